"""Seeds and states of torch's generator in a forward are lines of the pruned program."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.passes.ir.quiet import extreme_draws, own_random_state, plain_random_state


class Draws(nn.Module):
    def __init__(self, draw) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.draw = nn.Linear(4, 12), nn.Linear(12, 3), draw

    def forward(self, x):
        y = self.first(x).relu()
        return self.last(y + self.draw(y)) + torch.rand(())


def seeded(y):
    torch.manual_seed(3)
    return torch.rand(y.shape[0], 1)


def seeded_by_a_size(y):
    torch.random.manual_seed(y.shape[0])
    return torch.rand(1)


def forked(y):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return torch.rand(y.shape[0], 1)


def put_back(y):
    state = torch.get_rng_state()
    drawn = torch.rand(1)
    torch.set_rng_state(state)
    return drawn * torch.rand(1)


@pytest.mark.parametrize("draw", [seeded, seeded_by_a_size, forked, put_back], ids=lambda f: f.__name__)
def test_draws_after_seeds(draw):
    model, x = Draws(draw).eval(), torch.randn(3, 4)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert torch.equal(before, torch.get_rng_state())
    assert pruned.meta["capture"] == "symbolic" and pruned.first.out_features == 6
    masks = fxprune.plan_of(pruned).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
        for y in (x, torch.randn(5, 4)):
            torch.manual_seed(5)
            wanted, after = model(y), torch.rand(1)
            torch.manual_seed(5)
            assert torch.allclose(pruned(y), wanted, atol=1e-5)
            assert torch.equal(torch.rand(1), after)  # the state is that which the original leaves


def test_draws_for_each_channel_after_a_seed_are_refused_and_leave_no_seed():
    """They are the same numbers in every call, which a smaller model would draw for other channels."""

    def draw(y):
        torch.manual_seed(3)
        return torch.randn_like(y)

    model, x = Draws(draw).eval(), torch.randn(3, 4)
    before = torch.get_rng_state()
    with pytest.raises(fxprune.PruneError, match="is not exact"):
        fxprune.prune(model, 0.5, example_inputs=x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("high", "bound"), [(False, lambda drawn: drawn < 1e-9), (True, lambda drawn: drawn > 1 - 1e-9)])
def test_the_least_and_the_greatest_numbers_that_there_are(high, bound):
    before = plain_random_state()
    with own_random_state(), extreme_draws(high=high):
        assert all(bound(random.random()) and bound(np.random.rand()) for _ in range(300))
        assert random.gauss(0, 1) < 100 and np.random.randn() < 100 and random.sample(range(5), 3)  # none goes on for good
    assert plain_random_state() == before
