"""Opaque modules are tried on what they were given while the model was captured, or else in one more run of it."""

import pytest
import torch
from torch import nn

import fxprune
from fxprune.passes.capture.evaluation import Evaluator
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.verification import opaque_check


class Reads(nn.Module):
    """Reads a value; one of its sizes may be written out, so that it breaks once it is cut."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 12)
        self.size = size

    def forward(self, x):
        hidden = self.one(x).relu_()
        if hidden.max() > 1e9:
            raise ValueError("the input has exploded")
        return self.two(hidden.reshape(-1, self.size or int("16")))


class Twice(nn.Module):
    """Calls such a module on two tensors, the first of which is then written to."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.stem, self.reads = nn.Linear(4, 12), Reads(size)
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x):
        x = self.stem(x)
        found = self.reads(x)
        return self.head(found + self.reads(x.mul_(2)))


@pytest.mark.parametrize("size", [16, None])
def test_what_modules_were_given_is_remembered(size, monkeypatch):
    """No further run of the original is needed, and the result is that of one."""
    torch.manual_seed(0)
    model, x = Twice(size), torch.randn(5, 4)
    runs = []
    arguments = opaque_check.arguments
    monkeypatch.setattr(opaque_check, "arguments", lambda *a: runs.append(a) or arguments(*a))
    remembered = fxprune.prune(model, ratio=0.5, example_inputs=x)
    assert not runs
    monkeypatch.setattr(Evaluator, "room", 0)  # a model whose opaque modules are given more than it takes itself
    asked = fxprune.prune(model, ratio=0.5, example_inputs=x)
    assert runs
    assert fxprune.plan_of(asked) == fxprune.plan_of(remembered)
    assert fxprune.plan_of(asked).kept_shape("reads.one.weight") == ((8, 6) if size else (16, 12))
    assert torch.equal(asked(x), remembered(x))


def test_what_was_given_is_as_it_was_then():
    """Though the program writes to it later."""
    torch.manual_seed(0)
    model, x = Twice(16), torch.randn(5, 4)
    seen = []
    model.reads.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    model(x)
    solution = analyse(model, (x,), {}, CouplingOptions(heads=True))
    found = [args[0] for args, _ in solution.captures[0].given.values()]
    assert len(found) == 2 and all(torch.allclose(a, b) for a, b in zip(found, seen[:2], strict=True))
    coupling = fxprune.couple(model, x)  # which lives on
    assert not any(capture.given for capture in coupling._solution.captures)
