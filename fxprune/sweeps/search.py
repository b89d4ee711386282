"""search(): improve one point by moving its budget between families, and residual branches where they may go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.arguments import checked_call, is_number, shown
from fxprune.basis.pruning import coupling_of
from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import CriterionName
from fxprune.entry_points import entry_point
from fxprune.passes.coupling.branches import Branches
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.progress import progress_bar
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData
from fxprune.repairs.request import Repairs
from fxprune.reports.ratios import Chooser
from fxprune.reports.sensitivity import Raised
from fxprune.reports.sweep import Point, Search
from fxprune.selection.allocation import Allocator
from fxprune.selection.depth import BRANCHES, free_branches, speed_name
from fxprune.selection.options import Ranking
from fxprune.selection.select import score_families
from fxprune.sweeps.evaluator import Evaluator, Request
from fxprune.sweeps.requests import PASSED, request_of
from fxprune.sweeps.sweep import prepare

LEAST = 0.02  # the share that a family which lost nothing is taken to have lost, so that it may lose some
FIRST, LARGEST, GROWTH, DECAY = 0.7, 3.0, 1.3, 0.7  # of the logarithms of speeds: a step, and how it changes
REPEATS = 20  # proposals in a row that leave the same model as one before: nothing is left to try


@checked_call({name: p for name, p in PASSED.items() if name not in ("criterion", "ranking")})
def search(
    model: nn.Module,
    example_inputs: Any = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    *,
    params: float | str | None = None,
    macs: float | str | None = None,
    memory: float | str | None = None,
    latency: float | str | None = None,
    start: Point | None = None,
    steps: int = 40,
    seed: int = 0,
    criterion: CriterionName | str | Criterion | None = None,
    ranking: Ranking | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    repair: Repairs | None = None,
    measure: bool = True,
    same_class: bool = False,
    **asked: Any,
) -> Search:
    """A better model at the same budget: one point is improved by moving the budget between families.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> x = torch.randn(64, 4)
    >>> found = search(net, x[:1], lambda m: -(m(x) - net(x)).square().mean(), macs=0.5, data=[x], steps=6, measure=False)
    >>> found.best.value >= found.start.value, found.best.macs <= 0.5 * found.original.macs
    (True, True)

    Every family loses units at a speed of its own until the budget is met, lowest scores first. A step proposes other speeds,
    at random around those of the best model so far, and their mirror image where that one is no better. With `depth` the
    residual branches have a speed too, and each of them its place among them. (Evolution with one parent, mirrored steps and
    a step size that follows success: Rechenberg 1973; Brockhoff et al. 2010.)

    Arguments:
        model: it is not touched.
        example_inputs, evaluate, data, loss, repair, measure, same_class: as for `sweep`.
        params, macs, memory, latency: the budget, as for `prune`; by default that of `start`. A budget of latency is measured
            for every step.
        start: a point of a sweep or a search of this model, with all that it was asked for; by default what `prune` chooses
            without `repair`. With another budget it is the proportions of this point that the search begins with.
            Its basis stays, if it was rotated.
        steps: how many models are made and evaluated, beside the start.
        seed: of the proposals; the same one tries the same models, unless the budget is measured.
        criterion, ranking, asked: as for `prune`, by default those of `start`; `ranking` says how the start is chosen.

    Returns: all points, printable; `best` is one of them that is no worse than `start`.

    Raises: PruneError for anything that cannot be done, also where the start cannot be made or evaluated; what `evaluate`
    raises for the original passes through.
    """
    check_numbers(start, steps, seed)
    limits = {"params": params, "macs": macs, "memory": memory, "latency": latency}
    given = {n: v for n, v in {**asked, "criterion": criterion, "ranking": ranking}.items() if v is not None}
    limit = {n: v for n, v in limits.items() if v is not None}
    known = {} if start is None else dict(start.how)
    if limit:
        known = {name: value for name, value in known.items() if name not in ("ratio", "budget")}
    how = {**known, **({"budget": limit} if limit else {}), **given}
    if "budget" not in how and "ratio" not in how:
        raise PruneError(
            "nothing says what the budget is", fix="macs=0.5, or another budget; or start= with a point of a sweep"
        )
    try:
        with entry_point(model) as model:
            if start is not None:
                rotated, plan = start.plan.in_basis(model)
                plan.check(rotated)
            evaluator, evidence = prepare(model, example_inputs, evaluate, data, loss, repair, same_class, measure)
            request = request_of(model, how, evidence)
            if request.options.budget is None:
                raise PruneError("a ratio is no budget: it leaves nothing to move between families", fix="macs=0.5")
            original = evaluator.original()
            found = Searcher(evaluator, request, steps, seed).run(start, within=not limit)
            return Search(type(model).__name__, original, tuple(found))
    except Raised as raised:
        raise raised.error from None


def check_numbers(start: Any, steps: Any, seed: Any) -> None:
    """Raise PruneError for arguments of `search` that mean nothing."""
    if start is not None and (not isinstance(start, Point) or start.plan is None):
        what = f"start must be a point of a sweep that did not fail, not {shown(start)}"
        raise PruneError(what, fix="fxprune.sweep(...).front()[0]")
    for name, value, least in (("steps", steps, 1), ("seed", seed, 0)):
        if not is_number(value) or not isinstance(value, int) or value < least:
            raise PruneError(
                f"{name} must be an integer of {least} or more, not {shown(value)}", fix=f"{name}={least + 39 * least}"
            )


class Searcher:
    """Proposes speeds, and goes on from the best of what they leave.

    Arguments:
        evaluator: makes points.
        request: the budget, and how units are chosen.
        steps, seed: as for `search`.

    Attributes:
        points: all that were made.
        best: the highest value among them.
    """

    def __init__(self, evaluator: Evaluator, request: Request, steps: int, seed: int) -> None:
        self.evaluator, self.request, self.steps = evaluator, request, steps
        self.random = np.random.default_rng(seed)
        self.points: list[Point] = []
        self.seen: set[str] = set()
        self.best = -math.inf

    def run(self, start: Point | None, *, within: bool) -> list[Point]:
        """All points, the start first; `within` says whether it is within the budget as it is."""
        if start is None:
            self.add(self.evaluator.point(1, self.request))
            start = self.points[0]
            names, speeds = self.speeds_of(start.plan)
        else:
            names, speeds = self.speeds_of(start.plan)
            self.add(self.evaluator.known(1, self.request, start.plan)) if within else self.propose(names, speeds)
        if len(names) < 2:
            what = "nothing can be moved: the model has a single family that may lose units"
            raise PruneError(what, fix="prune, which chooses its units by their scores")
        with progress_bar(None, "search", "point", total=self.steps) as bar:
            self.evolve(names, speeds, lambda: bar.update(len(self.points) - 1 - bar.n))
        return self.points

    def evolve(self, names: Sequence[str], speeds: np.ndarray, tell: Callable[[], Any]) -> None:
        """Take all steps; `speeds` are logarithms, shape (names,)."""
        size, idle = FIRST, 0
        while self.left and idle < REPEATS:
            direction = self.random.standard_normal(len(names))
            made, gained = len(self.points), False
            for sign in (1.0, -1.0):
                while self.left and self.propose(names, moved := speeds + sign * size * direction):
                    speeds, gained = moved, True  # and on in this direction
                    tell()
                if gained:
                    break
            tell()
            idle = 0 if len(self.points) > made else idle + 1
            size = min(size * (DECAY if idle == 0 and not gained else GROWTH), LARGEST)

    @property
    def left(self) -> bool:
        """Whether there are steps left."""
        return len(self.points) <= self.steps

    def propose(self, names: Sequence[str], speeds: np.ndarray) -> bool:
        """Whether some speeds, shape (names,), leave a better model than all before; what leaves one of them is no point."""
        by_name = dict(zip(names, np.exp(speeds).tolist(), strict=True))
        point = self.evaluator.point(len(self.points) + 1, self.request, by_name, self.is_new)
        return point is not None and self.add(point)

    def add(self, point: Point) -> bool:
        """Keep a point; whether it is better than all before."""
        if not self.points and point.value is None:
            raise PruneError(f"there is nothing to begin with: {point.failed}", fix="another budget, or another start")
        self.points.append(point)
        better = point.value is not None and point.value > self.best
        self.best = point.value if better and point.value is not None else self.best
        return better

    def is_new(self, plan: PlanData) -> bool:
        """Whether a plan was not made before; the basis is the same in all."""
        key = plan.to_json()
        known = key in self.seen
        self.seen.add(key)
        return not known

    def speeds_of(self, plan: PlanData) -> tuple[list[str], np.ndarray]:
        """The names of what can be moved, and the logarithms of the speeds that lead to a plan."""
        options, model = self.request.options, self.evaluator.model
        self.is_new(plan)
        chooser = self.evaluator.chooser(options)
        if options.basis is not None:
            model, plan = plan.in_basis(model)
            options = dataclasses.replace(options, coupling=coupling_of(model, options.coupling))
            chooser = Chooser(Compilation(model, self.evaluator.inputs, options.coupling))
        choice = chooser.compilation.choice_of(plan)
        kept, shares = choice.kept.numpy(), dict[str, float]()
        if options.narrows:
            options = dataclasses.replace(options, memo=chooser.memo)
            allocator = Allocator(*score_families(model, chooser.solution, options), chooser.solution, options)
            for name, found in zip(allocator.names, allocator.candidates, strict=True):
                units = np.concatenate([units for _, units in found.group.strata])
                if found.count[-1]:
                    shares[name] = 1 - float(kept[units].mean())
        if options.depth:
            branches = Branches(chooser.solution.captures, set(named_parameters(model)))
            names = [speed_name(branch) for branch in free_branches(model, branches, options)]
            shares |= {BRANCHES: len(choice.slicer.removed.branches) / len(names)} if shares else {}
            shares |= dict.fromkeys(names, 1.0)
        return list(shares), np.log([max(share, LEAST) for share in shares.values()])
