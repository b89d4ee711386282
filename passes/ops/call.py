"""Rules: for each dispatcher op, the labels of its results from the labels of its arguments.

A rule is a function of a `Call` that returns the labels of the result (a list of them for several results) and reports
ties through `call.constraints`. `@rule("aten::flip")` files it; `find(op)` answers which rule an op has. Ops that torch itself
tags as pointwise need no entry.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fxprune.passes.errors import NeedsValues
from fxprune.passes.ir.constraints import Constraints
from fxprune.passes.ir.labels import NONE, Factor, Labels, along, factor
from fxprune.passes.ir.op_trace import OpCall, OpTrace, signature
from fxprune.passes.ir.tensor_ref import TensorRef


class Renamed:
    """An op that goes by another one's name."""

    def __init__(self, func: Any, name: str) -> None:
        self.func = func
        self._schema = SimpleNamespace(name=name, arguments=func._schema.arguments, returns=func._schema.returns)
        self._overloadname = "default"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


RENAMED: dict[tuple[Any, str], Renamed] = {}


class RuleContext:
    """One op on the tape as a rule sees it: arguments by name, labels and shapes of tensors, and where to report."""

    def __init__(
        self,
        op: OpCall,
        op_trace: OpTrace,
        labels: dict[int, Labels],
        constraints: Constraints,
        heads: bool,
        uses: set[int],
        varying: set[int] | None = None,
    ) -> None:
        self.op, self.op_trace, self.known, self.constraints, self.heads, self.uses = (
            op,
            op_trace,
            labels,
            constraints,
            heads,
            uses,
        )
        self.varying = varying or ()  # values whose contents change with the sizes of the inputs
        self.inputs: list[TensorRef] = op.inputs
        self.outputs: list[TensorRef] = op.outputs

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        names, defaults = signature(self.op.func)
        return {**defaults, **dict(zip(names, self.op.args, strict=False)), **self.op.kwargs}

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.named.get(name, default)

    def under(self, name: str) -> RuleContext:
        """The same call as one of another op, which has the same arguments."""
        op = self.op
        func = RENAMED.setdefault((op.func, name), Renamed(op.func, name))
        same = OpCall(func, op.args, op.kwargs, op.outs, op.node)
        return RuleContext(same, self.op_trace, self.known, self.constraints, self.heads, self.uses, self.varying or None)

    @property
    def first(self) -> TensorRef:
        return self.inputs[0]

    def labels(self, ref: TensorRef) -> Labels:
        return self.known.get(ref.id, NONE)

    def shape(self, ref: TensorRef) -> tuple[int, ...]:
        return self.op_trace.values[ref.id].shape

    def data(self, ref: TensorRef) -> Tensor | None:
        """The contents of a tensor of indices, if they are the same for every input."""
        value = self.op_trace.values[ref.id]
        if ref.id in self.varying:
            return None
        if value.data is None and value.on_meta and not value.from_input:
            raise NeedsValues  # a constant whose contents were not computed
        return value.data

    def used(self, ref: TensorRef) -> bool:
        """Whether a later call reads a value; `uses` is empty where calls are looked at one by one, and nobody knows."""
        return ref.id in self.uses

    def dim(self, index: int, ndim: int) -> int:
        return index % max(ndim, 1)

    def dims(self, indices: Any, ndim: int) -> tuple[int, ...]:
        """A dim argument as a tuple of non-negative dims; None or an empty list means all of them."""
        if indices is None or (isinstance(indices, Sequence) and not len(indices)):
            return tuple(range(ndim))
        return tuple(self.dim(i, ndim) for i in ([indices] if isinstance(indices, int) else indices))

    # -- building blocks ----------------------------------------------------------------------------------------------

    def fresh(self, size: int, dim: int, ndim: int) -> Factor:
        """New labels along one dimension whose entries are all alike, so that any number of them may go."""
        return along(self.constraints.fresh(size), dim, ndim)

    def settle(self, f: Factor, why: str = "a single channel is taken out by a constant index") -> Labels:
        """A compressed factor, or nothing where it no longer varies (what it said is then frozen)."""
        if f.major_to_minor:
            return (f,)
        if bool((f.labels != 0).any()):
            self.constraints.freeze(f.labels, why)
        return NONE

    def freeze(self, labels: Labels, why: str) -> None:
        for f in labels:
            self.constraints.freeze(f.labels, why)

    def freeze_dims(self, labels: Labels, dims: Sequence[int], why: str) -> Labels:
        """Freeze the factors that vary along any of `dims`; the others pass."""
        passed, among = [], frozenset(dims)
        for f in labels:
            if f.dims & among:
                self.constraints.freeze(f.flat, why)
            else:
                passed.append(f)
        return tuple(passed)

    def equal_rows(self, labels: Labels) -> Labels:
        """Report that joint factors made here must stay rectangles."""
        for f in labels:
            self.constraints.keep_rows_equal(f)
        return labels

    def collapse(self, f: Factor, dims: Sequence[int]) -> Labels:
        """Tie the factor's labels together along `dims`, so that it no longer varies there."""
        flat = f.labels
        for d in dims:
            flat = flat.narrow(d, 0, 1)
        if flat.shape == f.labels.shape:
            return (f,)
        self.constraints.tie(f.labels, flat, broadcast=True)
        return self.settle(factor(flat, f.major_to_minor), "all entries of a dimension are mixed with one another")
