"""What the rules say of labels: ties, frozen labels, and constraints on the choice; collected as arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.ir.labels import Factor, Labels

MANY = 16
PART_OF_ROWS = "is a row of channels that go one by one"


@dataclass(slots=True)
class Event:
    """An array of labels with the reason or the place it came from; `node` is the index of the graph node."""

    labels: Tensor | np.ndarray
    node: int
    why: str = ""

    @property
    def array(self) -> np.ndarray:
        return self.labels if isinstance(self.labels, np.ndarray) else self.labels.numpy()


@dataclass(slots=True)
class Tie:
    """Two arrays of labels to be removed together.

    Attributes:
        a, b: the arrays; vectors are of NumPy.
        broadcast: whether a label of one side is repeated.
        node: index of the graph node.
        starts: the first labels of vectors that are known to be consecutive and ascending.
    """

    a: Tensor | np.ndarray
    b: Tensor | np.ndarray
    broadcast: bool
    node: int
    starts: tuple[int | None, int | None] = (None, None)


@dataclass(slots=True)
class Rows:
    """Labels that each stand for one row of others: it goes if the row is a single unit that goes, else it stays.

    Attributes:
        labels: one for each row.
        entries: a row of labels for each.
        node: index of the graph node.
    """

    labels: Tensor
    entries: Tensor
    node: int


@dataclass(slots=True)
class Constraints:
    """Everything the rules report, in the order it was met.

    Attributes:
        pairs: two arrays of labels to be removed together; `broadcast` ones repeat a label of one side.
        frozen: labels that are never removed, with the reason.
        coarse: matrices of labels whose rows are heads, to be removed whole when heads are the granularity.
        equal: matrices of labels whose rows must keep equally many entries.
        product: matrices of labels whose rows must keep the same columns.
        lines: labels of which one at least must stay.
        rows: labels that stand for rows of others; `standing` is the set of them.
        alike: values whose entries are all alike, with the one that they are views of; `read_before`: those some call has read.
        pinned: views that are written into and cannot become copies.
        first_fresh: the first label made on the way: those below it belong to the model's own tensors.
        leaves: the labels of the model's own tensors, where their dimensions may become composed (empty: they may not).
        settled: those dimensions that are composed already.
        composed: leaf dimensions, by first label, whose entries belong to several labels at once (an outer product).
        seeking_heads: whether this reading only looks for heads.
        rewrite: what the node that is being read becomes in the pruned program (see `OpSpec`).
        opaque: whether that node is an opaque module, in which nothing that is written out can be changed.
        literals: sizes written out among that node's arguments which the rewriter does not know how to change.
    """

    pairs: list[Tie] = field(default_factory=list)
    frozen: list[Event] = field(default_factory=list)
    coarse: list[Event] = field(default_factory=list)
    equal: list[Event] = field(default_factory=list)
    product: list[Event] = field(default_factory=list)
    lines: list[np.ndarray] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    standing: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    alike: dict[int, int] = field(default_factory=dict)
    read_before: set[int] = field(default_factory=set)
    node: int = -1
    size: int = 1
    seeking_heads: bool = False
    rewrite: Callable[..., Any] | None = None
    opaque: bool = False
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
                    if (
                        len(f.major_to_minor) == 1
                        and (name, f.major_to_minor[0]) not in self.settled
                        and f.flat[-1] - f.flat[0] == len(f.flat) - 1
                    ):
                        self.starts[int(f.flat[0])] = (name, f.major_to_minor[0], len(f.flat))
        return self.starts

    def fresh(self, count: int) -> Tensor:
        """New labels, `count` of them."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def head_rows(self, rows: Tensor) -> None:
        self.coarse.append(Event(rows, self.node))

    def keep_two(self, rows: Tensor) -> None:
        """Each row of labels keeps two entries at least: one without any other one, or of many, one of either half."""
        n = rows.shape[1]
        if n > MANY:
            self.lines += [*rows[:, : n // 2].numpy(), *rows[:, n // 2 :].numpy()]
        elif n > 1:
            self.lines += [line for i in range(n) for line in torch.cat([rows[:, :i], rows[:, i + 1 :]], 1).numpy()]

    def row_labels(self, f: Factor, rest: Sequence[int]) -> Factor:
        """A factor over the dimensions `rest` of another one, for what no longer tells its other entries apart."""
        shape = [n if d in rest else 1 for d, n in enumerate(f.labels.shape)]
        labels = self.fresh(math.prod(shape)).reshape(shape)
        self.standing.update(labels.flatten().tolist())
        self.stand(labels, f.labels)
        return Factor(labels, tuple(d for d in f.major_to_minor if d in rest))

    def stand(self, labels: Tensor, entries: Tensor) -> None:
        """Labels of row type go with the rows of a wider array, where those go whole."""
        rest = [d for d, n in enumerate(labels.shape) if n > 1]
        order = [*rest, *(d for d in range(entries.dim()) if d not in rest)]
        full = entries.expand([max(n, m) for n, m in zip(labels.shape, entries.shape, strict=True)])
        self.rows.append(Rows(labels.flatten(), full.permute(order).reshape(labels.numel(), -1), self.node))

    def stands(self, f: Factor) -> bool:
        """Whether all labels of a factor are of row type."""
        return bool(self.standing) and all(x in self.standing for x in f.flat.tolist())

    def tie(self, a: Tensor, b: Tensor, *, broadcast: bool = False) -> None:
        """`a` and `b` broadcast against each other; a tie with label 0 freezes."""
        if a is not b:
            self.pairs.append(Tie(a, b, broadcast or a.shape != b.shape, self.node))

    def join(self, f: Factor, g: Factor) -> None:
        """Two lines of one length, removed together."""
        if f.base is not g.base:
            self.pairs.append(Tie(f.flat, g.flat, False, self.node, (f.start, g.start)))

    def freeze(self, labels: Tensor | np.ndarray, why: str) -> None:
        self.frozen.append(Event(labels, self.node, why))

    def keep_rows_equal(self, f: Factor) -> None:
        if len(f.major_to_minor) > 1:
            self.equal.append(Event(f.rows(), self.node))

    def same_columns(self, f: Factor) -> None:
        if len(f.major_to_minor) > 1:
            self.product.append(Event(f.rows(), self.node))


def flat(pair: Tie) -> tuple[np.ndarray, np.ndarray]:
    """The two sides of a pair as flat arrays of equal length."""
    a, b = pair.a, pair.b
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a, b
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if a.shape != b.shape:
        a, b = torch.broadcast_tensors(a, b)
    if a.dim() > 1 and a.numel() > LARGE:
        rows, cols = a.reshape(-1, a.shape[-1]).numpy(), b.reshape(-1, b.shape[-1]).numpy()
        first = unlike_rows(rows, cols)
        return rows[first].reshape(-1), cols[first].reshape(-1)
    return a.reshape(-1).numpy(), b.reshape(-1).numpy()


def row(labels: Tensor | np.ndarray) -> np.ndarray:
    """An array of labels as one row of numbers."""
    return labels if isinstance(labels, np.ndarray) else labels.reshape(-1).numpy()


LARGE = 1 << 16  # labels of a pair that are looked through for rows that repeat


def unlike_rows(*matrices: np.ndarray) -> np.ndarray:
    """The numbers of the rows that are not all equal to those of an earlier row, in order: tokens repeat what is tied along
    channels. They are found by their product with random vectors, which takes far less than to sort them.
    """
    rng = np.random.default_rng(0)
    sums = np.zeros(len(matrices[0]), np.uint64)
    for matrix in matrices:
        sums += matrix.astype(np.uint64) @ rng.integers(1, 1 << 62, size=matrix.shape[1]).astype(np.uint64)
    return np.sort(np.unique(sums, return_index=True)[1])
