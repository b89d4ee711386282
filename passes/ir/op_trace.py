"""The op trace: every dispatcher call of one run, with tensors replaced by numbered references.

Coupling reads the op trace, not the model, so it can be repeated without running anything. Activations are not stored: a value
has a shape and a dtype. Only the contents of small index tensors that do not depend on the inputs are stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.ir.pytree import TensorRef, collect


@functools.lru_cache(maxsize=4096)
def name_of(func: Any) -> str:
    """The name in a dispatcher function's schema, which torch creates anew on each access."""
    return str(func._schema.name)


@dataclass(slots=True)
class TensorInfo:
    """What is known of a tensor: `name` for a parameter, buffer or constant of the model; `data` for index contents."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    from_input: bool
    name: str | None = None
    data: Tensor | None = None
    on_meta: bool = False


@dataclass(slots=True)
class OpCall:
    """One dispatcher call; `node` is the index of the graph node it belongs to, `spec` what `spec_of` has found.

    `trial` says that it is none of the forward's, but of a run that shows what other inputs would lead to.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    node: int
    ins: list[TensorRef] | None = None
    results: list[TensorRef] | None = None
    spec: Any = None
    trial: bool = False

    @property
    def inputs(self) -> list[TensorRef]:
        """The tensors among its arguments, in order."""
        if self.ins is None:
            self.ins = collect((self.args, self.kwargs) if self.kwargs else self.args, TensorRef)
        return self.ins

    @property
    def outputs(self) -> list[TensorRef]:
        """The tensors among its results, in order."""
        if self.results is None:
            self.results = [self.outs] if type(self.outs) is TensorRef else collect(self.outs, TensorRef)
        return self.results


@dataclass(slots=True)
class OpTrace:
    values: list[TensorInfo] = field(default_factory=list)
    ops: list[OpCall] = field(default_factory=list)
    made: dict[int, OpCall] = field(default_factory=dict)

    def maker(self, value: int) -> OpCall | None:
        """The call that made a value; None for what was there before. Asked for once the trace is complete."""
        if not self.made:
            for op in self.ops:
                for ref in collect(op.outs, TensorRef):
                    self.made.setdefault(ref.id, op)
        return self.made.get(value)

    def shape(self, ref: TensorRef) -> tuple[int, ...]:
        return self.values[ref.id].shape


@functools.lru_cache(maxsize=4096)
def written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that a dispatcher function writes to."""
    schema: Any = getattr(func, "_schema", None)
    if not getattr(schema, "is_mutable", False):
        return ()
    return tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)


def arguments_written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that a call of a dispatcher function writes to; None for each that is not given."""
    return [args[at] if at < len(args) else kwargs.get(name) for at, name in written_by(func)]


@functools.lru_cache(maxsize=4096)
def signature(func: Any) -> tuple[list[str], dict[str, Any]]:
    """The names of an op's arguments, and the values of those that have a default."""
    arguments = func._schema.arguments
    return [a.name for a in arguments], {a.name: a.default_value for a in arguments if a.has_default_value()}


def writes(op: OpCall) -> list[TensorRef]:
    """The positional arguments that a call writes into."""
    return [v for i, _ in written_by(op.func) if i < len(op.args) and isinstance(v := op.args[i], TensorRef)]
