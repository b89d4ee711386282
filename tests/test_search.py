"""`search`: finds what is better by construction, keeps the budget, is never worse than its start, and repeats itself."""

import re

import pytest
import torch
from clocks import counting_clock
from refusals import untouched
from torch import nn

import fxprune
from fxprune import PruneError
from fxprune.selection import latency

DATA = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


class Uneven(nn.Module):
    """Every unit of the first branch matters, none of the second does, and a criterion that draws scores cannot know."""

    def __init__(self, width=24):
        super().__init__()
        self.much, self.little = nn.Linear(16, width), nn.Linear(16, width)
        self.sum, self.rest = nn.Linear(width, 8), nn.Linear(width, 8)
        with torch.no_grad():
            self.rest.weight.mul_(1e-3)

    def forward(self, x):
        return self.sum(self.much(x).relu()) + self.rest(self.little(x).relu())


def uneven(width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    return Uneven(width).eval()


def closeness(model: nn.Module, x: torch.Tensor = DATA):
    """A function that says how close a module is to the model: 1 for the model itself."""
    with torch.no_grad():
        wanted = model(x)
    return lambda module: 1 - float((module(x).detach() - wanted).norm() / wanted.norm())


def searched(model: nn.Module, evaluate=None, **asked):
    asked = {"macs": 0.5, "criterion": "random", "ranking": "local", "steps": 15, "measure": False, **asked}
    return fxprune.search(model, DATA[:1], evaluate or closeness(model), **asked)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_uniform_ratio_that_is_bad_by_construction_is_left(seed):
    model = uneven()
    with untouched(model):
        found = searched(model, seed=seed)
    uniform = fxprune.prune(model, example_inputs=DATA[:1], macs=0.5, criterion="random", ranking="local")
    assert found.start.plan == uniform.meta["plan"] and found.start.value == closeness(model)(uniform)
    best = found.best
    assert best.value == max(p.value for p in found.points) == closeness(model)(best.model()) > found.start.value + 0.15
    assert best.plan.kept_shape("much.weight")[0] > 18 and best.plan.kept_shape("little.weight")[0] < 6
    whole = fxprune.count(model, DATA[:1]).macs
    for point in found.points:
        assert 0.45 * whole <= point.macs <= 0.5 * whole
    assert len({point.plan for point in found.points}) == len(found.points) <= 16


def test_the_same_seed_tries_the_same():
    model = uneven()
    first, again, other = (searched(model, seed=seed, steps=6) for seed in (3, 3, 4))
    assert first == again != other


def test_it_begins_with_a_point_of_a_sweep():
    model, score = uneven(), closeness(uneven())
    swept = fxprune.sweep(
        model, DATA[:1], score, budgets={"macs": [0.5, 0.4]}, criteria="random", rankings="local", measure=False
    )
    found = fxprune.search(model, DATA[:1], score, start=swept[2], steps=8, measure=False)
    assert found.start.plan == swept[2].plan and found.start.value == swept[2].value
    assert found.start.asked == {"macs": 0.4, "criterion": "random", "ranking": "local"}
    assert all(p.macs <= 0.4 * swept.original.macs for p in found.points) and found.best.value > found.start.value
    on = fxprune.search(model, DATA[:1], score, start=found.best, steps=3, measure=False)
    assert on.start.plan == found.best.plan and on.best.value >= found.best.value
    narrower = fxprune.search(model, DATA[:1], score, start=found.best, macs=0.3, steps=3, measure=False)
    assert all(p.macs <= 0.3 * swept.original.macs for p in narrower.points)
    much, little = (narrower.start.plan.kept_shape(f"{name}.weight")[0] for name in ("much", "little"))
    assert much > little + 4  # the proportions are those of the point


def test_it_is_never_worse_than_the_start():
    """By what `evaluate` says, whatever that is: here the start is the best there can be."""
    model = uneven()
    start = fxprune.prune(model, example_inputs=DATA[:1], macs=0.5, criterion="random", ranking="local")
    width = start.get_submodule("much").out_features
    found = searched(model, lambda m: -abs(m.get_submodule("much").out_features - width), steps=6)
    assert found.best is found.start and found.best.value == 0
    assert len(found.points) > 3


def test_what_cannot_be_evaluated_is_passed_over():
    model, good = uneven(), closeness(uneven())

    def evaluate(module):
        if 16 < module.get_submodule("much").out_features < 24:
            raise RuntimeError("too wide")
        return good(module)

    found = searched(model, evaluate)
    assert any(p.failed == "RuntimeError: too wide" for p in found.points)
    assert found.start.value < found.best.value and found.best.plan.kept_shape("much.weight")[0] <= 16


def test_candidates_are_repaired():
    model = uneven()
    found = searched(model, data=[DATA], steps=4)
    assert all(p.error is not None for p in found.points)
    assert closeness(model)(found.best.model()) == found.best.value


def test_the_start_has_to_be_there():
    with pytest.raises(PruneError, match=r"there is nothing to begin with: macs=0\.001 cannot be met"):
        searched(uneven(), macs=0.001)


class Blocks(nn.Module):
    """Three residual blocks, of which the second one adds next to nothing, though its weights are the largest."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 16) for _ in range(3))
        with torch.no_grad():
            self.up[1].weight.mul_(30.0)
            self.up[1].bias.sub_(1e3)
            self.down[1].bias.zero_()

    def forward(self, x):
        for up, down in zip(self.up, self.down):
            x = x + down(up(x).relu())
        return x


def test_residual_branches_take_part():
    torch.manual_seed(0)
    model = Blocks().eval()
    for depth in (True, "only"):
        found = searched(model, criterion="magnitude", depth=depth, macs=0.67, steps=25)
        assert found.start.value < 0.9 < found.best.value
        assert "up.1.weight" in found.best.plan.removed or found.best.plan.kept_shape("up.1.weight")[0] < 5
        assert all(p.macs <= 0.67 * found.original.macs for p in found.points)


def test_a_budget_of_latency_is_met_by_every_point(monkeypatch):
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    model = uneven(64)  # widths are multiples of 8
    found = searched(model, macs=None, latency=0.5, steps=5)
    assert found.best.value > found.start.value
    assert all(p.latency <= 0.5 for p in found.done) and len(found.done) > 2


def test_channels_and_branches_meet_a_latency_together(monkeypatch):
    """Channels alone lose a third of each block; with blocks, the idle one goes first."""
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    torch.manual_seed(0)
    model = Blocks().eval()
    how = {"macs": None, "latency": 0.67, "criterion": "magnitude", "steps": 4}
    narrow, both = searched(model, **how), searched(model, depth=True, **how)
    assert both.best.value > narrow.best.value + 0.05
    assert all(p.latency <= 0.67 for p in (*narrow.done, *both.done)) and len(both.done) > 3


def test_it_prints():
    found = searched(uneven(), steps=2)
    lines = repr(found).splitlines()
    assert (
        lines[0]
        == f"macs=0.5 random/local: {found.start.value:.4g} at the start, {found.best.value:.4g} at point {found.best.number}"
    )
    assert lines[1] == f"Uneven: {len(found.points)} points"
    assert fxprune.report(uneven(), found.best.model(), sweep=found).sweep is found


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"macs": None}, "nothing says what the budget is"),
        ({"params": 0.5}, "params and macs are both given"),
        ({"steps": 0}, "steps must be an integer of 1 or more, not 0"),
        ({"seed": -1}, "seed must be an integer of 0 or more, not -1"),
        ({"start": 3}, "start must be a point of a sweep that did not fail, not 3"),
        ({"evaluate": 3}, "evaluate must be a function, not 3"),
        ({"freeze": "much", "macs": 0.9}, "nothing can be moved"),
        ({"budgets": {"macs": 0.5}}, "search has no argument 'budgets'"),
    ],
)
def test_what_is_refused(asked, what):
    model = uneven()
    with untouched(model), pytest.raises(PruneError, match=re.escape(what)):
        searched(model, asked.pop("evaluate", None), **asked)


def test_a_ratio_is_no_budget():
    model = uneven()
    swept = fxprune.sweep(model, DATA[:1], closeness(model), budgets={"ratio": 0.5}, measure=False)
    with pytest.raises(PruneError, match="a ratio is no budget"):
        fxprune.search(model, DATA[:1], closeness(model), start=swept[1])


def test_a_start_in_another_basis_is_improved_in_it():
    """All axes of the stream matter, and next to nothing of the branch does: speeds move the cut from one to the other."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

        def forward(self, x):
            return x + 1e-2 * self.down(self.up(self.norm(x)).relu())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), Branch(), nn.LayerNorm(12), nn.Linear(12, 8)).eval()
    how = {"macs": 0.7, "ranking": "local", "basis": "principal", "floor": 0.0, "data": [DATA], "steps": 6, "measure": False}
    found = fxprune.search(model, DATA[:1], closeness(model), **how)
    assert all(p.plan.basis is not None and p.macs <= 0.7 * found.original.macs for p in found.points)
    assert found.start.plan == fxprune.prune(model, None, DATA[:1], **{k: how[k] for k in list(how)[:5]}).meta["plan"]
    assert found.best.value > found.start.value + 0.01 and closeness(model)(found.best.model()) == found.best.value
    assert len({repr(p.plan.slices) for p in found.points}) == len(found.points)
    again = fxprune.search(model, DATA[:1], closeness(model), start=found.best, data=[DATA], steps=2, measure=False)
    assert again.start.value == found.best.value


def test_a_start_of_another_model_is_refused():
    other = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2))
    x = torch.randn(3, 4)
    start = fxprune.sweep(other, x, lambda m: 1.0, budgets={"macs": 0.5}, measure=False).points[0]
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(PruneError, match="the plan is for another model"):
        fxprune.search(model, x, lambda m: 1.0, start=start)
