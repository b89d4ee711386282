"""Scoring does not copy weights: bytes that torch allocates are counted while it scores."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxprune import criteria
from fxprune.criteria.unit_scores import score_units
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import CouplingOptions


class Allocated(TorchDispatchMode):
    """Bytes of new tensors that are alive at once, and of the largest one.

    Outside of torch's own allocator nothing of the kind can be seen: `tracemalloc` knows only of Python's objects.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        theirs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) and not tensor.is_meta else None
            if storage is not None and storage.data_ptr() not in theirs | self.known and storage.nbytes():
                self.known.add(storage.data_ptr())
                self.alive += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.freed, storage.data_ptr(), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def freed(self, address, size):
        self.known.discard(address)
        self.alive -= size


MIB = 2**20


def test_the_counter_of_bytes_sees_a_copy():
    weight = torch.ones(MIB)
    with Allocated() as seen:
        view = weight[1:].view(-1)
        double = view.double()
        del double
        kept = [weight + 1, weight + 2]
    assert (seen.largest, seen.peak, seen.alive) == (8 * (MIB - 1), 8 * MIB, 8 * MIB)
    del kept
    assert seen.alive == 0


class Wide(nn.Module):
    """Two families of 64 units; nearly all of the weights lie between them and the inputs and outputs."""

    def __init__(self, wide=1 << 16):
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Linear(wide, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, wide)) for _ in range(2)
        )

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("criterion", ["magnitude", "lamp", "bn_scale", "fpgm", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_does_not_copy_weights(criterion, dtype):
    """However many there are: they are looked at block by block, and nothing of their size is held."""
    model, x = Wide().to(dtype), torch.randn(1, 1 << 16, dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with Allocated() as seen:
        solution = analyse(model, (x,), {}, CouplingOptions())
        found = [f for f in families(solution, {n for n, _ in model.named_parameters()}) if f.frozen is None]
        score_units(model, solution, found, criteria.find(criterion))
    assert len(found) == 2 and size >= 4 * 8.3e6
    assert seen.largest <= 8.1 * MIB, "a block in double precision"
    assert seen.peak <= 20 * MIB
