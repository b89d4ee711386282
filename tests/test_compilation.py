"""One way through the compiler: what `prune` finds out about a model holds for every other entry point, too."""

import dataclasses
import warnings

import pytest
import torch
from oracle import plain_masked, relative_error
from torch import nn

import fxprune
from fxprune import Plan, PruneError
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.rewrite.rewrite import rewrite_program
from fxprune.pipeline import Compilation
from fxprune.selection.options import Options
from fxprune.stage_checks import StageFault, check_choice, check_coupling

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """Reads a value, so that it stays one node of the program; its width is written out in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        hidden = self.one(x).relu()
        if hidden.max() > 1e9:
            raise ValueError("the input has exploded")
        return self.two(hidden.reshape(-1, 16))


class AtLeast(nn.Module):
    """Reads a value, too; it works on any width from three."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x):
        hidden = self.one(x).relu()
        if hidden.max() > 1e9 or hidden.shape[1] < int("3"):
            raise ValueError("the input has exploded, or is too narrow")
        return self.two(hidden)


class Holds(nn.Module):
    def __init__(self, reads: nn.Module) -> None:
        super().__init__()
        self.stem, self.reads = nn.Linear(4, 12), reads
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x):
        return self.head(self.reads(self.stem(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Holds(Written()).eval()


def widths(model: nn.Module) -> tuple[int, ...]:
    return tuple(model.get_submodule(name).out_features for name in ("stem", "reads.one", "reads.two", "head.0"))


def exact(model: nn.Module, small: nn.Module, x: torch.Tensor, plan: Plan) -> None:
    """Both give the same; nothing in these models is a statistic of channels."""
    with torch.no_grad():
        assert relative_error(plain_masked(model, plan)(x), small(x)) < 1e-5


def by_prune(model):
    return fxprune.prune(model, 0.5, example_inputs=X)


def by_pruner(model):
    return fxprune.Pruner(model, 0.5, example_inputs=X).step()


def by_pruner_unverified(model):
    return fxprune.Pruner(model, 0.5, example_inputs=X, verify=False).step()


def by_masks(model):
    pruner = fxprune.Pruner(model, 0.5, example_inputs=X, mask="hold")
    pruner.step()
    return pruner.shrink()


def by_proposal(model):
    proposal = fxprune.Pruner(model, 0.5, example_inputs=X).step(interactive=True)
    for candidate in proposal:
        candidate.apply()
    return proposal.finish()


def by_plan(model):
    return Plan.from_json(by_prune(model).plan.to_json()).apply(model)


def by_zeros(model):
    return fxprune.masks.prune_zeros(fxprune.masks.masked(model, by_prune(model).plan), X)


def by_latency(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxprune.PruneWarning)  # it removes nothing
        return fxprune.prune(model, latency=1.0, example_inputs=X)


WAYS = [by_prune, by_pruner, by_pruner_unverified, by_masks, by_proposal, by_plan, by_zeros]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_module_that_fails_once_it_is_cut_stays_whole(model, way):
    small = way(model)
    assert widths(small) == (12, 16, 12, 5)
    exact(model, small, X, fxprune.plan_of(small))


def test_timed_models_run(model):
    small = by_latency(model)
    assert widths(small)[:3] == (12, 16, 12)


def test_couple_says_so(model):
    found = {f.name: f.frozen for f in fxprune.couple(model, X).families}
    assert [name for name, why in found.items() if why is None] == ["head.0"]
    assert "fails once it is cut" in found["reads.one"]


def test_feasible_counts_what_prune_leaves(model):
    found, small = fxprune.feasible(model, X), by_prune(model)
    least = fxprune.prune(model, 0.9, example_inputs=X)
    assert found.params[:2] == tuple(sum(p.numel() for p in m.parameters()) for m in (least, small))


def test_sensitivity_leaves_it_out(model):
    found = fxprune.sensitivity(model, X, lambda m: float(m(X).sum()), ratios=(0.25, 0.5))
    assert [c.family for c in found.curves] == ["head.0"]


def test_verify_and_report_take_what_prune_returns(model):
    small = by_prune(model)
    assert fxprune.verify(model, small, X).ok
    whole = {c.family.name: c.reason for c in fxprune.report(model, small).whole}
    assert "fails once it is cut" in whole["reads.one"]


def test_a_plan_that_cuts_it_is_refused(model):
    """Such a plan is made by hand: of a model of the same shapes whose module takes any width."""
    free = Holds(AtLeast()).eval()
    free.reads.one, free.reads.two = nn.Linear(12, 16), nn.Linear(16, 12)
    plan = fxprune.prune(free, 0.5, example_inputs=X).plan
    assert plan.kept_shape("reads.one.weight") == (8, 6)
    with pytest.raises(PruneError, match=r"the plan cuts reads, which .* fails once it is cut"):
        plan.apply(model)


@pytest.mark.parametrize("mask", [None, "hold"])
def test_a_module_that_fails_in_a_later_step_keeps_what_the_step_before_left(mask):
    """Half of its units may go, and four fifths of them may not."""
    torch.manual_seed(0)
    model = Holds(AtLeast()).eval()
    pruner = fxprune.Pruner(model, 0.8, example_inputs=X, steps=2, mask=mask)
    pruner.step()
    assert pruner.plan.kept_shape("reads.one.weight") == (6, 8)
    pruner.step()
    assert pruner.plan.kept_shape("reads.one.weight")[0] == 6 and pruner.plan.kept_shape("head.0.weight")[0] == 2
    exact(model, pruner.shrink(), X, pruner.plan)


def test_a_proposal_that_would_fail_is_refused():
    torch.manual_seed(0)
    pruner = fxprune.Pruner(Holds(AtLeast()).eval(), 0.8, example_inputs=X)
    proposal = pruner.step(interactive=True)
    for candidate in proposal:
        candidate.apply()
    with pytest.raises(PruneError, match=r"the proposal cuts reads, which .* fails once it is cut"):
        proposal.finish()
    assert not pruner.history and pruner.step().plan.kept_shape("reads.one.weight") == (10, 12)


# -- a captured program is used once ----------------------------------------------------------------------------------------


def half_kept(solution) -> torch.Tensor:
    kept = torch.ones(len(solution.unit_of), dtype=torch.bool)
    kept[solution.leaves["0.weight"][0].labels.reshape(-1)[:4]] = False
    return kept[solution.unit_of]


def test_a_captured_program_is_rewritten_once():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    solution = analyse(model, (X,), {}, CouplingOptions())
    first = rewrite_program(model, solution, half_kept(solution))
    with pytest.raises(RuntimeError, match="has been rewritten already"):
        rewrite_program(model, solution, torch.ones(len(solution.unit_of), dtype=torch.bool))
    assert first.get_submodule("0").out_features == 4


def test_a_choice_is_emitted_as_often_as_one_likes(model):
    for made in (model, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()):
        options = Options.parse(made)
        compilation = Compilation(made, ExampleInputs.parse(X), options.coupling)
        choice = compilation.choose(options)
        first, second = compilation.emit(choice), compilation.emit(choice)
        assert first is not second and first.plan == second.plan and torch.equal(first(X), second(X))
        mine = {p.data_ptr() for p in first.parameters()}
        assert mine and not mine & {p.data_ptr() for p in second.parameters()}


# -- the checks of stages can fail ------------------------------------------------------------------------------------------


def test_a_coupling_with_a_dead_reference_is_found():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    solution = analyse(model, (X,), {}, CouplingOptions())
    check_coupling(solution)
    node = next(n for n in solution.captures[0].graph.nodes if n.op == "call_module")
    solution.captures[0].results[node] = TensorRef(10_000)
    with pytest.raises(StageFault, match="refers to a value that was not recorded"):
        check_coupling(solution)


def test_a_choice_that_parts_a_unit_is_found(model):
    solution = analyse(model, (X,), {}, CouplingOptions())
    units, sizes = torch.unique(solution.unit_of, return_counts=True)
    kept = torch.ones(len(solution.unit_of), dtype=torch.bool)
    kept[units[sizes > 1][0]] = False
    with pytest.raises(StageFault, match="labels of one unit are kept and removed"):
        check_choice(solution, Slicer(kept))


# -- plans ------------------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_model_that_makes_an_index():
    """It says nothing of the index, which is no tensor of the model's."""

    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            index = torch.tensor([6, 1, 0, 3]).view(1, -1, 1, 1)
            return self.b(torch.take_along_dim(self.a(x), index, 1))

    torch.manual_seed(0)
    model, x = Picks().eval(), torch.randn(2, 3, 4, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    assert small.plan.slices.keys() <= small.plan.shapes.keys()
    assert "b.weight: (2, 4, 1, 1) -> (2, 2, 1, 1)" in str(small.plan)
    again = Plan.from_json(small.plan.to_json())
    assert again == small.plan and torch.equal(again.apply(model)(x), small(x))


def test_a_plan_has_slices_and_reads_files_that_call_them_keep(model):
    plan = by_prune(model).plan
    assert set(plan.to_dict()["keep"]) == set(plan.slices) and plan.keep is plan.slices
    assert dataclasses.replace(plan) == plan and isinstance(dataclasses.replace(plan), Plan)
