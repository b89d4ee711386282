"""What the rules say of labels: ties, frozen labels, and constraints on the choice; collected as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.labels import Factor, Labels

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
class Pair:
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
class Ties:
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
        maker: the function or kind of module whose node is being read: what a new tensor's size can be changed through.
        literals: sizes written out among that node's arguments which the rewriter does not know how to change.
    """

    pairs: list[Pair] = field(default_factory=list)
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
        return Factor(labels, tuple(d for d in f.nest if d in rest))

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
            self.pairs.append(Pair(a, b, broadcast or a.shape != b.shape, self.node))

    def join(self, f: Factor, g: Factor) -> None:
        """Two lines of one length, removed together."""
        if f.base is not g.base:
            self.pairs.append(Pair(f.flat, g.flat, False, self.node, (f.start, g.start)))

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
    if a.dim() > 1 and a.numel() > LARGE:
        rows, cols = a.reshape(-1, a.shape[-1]).numpy(), b.reshape(-1, b.shape[-1]).numpy()
        first = unlike_rows(rows, cols)
        return rows[first].reshape(-1), cols[first].reshape(-1)
    return a.reshape(-1).numpy(), b.reshape(-1).numpy()


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


def row(labels: Tensor | np.ndarray) -> np.ndarray:
    """An array of labels as one row of numbers."""
    return labels if isinstance(labels, np.ndarray) else labels.reshape(-1).numpy()


def chained(events: list[Event], *, columns: bool = False) -> list[Pair]:
    """Ties that make every row (or every column) of each matrix one unit."""
    along = 0 if columns else 1
    matrices = [(torch.from_numpy(e.array), e.node) for e in events]
    return [Pair(m.amax(along, keepdim=True).expand_as(m), m, True, node) for m, node in matrices]


def components(
    size: int, pairs: Sequence[Pair], part: np.ndarray | None = None
) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """The smallest label tied to each of `size` labels, and for each pair that met label 0 the other labels and its node.

    Label 0 ties nothing together: to meet it is to be frozen. `part` is what earlier pairs came to; these add to it.
    """
    rest = pairs
    if part is None:
        part = np.arange(size)
        rest = whole_lines(part, pairs)
    if not rest:
        return part, []
    sides = [flat(pair) for pair in rest]
    rows, cols = np.concatenate([a for a, _ in sides]), np.concatenate([b for _, b in sides])
    differs = rows != cols
    zero = ((rows == 0) | (cols == 0)) & differs
    stopped: list[tuple[np.ndarray, int]] = []
    if zero.any():
        which = np.repeat(np.arange(len(sides)), [len(a) for a, _ in sides])[zero]
        met = np.maximum(rows, cols)[zero]
        stopped = [(met[which == i], rest[i].node) for i in np.unique(which)]
        differs &= ~zero
    return smallest_tied(part, rows[differs], cols[differs]), stopped


def whole_lines(part: np.ndarray, pairs: Sequence[Pair]) -> list[Pair]:
    """Settle the pairs of arrays that each hold consecutive labels, as nearly all do, array by array; returns the others.

    Arrays that overlap others without being the same are among those. `part` ties nothing yet, and is changed.
    """
    lines = {id(v): (start, v) for p in pairs if p.a.shape == p.b.shape for v, start in zip((p.a, p.b), p.starts, strict=True)}
    known = {k: (start, len(v)) for k, (start, v) in lines.items() if start is not None}
    vectors = {k: row(v) for k, (_, v) in lines.items() if k not in known}
    ends = {k: (v, int(v[0]), int(v[-1]) + 1) for k, v in vectors.items() if len(v)}
    spans = known | {
        k: (start, end - start)
        for k, (v, start, end) in ends.items()
        if start > 0 and end - start == len(v) and bool((v[1:] > v[:-1]).all())
    }
    distinct = sorted(set(spans.values()))
    shared: set[tuple[int, int]] = set()
    end, last = 0, (0, 0)
    for span in distinct:
        if span[0] < end:
            shared |= {span, last}
        if span[0] + span[1] > end:
            end, last = span[0] + span[1], span
    lead = {span: span for span in distinct if span not in shared}

    def find(span: tuple[int, int]) -> tuple[int, int]:
        while lead[span] != span:
            lead[span] = lead[lead[span]]
            span = lead[span]
        return span

    rest = []
    for pair in pairs:
        a, b = spans.get(id(pair.a)), spans.get(id(pair.b))
        if pair.a.shape == pair.b.shape and a in lead and b in lead and a is not None and b is not None and a[1] == b[1]:
            a, b = find(a), find(b)
            lead[max(a, b)] = min(a, b)
        else:
            rest.append(pair)
    for span in lead:
        first = find(span)
        if first != span:
            part[span[0] : span[0] + span[1]] = part[first[0] : first[0] + first[1]]
    return rest


def smallest_tied(part: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The smallest member of each number's connected component, the edges being (rows[i], cols[i]).

    Arguments: `part`, the smallest member of each number's component without these edges (the number itself where it has
    none).

    Roots are hooked to smaller roots and paths halved, all at once (Shiloach and Vishkin, An O(log n) parallel connectivity
    algorithm, 1982).
    """
    rows, cols = part[rows], part[cols]
    apart = rows != cols
    rows, cols = rows[apart], cols[apart]
    if not len(rows):
        return part
    root, met = part.copy(), np.concatenate([rows, cols])  # only roots that are met change
    while len(rows):
        low, high = np.minimum(rows, cols), np.maximum(rows, cols)
        np.minimum.at(root, high, low)  # of several the smallest: with any of them, a star would shrink by one arm a round
        while True:
            further = root[root[high]]
            if np.array_equal(further, root[high]):
                break
            root[high] = further
        rows, cols = root[rows], root[cols]
        apart = rows != cols
        rows, cols = rows[apart], cols[apart]
    while not np.array_equal(further := root[root[met]], root[met]):
        root[met] = further
    return root[part]


def whole(classes: np.ndarray) -> np.ndarray:
    """For each row of a matrix, whether it is one class."""
    return (classes == classes[:, :1]).all(1)


def settle_rows(ties: Ties, part: np.ndarray) -> tuple[list[Pair], list[np.ndarray]]:
    """Ties of row labels to the rows that go whole, and the rows (of labels) that must keep an entry.

    A row label that stands for several rows goes with them if all of them are whole. If not, it is frozen, and with it
    those rows that are. Ties make more rows whole, so this is repeated.
    """
    made: list[Pair] = []
    while True:
        held = np.zeros(len(part), bool)
        goes_whole = []
        for r in ties.rows:
            alone = whole(part[r.entries.numpy()])
            goes_whole.append(alone)
            held[r.labels.numpy()[~(alone & (r.entries[:, 0].numpy() != 0))]] = True
        new = []
        for r in ties.rows:
            labels, lead = r.labels.numpy(), r.entries[:, 0].numpy()
            going = ~held[labels] & (part[labels] != part[lead])
            if going.any():
                chosen = torch.from_numpy(going)
                new.append(Pair(r.labels[chosen], r.entries[chosen, 0], False, r.node))
        if not new:
            break
        made += new
        part, _ = components(ties.size, new, part)
    stay: list[np.ndarray] = []
    for r, alone in zip(ties.rows, goes_whole, strict=True):
        kept = held[r.labels.numpy()]
        if kept.any():
            entries = r.entries.numpy()
            ties.frozen.append(Event(r.labels.numpy()[kept], r.node, PART_OF_ROWS))
            ties.frozen.append(Event(entries[kept & alone, 0], r.node, PART_OF_ROWS))
            stay += list(entries[kept & ~alone])
    return made, stay
