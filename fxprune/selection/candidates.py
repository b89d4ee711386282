"""List what a group can lose: nested candidates, lowest scores first, each of which leaves every tensor a rectangle.

Level 0 of a group removes nothing; a step goes from one level to the next. What is removed of a model is an allocation: a
level for each group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.selection.groups import Group, solve_shared_rows

QUARTERS = (0.25, 0.5, 0.75)
COARSE = 0.75  # of what is wanted: common shares of the strata that reach less are given up for an integer program


@dataclass(slots=True)
class Candidates:
    """What a group can lose, level by level.

    Attributes:
        group: its units.
        removed: the units that are removed at a level; a level contains those below it, except where rows share units.
        count: how many units that is, ascending from 0.
        importance: of the step to each level the mean score of the units that it removes; it never falls.
    """

    group: Group
    removed: Callable[[int], np.ndarray]
    count: list[int]
    importance: list[float]

    @property
    def total(self) -> int:
        """The number of units of the group."""
        return sum(self.group.sizes.values())

    def highest_within(self, count: int) -> int:
        """The highest level that removes at most `count` units."""
        return bisect_right(self.count, count) - 1


def list_candidates(
    group: Group, score: np.ndarray, width: Sequence[int], round_to: int, floor: float, share: float | None = None
) -> Candidates:
    """All that a group can lose: at least one unit and the share `floor` of every family stay.

    Arguments:
        group: its units.
        score: importance by unit, comparable between the families that compete.
        width: channels that one unit of each family takes up.
        round_to: the number of channels that stay of each family is a multiple of this.
        floor: the share of every family that stays.
        share: the share that will be removed, where it is known.
    """
    even = list_even_shares(group, score, width, round_to, floor)
    if not group.equal or round_to > 1:
        return even
    sizes = group.sizes.values()
    if share is None:
        if len(even.count) <= len(QUARTERS) <= min(sizes):
            return list_solved(group, score, [(s, int(s * even.total)) for s in QUARTERS if s <= 1 - floor])
        return even
    reached = even.count[even.highest_within(int(share * even.total + 1e-9))]
    wanted = sum(int(share * n + 1e-9) for n in sizes)
    if reached >= COARSE * wanted:
        return even
    solved = list_solved(group, score, [(share, wanted)])
    return solved if solved.count[-1] > reached else even


def list_even_shares(group: Group, score: np.ndarray, width: Sequence[int], round_to: int, floor: float) -> Candidates:
    """Candidates that remove the lowest scored units of each stratum, the same share of every stratum."""
    step = math.gcd(*(len(units) for _, units in group.strata))
    highest = min(step - 1, int((1 - floor) * step + 1e-9))
    lengths = {len(units) for _, units in group.strata}
    strata = [units for _, units in group.strata]
    # strata of one length are sorted together; equal scores keep the order of the units
    matrices = [np.stack(strata)] if len(lengths) == 1 else [units[None] for units in strata]
    order = [np.take_along_axis(m, np.argsort(score[m], axis=1, kind="stable"), 1) for m in matrices]
    levels = np.arange(highest + 1)
    for family, n in group.sizes.items():
        levels = levels[(n // step * (step - levels) * width[family] % round_to == 0) | (levels == 0)]
    sums = sum(score[m].reshape(len(m), step, -1).sum(2).sum(0) for m in order)
    each = sum(group.sizes.values()) // step
    taken = np.add.reduceat(sums[: levels[-1]], levels[:-1]) if len(levels) > 1 else np.zeros(0)
    importance = np.maximum.accumulate(taken / (np.diff(levels) * each))  # rounding must not put a step before the one below
    return Candidates(
        group,
        lambda level: np.concatenate([m[:, : levels[level] * (m.shape[1] // step)].reshape(-1) for m in order]),
        (levels * each).tolist(),
        [0.0, *importance.tolist()],
    )


def list_solved(group: Group, score: np.ndarray, wanted: Sequence[tuple[float, int]]) -> Candidates:
    """Candidates where rows share units, for some shares and the number of units that each of them is."""
    sets, importance = [np.zeros(0, np.int64)], [0.0]
    for share, count in wanted:
        units = solve_shared_rows(group, score, share, count)
        if len(units) > len(sets[-1]):
            fresh = np.setdiff1d(units, sets[-1])
            least = importance[-1] if len(sets) > 1 else -math.inf
            importance.append(max(least, float(score[fresh].mean())))
            sets.append(units)
    return Candidates(group, lambda level: sets[level], [len(s) for s in sets], importance)


def remove_share(group: Group, score: np.ndarray, width: Sequence[int], round_to: int, share: float) -> np.ndarray:
    """The units that a group loses by itself: at most a share of them, the lowest scored."""
    found = list_candidates(group, score, width, round_to, 0.0, share)
    return found.removed(found.highest_within(int(share * found.total + 1e-9)))
