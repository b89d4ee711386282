"""Ranking: which families compete with one another, and in what order units go.

A pool (see `select.py`) can lose its units in steps that leave every tensor a rectangle. A *ladder* lists these steps, lowest
scores first. Ladders that compete are merged by the price of their steps into one sequence, and a choice is how far each
ladder is climbed. Budgets are met in the same way: by how many steps of a sequence are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.selection.pools import Pool, balanced

FLOOR = 0.1  # the share of every family that stays where families compete, unless told otherwise


@dataclass(slots=True)
class Ladder:
    """What a pool can lose, rung by rung; rung 0 is nothing.

    Attributes:
        pool: the units.
        gone: the units that are gone at each rung; a later rung holds all of an earlier one, except where rows overlap.
        count: how many units that is, ascending.
        price: what the step to each rung costs: the mean score of the units it takes; never falls.
    """

    pool: Pool
    gone: Callable[[int], np.ndarray]
    count: list[int]
    price: list[float]

    @property
    def total(self) -> int:
        return sum(len(units) for _, units in self.pool.cells)


def ladder(pool: Pool, score: np.ndarray, width: Sequence[int], round_to: int, floor: float) -> Ladder:
    """All that a pool can lose: the same share of every cell, and at least one unit and `floor` of every family stay.

    Arguments:
        pool: the units.
        score: importance by unit, comparable between families.
        width: channels that one unit of each family takes up.
        round_to: what is left of each family is a multiple of this.
        floor: the share of every family that stays.
    """
    step = math.gcd(*(len(units) for _, units in pool.cells))
    sizes: dict[int, int] = {}
    for family, units in pool.cells:
        sizes[family] = sizes.get(family, 0) + len(units)
    highest = min(step - 1, int((1 - floor) * step + 1e-9))
    if pool.equal and round_to == 1 and highest < 3 <= min(sizes.values()):
        return overlapping(pool, score, sum(sizes.values()), floor)
    order = [units[np.lexsort((units, score[units]))] for _, units in pool.cells]
    levels = np.arange(highest + 1)
    for family, n in sizes.items():
        levels = levels[(n // step * (step - levels) * width[family] % round_to == 0) | (levels == 0)]
    sums = sum(score[units].reshape(step, -1).sum(1) for units in order)
    each = sum(sizes.values()) // step
    taken = np.add.reduceat(sums[: levels[-1]], levels[:-1]) if len(levels) > 1 else np.zeros(0)
    price = taken / (np.diff(levels) * each)
    return Ladder(
        pool,
        lambda k: np.concatenate([units[: levels[k] * (len(units) // step)] for units in order]),
        (levels * each).tolist(),
        [0.0, *np.maximum.accumulate(price).tolist()],  # rounding in the sums must not put a step before the one below it
    )


def overlapping(pool: Pool, score: np.ndarray, total: int, floor: float) -> Ladder:
    """A ladder of quarters where rows overlap, so that no common share of every cell exists."""
    sets, price = [np.zeros(0, np.int64)], [0.0]
    for share in (0.25, 0.5, 0.75):
        if share > 1 - floor:
            break
        gone = balanced(Pool(pool.cells, share, pool.equal, pool.gone), score, int(share * total))
        if len(gone) > len(sets[-1]):
            fresh = np.setdiff1d(gone, sets[-1])
            least = price[-1] if len(sets) > 1 else -math.inf
            price.append(max(least, float(score[fresh].mean())))
            sets.append(gone)
    return Ladder(pool, lambda k: sets[k], [len(s) for s in sets], price)


def begun(ladders: Sequence[Ladder], held: np.ndarray) -> None:
    """Make the steps free that take nothing but what is gone already: they come first, whatever the price of others.

    Arguments:
        ladders: made with scores by which, within a family, what is gone scores lowest.
        held: for each class whether it is gone, shape (labels,).
    """
    for rung in ladders:
        for k in range(1, len(rung.count)):
            if not held[rung.gone(k)].all():
                break
            rung.price[k] = -math.inf


def in_order(ladders: Sequence[Ladder]) -> list[int]:
    """The order in which ladders that compete are climbed, by price: for each step the ladder that takes it.

    Ties go to the ladder that stands first.
    """
    keys = [(rung.price[k], i, k) for i, rung in enumerate(ladders) for k in range(1, len(rung.count))]
    return [i for _, i, _ in sorted(keys)]


def merged(groups: Sequence[Sequence[int]], ladders: Sequence[Ladder]) -> list[int]:
    """One order for groups of ladders that do not compete with each other: all lose the same share of their units.

    Arguments:
        groups: positions in `ladders` of those that compete.
        ladders: of all pools.
    """
    keys = []
    for g, group in enumerate(groups):
        mine = [ladders[i] for i in group]
        total, gone, rungs = sum(rung.total for rung in mine), 0, [0] * len(mine)
        for position, i in enumerate(in_order(mine)):
            gone += mine[i].count[rungs[i] + 1] - mine[i].count[rungs[i]]
            rungs[i] += 1
            keys.append((gone / total, g, position, group[i]))
    return [i for *_, i in sorted(keys)]


def climbed(ladders: Sequence[Ladder], sequence: Iterable[int]) -> list[int]:
    """The rung of each ladder after some steps."""
    rungs = [0] * len(ladders)
    for i in sequence:
        rungs[i] += 1
    return rungs


def removed(ladders: Sequence[Ladder], rungs: Sequence[int], size: int) -> np.ndarray:
    """Which classes are gone, shape (size,)."""
    gone = np.zeros(size, bool)
    for rung, k in zip(ladders, rungs, strict=True):
        gone[rung.gone(k)] = True
    return gone


def share_of_units(ladders: Sequence[Ladder], ratio: float) -> list[int]:
    """The rungs at which at most `ratio` of all units of competing ladders are gone, those of the lowest price.

    A step that would go past the share is not taken, and nothing later of that ladder; others may still fit.
    """
    room = int(ratio * sum(rung.total for rung in ladders) + 1e-9)
    rungs = [0] * len(ladders)
    stopped: set[int] = set()
    for i in in_order(ladders):
        if i in stopped:
            continue
        taken = ladders[i].count[rungs[i] + 1] - ladders[i].count[rungs[i]]
        if taken > room:
            stopped.add(i)
            continue
        room -= taken
        rungs[i] += 1
    return rungs
