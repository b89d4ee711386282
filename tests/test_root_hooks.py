"""Hooks of the model itself, which are no part of its forward: all is as if that did what they do."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fxprune

FACTORS = torch.tensor([1.0, 10, 1, 1])


class Chain(nn.Module):
    """What the hooks do is written in forward, or left to them."""

    def __init__(self, written):
        super().__init__()
        self.written = written
        self.stem, self.head = nn.Linear(8, 24), nn.Linear(24, 4)
        block = lambda: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))  # noqa: E731
        self.blocks = nn.ModuleList([block(), block(), block()])

    def forward(self, x):
        x = self.stem(x * 20 + 3 if self.written else x).relu()
        for block in self.blocks:
            x = x + block(x)
        x = self.head(x)
        return x * FACTORS if self.written else x


def scaled(module, args, kwargs):
    return (args[0] * 20 + 3, *args[1:]), kwargs


def multiplied(module, args, out):
    return out * FACTORS


def made(written):
    torch.manual_seed(0)
    model = Chain(written).eval()
    if not written:
        model.register_forward_pre_hook(scaled, with_kwargs=True)
        model.register_forward_hook(multiplied)
    return model


@torch.no_grad()
def error(model, pruned, x):
    return float((pruned(x) - model(x)).square().sum())


@pytest.fixture
def batches():
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(3)).split(32)


@pytest.mark.parametrize("method", [None, "compensate", "fold", "refit", "block"])
def test_repair(method, batches):
    found = []
    for written in (True, False):
        model = made(written)
        small = fxprune.prune(model, 0.5, batches[0])
        better = fxprune.repair(model, small, batches, method=method, steps=4)
        found.append(better(batches[0]))
        if method != "fold":
            assert error(model, better, batches[0]) < error(model, small, batches[0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("how", ["influence", "taylor", "loss"])
def test_scores_of_branches(how, batches):
    found = []
    for written in (True, False):
        data = [(x, torch.arange(len(x)) % 4) for x in batches]
        asked = {"depth": "only", "depth_criterion": how, "data": data, "loss": cross_entropy}
        small = fxprune.prune(made(written), 0.4, batches[0], **asked)
        found.append(small.meta["branches"])
    assert found[0] == found[1]


def test_flat(batches):
    small = fxprune.prune(made(False), 0.5, batches[0])
    torch.testing.assert_close(small.flat()(batches[1]), small(batches[1]))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, gate):
        return self.second(self.first(x).relu() * gate)


HOOKS = {
    "by name": (lambda module, args, kwargs: (args, kwargs | {"gate": 2.0}), True),
    "by position": (lambda module, args: (*args, torch.tensor(2.0)), False),
    "taken apart": (lambda module, args: (args[0][0], args[0][1]), False),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_arguments_that_a_hook_adds(kind, batches, tmp_path):
    hook, with_kwargs = HOOKS[kind]
    x, y = ([t, torch.tensor(2.0)] if kind == "taken apart" else t for t in batches)
    x, y = ((x,), (y,)) if kind == "taken apart" else (x, y)
    model = Gated().eval()
    model.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    call = lambda m, given: m(*given) if isinstance(given, tuple) else m(given)  # noqa: E731
    small = fxprune.prune(model, 0.5, x)
    assert small.verification.ok and small.first.out_features == 8
    again = fxprune.prune(model, 0.5, x, same_class=True)
    torch.testing.assert_close(call(again, y), call(small, y))
    fxprune.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(call(fxprune.load(tmp_path / "small.safetensors", model), y), call(small, y))
    better = fxprune.repair(model, small, [(x, 0), (y, 0)], held_out=0)
    assert better.meta["repair"].error[1] < better.meta["repair"].error[0]


def test_a_hook_that_raises(batches):
    model = made(True)
    model.register_forward_pre_hook(lambda module, args: args[0].no_such_thing)
    with pytest.raises(fxprune.PruneError, match="a hook of the model raises AttributeError"):
        fxprune.prune(model, 0.5, batches[0])
