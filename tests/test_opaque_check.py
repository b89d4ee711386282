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


class Keeps(nn.Module):
    """Scales its input by a state that each call changes: a buffer, or a parameter, a count, a list."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.seen = how, 1, {"calls": [1]}
        self.register_buffer("held", torch.linspace(1, 2, 8))
        self.scale = nn.Parameter(torch.linspace(2, 3, 8))

    def forward(self, x):
        out = x * self.scale * self.calls * len(self.seen["calls"])
        out = out if self.how == "unused" else out * self.held
        if self.how == "in place":
            self.held.mul_(0.5)
        elif self.how == "count":
            self.calls += 1
        elif self.how == "parameter":
            with torch.no_grad():
                self.scale.mul_(0.5)
        elif self.how == "parameter's data":
            self.scale.data = self.scale.data * 0.5
        elif self.how == "list":
            self.seen["calls"].append(1)
        else:
            self.held = self.held * 0.5
        return out


class OpaqueKeeps(Keeps):
    def forward(self, x):
        if x.max() > 1e9:
            raise ValueError("the input has exploded")
        return super().forward(x)


class Around(nn.Module):
    """Calls it, and reads a value itself where it is to be one node as a whole."""

    def __init__(self, how: str, *, whole: bool) -> None:
        super().__init__()
        self.stem, self.keeps, self.head = nn.Linear(4, 8), (Keeps if whole else OpaqueKeeps)(how), nn.Linear(8, 2)
        self.whole = whole

    def forward(self, x):
        if self.whole and x.max() > 1e9:
            raise ValueError("the input has exploded")
        return self.head(self.keeps(self.stem(x)))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("how", ["anew", "in place", "unused", "parameter", "parameter's data", "count", "list"])
def test_the_state_of_an_opaque_module_stays_what_it_was(how, whole, verify):
    """The result is, call after call, the original that has zeros for the removed columns of its last layer."""
    torch.manual_seed(0)
    model, x = Around(how, whole=whole).double().eval(), torch.randn(5, 4, dtype=torch.double)
    held, before, scale = model.keeps.held, model.keeps.held.clone(), model.keeps.scale.detach().clone()
    pruned = fxprune.prune(model, 0.5, x, verify=verify)
    plan = fxprune.plan_of(pruned)
    kept = plan.slices["head.weight"][0].keep
    assert plan.kept_shape("keeps.held") == ((8,) if how == "unused" else (4,))
    assert model.keeps.held is held and torch.equal(held, before) and torch.equal(model.keeps.scale, scale)
    assert model.keeps.calls == 1 and model.keeps.seen == {"calls": [1]}
    with torch.no_grad():
        model.head.weight[:, ~kept] = 0
        for _ in range(3):
            torch.testing.assert_close(pruned(x), model(x))


class Regroups(nn.Module):
    """Writes the number of its groups down where no attribute shows it, so that it fails once it is cut."""

    def forward(self, x):
        if float(x.detach().abs().max()) > 1e30:
            raise ValueError("the input has exploded")
        return x.view(len(x), 1, 7).transpose(1, 2).reshape(len(x), 7)


class Maxout(nn.Module):
    """Pairs of channels: each of the two can go, unless what reads the pairs is cut."""

    def __init__(self):
        super().__init__()
        self.first, self.regroups, self.last = nn.Linear(5, 14), Regroups(), nn.Linear(7, 2)

    def forward(self, x):
        x = self.first(x).unflatten(1, (7, 2)).amax(2)
        self.regroups(x)
        return self.last(x)


def test_a_plan_knows_the_modules_that_stay_whole():
    torch.manual_seed(0)
    model, x = Maxout().double(), torch.randn(3, 5).double()
    pruned = fxprune.prune(model, 0.5, x)
    plan = fxprune.plan_of(pruned)
    assert plan.frozen_modules == ("regroups",) and pruned.first.out_features == 7
    for same in (plan, fxprune.Plan.from_json(plan.to_json())):
        assert same == plan
        torch.testing.assert_close(same.apply(model)(x), pruned(x))
    assert fxprune.verify(model, pruned, x).ok
    assert "frozen_modules" not in fxprune.plan_of(fxprune.prune(model.last, 0.5, x[:, :1].repeat(1, 7), release="*")).to_dict()
    with pytest.raises(fxprune.PruneError, match="frozen_modules"):
        fxprune.Plan.from_dict(plan.to_dict() | {"frozen_modules": [3]})


class ReadsAfterNorm(nn.Module):
    """Is not captured, and computes something else in training."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.norm(self.enter(x)).relu()
        return self.leave(2 * x if x.sum().item() > 1e9 else x)


@pytest.mark.parametrize("training", [False, True])
def test_modules_are_tried_in_evaluation(training):
    model = ReadsAfterNorm().train(training)
    model.norm.running_var.uniform_(0.5, 2)
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.rand(2, 3, 8, 8))
    assert pruned.enter.weight.shape[0] == 4
    assert pruned.training is training
