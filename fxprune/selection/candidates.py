"""What can be removed: groups of families that must lose the same share of their units, and the candidates of each group.

*Groups.* Units that fill the rows of a rectangle (groups of a convolution, packed q/k/v, recurrent layers of one width) are
chosen row by row: each row loses equally many units, not the same ones. A family is split into strata, the sets of units that
occur in the same rows, and every stratum of a group loses the same share, so that every tensor stays a rectangle.

*Candidates* are nested sets of units, lowest scores first. Level 0 of a group removes nothing; a step goes from one level to
the next. What is removed of a model is an allocation: a level for each group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fxprune.passes.coupling.components import smallest_connected

SECONDS = 5.0  # for one integer program


@dataclass(slots=True)
class Group:
    """Families that lose the same share of their units.

    Attributes:
        strata: (family, units) that the constraints tell apart; the units ascend.
        ratio: the share to remove.
        equal: matrices of units whose rows must keep equally many entries.
        removed: units that were removed by an earlier step.
    """

    strata: list[tuple[int, np.ndarray]]
    ratio: float
    equal: list[np.ndarray] = field(default_factory=list)
    removed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def families(self) -> list[int]:
        """Its families, each once."""
        return list(dict.fromkeys(family for family, _ in self.strata))

    @property
    def sizes(self) -> dict[int, int]:
        """The number of units of each family."""
        found: dict[int, int] = {}
        for family, units in self.strata:
            found[family] = found.get(family, 0) + len(units)
        return found


def form_groups(
    families: Sequence[np.ndarray],
    ratios: Sequence[float],
    equal: Sequence[np.ndarray],
    size: int,
    removed: np.ndarray | None = None,
) -> list[Group]:
    """Families split into strata by the constraints, and joined where one constraint spans several.

    Arguments:
        families: the units of each family.
        ratios: the share of units to remove from each; a group takes the smallest of its families.
        equal: matrices of units whose rows must keep equally many entries.
        size: number of labels; units are labels.
        removed: for each label whether an earlier step removed it, shape (size,).
    """
    family_of = np.full(size, -1, np.int64)
    for i, units in enumerate(families):
        family_of[units] = i
    pattern = np.zeros(size, np.uint64)  # a hash of the rows that a unit occurs in
    rng = np.random.default_rng(0)
    constrained: list[tuple[int, np.ndarray]] = []
    edges: list[tuple[int, int]] = []
    for matrix in equal:
        key = np.asarray(rng.integers(1, 1 << 62, size=matrix.shape[0]), dtype=np.uint64)
        units, hashes = hash_rows(matrix, key)
        mine = family_of[units] >= 0
        if mine.any():
            np.add.at(pattern, units[mine], hashes[mine])
            members = np.unique(family_of[units[mine]]).tolist()
            constrained.append((members[0], matrix))
            edges += [(members[0], other) for other in members[1:]]
    ends = np.array(edges, np.int64).reshape(-1, 2)
    root = smallest_connected(np.arange(len(families)), ends[:, 0], ends[:, 1])
    groups: dict[int, Group] = {}
    for i, units in enumerate(families):
        group = groups.setdefault(int(root[i]), Group([], ratios[i]))
        group.ratio = min(group.ratio, ratios[i])
        group.strata += [(i, stratum) for stratum in split_by(units, pattern[units])]
    for family, matrix in constrained:
        groups[int(root[family])].equal.append(matrix)
    if removed is not None:
        for group in groups.values():
            units = np.concatenate([units for _, units in group.strata])
            group.removed = units[removed[units]]
    return list(groups.values())


def hash_rows(matrix: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The units of a constraint that do not occur equally often in all rows, and a hash of how often each does in which."""
    rows, columns = matrix.shape
    units = matrix.reshape(-1)
    row = np.repeat(np.arange(rows), columns)
    distinct, inverse = np.unique(units, return_inverse=True)
    if rows > 1 and len(distinct) == len(units):  # no unit occurs twice
        return units, key[row]
    counts = np.zeros((rows, len(distinct)), np.int32)
    np.add.at(counts, (row, inverse.reshape(-1)), 1)
    uneven = (counts != counts[:1]).any(0)
    return distinct[uneven], (counts[:, uneven].astype(np.uint64) * key[:, None]).sum(0, dtype=np.uint64)


def split_by(units: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Units with equal values together, in the order of the values; ascending units stay ascending."""
    if bool((values == values[0]).all()):
        return [units]
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
    return np.split(units[order], ends)


def solve_shared_rows(group: Group, score: np.ndarray, share: float, wanted: int) -> np.ndarray:
    """The units to remove where rows share units, so that strata have no common share.

    An integer program: of each family at most `share` goes, every row of a constraint loses equally many entries, as many
    units as possible go (at most `wanted` of a row), and of those the lowest scored. Units that were removed before stay
    removed. Empty where no solution is found in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # it takes half a second, and few models need it
    from scipy.sparse import csr_matrix

    units = np.unique(np.concatenate([units for _, units in group.strata]))
    column = {int(u): i for i, u in enumerate(units)}
    n, extra = len(units), len(group.equal)  # a variable for each unit, and one for what each constraint's rows lose
    entries: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []
    for c, matrix in enumerate(group.equal):
        for line in matrix:
            entries += [(len(low), column[u], 1.0) for u in line.tolist() if u in column]
            entries.append((len(low), n + c, -1.0))
            low.append(0.0)
            high.append(0.0)
    for family, size in group.sizes.items():
        mine = [column[u] for f, members in group.strata if f == family for u in members.tolist()]
        entries += [(len(low), at, 1.0) for at in mine]
        low.append(0.0)
        high.append(float(int(share * size + 1e-9)))
    rows, columns, values = zip(*entries, strict=True)
    above = score[units] - min(float(score[units].min()), 0.0)
    scale = max(float(above.max()), 1e-30)
    found = milp(
        np.r_[above / scale - 2.0, np.zeros(extra)],
        constraints=LinearConstraint(csr_matrix((values, (rows, columns)), shape=(len(low), n + extra)), low, high),
        bounds=Bounds(
            np.r_[np.isin(units, group.removed).astype(float), np.zeros(extra)],
            np.r_[np.ones(n), np.full(extra, float(wanted))],
        ),
        integrality=np.ones(n + extra),
        options={"time_limit": SECONDS},
    )
    return np.zeros(0, np.int64) if found.x is None else units[np.round(found.x[:n]).astype(bool)]


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
    order = [
        m[:, np.argsort(score[m[0]], kind="stable")]
        if len(m) == 1
        else np.take_along_axis(m, np.argsort(score[m], axis=1, kind="stable"), 1)
        for m in matrices
    ]
    levels = np.arange(highest + 1)
    for family, n in group.sizes.items() if round_to > 1 else ():
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
