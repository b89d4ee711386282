"""What the rules say of labels: ties, frozen labels, and constraints on the choice; collected as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fxprune.passes.labels import Factor, Labels


@dataclass(slots=True)
class Event:
    """An array of labels with the reason or the place it came from; `node` is the index of the graph node."""

    labels: Tensor | np.ndarray
    node: int
    why: str = ""


@dataclass(slots=True)
class Pair:
    """Two arrays of labels to be removed together; a broadcast one repeats a label of one side. Vectors are of NumPy."""

    a: Tensor | np.ndarray
    b: Tensor | np.ndarray
    broadcast: bool
    node: int


@dataclass(slots=True)
class Ties:
    """Everything the rules report, in the order it was met.

    Attributes:
        pairs: two arrays of labels to be removed together; `broadcast` ones repeat a label of one side.
        frozen: labels that are never removed, with the reason.
        coarse: matrices of labels whose rows are heads, to be removed whole when heads are the granularity.
        equal: matrices of labels whose rows must keep equally many entries.
        product: matrices of labels whose rows must keep the same columns.
        first_fresh: the first label made on the way: those below it belong to the model's own tensors.
        leaves: the labels of the model's own tensors, where their dimensions may become composed (empty: they may not).
        settled: those dimensions that are composed already.
        composed: leaf dimensions, by first label, whose entries belong to several labels at once (an outer product).
        seeking_heads: whether this reading only looks for heads.
        maker: the function or kind of module whose node is being read: what a new tensor's size can be changed through.
        literals: sizes written out among that node's arguments which the rewriter does not know how to change.
    """

    pairs: list[Pair] = field(default_factory=list)
    frozen: list[Event] = field(default_factory=list)
    coarse: list[Event] = field(default_factory=list)
    equal: list[Event] = field(default_factory=list)
    product: list[Event] = field(default_factory=list)
    node: int = -1
    size: int = 1
    seeking_heads: bool = False
    maker: str = ""
    literals: frozenset[int] = frozenset()
    leaves: dict[str, Labels] = field(default_factory=dict)
    starts: dict[int, tuple[str, int, int]] | None = None
    settled: frozenset[tuple[str, int]] = frozenset()
    composed: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    first_fresh: int = 0

    def __post_init__(self) -> None:
        self.first_fresh = self.size

    @property
    def leaf_starts(self) -> dict[int, tuple[str, int, int]]:
        """Leaf dimensions with labels of their own, by their first label: tensor, dimension and size."""
        if self.starts is None:
            self.starts = {}
            for name, labels in self.leaves.items():
                for f in labels:
                    if len(f.nest) == 1 and (name, f.nest[0]) not in self.settled and f.flat[-1] - f.flat[0] == len(f.flat) - 1:
                        self.starts[int(f.flat[0])] = (name, f.nest[0], len(f.flat))
        return self.starts

    def fresh(self, count: int) -> Tensor:
        """New labels, `count` of them."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def head_rows(self, rows: Tensor) -> None:
        self.coarse.append(Event(rows, self.node))

    def tie(self, a: Tensor, b: Tensor, *, broadcast: bool = False) -> None:
        """`a` and `b` broadcast against each other; a tie with label 0 freezes."""
        if a is not b:
            self.pairs.append(Pair(a, b, broadcast or a.shape != b.shape, self.node))

    def join(self, f: Factor, g: Factor) -> None:
        """Two lines of one length, removed together."""
        if f.base is not g.base:
            self.pairs.append(Pair(f.flat, g.flat, False, self.node))

    def freeze(self, labels: Tensor | np.ndarray, why: str) -> None:
        self.frozen.append(Event(labels, self.node, why))

    def keep_rows_equal(self, f: Factor) -> None:
        if len(f.nest) > 1:
            self.equal.append(Event(f.rows(), self.node))

    def same_columns(self, f: Factor) -> None:
        if len(f.nest) > 1:
            self.product.append(Event(f.rows(), self.node))


def flat(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The two sides of a pair as flat arrays of equal length."""
    a, b = pair.a, pair.b
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a, b
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)
    return a.reshape(-1).numpy(), b.reshape(-1).numpy()


def row(labels: Tensor | np.ndarray) -> np.ndarray:
    """An array of labels as one row of numbers."""
    return labels if isinstance(labels, np.ndarray) else labels.reshape(-1).numpy()


def chained(events: list[Event], *, columns: bool = False) -> list[Pair]:
    """Ties that make every row (or every column) of each matrix one unit."""
    along = 0 if columns else 1
    return [Pair(m.labels.amax(along, keepdim=True).expand_as(m.labels), m.labels, True, m.node) for m in events]


def components(size: int, pairs: list[Pair]) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """The connected component of each of `size` labels, and for each pair that met label 0 the other labels and its node.

    Label 0 ties nothing together: to meet it is to be frozen.
    """
    if not pairs:
        return np.arange(size), []
    sides = [flat(pair) for pair in pairs]
    rows, cols = np.concatenate([a for a, _ in sides]), np.concatenate([b for _, b in sides])
    differs = rows != cols
    zero = ((rows == 0) | (cols == 0)) & differs
    stopped: list[tuple[np.ndarray, int]] = []
    if zero.any():
        which = np.repeat(np.arange(len(sides)), [len(a) for a, _ in sides])[zero]
        met = np.maximum(rows, cols)[zero]
        stopped = [(met[which == i], pairs[i].node) for i in np.unique(which)]
        differs &= ~zero
    rows, cols = rows[differs], cols[differs]
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, cols)), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64), stopped
