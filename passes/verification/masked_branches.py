"""Residual branches of a model as it runs, multiplied by zero: the additions are found by the parameters of the branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxprune.passes.ir.op_trace import OpCall, OpTrace, name_of, writes
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView

NO_NAMES: frozenset[str] = frozenset()


class MaskedBranches:
    """Follows which parameters of branches each value is computed from.

    A branch ends in the first addition of which one operand is computed from all of its parameters and the other one from none.

    Arguments:
        branches: the names of the parameters of each branch.
    """

    def __init__(self, branches: Sequence[frozenset[str]]) -> None:
        self.branches = [parameters for parameters in branches if parameters]
        self.names = NO_NAMES.union(*branches)
        self.read: dict[int, frozenset[str]] = {}  # by value
        self.zero: set[int] = set()  # values that end a branch in the present addition

    def of(self, ref: TensorRef, trace: OpTrace) -> frozenset[str]:
        name = trace.values[ref.id].name
        return self.names & {name} if name is not None else self.read.get(ref.id, NO_NAMES)

    def ends(self, func: Any, refs: Sequence[TensorRef], trace: OpTrace) -> bool:
        """Whether a call, of tensors with these references, adds what a branch ends in to something else."""
        self.zero.clear()
        if self.names and len(refs) == 2 and name_of(func) in ("aten::add", "aten::add_"):
            a, b = (self.of(ref, trace) for ref in refs)
            for ref, mine, others in ((refs[0], a, b), (refs[1], b, a)):
                if any(names <= mine and not names & others for names in self.branches):
                    self.zero.add(ref.id)
        return bool(self.zero)

    def sum_without(self, masker: Any, call: OpView, args: Any, kwargs: Any) -> torch.Tensor:
        """The sum with zeros in place of what ends a branch."""
        a, b = (torch.zeros_like(t) if ref.id in self.zero else t for ref, t in zip(call.op.args, args, strict=True))
        return torch.add(a, b, **kwargs)

    def follow(self, op: OpCall, trace: OpTrace) -> None:
        """Note what the results of a call are computed from."""
        if not self.names:
            return
        refs = [ref for ref in op.inputs if ref.id not in self.zero]
        found = NO_NAMES.union(*(self.of(ref, trace) for ref in refs))
        for ref in (*op.outputs, *writes(op)):
            if found or ref.id in self.read:
                self.read[ref.id] = found
