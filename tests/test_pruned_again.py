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
