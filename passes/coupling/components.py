"""Connected components of labels: which labels are one unit under the ties reported so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from fxprune.passes.ir.constraints import Tie, flatten
from fxprune.passes.ir.labels import compress


class Components:
    """The units of a number of labels, which grow as ties are added.

    Label 0 ties nothing together: a label that is tied to it is frozen.

    Attributes:
        unit_of: the smallest label of each label's component.
        ties: all that were added.
        tied_to_zero: for each tie that held label 0, the labels on its other side, and the node.
    """

    def __init__(self, size: int) -> None:
        self.unit_of = np.arange(size)
        self.ties: list[Tie] = []
        self.tied_to_zero: list[tuple[np.ndarray, int]] = []

    def add(self, ties: Sequence[Tie]) -> None:
        rest = list(ties) if self.ties else tie_ranges(self.unit_of, ties)
        self.ties += ties
        if not rest:
            return
        sides = [edges(tie) for tie in rest]
        a, b = np.concatenate([a for a, _ in sides]), np.concatenate([b for _, b in sides])
        differs = a != b
        zero = ((a == 0) | (b == 0)) & differs
        if zero.any():
            which = np.repeat(np.arange(len(sides)), [len(a) for a, _ in sides])[zero]
            other = np.maximum(a, b)[zero]
            self.tied_to_zero += [(other[which == i], rest[i].node) for i in np.unique(which)]
            differs &= ~zero
        self.unit_of = smallest_connected(self.unit_of, a[differs], b[differs])


def edges(tie: Tie) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of labels that join what a tie joins, if no label of it is 0.

    Where all labels of either side meet all of the other one, as masks by token do, the first one of each joins them.
    """
    a, b = tie.a, tie.b
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim():
        across = [d for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m]
        wide = {a.shape[d] == 1 for d in across}
        if len(wide) > 1 and bool((a != 0).all()) and bool((b != 0).all()):
            first = [compress(x, set(range(x.dim())).difference(across)) for x in (a, b)]
            found = [replace(tie, a=x, b=y).sides() for x, y in ((first[0], b), (a, first[1]))]
            return np.concatenate([x for x, _ in found]), np.concatenate([y for _, y in found])
    return tie.sides()


def tie_ranges(unit_of: np.ndarray, ties: Sequence[Tie]) -> list[Tie]:
    """Settle the ties between vectors of consecutive labels, as nearly all are, vector by vector; returns the other ties.

    Vectors that overlap others without being the same are among those. `unit_of` ties nothing yet, and is changed.
    """
    vectors = {id(v): (start, v) for t in ties if t.a.shape == t.b.shape for v, start in zip((t.a, t.b), t.starts, strict=True)}
    known = {k: (start, len(v)) for k, (start, v) in vectors.items() if start is not None}
    unknown = {k: flatten(v) for k, (_, v) in vectors.items() if k not in known}
    ends = {k: (v, int(v[0]), int(v[-1]) + 1) for k, v in unknown.items() if len(v)}
    ranges = known | {
        k: (start, end - start)
        for k, (v, start, end) in ends.items()
        if start > 0 and end - start == len(v) and bool((v[1:] > v[:-1]).all())
    }
    leader = {r: r for r in apart(sorted(set(ranges.values())))}

    def find(r: tuple[int, int]) -> tuple[int, int]:
        while leader[r] != r:
            leader[r] = leader[leader[r]]
            r = leader[r]
        return r

    rest = []
    for tie in ties:
        a, b = ranges.get(id(tie.a)), ranges.get(id(tie.b))
        if tie.a.shape == tie.b.shape and a in leader and b in leader and a is not None and b is not None and a[1] == b[1]:
            a, b = find(a), find(b)
            leader[max(a, b)] = min(a, b)
        else:
            rest.append(tie)
    for r in leader:
        first = find(r)
        if first != r:
            unit_of[r[0] : r[0] + r[1]] = unit_of[first[0] : first[0] + first[1]]
    return rest


def apart(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of sorted ranges (start, length) those that overlap no other one."""
    overlapping: set[tuple[int, int]] = set()
    end, last = 0, (0, 0)
    for r in ranges:
        if r[0] < end:
            overlapping |= {r, last}
        if r[0] + r[1] > end:
            end, last = r[0] + r[1], r
    return [r for r in ranges if r not in overlapping]


def smallest_connected(unit_of: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest member of each number's connected component, the edges being (a[i], b[i]).

    Arguments: `unit_of`, the same without these edges (the number itself where it has none).

    Roots are hooked to smaller roots and paths halved, all at once (Shiloach and Vishkin, An O(log n) parallel connectivity
    algorithm, 1982).
    """
    a, b = unit_of[a], unit_of[b]
    differs = a != b
    a, b = a[differs], b[differs]
    if not len(a):
        return unit_of
    root, met = unit_of.copy(), np.concatenate([a, b])  # only roots that are met change
    while len(a):
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(root, high, low)  # of several the smallest: with any of them, a star would shrink by one arm a round
        while True:
            further = root[root[high]]
            if np.array_equal(further, root[high]):
                break
            root[high] = further
        a, b = root[a], root[b]
        differs = a != b
        a, b = a[differs], b[differs]
    while not np.array_equal(further := root[root[met]], root[met]):
        root[met] = further
    return root[unit_of]
