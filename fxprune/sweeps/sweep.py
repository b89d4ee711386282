"""sweep(): many budgets and methods of one model, from one coupling and one scoring for each criterion."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fxprune.arguments import checked_call, shown
from fxprune.criteria.base import Criterion
from fxprune.criteria.calibration import check_batches, read
from fxprune.criteria.catalog import CriterionName
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.progress import progress_bar
from fxprune.repairs.request import RepairRequest, Repairs
from fxprune.reports.sensitivity import EVALUATE, Raised
from fxprune.reports.sweep import Sweep
from fxprune.selection.argument_checks import check_flag
from fxprune.selection.options import Ranking
from fxprune.sweeps.evaluator import Evaluator, Request
from fxprune.sweeps.folder import SweepFolder, weights_of
from fxprune.sweeps.requests import BUDGETS, PASSED, described, requests_of

SHARED = {name: p for name, p in PASSED.items() if name not in ("criterion", "ranking")}


@checked_call(SHARED)
def sweep(
    model: nn.Module,
    example_inputs: Any = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    *,
    budgets: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    criteria: CriterionName | str | Criterion | Sequence[CriterionName | str | Criterion] | None = None,
    rankings: Ranking | Sequence[Ranking] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    repair: Repairs | None = None,
    measure: bool = True,
    same_class: bool = False,
    folder: str | os.PathLike[str] | None = None,
    **asked: Any,
) -> Sweep:
    """Prune a model in many ways, repair each result and evaluate it: a table and a plot of what each costs and is worth.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> x = torch.randn(64, 4)
    >>> found = sweep(net, x[:1], lambda m: -(m(x) - net(x)).square().mean(), budgets={"macs": [0.5, 0.25]}, data=[x])
    >>> [(p.label, p.parameters) for p in found.points]
    [('macs=0.5 flap/global', 58), ('macs=0.25 flap/global', 30)]

    The model is captured and coupled once, and scored once for each criterion.

    Arguments:
        model: it is not touched.
        example_inputs: as for `prune`.
        evaluate: a function of a module in evaluation mode that returns a number, such as its accuracy; higher is better.
        budgets: a mapping from kinds (`macs`, `params`, `memory`, `latency`, `ratio`) to one amount or several, each as for
            `prune`; or a list of such mappings.
        criteria, rankings: one or several; by default what `prune` chooses without `repair`.
        data, loss: as for `prune`; data are read once.
        repair: as for `prune`; by default True where there are data.
        measure: time each result, in turns with the original.
        same_class: as for `prune`: what `evaluate` is given is then of the model's class.
        folder: where to keep each point once it is done, with its plan. A sweep that was stopped goes on from there if it is
            asked for again; points that failed are tried again. Data, `evaluate` and functions as criteria are taken to be
            the same.
        asked: other arguments of `prune`, the same for all points; `depth`, `attention` and `basis` may be lists.

    Returns: the points, printable; a point that cannot be made or evaluated has the reason in place of figures.

    Raises: PruneError for anything that cannot be done, or where the folder holds another sweep; what `evaluate` raises for the
    original passes through.
    """
    if budgets is None:
        raise PruneError("budgets are missing", fix=BUDGETS)
    asked |= {"criterion": criteria, "ranking": rankings}
    try:
        with entry_point(model) as model:
            evaluator, evidence = prepare(model, example_inputs, evaluate, data, loss, repair, same_class, measure)
            requests = requests_of(model, budgets, asked, evidence)
            kept = None if folder is None else SweepFolder(folder, content(evaluator, requests))
            return Sweep(type(model).__name__, *run(evaluator, requests, kept))
    except Raised as raised:
        raise raised.error from None


def prepare(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Any,
    data: Any,
    loss: Any,
    repair: Any,
    same_class: bool,
    measure: bool,
) -> tuple[Evaluator, dict[str, Any]]:
    """What makes points, and the data and the loss that choose them; raises PruneError for what means nothing."""
    if not callable(evaluate):
        raise PruneError(f"evaluate must be a function, not {shown(evaluate)}", fix=EVALUATE)
    check_flag("same_class", same_class)
    check_flag("measure", measure)
    if data is not None:
        check_batches(data)
        data = list(read(data)) if iter(data) is data else data
    mending = RepairRequest.parse(data is not None if repair is None else repair, data)
    inputs = ExampleInputs.parse(example_inputs, model).check(model)
    evaluator = Evaluator(model, inputs, evaluate, mending, same_class=same_class, measure=measure)
    return evaluator, {"data": data, "loss": loss}


def content(evaluator: Evaluator, requests: Sequence[Request]) -> dict[str, Any]:
    """All that the points of a sweep depend on, but for data and `evaluate`."""
    mending = evaluator.mending
    return {
        "model": type(evaluator.model).__name__,
        "weights": weights_of(evaluator.model),
        "inputs": evaluator.inputs.describe(),
        "repair": None if mending is None else dict(mending.arguments),
        "same_class": evaluator.same_class,
        "measure": evaluator.measure,
        "points": [described(request.options) for request in requests],
    }


def run(evaluator: Evaluator, requests: Sequence[Request], kept: SweepFolder | None) -> tuple[Any, tuple[Any, ...]]:
    """The original and all points; those that are kept are not made again."""
    original = kept.load(0) if kept is not None else None
    if original is None:
        original = evaluator.original()
        if kept is not None:
            kept.save(original)
    points = []
    for number, request in enumerate(progress_bar(requests, "sweep", "point"), 1):
        known = kept.load(number) if kept is not None else None
        if known is not None:
            point = dataclasses.replace(known, how=request.how, make=evaluator.again)
        else:
            point = evaluator.point(number, request)
            if kept is not None:
                kept.save(point)
        points.append(point)
    return original, tuple(points)
