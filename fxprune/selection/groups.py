"""Form groups of families that must lose the same share of their units, so that every tensor stays a full rectangle.

Units that fill the rows of a rectangle (groups of a convolution, packed q/k/v, recurrent layers of one width) are chosen row
by row: each row loses equally many units, not the same ones. A family is split into strata, the sets of units that occur in
the same rows, and every stratum of a group loses the same share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

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
        equal: matrices of classes whose rows must keep equally many entries.
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
