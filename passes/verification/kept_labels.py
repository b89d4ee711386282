"""Which labels are kept while the masked original runs and makes more of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.passes.ir.constraints import Constraints, RowLabels


class KeptLabels:
    """Which labels are kept, for a number of labels that grows while a program runs.

    A new label shares the fate of what it is tied to. Until that is known it is kept.

    Arguments:
        kept: which of the first labels are kept, shape (labels,).
        fates: from an earlier run of the program which labels are kept, those that it made included.

    Attributes:
        table: which labels are kept.
        late: whether a label turned out to be removed after it was made.
        unknown: whether there are labels of which nothing is known.
    """

    def __init__(self, kept: Tensor, fates: Tensor | None = None) -> None:
        self.table, self.fates = kept, fates
        self.late = self.unknown = False
        self.known = torch.ones(len(kept), dtype=torch.bool)
        self.ties: list[tuple[Tensor, Tensor]] = []  # of labels that are not all known
        self.row_labels: list[RowLabels] = []

    def add(self, constraints: Constraints, size: int) -> None:
        """Settle what constraints say of unknown labels; there are `size` labels now."""
        if size > len(self.table):
            self.grow(size)
        if not (self.unknown or constraints.frozen):
            return
        for event in constraints.frozen:  # what a rule keeps is kept, whatever it is tied to later
            self.known[torch.from_numpy(event.flat)] = True
        sides = [tuple(map(torch.from_numpy, tie.sides())) for tie in constraints.ties]
        new = [(a, b) for a, b in sides if not bool((self.known[a] & self.known[b]).all())]
        self.ties += new
        self.row_labels += constraints.row_labels
        if new or constraints.row_labels or constraints.frozen:  # else nothing is said of unknown labels
            while self.spread():
                pass
            self.ties = [(a, b) for a, b in self.ties if not bool((self.known[a] & self.known[b]).all())]
            self.row_labels = [r for r in self.row_labels if not bool(self.known[r.labels].all())]
            self.unknown = not bool(self.known.all())

    def grow(self, size: int) -> None:
        start, count = len(self.table), size - len(self.table)
        made = torch.ones(count, dtype=torch.bool) if self.fates is None else self.fates[start:size]
        self.table = torch.cat([self.table, made])
        self.known = torch.cat([self.known, torch.full((count,), self.fates is not None)])
        self.unknown |= self.fates is None

    def spread(self) -> bool:
        """Settle what is tied to known labels; returns whether that was anything."""
        found = False
        for tie in self.ties:
            for new, old in (tie, tie[::-1]):
                now = ~self.known[new] & self.known[old]
                if bool(now.any()):
                    self.table[new[now]] = self.table[old[now]]
                    self.known[new[now]] = found = True
                    self.late |= not bool(self.table[old[now]].all())
        for rows in self.row_labels:
            now = ~self.known[rows.labels] & self.known[rows.entries].all(1)
            self.table[rows.labels[now]] = self.table[rows.entries[now]].any(1)
            self.known[rows.labels[now]] = True
            found |= bool(now.any())
        return found
