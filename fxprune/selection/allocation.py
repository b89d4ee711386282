"""Allocate what is removed among the groups of a model: a level for each, by a ratio or step by step for a budget.

Ratios and scopes are matched with families by globs over the names of modules.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor, fx

from fxprune.criteria.aggregation import LOSS, RELATIVE
from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.coupling.structure import find_roles
from fxprune.passes.ir.module_tree import with_outer
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.candidates import Candidates, Group, form_groups, list_candidates
from fxprune.selection.options import Options, Scopes
from fxprune.selection.rectangles import find_nonempty_sets, restore_rectangles
from fxprune.selection.structures import describe_structures

FREE = 1e-9  # what units cost at least, as a share of all that there is
FLOOR = 0.1  # the share of every family that stays where families compete, unless told otherwise


class Allocator:
    """What each group of families can lose, and which groups compete.

    Without competition (`ranking="local"`, no scopes) each group is alone and loses its ratio.

    Arguments:
        free: the families that may lose units.
        score: the score of every unit; where families compete, comparable between them.
        solution: the coupling.
        options: what to remove.
        round_to, competes: in place of those of `options`.
        removed: for each unit whether an earlier step removed it, shape (labels,); it stays removed.

    Attributes:
        candidates: what each group can lose.
        names: of each group the name of its first family.
        speeds: how fast groups lose their units, by name; None where scores decide.
        rivals: positions in `candidates` of those that compete with one another.
        late: positions of those that lose units only where all others have lost what they can.
        weighs_cost: whether steps count for what they cost; see `weigh`.
        scores: of each group the importance of its steps before that.
    """

    def __init__(
        self,
        free: Sequence[Family],
        score: np.ndarray,
        solution: Solution,
        options: Options,
        *,
        round_to: int | None = None,
        removed: np.ndarray | None = None,
        competes: bool | None = None,
    ) -> None:
        self.solution, self.score, self.removed = solution, score, removed
        self.nonempty = find_nonempty_sets(solution)
        competes = options.competes if competes is None else competes
        floor = (FLOOR if competes else 0.0) if options.floor is None else options.floor
        ratios = [1.0] * len(free) if options.budget else match_ratios(free, options.ratio, solution, options.scopes)
        if not competes:
            ratios = [min(ratio, 1 - floor) for ratio in ratios]
        units, width = [f.units for f in free], [f.width for f in free]
        groups = [g for g in form_groups(units, ratios, solution.equal_rows, len(score), removed) if g.ratio > 0]
        self.candidates = [
            list_candidates(g, score, width, round_to or options.round_to, floor, None if competes else g.ratio) for g in groups
        ]
        if removed is not None:
            prefer_removed(self.candidates, removed)
        self.names = [free[group.families[0]].name for group in groups]
        self.speeds = options.speeds
        self.rivals = find_rivals(groups, free, solution, options)
        crossing = [role.crosses for role in find_roles(solution, free)] if options.spares else [False] * len(free)
        self.late = {i for i, group in enumerate(groups) if any(crossing[m] for m in group.families)}
        self.weighs_cost = options.scale in LOSS or (options.weighs and options.speeds is None)
        self.scores = [found.importance[1:] for found in self.candidates]
        if self.weighs_cost or options.scale in RELATIVE:
            self.grow()

    def allocate_ratio(self) -> list[int]:
        """The levels at which rivals together lose their ratio of units."""
        levels = [0] * len(self.candidates)
        for rivals in self.rivals:
            mine = [self.candidates[i] for i in rivals]
            for i, level in zip(rivals, allocate_share(mine, mine[0].group.ratio), strict=True):
                levels[i] = level
        return levels

    def allocate_all(self) -> list[int]:
        """The highest level of every group."""
        return [len(c.count) - 1 for c in self.candidates]

    def order_steps(self) -> list[int]:
        """The order of all steps: for each the position of the group that takes it."""
        if self.speeds is not None:
            return order_by_speed(self.candidates, [self.speeds.get(name, 1.0) for name in self.names])
        parts = [[[i for i in rivals if (i in self.late) == late] for rivals in self.rivals] for late in (False, True)]
        return [i for part in parts for i in merge_steps([rivals for rivals in part if rivals], self.candidates)]

    def grow(self) -> None:
        """Have steps count for more the less of their group is left.

        Scores are changes of the loss, or shares of what the group has, each as if its unit went alone. Where a group has lost
        the part g of its sum t, what its readers miss is g, beside the t - g that they still get. So all that it has lost
        counts t g / (t - g): g at first, and without bound where nothing would be left. The importance of a step is the mean
        of that increase over its units.
        """
        score = np.maximum(self.score, 0)  # what an earlier step removed is below zero
        for found in self.candidates:
            steps, taken = np.array(found.importance[1:]), np.diff(found.count)
            whole = float(score[np.concatenate([units for _, units in found.group.strata])].sum())
            if len(steps) and whole > 0:
                lost = np.r_[0.0, np.cumsum(np.maximum(steps, 0) * taken)]
                grown = whole**2 * np.diff(1 / np.maximum(whole - lost, 1e-9 * whole)) / taken
                found.importance[1:] = np.where(steps < 0, steps, np.maximum.accumulate(grown)).tolist()

    def weigh(self, cost: Callable[[Sequence[int]], float], left: Callable[[Slicer], float]) -> list[float]:
        """Divide the importance of every step by what its units cost (the mean of its group's), if costs count.

        Units that cost nothing go last. `cost` is that of what is left at some levels, `left` that of what any slicer leaves.
        Returns what a unit of each group costs.
        """
        whole, prices = cost([0] * len(self.candidates)) if self.weighs_cost else 0.0, [1.0] * len(self.candidates)
        for i, found in enumerate(self.candidates):
            if self.weighs_cost and found.count[-1]:
                levels = [len(found.count) - 1 if j == i else 0 for j in range(len(self.candidates))]
                prices[i] = max(whole - cost(levels), FREE * whole) / found.count[-1]
                found.importance[:] = [value / prices[i] for value in found.importance]
        return prices

    def removed_at(self, levels: Sequence[int]) -> np.ndarray:
        """For each unit whether an allocation removes it, shape (labels,)."""
        return removed_at(self.candidates, levels, len(self.score))

    def lost(self, group: int, level: int) -> Collection[fx.Node]:
        """The nodes of the captured programs that go with a group at a level."""
        return ()

    def apply(self, levels: Sequence[int]) -> tuple[Tensor, Slicer]:
        """What an allocation keeps, with every tensor a rectangle."""
        kept, slicer = restore_rectangles(self.solution, self.removed_at(levels), self.score, self.nonempty, self.removed)
        return kept, self.solution.complete(slicer)


def find_rivals(groups: Sequence[Group], free: Sequence[Family], solution: Solution, options: Options) -> list[list[int]]:
    """Positions of the groups that compete: those of one scope, and by ranking all of them, those of one structure, or none."""
    scope = match_scopes(free, options.scopes, solution)
    structures: Sequence[object] = [None] * len(free)
    if options.ranking == "isomorphic":
        structures = describe_structures(free, solution)
    found: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        named = next((scope[m] for m in group.families if scope[m] is not None), None)
        alone = i if options.ranking == "local" and named is None else -1
        like = () if named is not None else tuple(sorted(map(repr, {structures[m] for m in group.families})))
        found.setdefault((named, alone, like, group.ratio), []).append(i)
    return list(found.values())


def prefer_removed(candidates: Sequence[Candidates], removed: np.ndarray) -> None:
    """Put steps that remove nothing new before all others.

    Arguments:
        candidates: listed by scores that are lowest for units that are removed already.
        removed: for each unit whether it is, shape (labels,).
    """
    for found in candidates:
        for level in range(1, len(found.count)):
            if not removed[found.removed(level)].all():
                break
            found.importance[level] = -math.inf


def order_by_importance(candidates: Sequence[Candidates]) -> list[int]:
    """The order in which rivals take their steps, the least important first; ties go to the one that stands first."""
    keys = [(found.importance[level], i, level) for i, found in enumerate(candidates) for level in range(1, len(found.count))]
    return [i for _, i, _ in sorted(keys)]


def order_by_speed(candidates: Sequence[Candidates], speeds: Sequence[float]) -> list[int]:
    """The order of all steps where every group loses its units at a speed of its own: shares stay in one proportion."""
    keys = [
        (found.count[level] / found.total / speed, i)
        for i, (found, speed) in enumerate(zip(candidates, speeds, strict=True))
        for level in range(1, len(found.count))
    ]
    return [i for _, i in sorted(keys)]


def merge_steps(rivals: Sequence[Sequence[int]], candidates: Sequence[Candidates]) -> list[int]:
    """One order for all steps, in which sets of rivals lose the same share of their units, the least important first.

    Arguments:
        rivals: positions in `candidates` of those that compete with one another.
        candidates: of all groups.
    """
    keys = []
    for which, members in enumerate(rivals):
        mine = [candidates[i] for i in members]
        total, removed, levels = sum(c.total for c in mine), 0, [0] * len(mine)
        for position, i in enumerate(order_by_importance(mine)):
            removed += mine[i].count[levels[i] + 1] - mine[i].count[levels[i]]
            levels[i] += 1
            keys.append((removed / total, mine[i].importance[levels[i]], which, position, members[i]))
    return [i for *_, i in sorted(keys)]


def levels_after(candidates: Sequence[Candidates], steps: Iterable[int]) -> list[int]:
    """The level of each group after some steps."""
    levels = [0] * len(candidates)
    for i in steps:
        levels[i] += 1
    return levels


def removed_at(candidates: Sequence[Candidates], levels: Sequence[int], size: int) -> np.ndarray:
    """For each of `size` units whether an allocation removes it."""
    removed = np.zeros(size, bool)
    for found, level in zip(candidates, levels, strict=True):
        removed[found.removed(level)] = True
    return removed


def allocate_share(candidates: Sequence[Candidates], share: float) -> list[int]:
    """The levels at which rivals have lost at most a share of their units, by the least important steps.

    A step that would remove more is not taken, nor any later step of that group; smaller steps of others may be.
    """
    room = int(share * sum(c.total for c in candidates) + 1e-9)
    if len(candidates) == 1:
        return [candidates[0].highest_within(room)]
    levels = [0] * len(candidates)
    stopped: set[int] = set()
    for i in order_by_importance(candidates):
        taken = candidates[i].count[levels[i] + 1] - candidates[i].count[levels[i]]
        if i in stopped or taken > room:
            stopped.add(i)
            continue
        room -= taken
        levels[i] += 1
    return levels


Shares = float | Mapping[str, float]


def match_ratios(free: Sequence[Family], ratio: Shares, solution: Solution, scopes: Scopes | None = None) -> list[float]:
    """The share to remove from each family: that of the first glob that matches it."""
    if not isinstance(ratio, Mapping):
        return [float(ratio)] * len(free)
    return [float(ratio[found[0]]) if found else 0.0 for found in match_globs(free, list(ratio), solution, scopes)]


def match_globs(
    found: Sequence[Family], globs: Sequence[str], solution: Solution, scopes: Scopes | None = None
) -> list[list[str]]:
    """The globs that match each family: by a module which writes or scales it, by its name, or by that of its scope."""
    return [
        [glob for glob in globs if glob == scope or is_match(family, modules, glob)]
        for family, scope, modules in zip(
            found, match_scopes(found, scopes, solution), find_owners(found, solution), strict=True
        )
    ]


def is_match(family: Family, modules: Iterable[str], glob: str) -> bool:
    return family.answers(glob) or any(matches(module, glob) for module in modules)


def match_scopes(free: Sequence[Family], scopes: Scopes | None, solution: Solution) -> list[str | None]:
    """The scope of each family: the first one with a glob that matches a module which writes or scales it."""
    if scopes is None:
        return [None] * len(free)
    globs = {name: [g] if isinstance(g, str) else list(g) for name, g in scopes.items()}
    return [
        next((name for name, listed in globs.items() if any(is_match(family, modules, glob) for glob in listed)), None)
        for family, modules in zip(free, find_owners(free, solution), strict=True)
    ]


def find_owners(free: Sequence[Family], solution: Solution) -> list[set[str]]:
    """The modules that write or scale each family."""
    found = find_emitters(solution)
    every = []
    for family in free:
        holding = {name.rpartition(".")[0] for name, _ in family.members}
        every.append(holding & found.get(int(family.units[0]), set()) or holding)
    return every


def find_emitters(solution: Solution) -> dict[int, set[str]]:
    """For each unit, the modules in whose results it occurs; a module that only reads a unit is not among them."""
    unit = solution.unit_of.numpy()
    found: dict[int, set[str]] = {}
    for capture, values in zip(solution.captures, solution.values, strict=True):
        for node, result in capture.results.items():
            if node.op == "call_module":
                for f in (f for ref in collect(result, TensorRef) for f in values.get(ref.id, ())):
                    for c in np.unique(unit[f.compressed]).tolist():
                        found.setdefault(c, set()).add(str(node.target).removeprefix(capture.prefix))
    return found


def matches(module: str, glob: str) -> bool:
    """Whether a glob matches a module or one that contains it."""
    return any(fnmatch.fnmatchcase(path, glob) for path in with_outer(module))


def tied_to_whole(free: Sequence[Family], solution: Solution, options: Options) -> dict[str, str]:
    """Families that a ratio names and that stay whole since another one does, with its name: rows keep equally many."""
    ratios, size = match_ratios(free, options.ratio, solution, options.scopes), len(solution.unit_of)
    if all(ratios) or not any(ratios):
        return {}
    groups = [g.families for g in form_groups([f.units for f in free], ratios, solution.equal_rows, size)]
    whole = {i: j for group in groups for i in group for j in group if ratios[i] and not ratios[j]}
    return {free[i].name: free[j].name for i, j in whole.items()}
