"""Keys of a library's own, which hold shapes, in a table that is out of sight: no capture leaves them broken."""

import functools
import types

import pytest
import torch
from torch import nn

import fxprune


class Key:
    """What a library knows of a tensor: its shape; it is compared attribute by attribute."""

    def __init__(self, tensor) -> None:
        self.shape = tensor.shape

    def __hash__(self) -> int:
        return hash(self.shape)

    def __eq__(self, other) -> bool:
        return self.shape == other.shape


def build(key):
    return [int(n) for n in key.shape]


class Reads(nn.Module):
    """It reads values: a run without them fails here, and one with values follows."""

    def forward(self, x):
        return x * 2 if float(x.detach().sum()) < 1e9 else x


class Looks(nn.Module):
    def __init__(self, table, reads) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.table, self.reads = [table], Reads() if reads else nn.Identity()

    def forward(self, x):
        y = self.first(x).relu()
        batch, tokens, _ = self.table[0].lookup(Key(x))
        return self.last(self.reads(y).view(batch, tokens, 12))


@pytest.mark.parametrize("reads", [False, True], ids=["one run", "two runs"])
def test_a_table_works_during_a_capture_and_after_it(reads):
    torch.manual_seed(0)
    table = types.SimpleNamespace(lookup=functools.lru_cache(build))
    model, x = Looks(table, reads).eval(), torch.randn(2, 5, 6)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.first.out_features == 6 and pruned.verification.ok
    wanted = model(x)
    for other in (x, torch.randn(3, 5, 6), torch.randn(2, 5, 6)):
        assert table.lookup(Key(other)) == list(other.shape) and all(type(n) is int for n in table.lookup(Key(other)))
    assert torch.equal(model(x), wanted)


def test_a_key_keeps_its_shape():
    """Keys that are looked up later are compared with those of the capture."""
    kept = []
    table = types.SimpleNamespace(lookup=lambda key: kept.append((key,)) or build(key))
    model, x = Looks(table, False).eval(), torch.randn(2, 5, 6)
    fxprune.prune(model, 0.5, example_inputs=x)
    assert kept and all(tuple(key.shape) in {(n, 5, 6) for n in (1, 2, 3)} for (key,) in kept)
    assert all(type(n) is int for (key,) in kept for n in key.shape)
