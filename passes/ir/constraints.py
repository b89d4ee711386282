"""Constraints: what label rules require of a removal, as arrays of labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.ir.labels import Factor

SPAN = 1_000_000  # node numbers of one captured program
PAIRWISE_UP_TO = 16  # entries of a row
COPIES = "is a copy or a constant in a sum over channels, and no parameter sets it to zero"


@dataclass(slots=True)
class LabelArray:
    """An array of labels, the node it was reported at, the reason if it is frozen, and the rows that its own are parts of."""

    labels: Tensor | np.ndarray
    node: int
    why: str = ""
    whole: Tensor | None = None

    @property
    def array(self) -> np.ndarray:
        return self.labels if isinstance(self.labels, np.ndarray) else self.labels.numpy()

    @property
    def flat(self) -> np.ndarray:
        return flatten(self.labels)


@dataclass(slots=True)
class Tie:
    """Two arrays of labels that are removed together, element by element under broadcasting.

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

    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The two sides as vectors of equal length; of large arrays rows that repeat are left out."""
        a, b = self.a, self.b
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return a, b
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        if a.dim() > 1 and a.numel() > DEDUPLICATED_FROM:
            left, right = a.reshape(-1, a.shape[-1]).numpy(), b.reshape(-1, b.shape[-1]).numpy()
            first = distinct_rows(left, right)
            return left[first].reshape(-1), right[first].reshape(-1)
        return a.reshape(-1).numpy(), b.reshape(-1).numpy()


@dataclass(slots=True)
class RowLabels:
    """Labels that each stand for one row of others: it goes if the row is a single unit that goes, else it stays.

    Attributes:
        labels: one for each row.
        entries: a row of labels for each.
        node: index of the graph node.
        whole: whether a row may be made a single unit, so that it can go.
    """

    labels: Tensor
    entries: Tensor
    node: int
    whole: bool = False


@dataclass(slots=True)
class Constraints:
    """What the label rules require of a removal, in the order it was reported.

    Attributes:
        ties: labels that are removed together.
        frozen: labels that are never removed, with the reason.
        head_rows: matrices of labels whose rows are heads, which go whole where heads are the granularity.
        equal_rows: matrices of labels whose rows keep equally many entries.
        same_columns: matrices of labels whose rows keep the same columns, unless they go whole.
        parts: matrices of labels whose rows are all that is read of others.
        some_stay: vectors of labels of which at least one stays.
        at_least: vectors of labels with how many of them stay.
        row_labels: labels that each stand for a row of others.
    """

    ties: list[Tie] = field(default_factory=list)
    frozen: list[LabelArray] = field(default_factory=list)
    head_rows: list[LabelArray] = field(default_factory=list)
    equal_rows: list[LabelArray] = field(default_factory=list)
    same_columns: list[LabelArray] = field(default_factory=list)
    parts: list[LabelArray] = field(default_factory=list)
    some_stay: list[np.ndarray] = field(default_factory=list)
    at_least: list[tuple[np.ndarray, int]] = field(default_factory=list)
    row_labels: list[RowLabels] = field(default_factory=list)


class LabelSet:
    """A set of labels, as a table."""

    def __init__(self, labels: np.ndarray | None = None) -> None:
        self.table = np.zeros(0, bool)  # whose last entry, which stands for all labels beyond it, is False
        if labels is not None:
            self.add(labels)

    def __bool__(self) -> bool:
        return len(self.table) > 0

    def add(self, labels: np.ndarray) -> None:
        top = int(labels.max(initial=-1)) + 1
        if top >= len(self.table) and top:
            self.table = np.concatenate([self.table, np.zeros(2 * top - len(self.table), bool)])
        self.table[labels] = True

    def holds(self, labels: np.ndarray) -> np.ndarray:
        """For each label whether it is in the set."""
        return self.table.take(labels, mode="clip") if len(self.table) else np.zeros(labels.shape, bool)

    def meets(self, labels: np.ndarray) -> bool:
        """Whether any of them is in the set."""
        return len(self.table) > 0 and bool(self.holds(labels).any())


class ConstraintBuilder:
    """Collects what label rules report, each with the node it is reported at, and numbers new labels.

    Arguments:
        size: the number of labels so far, label 0 included.
        first_undetermined: the first label of a constant of the program; those of the model's own tensors are below.
        determined: labels from there on that belong to the model's own tensors all the same.
        about_rows: whether anybody asks which rows keep equally many entries, or the same columns.

    Attributes:
        collected: what was reported since the last `clear`.
        node: index of the current graph node.
        first_new: the first label made on the way.
        reduced: labels that stand for rows that an op reduced.
        copies: labels of copies of a value that is computed from the inputs; `shifted`: of those that what parameters determine
            was added to.
        overwritten: labels of entries that a number other than zero is written over.
    """

    def __init__(
        self,
        size: int,
        first_undetermined: int | None = None,
        determined: np.ndarray | None = None,
        about_rows: bool = True,
    ) -> None:
        self.collected = Constraints()
        self.node, self.about_rows = -1, about_rows
        self.size = self.first_new = size
        self.first_undetermined = size if first_undetermined is None else first_undetermined
        self.determined = LabelSet(determined)
        self.reduced, self.overwritten = LabelSet(), LabelSet()
        self.copies, self.shifted = LabelSet(), LabelSet()

    def clear(self) -> Constraints:
        """What was collected; the builder starts with nothing again, but for the labels it has made."""
        done, self.collected = self.collected, Constraints()
        return done

    def fresh(self, count: int) -> Tensor:
        """New labels, `count` of them."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def add_head_rows(self, rows: Tensor) -> None:
        self.collected.head_rows.append(LabelArray(rows, self.node))

    def keep_two_per_row(self, rows: Tensor) -> None:
        """Each row of labels keeps two entries at least: for each entry one of the others; in long rows one of either half."""
        n = rows.shape[1]
        if n > PAIRWISE_UP_TO:
            self.collected.some_stay += [*rows[:, : n // 2].numpy(), *rows[:, n // 2 :].numpy()]
        elif n > 1:
            self.collected.some_stay += [
                line for i in range(n) for line in torch.cat([rows[:, :i], rows[:, i + 1 :]], 1).numpy()
            ]

    def keep_at_least(self, labels: np.ndarray, count: int) -> None:
        self.collected.at_least.append((labels, count))

    def new_row_labels(self, f: Factor, rest: Sequence[int], *, whole: bool) -> Factor:
        """New labels over the dimensions `rest` of a factor, of what was reduced along the others."""
        shape = [n if d in rest else 1 for d, n in enumerate(f.labels.shape)]
        labels = self.fresh(math.prod(shape)).reshape(shape)
        self.reduced.add(labels.reshape(-1).numpy())
        self.tie_to_rows(labels, f.labels, whole=whole)
        if self.is_overwritten(f):
            self.tie_entries(f, rest)
        return Factor(labels, tuple(d for d in f.major_to_minor if d in rest))

    def tie_entries(self, f: Factor, rest: Sequence[int]) -> None:
        """A row in which a number is written over an entry is a unit: the number goes with the whole row alone."""
        order = [*rest, *(d for d in range(f.labels.dim()) if d not in rest)]
        rows = f.labels.permute(order).reshape(math.prod(f.labels.shape[d] for d in rest), -1)
        mine = rows[torch.from_numpy(self.overwritten.holds(rows.numpy()).any(1))]
        self.tie(mine, mine[:, :1].expand_as(mine))

    def tie_to_rows(self, labels: Tensor, entries: Tensor, *, whole: bool = False) -> None:
        """Labels go with the rows of a wider array, where those go whole."""
        rest = [d for d, n in enumerate(labels.shape) if n > 1]
        order = [*rest, *(d for d in range(entries.dim()) if d not in rest)]
        full = entries.expand([max(n, m) for n, m in zip(labels.shape, entries.shape, strict=True)])
        labels, rows = labels.flatten(), full.permute(order).reshape(labels.numel(), -1)
        self.collected.row_labels.append(RowLabels(labels, rows, self.node, whole))
        unknown = self.are_undetermined(rows.numpy()).any(1)
        self.determined.add(labels.numpy()[~unknown])

    def are_row_labels(self, f: Factor) -> bool:
        """Whether all labels of a factor stand for reduced rows."""
        return bool(self.reduced) and bool(self.reduced.holds(f.flat).all())

    def undetermined(self, f: Factor) -> np.ndarray | None:
        """Which of a factor's labels, flattened, belong to copies and constants; None where none do.

        No parameter determines them: unlike other labels they are not tied to what made the value.
        """
        if f.largest < self.first_undetermined:
            return None
        found = self.are_undetermined(f.flat)
        return found if bool(found.any()) else None

    def are_undetermined(self, labels: np.ndarray) -> np.ndarray:
        found = labels >= self.first_undetermined
        return found & ~self.determined.holds(labels) if self.determined else found

    def determine(self, f: Factor, g: Factor, *, adds: bool = False) -> Factor:
        """Of two tied factors the one with labels that parameters determine; if both are so in part, one made of both.

        A parameter that is added to copies sets none of them to zero: then it is those, by labels of their own.
        """
        for copied, other in ((f, g), (g, f)) if adds and self.copies else ():
            if self.copies.meets(copied.flat):
                return copied if self.undetermined(other) is not None else self.shift(copied)
        mine = self.undetermined(f)
        if mine is None:
            return f
        theirs = self.undetermined(g)
        if theirs is None:
            return g
        if f.labels.shape != g.labels.shape or not bool((mine & ~theirs).any()):
            return f
        labels = np.where(mine & ~theirs, g.flat, f.flat)
        return Factor(torch.from_numpy(labels).reshape(f.labels.shape), f.major_to_minor)

    def shift(self, copied: Factor) -> Factor:
        """New labels of copies that something was added to which parameters determine."""
        made = Factor(self.fresh(len(copied.flat)).reshape(copied.labels.shape), copied.major_to_minor)
        self.tie(made.labels, copied.labels)
        self.copies.add(made.flat)
        self.shifted.add(made.flat)
        return made

    def note_written(self, f: Factor, g: Factor) -> None:
        """Labels of a tensor that was written to are determined where those of what was written are."""
        mine = self.undetermined(f)
        if mine is not None and f.labels.shape == g.labels.shape:
            theirs = self.undetermined(g)
            self.determined.add(f.flat[mine if theirs is None else mine & ~theirs])

    def keep_copies(self, labels: Iterable[Factor], *, shares: bool = False) -> None:
        """Freeze the labels of copies and constants that are summed over: no parameter sets those to zero.

        `shares` says that what is removed has no share of the sum, zero or not: then it is enough that something differs.
        """
        for f in labels:
            found = self.undetermined(f)
            if found is not None and shares:
                found &= ~self.shifted.holds(f.flat)
            if found is not None and found.any():
                self.freeze(f.flat[found], COPIES)
            if len(f.major_to_minor) == 1 and self.is_overwritten(f):  # else what is summed in a row goes with the row
                self.freeze(f.flat[self.overwritten.holds(f.flat)], COPIES)

    def is_overwritten(self, f: Factor) -> bool:
        """Whether a number other than zero is written over some entries of a factor."""
        return self.overwritten.meets(f.flat)

    def tie(self, a: Tensor, b: Tensor, *, broadcast: bool = False) -> None:
        """Tie two arrays under broadcasting; a tie to label 0 freezes."""
        if a is not b:
            self.collected.ties.append(Tie(a, b, broadcast or a.shape != b.shape, self.node))

    def tie_vectors(self, f: Factor, g: Factor) -> None:
        """Tie two vectors of one length."""
        if f.base is not g.base:
            self.collected.ties.append(Tie(f.flat, g.flat, False, self.node, (f.start, g.start)))

    def freeze(self, labels: Tensor | np.ndarray, why: str) -> None:
        self.collected.frozen.append(LabelArray(labels, self.node, why))

    def keep_rows_equal(self, f: Factor, whole: Factor | None = None) -> None:
        """All rows keep equally many entries; those that are parts of others may go whole where these do."""
        if len(f.major_to_minor) > 1 and self.about_rows:
            self.collected.equal_rows.append(LabelArray(f.rows(), self.node, whole=None if whole is None else whole.rows()))

    def keep_columns_equal(self, f: Factor, minor: int = 1) -> None:
        """All rows of `f.rows(minor)` keep the same columns."""
        if len(f.major_to_minor) > 1 and self.about_rows:
            self.collected.same_columns.append(LabelArray(f.rows(minor), self.node))


def flatten(labels: Tensor | np.ndarray) -> np.ndarray:
    """An array of labels as a vector."""
    return labels if isinstance(labels, np.ndarray) else labels.reshape(-1).numpy()


DEDUPLICATED_FROM = 1 << 16  # labels of a tie from which on rows that repeat are left out


def distinct_rows(*matrices: np.ndarray) -> np.ndarray:
    """The indices of the rows that are equal to no earlier row in all matrices, in order.

    Tokens repeat what is tied along channels. Rows are compared by a product with random vectors, far faster than by sorting.
    """
    rng = np.random.default_rng(0)
    sums = np.zeros(len(matrices[0]), np.uint64)
    for matrix in matrices:
        sums += matrix.astype(np.uint64) @ rng.integers(1, 1 << 62, size=matrix.shape[1]).astype(np.uint64)
    return np.sort(np.unique(sums, return_index=True)[1])
