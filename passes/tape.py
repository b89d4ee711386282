"""The tape: every dispatcher call of one run, with tensors replaced by numbered values.

Coupling reads the tape, not the model, so it can be repeated without running anything. Activations are not kept: a value
is its shape and dtype. Only the contents of small index tensors that do not depend on the inputs are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class NeedsValues(Exception):
    """The contents of a constant matter, but the run was without values."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor on the tape."""

    id: int


@dataclass(slots=True)
class Value:
    """What is known of a tensor: `name` for a parameter, buffer or constant of the model; `data` for index contents."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    from_input: bool
    name: str | None = None
    data: Tensor | None = None
    on_meta: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One dispatcher call; `node` is the index of the graph node it belongs to."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    node: int


@dataclass(slots=True)
class Tape:
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.values[ref.id].shape


def map_tensors(x: Any, fn: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Any:
    """Replace every instance of `kind` inside nested tuples, lists, dicts and slices."""
    if isinstance(x, kind):
        return fn(x)
    if isinstance(x, tuple):
        mapped = [map_tensors(v, fn, kind) for v in x]
        return type(x)(*mapped) if hasattr(x, "_fields") else tuple(mapped)
    if isinstance(x, list):
        return [map_tensors(v, fn, kind) for v in x]
    if isinstance(x, dict):
        return {k: map_tensors(v, fn, kind) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(*(map_tensors(v, fn, kind) for v in (x.start, x.stop, x.step)))
    return x


def collect(x: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Every instance of `kind` inside a nested structure, in order."""
    found: list[Any] = []
    map_tensors(x, found.append, kind)
    return found


LARGEST_INDEX = 1 << 22
ACTIVATIONS = frozenset(
    f"aten::{name}"
    for name in "relu hardtanh hardswish hardsigmoid silu gelu sigmoid tanh leaky_relu elu mish softplus selu".split()
)
NORMS = ("aten::native_batch_norm", "aten::native_layer_norm", "aten::native_group_norm")
# in-place ops that change a tensor's shape rather than its contents: the tensor becomes another value
RESHAPING = frozenset(
    f"aten::{name}"
    for name in ["transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "as_strided_", "resize_", "set_"]
)


def without_values(func: Any, args: Any) -> Any:
    """Results on the meta device of ops whose general meta kernels are slow Python; None for anything else.

    (1) Normalisations over given dimensions. (2) Pointwise ops in place. (3) Activations, which keep shape and dtype.
    """
    schema = getattr(func, "_schema", None)
    if schema is None or not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
        return None
    x, name = args[0], schema.name
    if name in NORMS:  # (1)
        empty = torch.empty(0, device="meta", dtype=x.dtype)
        return torch.empty_like(x), empty, empty.clone()
    if name.endswith("_") and torch.Tag.pointwise in func.tags and len(schema.returns) == 1:  # (2)
        return x
    if name in ACTIVATIONS and x.is_floating_point():  # (3)
        return torch.empty_like(x)
    return None


class Recorder(TorchDispatchMode):
    """Writes what the dispatcher runs onto a tape.

    Arguments:
        names: the model's own tensors (parameters, buffers, tensor attributes) by identity.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.tape = Tape()
        self.names = names
        self.known: Any = WeakIdKeyDictionary()
        self.leaves: dict[int, tuple[Tensor, int]] = {}
        self.node = -1

    def ref(self, tensor: Tensor) -> Ref:
        """The number of a tensor; one never seen is a leaf: the model's own, or a constant."""
        held = self.leaves.get(id(tensor))
        if held is not None:
            return Ref(held[1])
        number = self.known.get(tensor)
        if number is None:
            name = self.names.get(id(tensor))
            number = self.add(tensor, from_input=False, name=name)
            if name is not None:
                self.leaves[id(tensor)] = (tensor, number)
            if not tensor.dtype.is_floating_point and tensor.numel() <= LARGEST_INDEX and not tensor.is_meta:
                self.tape.values[number].data = tensor.detach().clone()
        return Ref(number)

    def refs(self, argument: Any) -> Any:
        return map_tensors(argument, self.ref) if isinstance(argument, tuple | list) else argument

    def add(self, tensor: Tensor, *, from_input: bool, name: str | None = None) -> int:
        number = len(self.tape.values)
        self.tape.values.append(Value(tuple(tensor.shape), tensor.dtype, from_input, name, None, tensor.is_meta))
        self.known[tensor] = number
        return number

    def has(self, tensor: Tensor) -> bool:
        return id(tensor) in self.leaves or tensor in self.known

    def truncate(self, ops: int) -> None:
        """Forget the calls after the first `ops`: they belonged to an attempt that was given up."""
        del self.tape.ops[ops:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_args = tuple(self.ref(a) if isinstance(a, Tensor) else self.refs(a) for a in args)
        in_kwargs = map_tensors(kwargs, self.ref) if kwargs else kwargs
        out = without_values(func, args)
        out = func(*args, **kwargs) if out is None else out
        values = self.tape.values
        refs = collect((in_args, in_kwargs), Ref)
        from_input = any(values[r.id].from_input for r in refs)

        name = getattr(getattr(func, "_schema", None), "name", "")

        def result(tensor: Tensor) -> Ref:
            if self.has(tensor) and name not in RESHAPING:  # in-place, or the argument itself
                ref = self.ref(tensor)
                values[ref.id].from_input |= from_input
                return ref
            number = self.add(tensor, from_input=from_input)
            small = tensor.numel() <= LARGEST_INDEX and not tensor.dtype.is_floating_point
            if small and not from_input and not tensor.dtype.is_complex and not tensor.is_meta:
                values[number].data = tensor.detach().clone()
            return Ref(number)

        self.tape.ops.append(Op(func, in_args, in_kwargs, map_tensors(out, result), self.node))
        return out
