"""The tape: every dispatcher call of one run, with tensors replaced by numbered values.

Coupling reads the tape, not the model, so it can be repeated without running anything. Activations are not kept: a value
is its shape and dtype. Only the contents of small index tensors that do not depend on the inputs are stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef

NAMES: dict[Any, str] = {}


def name_of(func: Any) -> str:
    """The name in a dispatcher function's schema, which torch makes anew each time."""
    name = NAMES.get(func)
    if name is None:
        name = NAMES[func] = func._schema.name
    return name


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
    """One dispatcher call; `node` is the index of the graph node it belongs to."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    node: int
    ins: list[TensorRef] | None = None
    results: list[TensorRef] | None = None

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
        """The call that made a value; None for what was there before. Asked for once the tape is complete."""
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
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)


SIGNATURES: dict[Any, tuple[list[str], dict[str, Any]]] = {}


def signature(func: Any) -> tuple[list[str], dict[str, Any]]:
    """The names of an op's arguments, and the values of those that have a default."""
    found = SIGNATURES.get(func)
    if found is None:
        arguments = func._schema.arguments
        found = [a.name for a in arguments], {a.name: a.default_value for a in arguments if a.has_default_value()}
        SIGNATURES[func] = found
    return found


WRITTEN: dict[object, tuple[int, ...]] = {}


def writes(op: OpCall) -> list[TensorRef]:
    """The arguments that a call writes into."""
    places = WRITTEN.get(op.func)
    if places is None:
        arguments = enumerate(op.func._schema.arguments)
        places = tuple(i for i, a in arguments if getattr(a, "alias_info", None) is not None and a.alias_info.is_write)
        WRITTEN[op.func] = places
    return [v for i in places if i < len(op.args) and isinstance(v := op.args[i], TensorRef)] if places else []
