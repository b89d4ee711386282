"""Choice: from a request to what is kept, so that every tensor stays a full rectangle."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxprune import ranking, select
from fxprune.budget import KINDS, met
from fxprune.counting import Costs
from fxprune.criteria import find
from fxprune.criteria.scoring import comparable
from fxprune.criteria.units import unit_scores
from fxprune.errors import PruneError
from fxprune.latency import FRIENDLY, Trial, timely
from fxprune.passes.couple import Solution
from fxprune.passes.families import Family, families
from fxprune.passes.kept import Cutter, NotARectangle
from fxprune.passes.shrink import tensor_cuts
from fxprune.passes.tape import Ref, collect
from fxprune.passes.tree import named_parameters, named_tensors
from fxprune.request import Ratio, Request, Scopes


def selected(model: nn.Module, solution: Solution, request: Request, trial: Trial | None = None) -> tuple[Tensor, Cutter]:
    """Which labels stay; for a budget of latency, `trial` times them."""
    free, score = prepared(model, solution, request)
    if not request.competes:
        wanted = one_by_one(free, score, solution, request)
        kept, cutter = settled(solution, wanted, score, guards(solution))
        if cutter.whole and any(ratios_of(free, request.ratio, solution)):
            raise PruneError(
                "nothing in the model can be pruned by so little: "
                + ("what would go cannot go alone" if wanted.any() else "no family has a whole unit to lose"),
                where=type(model).__name__,
                fix="a larger ratio, or a smaller round_to",
            )
        return kept, cutter
    costs = Costs(solution, dict(named_tensors(model)))
    if request.budget is not None and request.budget.kind == "latency":
        assert trial is not None
        return in_time(free, score, costs, request, trial)
    rivalry = Rivalry(free, score, solution, request)
    if request.budget is None:
        return rivalry.settle(rivalry.by_ratio())
    return met(request.budget, rivalry.ladders, rivalry.sequence(), costs, rivalry.settle, len(solution.unit))


def in_time(
    free: Sequence[Family],
    score: np.ndarray,
    costs: Costs,
    request: Request,
    trial: Trial,
    held: np.ndarray | None = None,
) -> tuple[Tensor, Cutter]:
    """Which labels stay by a budget of latency: in counts that hardware likes, where that is enough.

    What is `held` is gone already, and stays so.
    """
    assert request.budget is not None
    tried = [request.round_to] if request.round_to > 1 else [FRIENDLY, 1]
    for round_to in tried:
        rivalry = Rivalry(free, score, costs.solution, request, round_to, held)
        names = [free[rung.pool.cells[0][0]].name for rung in rivalry.ladders]
        try:
            with trial.quiet():
                return timely(request.budget, rivalry.ladders, rivalry.sequence(), costs, rivalry.settle, trial, names)
        except PruneError:
            if round_to == tried[-1]:
                raise
    raise AssertionError("the last attempt returns or raises")


def outcome(
    model: nn.Module, solution: Solution, request: Request, trial: Trial | None = None
) -> dict[str, tuple[int, int, int]]:
    """For each kind of cost that is computed: the least, at the request, and the original; `trial.found` for latency."""
    costs = Costs(solution, dict(named_tensors(model)))
    free, score = prepared(model, solution, request)
    rivalry = Rivalry(free, score, solution, request)
    _, least = rivalry.settle(rivalry.everything())
    _, now = selected(model, solution, request, trial)
    return {kind: (costs.of(least, kind), costs.of(now, kind), costs.original(kind)) for kind in KINDS}


def prepared(model: nn.Module, solution: Solution, request: Request) -> tuple[list[Family], np.ndarray]:
    """The families that may lose units, and the score of every unit."""
    free = free_families(model, solution, request)
    criterion = find(request.criterion)
    score, seen = unit_scores(model, solution, free, criterion, request.data, request.loss)
    free = [f for f in free if seen[f.units].any()]
    return free, comparable(score, free, criterion) if request.competes else score


def free_families(model: nn.Module, solution: Solution, request: Request) -> list[Family]:
    """The families that may lose units; raises PruneError where there are none."""
    found = families(solution, set(named_parameters(model)))
    free = [f for f in found if f.frozen is None and len(f.units) > 1]
    if not free:
        reasons = sorted({f.frozen for f in found if f.frozen})
        raise PruneError(
            "nothing in the model can be pruned" + (f": every family {', or '.join(reasons[:3])}" if reasons else ""),
            where=type(model).__name__,
            fix="freeze less; print(fxprune.couple(model, example_inputs)) says why each family stays",
        )
    largest = max(len(f.units) * f.width for f in free)
    if request.round_to > largest:
        raise PruneError(
            f"round_to={request.round_to} is larger than every family (the largest has {largest} channels)",
            fix=f"round_to<={largest}",
        )
    return free


def one_by_one(
    free: Sequence[Family], score: np.ndarray, solution: Solution, request: Request, held: np.ndarray | None = None
) -> np.ndarray:
    """Removed classes where every family loses its own ratio, in which those that are `held` count."""
    most = 1.0 if request.floor is None else 1 - request.floor
    ratios = [min(r, most) for r in ratios_of(free, request.ratio, solution)]
    removed = np.zeros(len(score), bool)
    pools = select.pools([f.units for f in free], ratios, solution.equal, len(score))
    for pool in pools if held is None else select.resume(pools, held):
        removed[select.choose(pool, score, [f.width for f in free], request.round_to)] = True
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
        request: Request,
        round_to: int | None = None,
        held: np.ndarray | None = None,
    ) -> None:
        self.solution, self.score, self.guards, self.held = solution, score, guards(solution), held
        floor = ranking.FLOOR if request.floor is None else request.floor
        ratios = [1.0] * len(free) if request.budget else ratios_of(free, request.ratio, solution, request.scopes)
        pools = [p for p in select.pools([f.units for f in free], ratios, solution.equal, len(score)) if p.ratio > 0]
        pools = pools if held is None else select.resume(pools, held)
        width = [f.width for f in free]
        self.ladders = [ranking.ladder(p, score, width, round_to or request.round_to, floor) for p in pools]
        if held is not None:
            ranking.begun(self.ladders, held)
        scope = scopes_of(free, request.scopes, solution)
        kinds: Sequence[object] = [None] * len(free)
        if request.ranking == "isomorphic":
            kinds = ranking.structures(free, solution)

        def key(i: int) -> object:
            members = dict.fromkeys(family for family, _ in pools[i].cells)
            named = next((scope[m] for m in members if scope[m] is not None), None)
            alone = i if request.ranking == "local" and named is None else -1
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
            for i, rung in zip(group, ranking.share_of_units(mine, mine[0].pool.ratio), strict=True):
                rungs[i] = rung
        return ranking.removed(self.ladders, rungs, len(self.score))

    def sequence(self) -> list[int]:
        """The order of all steps."""
        return ranking.merged(self.groups, self.ladders)

    def everything(self) -> np.ndarray:
        """Removed classes where every ladder is climbed to its end."""
        return ranking.removed(self.ladders, [len(rung.count) - 1 for rung in self.ladders], len(self.score))

    def settle(self, removed: np.ndarray) -> tuple[Tensor, Cutter]:
        return settled(self.solution, removed, self.score, self.guards, self.held)


# -- rectangles -----------------------------------------------------------------------------------------------------------


def settled(
    solution: Solution,
    removed: np.ndarray,
    score: np.ndarray,
    spans: Sequence[np.ndarray],
    held: np.ndarray | None = None,
) -> tuple[Tensor, Cutter]:
    """What is kept. Choices that would not leave rectangles, or would leave a tensor empty, are taken back.

    Classes that are `held` stay removed: an earlier choice of this kind, to which this one adds.
    """
    unit = solution.unit.numpy()
    if held is not None:
        removed = removed | held
    for some in portions(spans, PORTION):
        starts = np.cumsum([0, *(len(classes) for classes in some[:-1])])
        for i in np.flatnonzero(np.logical_and.reduceat(removed[np.concatenate(some)], starts)).tolist():
            if removed[some[i]].all():  # the best scored unit stays
                mine = some[i] if held is None else some[i][~held[some[i]]]
                removed[mine[np.argmax(score[mine])]] = False
    for _ in range(len(removed) + 1):
        even_rows(solution, removed, score)
        try:
            kept = torch.from_numpy(~removed[unit])
            cutter = Cutter(kept)
            tensor_cuts(solution, kept, cutter)
            activations_are_rectangles(solution, cutter)
            return kept, cutter
        except NotARectangle as error:
            classes = unit[error.labels.numpy()]
            removed[classes] = False if held is None else held[classes]
    raise AssertionError("restoring units always ends in a rectangle")


PORTION = 1 << 20  # classes looked at in one go


def portions(arrays: Sequence[np.ndarray], size: int) -> Iterator[Sequence[np.ndarray]]:
    """The arrays in their order, so many at a time that they have about so many elements."""
    ends = np.cumsum([len(a) for a in arrays])
    start = 0
    while start < len(arrays):
        reached = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, reached + size)))
        yield arrays[start:end]
        start = end


def even_rows(solution: Solution, removed: np.ndarray, score: np.ndarray) -> None:
    """Take back removals, those of the best scored units first, until the rows of each constraint keep equally many entries."""
    uneven = True
    while uneven:
        uneven = False
        for matrix in solution.equal:
            counts = (~removed[matrix]).sum(1)
            if (counts == counts[0]).all():
                continue
            uneven = True
            for row in matrix[counts < counts.max()]:
                gone = row[removed[row]]
                if len(gone):  # else what another row took back was its, too
                    removed[gone[np.argmax(score[gone])]] = False


def guards(solution: Solution) -> list[np.ndarray]:
    """The classes of every distinct array of labels: each must keep at least one entry."""
    unit = solution.unit.numpy()
    seen: set[int] = set()
    found = list(solution.lines)
    for values in solution.values:
        for labels in values.values():
            for f in labels:
                if id(f.base) not in seen:
                    seen.add(id(f.base))
                    found.append(f.among(unit))
    return found


def activations_are_rectangles(solution: Solution, cutter: Cutter) -> None:
    """Raise NotARectangle where a value outside of a gathered region would not be one, or would be empty."""
    for capture, values, regions in zip(solution.captures, solution.values, solution.regions, strict=True):
        for node, result in capture.results.items():
            if node in regions and regions[node] is not node:
                continue
            for ref in collect(result, Ref):
                labels = values.get(ref.id, ())
                if any(len(f.nest) > 1 for f in labels) or len({f.nest for f in labels}) < len(labels):
                    cutter(labels, capture.tape.shape(ref))


# -- globs ----------------------------------------------------------------------------------------------------------------


def ratios_of(free: Sequence[Family], ratio: Ratio, solution: Solution, scopes: Scopes | None = None) -> list[float]:
    """The share to remove from each family: what the first glob says that names a module which writes or scales it.

    The name of a scope counts as a glob that its families match.
    """
    if not isinstance(ratio, Mapping):
        return [float(ratio)] * len(free)
    named = scopes_of(free, scopes, solution)
    return [
        next((float(r) for glob, r in ratio.items() if glob == scope or any(matches(m, glob) for m in modules)), 0.0)
        for scope, modules in zip(named, owners(free, solution), strict=True)
    ]


def scopes_of(free: Sequence[Family], scopes: Scopes | None, solution: Solution) -> list[str | None]:
    """The scope of each family: the first one with a glob that names a module which writes or scales it."""
    if scopes is None:
        return [None] * len(free)
    globs = {name: [g] if isinstance(g, str) else list(g) for name, g in scopes.items()}
    return [
        next((name for name, listed in globs.items() if any(matches(m, glob) for m in modules for glob in listed)), None)
        for modules in owners(free, solution)
    ]


def owners(free: Sequence[Family], solution: Solution) -> list[set[str]]:
    """The modules that write or scale each family."""
    found = emitters(solution)
    every = []
    for family in free:
        holding = {name.rpartition(".")[0] for name, _ in family.members}
        every.append(holding & found.get(int(family.units[0]), set()) or holding)
    return every


def emitters(solution: Solution) -> dict[int, set[str]]:
    """For each class, the modules in whose results it occurs; one that only reads it is not among them."""
    unit = solution.unit.numpy()
    found: dict[int, set[str]] = {}
    for capture, values in zip(solution.captures, solution.values, strict=True):
        for node, result in capture.results.items():
            if node.op == "call_module":
                for f in (f for ref in collect(result, Ref) for f in values.get(ref.id, ())):
                    for c in np.unique(unit[f.brief]).tolist():
                        found.setdefault(c, set()).add(str(node.target).removeprefix(capture.prefix))
    return found


def matches(module: str, glob: str) -> bool:
    """Whether a glob names a module or one it lies in."""
    parts = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), glob) for i in range(len(parts)))
