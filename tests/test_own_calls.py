"""Modules whose class says what a call of them does, in a `__call__` of its own."""

import pytest
import torch
from torch import nn

import fxprune


class Doubling(nn.Module):
    def __init__(self, *, literal=False, reads=False):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.literal, self.reads = literal, reads

    def __call__(self, x, **kwargs):
        return super().__call__(x + 1, **kwargs) * 2

    def forward(self, x, shift=0):
        x = self.inner(x).relu() + shift
        if self.reads and float(x.detach().sum()) > 1e9:
            x = -x
        return x.view(-1, 8) if self.literal else x


class WithoutForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def __call__(self, x):
        return self.inner(x).view(-1, 8) * 3


class Plain(nn.Module):
    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return x.relu() + 1


KINDS = {
    "kept": Doubling,
    "rewritten": lambda: Doubling(literal=True),
    "opaque": lambda: Doubling(reads=True),
    "without forward": WithoutForward,
    "plain": Plain,
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_is_done_once(kind, times):
    torch.manual_seed(0)
    middle = KINDS[kind]()
    model = nn.Sequential(nn.Linear(4, 8), *[middle] * times, nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    pruned = fxprune.prune(model, 0.5, x)
    assert pruned[0].weight.shape == (4, 4)
    assert pruned.verification.ok
    assert fxprune.prune(model, 0.5, x, same_class=kind == "kept").get_parameter("0.bias").shape == (4,)


def test_of_the_model_itself():
    class Network(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x * 3) * 2

    model = Network(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    pruned = fxprune.prune(model, 0.5, x)
    torch.testing.assert_close(pruned(x), 2 * pruned[2](pruned[0](3 * x).relu()))


def test_with_keywords_only_the_call_knows():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def __call__(self, x, *, scale):
            return super().__call__(x) * scale

        def forward(self, x):
            return self.inner(x).view(-1, 8)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 8), Scaling(), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.middle(self.first(x), scale=3))

    x = torch.randn(3, 4)
    pruned = fxprune.prune(Network().eval(), 0.5, x)
    assert pruned.first.weight.shape == (4, 4)
    torch.testing.assert_close(pruned(x), pruned.last(3 * pruned.middle.inner(pruned.first(x))))
