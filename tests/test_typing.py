"""What an editor knows of the public functions. `make lint` checks this file by mypy; as tests, the same calls run."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fxprune
from fxprune import Plan, Pruner, layers, masks
from fxprune.criteria.branches import SCORES
from fxprune.iterative.proposal import Proposal
from fxprune.repairs.methods import METHODS
from fxprune.repairs.repair import ALONE, Method
from fxprune.reports.coupling import CoupledFamily
from fxprune.reports.group import Group
from fxprune.reports.sweep import COSTS, Cost
from fxprune.selection.options import DepthCriterion

if TYPE_CHECKING:
    from fxprune.pipeline import Pruned


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).relu())
        return y


MODEL = Net().eval()
X = torch.randn(2, 8)


def test_prune_returns_a_graph_module_that_carries_its_plan() -> None:
    small = fxprune.prune(MODEL, 0.5, X)
    assert_type(small.plan, Plan)
    assert_type(small.verification, fxprune.Verification | None)
    assert_type(small.graph, torch.fx.Graph)
    assert_type(small.meta, dict[str, Any])
    assert small.verification is not None and assert_type(small.verification.ok, bool)
    assert isinstance(small, torch.fx.GraphModule) and small.plan == small.meta["plan"]


def test_prune_returns_the_class_of_the_model() -> None:
    small = fxprune.prune(MODEL, 0.5, X, same_class=True)
    assert_type(small, Net)
    assert type(small) is Net and assert_type(small.first, nn.Linear).out_features == 8
    assert assert_type(fxprune.verify(MODEL, small, X), fxprune.Verification).ok


@pytest.mark.parametrize("same_class", [False, True])
def test_a_flag_that_is_not_known_before_gives_either(same_class: bool) -> None:
    small = fxprune.prune(MODEL, 0.5, X, same_class=same_class)
    if TYPE_CHECKING:
        assert_type(small, Net | Pruned)
    assert isinstance(small, Net if same_class else torch.fx.GraphModule)


def test_plans() -> None:
    plan = fxprune.plan_of(fxprune.prune(MODEL, 0.5, X))
    assert_type(plan, Plan)
    assert_type(Plan.from_json(assert_type(plan.to_json(), str)), Plan)
    assert_type(plan.apply(MODEL).plan, Plan)
    assert type(assert_type(plan.apply(MODEL, same_class=True), Net)) is Net
    assert_type(masks.masked(MODEL, plan), nn.Module)
    assert_type(masks.prune_zeros(masks.masked(MODEL, plan), X).verification, fxprune.Verification | None)


def test_couplings_and_groups() -> None:
    coupling = assert_type(fxprune.couple(MODEL, X), fxprune.Coupling)
    assert_type(coupling.prunable, list[CoupledFamily])
    group = assert_type(coupling.group("first", [1, 2]), Group)
    assert_type(group.apply().plan, Plan)
    assert type(assert_type(group.apply(same_class=True), nn.Module)) is Net


def test_a_pruner_returns_what_it_was_made_for() -> None:
    pruner = Pruner(MODEL, 0.5, X, steps=2, schedule="cubic", verify=False)
    optimizer = torch.optim.SGD(MODEL.parameters(), 0.1)
    assert_type(pruner.step().plan, Plan)
    assert_type(pruner.remap_optimizer(optimizer), torch.optim.SGD)
    with_proposal = pruner.step(interactive=True)
    assert isinstance(with_proposal, Proposal)
    assert_type(with_proposal.finish().plan, Plan)
    assert assert_type(pruner.done, bool)
    masking = Pruner(MODEL, 0.5, X, mask="hold")
    assert type(assert_type(masking.step(), Net)) is Net
    assert type(assert_type(Pruner(MODEL, 0.5, X, same_class=True).step(), Net)) is Net


def test_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    fxprune.save(fxprune.prune(MODEL, 0.5, X), path)
    assert_type(fxprune.load(path, MODEL).plan, Plan)
    assert type(assert_type(fxprune.load(path, MODEL, same_class=True), Net)) is Net


def test_what_reports_return(tmp_path: Path) -> None:
    small = fxprune.prune(MODEL, 0.5, X)
    report = assert_type(fxprune.report(MODEL, small), fxprune.Report)
    assert_type(report.to_dict(), dict[str, Any])
    report.to_html(tmp_path / "report.html")
    count = assert_type(fxprune.count(small, X), fxprune.Count)
    assert_type(count.parameters, int)
    assert_type(count.macs, int | None)
    assert_type(fxprune.verify(MODEL, small, X), fxprune.Verification)
    assert_type(fxprune.feasible(MODEL, X, ratio=0.5), fxprune.Feasibility)

    def score(net: nn.Module) -> float:
        return -float((net(X) - MODEL(X)).square().mean())

    swept = assert_type(
        fxprune.sweep(MODEL, X, score, budgets={"macs": [0.5]}, criteria="magnitude", measure=False), fxprune.Sweep
    )
    assert_type(swept.front("macs"), tuple[fxprune.Point, ...])
    assert_type(fxprune.sensitivity(MODEL, X, score, ratios=[0.5]), fxprune.Sensitivity)


def test_repair_returns_what_it_is_given() -> None:
    small = fxprune.prune(MODEL, 0.5, X, same_class=True)
    assert type(assert_type(fxprune.repair(MODEL, small, [torch.randn(16, 8)], method="reconstruct"), Net)) is Net


def test_layers_keep_their_class() -> None:
    assert_type(layers.remove_outputs(nn.Linear(4, 6), [1]), nn.Linear)
    assert_type(layers.remove_inputs(nn.Conv2d(4, 6, 1), [1]), nn.Conv2d)
    assert_type(layers.remove_heads(nn.MultiheadAttention(8, 2), [1]), nn.MultiheadAttention)
    assert isinstance(layers.remove_outputs(nn.Linear(4, 6).weight, [1]), nn.Parameter)


def test_names_that_do_not_exist_are_refused() -> None:
    """By mypy, which says where a `type: ignore` is not needed; and by fxprune."""
    refused: list[Callable[[], Any]] = [
        lambda: fxprune.prune(MODEL, 0.5, X, ranking="globall"),  # type: ignore[call-overload]
        lambda: fxprune.prune(MODEL, 0.5, X, attention="dim"),  # type: ignore[call-overload]
        lambda: fxprune.prune(MODEL, 0.5, X, basis="main"),  # type: ignore[call-overload]
        lambda: fxprune.prune(MODEL, 0.5, X, depth="some"),  # type: ignore[call-overload]
        lambda: fxprune.prune(MODEL, 0.5, X, depth=True, depth_criterion="influenc"),  # type: ignore[call-overload]
        lambda: fxprune.prune(MODEL, 0.5, X, experts="all"),  # type: ignore[call-overload]
        lambda: fxprune.prune(MODEL, 0.5, X, verify="always"),  # type: ignore[call-overload]
        lambda: fxprune.prune(MODEL, 0.5, X, pruning_ratio=0.5),  # type: ignore[call-overload]
        lambda: fxprune.couple(MODEL, X, attention="dim"),  # type: ignore[arg-type]
        lambda: fxprune.repair(MODEL, MODEL, [X], block_inputs="some"),  # type: ignore[arg-type]
        lambda: Pruner(MODEL, 0.5, X, mask="softly"),  # type: ignore[call-overload]
        lambda: fxprune.register_op("demo::op", "pointwize"),  # type: ignore[arg-type]
    ]
    for call in refused:
        with pytest.raises(fxprune.PruneError):
            call()


def test_names_are_those_of_the_tables() -> None:
    names, _ = typing.get_args(DepthCriterion)
    assert typing.get_args(names) == SCORES
    assert set(typing.get_args(Method)) == {*METHODS, *ALONE}
    assert typing.get_args(Cost) == COSTS


def test_dir_shows_what_is_public_and_no_function_hides_a_module() -> None:
    assert dir(fxprune) == sorted(fxprune.__all__)
    folder = Path(fxprune.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    for name in modules & set(fxprune.__all__):
        assert isinstance(getattr(fxprune, name), types.ModuleType), name


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
def test_no_public_function_returns_just_anything() -> None:
    """`prune` and others with several signatures say it in each of them."""
    overloads = getattr(typing, "get_overloads")
    untyped = [
        name
        for name in fxprune.__all__
        if inspect.isfunction(found := getattr(fxprune, name))
        and not overloads(inspect.unwrap(found))
        and inspect.signature(found).return_annotation in ("Any", inspect.Signature.empty)
    ]
    assert untyped == []
