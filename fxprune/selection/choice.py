"""What is chosen to stay of a coupling."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from fxprune.passes.coupling.branches import Branches
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.branches import NOTHING, Removed
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.slices import Slicer, TensorSlice
from fxprune.passes.rewrite.rewrite import tensor_cuts
from fxprune.passes.verification.masked_model import Removal
from fxprune.passes.verification.outlook import Outlook, outlook
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

    def __post_init__(self) -> None:
        self.solution.complete(self.slicer)

    def removal(self, heads: bool | str) -> Removal:
        """What it removes of the model; `heads` says whether heads go whole."""
        return Removal(self.solution.leaves, self.kept, heads, any(self.solution.picks), self.slicer.removed)

    def outlook(self, parameters: Collection[str]) -> Outlook:
        """What to expect of runs that verify it; `parameters` are the names of the model's."""
        return outlook(self.solution, self.kept.numpy(), parameters)

    @functools.cached_property
    def slices(self) -> dict[str, list[TensorSlice]]:
        """The slices of every tensor, by name."""
        return tensor_cuts(self.solution, self.kept, self.slicer)


def removal_of(model: nn.Module, solution: Solution, kept: Tensor, tensors: Collection[str]) -> Removed:
    """The residual branches whose tensors these are, but for those that go with labels that are not kept; raises PruneError
    where they are not those of branches.
    """
    tensors = set(tensors) - solution.complete(Slicer(kept)).removed.tensors
    if not tensors:
        return NOTHING
    branches = Branches(solution.captures, set(named_parameters(model)))
    found = branches.remove(b for b in branches.found if b.tensors <= tensors)
    odd = sorted(found.tensors.symmetric_difference(tensors) & solution.leaves.keys())  # others are not read here
    if odd:
        raise PruneError(
            "the plan does not fit the model: it removes what is no residual branch there",
            where=odd[0],
            fix="apply it to the architecture it was made for, unchanged",
        )
    return found


def spent(solution: Solution) -> bool:
    """Whether the captured program of a coupling was used up."""
    return any(capture.consumed for capture in solution.captures)
