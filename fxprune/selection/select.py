"""Choice: from a request to what is kept, so that every tensor stays a full rectangle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from fxprune.criteria.catalog import find
from fxprune.criteria.unit_scores import comparable, unit_scores
from fxprune.model_kinds import why_unprunable
from fxprune.options import Options
from fxprune.passes.coupling.families import Family, families
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors
from fxprune.passes.ir.slices import Slicer
from fxprune.selection import ladders
from fxprune.selection.budgets import met
from fxprune.selection.costs import Costs
from fxprune.selection.grouping import ratios_of, scopes_of, structures
from fxprune.selection.ladders import FLOOR, begun, ladder, merged, share_of_units
from fxprune.selection.latency import FRIENDLY, LatencyProbe
from fxprune.selection.latency_search import timely
from fxprune.selection.pools import choose, make_pools, resume
from fxprune.selection.rectangles import never_emptied, settle_removals


def selected(
    model: nn.Module, solution: Solution, options: Options, trial: LatencyProbe | None = None
) -> tuple[Tensor, Slicer]:
    """Which labels stay; for a budget of latency, `trial` times them."""
    free, score = prepared(model, solution, options)
    if not options.competes:
        wanted = one_by_one(free, score, solution, options)
        kept, slicer = settle_removals(solution, wanted, score, never_emptied(solution))
        if slicer.keeps_all and any(ratios_of(free, options.ratio, solution)):
            raise PruneError(
                "nothing in the model can be pruned by so little: "
                + ("what would go cannot go alone" if wanted.any() else "no family has a whole unit to lose"),
                where=type(model).__name__,
                fix="a larger ratio, or a smaller round_to",
            )
        return kept, slicer
    costs = Costs(solution, dict(named_tensors(model)))
    if options.budget is not None and options.budget.kind == "latency":
        assert trial is not None
        return in_time(free, score, costs, options, trial)
    rivalry = Rivalry(free, score, solution, options)
    if options.budget is None:
        return rivalry.settle(rivalry.by_ratio())
    return met(options.budget, rivalry.ladders, rivalry.sequence(), costs, rivalry.settle, len(solution.unit_of))


def in_time(
    free: Sequence[Family],
    score: np.ndarray,
    costs: Costs,
    options: Options,
    trial: LatencyProbe,
    held: np.ndarray | None = None,
) -> tuple[Tensor, Slicer]:
    """Which labels stay by a budget of latency: in counts that hardware likes, where that is enough.

    What is `held` is gone already, and stays so.
    """
    assert options.budget is not None
    tried = [options.round_to] if options.round_to > 1 else [FRIENDLY, 1]
    for round_to in tried:
        rivalry = Rivalry(free, score, costs.solution, options, round_to, held)
        names = [free[rung.pool.cells[0][0]].name for rung in rivalry.ladders]
        try:
            with trial.quiet():
                return timely(options.budget, rivalry.ladders, rivalry.sequence(), costs, rivalry.settle, trial, names)
        except PruneError:
            if round_to == tried[-1]:
                raise
    raise AssertionError("the last attempt returns or raises")


def smallest(model: nn.Module, solution: Solution, options: Options) -> tuple[Tensor, Slicer]:
    """Which labels stay where as much is removed as any request of the kind could remove."""
    free, score = prepared(model, solution, options)
    rivalry = Rivalry(free, score, solution, options)
    return rivalry.settle(rivalry.everything())


def prepared(model: nn.Module, solution: Solution, options: Options) -> tuple[list[Family], np.ndarray]:
    """The families that may lose units, and the score of every unit."""
    free = free_families(model, solution, options)
    criterion = find(options.criterion)
    score, seen = unit_scores(model, solution, free, criterion, options.data, options.loss)
    free = [f for f in free if seen[f.units].any()]
    return free, comparable(score, free, criterion) if options.competes else score


def free_families(model: nn.Module, solution: Solution, options: Options) -> list[Family]:
    """The families that may lose units; raises PruneError where there are none."""
    found = families(solution, set(named_parameters(model)))
    free = [f for f in found if f.frozen is None and len(f.units) > 1]
    if not free:
        reasons = sorted({f.frozen for f in found if f.frozen})
        raise why_unprunable(model) or PruneError(
            "nothing in the model can be pruned" + (f": every family {', or '.join(reasons[:3])}" if reasons else ""),
            where=type(model).__name__,
            fix="freeze less; print(fxprune.couple(model, example_inputs)) says why each family stays",
        )
    largest = max(len(f.units) * f.width for f in free)
    if options.round_to > largest:
        raise PruneError(
            f"round_to={options.round_to} is larger than every family (the largest has {largest} channels)",
            fix=f"round_to<={largest}",
        )
    return free


def one_by_one(
    free: Sequence[Family], score: np.ndarray, solution: Solution, options: Options, held: np.ndarray | None = None
) -> np.ndarray:
    """Removed classes where every family loses its own ratio, in which those that are `held` count."""
    most = 1.0 if options.floor is None else 1 - options.floor
    ratios = [min(r, most) for r in ratios_of(free, options.ratio, solution)]
    removed = np.zeros(len(score), bool)
    pools = make_pools([f.units for f in free], ratios, solution.equal_rows, len(score))
    for pool in pools if held is None else resume(pools, held):
        removed[choose(pool, score, [f.width for f in free], options.round_to)] = True
    return removed


class Rivalry:
    """Families that compete: what each pool can lose, and who competes with whom.

    Attributes:
        ladders: of the pools that may lose anything.
        groups: positions in `ladders` of those that compete.
    """

    def __init__(
        self,
        free: Sequence[Family],
        score: np.ndarray,
        solution: Solution,
        options: Options,
        round_to: int | None = None,
        held: np.ndarray | None = None,
    ) -> None:
        self.solution, self.score, self.guards, self.held = solution, score, never_emptied(solution), held
        floor = FLOOR if options.floor is None else options.floor
        ratios = [1.0] * len(free) if options.budget else ratios_of(free, options.ratio, solution, options.scopes)
        pools = [p for p in make_pools([f.units for f in free], ratios, solution.equal_rows, len(score)) if p.ratio > 0]
        pools = pools if held is None else resume(pools, held)
        width = [f.width for f in free]
        self.ladders = [ladder(p, score, width, round_to or options.round_to, floor) for p in pools]
        if held is not None:
            begun(self.ladders, held)
        scope = scopes_of(free, options.scopes, solution)
        kinds: Sequence[object] = [None] * len(free)
        if options.ranking == "isomorphic":
            kinds = structures(free, solution)

        def key(i: int) -> object:
            members = dict.fromkeys(family for family, _ in pools[i].cells)
            named = next((scope[m] for m in members if scope[m] is not None), None)
            alone = i if options.ranking == "local" and named is None else -1
            like = () if named is not None else tuple(sorted(map(repr, {kinds[m] for m in members})))
            return named, alone, like, pools[i].ratio

        found: dict[object, list[int]] = {}
        for i in range(len(pools)):
            found.setdefault(key(i), []).append(i)
        self.groups = list(found.values())

    def by_ratio(self) -> np.ndarray:
        """Removed classes where each group loses its ratio of units."""
        rungs = [0] * len(self.ladders)
        for group in self.groups:
            mine = [self.ladders[i] for i in group]
            for i, rung in zip(group, share_of_units(mine, mine[0].pool.ratio), strict=True):
                rungs[i] = rung
        return ladders.removed(self.ladders, rungs, len(self.score))

    def sequence(self) -> list[int]:
        """The order of all steps."""
        return merged(self.groups, self.ladders)

    def everything(self) -> np.ndarray:
        """Removed classes where every ladder is climbed to its end."""
        return ladders.removed(self.ladders, [len(rung.count) - 1 for rung in self.ladders], len(self.score))

    def settle(self, removed: np.ndarray) -> tuple[Tensor, Slicer]:
        return settle_removals(self.solution, removed, self.score, self.guards, self.held)
