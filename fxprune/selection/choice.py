"""A choice of labels, from which plans and pruned modules are made."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.slices import Slicer, TensorSlice
from fxprune.passes.rewrite.rewrite import tensor_cuts
from fxprune.passes.verification.masked_model import Removal
from fxprune.selection.latency import Latency


@dataclass(frozen=True, eq=False)
class Choice:
    """Which labels of a coupling stay.

    Attributes:
        solution: the coupling.
        kept: for each label whether it stays, shape (labels,).
        slicer: what that leaves of a tensor with given labels.
        latency: what was measured to make the choice, if its budget is one of latency.
    """

    solution: Solution
    kept: Tensor
    slicer: Slicer
    latency: Latency | None = None

    def removal(self, heads: bool) -> Removal:
        """What it removes of the model; `heads` says whether heads go whole."""
        return Removal(self.solution.leaves, self.kept, heads)

    @functools.cached_property
    def slices(self) -> dict[str, list[TensorSlice]]:
        """The slices of every tensor, by name."""
        return tensor_cuts(self.solution, self.kept, self.slicer)


def spent(solution: Solution) -> bool:
    """Whether the captured program of a coupling was used up."""
    return any(capture.consumed for capture in solution.captures)
