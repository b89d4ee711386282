"""Select: which units stay, family by family, so that every tensor stays a full rectangle.

Units that fill the rows of a rectangle (groups, packed q/k/v, recurrent layers of one width) are chosen row by row: each row
loses equally many, not the same ones. Where that cannot be arranged freely, each pattern of rows loses the same share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix


@dataclass(slots=True)
class Pool:
    """Units that lose the same share.

    Attributes:
        cells: (family, units) that the constraints tell apart; the units ascend.
        ratio: that share.
        equal: the constraints.
        gone: units that went before.
    """

    cells: list[tuple[int, np.ndarray]]
    ratio: float
    equal: list[np.ndarray] = field(default_factory=list)
    gone: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def make_pools(families: Sequence[np.ndarray], ratios: Sequence[float], equal: Sequence[np.ndarray], size: int) -> list[Pool]:
    """Families split into cells by the constraints they are under, and joined where one constraint spans several.

    Arguments:
        families: the units of each family.
        ratios: the share of units to remove from each.
        equal: matrices of classes whose rows must keep equally many entries.
        size: number of labels; units are labels.
    """
    family_of = np.full(size, -1, np.int64)
    for i, units in enumerate(families):
        family_of[units] = i
    pattern = np.zeros(size, np.uint64)
    parent = list(range(len(families)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    rng = np.random.default_rng(0)
    constrained: list[tuple[int, np.ndarray]] = []
    at = np.empty(size, np.int64)
    for matrix in equal:
        rows = matrix.shape[0]
        key = np.asarray(rng.integers(1, 1 << 62, size=rows), dtype=np.uint64)
        units = matrix.reshape(-1)
        at[units] = np.arange(len(units))
        if rows > 1 and bool((at[units] == np.arange(len(units))).all()):  # no unit occurs twice
            row = np.repeat(np.arange(rows), matrix.shape[1])
            mine = family_of[units] >= 0
            pattern[units[mine]] += key[row[mine]]
        else:
            units, inverse = np.unique(matrix, return_inverse=True)
            counts = np.zeros((rows, len(units)), np.int32)
            np.add.at(counts, (np.repeat(np.arange(rows), matrix.shape[1]), inverse.reshape(-1)), 1)
            uneven = (counts != counts[:1]).any(0)
            mine = uneven & (family_of[units] >= 0)
            pattern[units[mine]] += (counts[:, mine].astype(np.uint64) * key[:, None]).sum(0, dtype=np.uint64)
        if not mine.any():
            continue
        members = np.unique(family_of[units[mine]])
        constrained.append((int(members[0]), matrix))
        for other in members[1:]:
            parent[find(int(other))] = find(int(members[0]))
    made: dict[int, Pool] = {}
    for i, units in enumerate(families):
        pool = made.setdefault(find(i), Pool([], ratios[i]))
        pool.ratio = min(pool.ratio, ratios[i])
        mine = pattern[units]
        if bool((mine == mine[0]).all()):
            pool.cells.append((i, units))
            continue
        order = np.argsort(mine, kind="stable")
        steps = np.flatnonzero(mine[order][1:] != mine[order][:-1]) + 1
        ends, ordered = steps.tolist(), units[order]
        pool.cells += [(i, ordered[a:b]) for a, b in zip([0, *ends], [*ends, len(ordered)], strict=True)]
    for family, matrix in constrained:
        made[find(family)].equal.append(matrix)
    return list(made.values())


def resume(pools: Sequence[Pool], held: np.ndarray) -> list[Pool]:
    """The pools as they go on from an earlier choice; `held` says for each class whether it is gone, shape (labels,)."""
    for pool in pools:
        units = np.concatenate([units for _, units in pool.cells])
        pool.gone = units[held[units]]
    return list(pools)


def choose(pool: Pool, score: np.ndarray, width: Sequence[int], round_to: int) -> np.ndarray:
    """The units of a pool to remove: the lowest scored of each cell, the same share of every cell.

    Arguments:
        pool: the units.
        score: importance by unit.
        width: channels that one unit of each family takes up.
        round_to: what is left of each family is a multiple of this, or nothing of the pool goes.
    """
    step = math.gcd(*(len(units) for _, units in pool.cells))
    families = {family: 0 for family, _ in pool.cells}
    for family, units in pool.cells:
        families[family] += len(units)

    def fits(k: int) -> bool:
        return all(n // step * (step - k) * width[family] % round_to == 0 for family, n in families.items())

    wanted = sum(int(pool.ratio * n + 1e-9) for n in families.values())
    steps = next((k for k in range(int(pool.ratio * step + 1e-9), 0, -1) if fits(k)), 0)
    if pool.equal and round_to == 1 and steps * sum(n // step for n in families.values()) < 0.75 * wanted:
        balanced_choice = balanced(pool, score, wanted)
        if len(balanced_choice) > steps * sum(n // step for n in families.values()):
            return balanced_choice
    cells = [units for _, units in pool.cells]
    if len({len(units) for units in cells}) == 1:  # as many groups are: all at once
        matrix = np.stack(cells)
        lowest = ranked(score[matrix])[:, : steps * (matrix.shape[1] // step)]
        return np.take_along_axis(matrix, lowest, 1).reshape(-1)
    return np.concatenate([units[ranked(score[units])[: steps * (len(units) // step)]] for units in cells])


MANY_UNITS = 1 << 8  # values in a row from which on it takes longer to sort them than to see whether any are equal


def ranked(values: np.ndarray) -> np.ndarray:
    """Positions along the last dimension from the lowest value to the highest, equal ones in their own order.

    >>> ranked(np.array([[2.0, 1.0, 1.0], [3.0, 1.0, 2.0]])).tolist()
    [[1, 2, 0], [1, 2, 0]]
    """
    if values.shape[-1] < MANY_UNITS:
        return np.argsort(values, axis=-1, kind="stable")
    order = np.argsort(values, axis=-1)  # several times as fast as the stable one, which only equal values need
    found = np.take_along_axis(values, order, -1)
    distinct = bool((found[..., 1:] > found[..., :-1]).all())  # NaN is not
    return order if distinct else np.argsort(values, axis=-1, kind="stable")


def balanced(pool: Pool, score: np.ndarray, wanted: int) -> np.ndarray:
    """The units to remove where rows overlap so that no common share of every cell exists.

    A small integer program: of each family at most its ratio goes, every row of a constraint loses equally many entries,
    as many units as possible go, and of those the lowest scored. Those that are gone go again.
    """
    units = np.unique(np.concatenate([units for _, units in pool.cells]))
    column = {int(u): i for i, u in enumerate(units)}
    n, extra = len(units), len(pool.equal)
    rows: list[int] = []
    cols: list[int] = []
    values: list[float] = []
    low: list[float] = []
    high: list[float] = []
    count = 0
    for c, matrix in enumerate(pool.equal):
        for line in matrix:
            for unit in line:
                if int(unit) in column:
                    rows.append(count)
                    cols.append(column[int(unit)])
                    values.append(1.0)
            rows.append(count)
            cols.append(n + c)
            values.append(-1.0)
            low.append(0.0)
            high.append(0.0)
            count += 1
    by_family: dict[int, list[int]] = {}
    for family, members in pool.cells:
        by_family.setdefault(family, []).extend(column[int(u)] for u in members)
    for columns in by_family.values():
        rows += [count] * len(columns)
        cols += columns
        values += [1.0] * len(columns)
        low.append(0.0)
        high.append(float(int(pool.ratio * len(columns) + 1e-9)))
        count += 1
    above = score[units] - min(float(score[units].min()), 0.0)
    scale = max(float(above.max()), 1e-30)
    cost = np.r_[above / scale - 2.0, np.zeros(extra)]
    constraint = LinearConstraint(csr_matrix((values, (rows, cols)), shape=(count, n + extra)), low, high)
    surely = np.r_[np.isin(units, pool.gone).astype(float), np.zeros(extra)]
    bounds = Bounds(surely, np.r_[np.ones(n), np.full(extra, float(wanted))])
    found = milp(
        cost,
        constraints=constraint,
        bounds=bounds,
        integrality=np.ones(n + extra),
        options={"time_limit": 5.0},
    )
    if found.x is None:
        return np.zeros(0, np.int64)
    return units[np.round(found.x[:n]).astype(bool)]
