"""One dispatcher call as the specifications of ops see it.

`OpView` gives arguments by name and shapes: products, multiply-accumulates and masked forms need no more. `RuleContext` adds
labels and constraints, for label rules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fxprune.passes.errors import NeedsValues
from fxprune.passes.ir.labels import NONE, Factor, Labels, along, factor
from fxprune.passes.ir.op_trace import OpCall, OpTrace, signature
from fxprune.passes.ir.propagation_state import PropagationState
from fxprune.passes.ir.pytree import TensorRef


class AliasedOp:
    """An op whose arguments can also be asked for by the names that another op gives them.

    Attributes:
        func: the op itself.
        like: the dispatcher function that gives the other names, position by position.
    """

    def __init__(self, func: Any, like: Any) -> None:
        self.func, self.like = func, like
        self._schema = SimpleNamespace(name=like._schema.name, arguments=func._schema.arguments, returns=func._schema.returns)
        self._overloadname = like._overloadname

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


class OpView:
    """Arguments by name and shapes of the tensors of one call.

    Arguments:
        op: the call.
        op_trace: the trace it belongs to.
        shape_of: the shape of a tensor, where it is not that in the trace.
    """

    def __init__(self, op: OpCall, op_trace: OpTrace, shape_of: Callable[[TensorRef], tuple[int, ...]] | None = None) -> None:
        self.op, self.op_trace, self.shape_of = op, op_trace, shape_of
        self.inputs: list[TensorRef] = op.inputs
        self.outputs: list[TensorRef] = op.outputs

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        func = self.op.func
        names, defaults = signature(func)
        named = {**defaults, **dict(zip(names, self.op.args, strict=False)), **self.op.kwargs}
        if isinstance(func, AliasedOp):
            others, other_defaults = signature(func.like)
            known = {other: named[own] for own, other in zip(names, others, strict=False) if own in named}
            named = {**other_defaults, **known, **named}
        return named

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.named.get(name, default)

    def tensor(self, name: str) -> TensorRef | None:
        """An optional tensor argument; None where it is not given."""
        value = self.named.get(name)
        return value if isinstance(value, TensorRef) else None

    @property
    def first(self) -> TensorRef:
        return self.inputs[0]

    def shape(self, ref: TensorRef) -> tuple[int, ...]:
        return self.op_trace.values[ref.id].shape if self.shape_of is None else self.shape_of(ref)

    def dim(self, index: int, ndim: int) -> int:
        return index % max(ndim, 1)

    def dims(self, indices: Any, ndim: int) -> tuple[int, ...]:
        """A dim argument as a tuple of non-negative dims; None or an empty list means all of them."""
        if indices is None or (isinstance(indices, Sequence) and not len(indices)):
            return tuple(range(ndim))
        return tuple(self.dim(i, ndim) for i in ([indices] if isinstance(indices, int) else indices))

    def under(self, like: Any) -> OpView:
        """The same call as one of another dispatcher function, whose arguments it has by position."""
        return OpView(self.aliased(like), self.op_trace, self.shape_of)

    def aliased(self, like: Any) -> OpCall:
        op = self.op
        return OpCall(aliased_op(op.func, like), op.args, op.kwargs, op.outs, op.node, trial=op.trial)


@functools.lru_cache(maxsize=256)
def aliased_op(func: Any, like: Any) -> AliasedOp:
    return AliasedOp(func, like)


class RuleContext(OpView):
    """One call as a label rule sees it: the labels of its tensors, and the constraints to add to.

    Arguments:
        op: the call.
        state: what is known when the rule is applied.
    """

    def __init__(self, op: OpCall, state: PropagationState) -> None:
        super().__init__(op, state.op_trace)
        self.state = state
        self.known, self.constraints, self.heads, self.uses = state.labels, state.constraints, state.heads, state.uses

    def under(self, like: Any) -> RuleContext:
        return RuleContext(self.aliased(like), self.state)

    def labels(self, ref: TensorRef) -> Labels:
        return self.known.get(ref.id, NONE)

    def data(self, ref: TensorRef) -> Tensor | None:
        """The contents of an index tensor, on the CPU, if they are the same for every input."""
        value = self.op_trace.values[ref.id]
        if ref.id in self.state.varying:
            return None
        if value.data is None and value.on_meta and not value.from_input:
            raise NeedsValues  # a constant whose contents were not computed
        return None if value.data is None else value.data.cpu()

    def used(self, ref: TensorRef) -> bool:
        """Whether a later call is known to read a value."""
        return ref.id in self.uses

    # -- building blocks ----------------------------------------------------------------------------------------------

    def fresh(self, size: int, dim: int, ndim: int) -> Factor:
        """New labels along one dimension whose entries are all alike, so that any number of them may go."""
        return along(self.constraints.fresh(size), dim, ndim)

    def settle(self, f: Factor, why: str = "is taken out alone by a constant index") -> Labels:
        """The factor as labels of a result; one that no longer varies is dropped, and its label frozen."""
        if f.major_to_minor:
            return (f,)
        if bool((f.labels != 0).any()):
            self.constraints.freeze(f.labels, why)
        return NONE

    def freeze(self, labels: Labels, why: str) -> None:
        for f in labels:
            self.constraints.freeze(f.labels, why)

    def freeze_inputs(self, why: str) -> list[Labels]:
        """Freeze the labels of every argument; returns no labels for each result."""
        for ref in self.inputs:
            self.freeze(self.labels(ref), why)
        return [NONE] * len(self.outputs)

    def freeze_dims(self, labels: Labels, dims: Sequence[int], why: str) -> Labels:
        """Freeze the factors that vary along nothing but `dims`; what varies along others, too, is one unit along `dims`."""
        passed: list[Factor] = []
        for f in labels:
            within = [d for d in f.major_to_minor if d in dims]
            if not within:
                passed.append(f)
            elif len(within) < len(f.major_to_minor):
                passed += self.collapse(f, within)
            else:
                self.constraints.freeze(f.flat, why)
        return tuple(passed)

    def collapse(self, f: Factor, dims: Sequence[int]) -> Labels:
        """Tie the factor's labels together along `dims`, so that it no longer varies there."""
        flat = f.labels
        for d in dims:
            flat = flat.narrow(d, 0, 1)
        if flat.shape == f.labels.shape:
            return (f,)
        self.constraints.tie(f.labels, flat, broadcast=True)
        return self.settle(factor(flat, f.major_to_minor), "has all its entries mixed with one another")


def frozen(why: str) -> Callable[[RuleContext], list[Labels]]:
    """The rule of an op that freezes its arguments, for this reason."""
    return lambda call: call.freeze_inputs(why)
