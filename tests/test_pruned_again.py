"""A pruned model that is pruned again, or copied, stays what it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.errors import GuardError


class Drops(nn.Module):
    """Training runs another program: it drops values, and follows a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            x = F.dropout(x, 0.9)
        return self.b(x - self.mean)


def test_the_first_result_still_evaluates_and_trains():
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    small = fxprune.prune(Drops().eval(), 0.5, x)
    wanted, state = small(x), copy.deepcopy(small.state_dict())
    again = fxprune.prune(small, 0.5, x)
    assert again.a.out_features == 4
    assert torch.equal(small(x), wanted)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not torch.equal(small.train()(x), small(x))


class Halves(nn.Module):
    """Python decides by a size of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * 2 if x.shape[-1] == 6 else x.relu())


def test_what_python_decided_is_still_asked():
    small = fxprune.prune(Halves().eval(), 0.5, torch.randn(2, 3, 6))
    for pruned in (small, fxprune.prune(small, 0.5, torch.randn(2, 3, 6))):
        assert pruned(torch.randn(3, 3, 6)).shape == (3, 2, 6)
        with pytest.raises(GuardError, match="captured where"):
            pruned(torch.randn(2, 3, 7))


class Masks(nn.Module):
    """Has a mask, which holds no fractions and is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 2)
        self.register_buffer("mask", torch.arange(16) % 3 > 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.mask)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_the_original_s_masks_are_saved_after_the_second_step(first, second, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    small = fxprune.prune(Masks().eval(), 0.3, x, same_class=first)
    smaller = fxprune.prune(small, 0.3, x, same_class=second)
    fxprune.save(smaller, tmp_path / "smaller.safetensors")
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Masks()
        assert torch.equal(fxprune.load(tmp_path / "smaller.safetensors", model)(x), smaller(x))
