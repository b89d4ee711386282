"""The tape: every dispatcher call of one run, with tensors replaced by numbered values.

Coupling reads the tape, not the model, so it can be repeated without running anything. Activations are not kept: a value
is its shape and dtype. Only the contents of small index tensors that do not depend on the inputs are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

ATOMS = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device])


class NeedsValues(Exception):
    """The contents of a constant matter, but the run was without values."""


class Ref:
    """A tensor on the tape. A recorder makes one for each number, so that they compare by identity."""

    __slots__ = ("id",)

    def __init__(self, number: int) -> None:
        self.id = number

    def __repr__(self) -> str:
        return f"Ref({self.id})"


@dataclass(slots=True)
class Value:
    """What is known of a tensor: `name` for a parameter, buffer or constant of the model; `data` for index contents."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    from_input: bool
    name: str | None = None
    data: Tensor | None = None
    on_meta: bool = False


@dataclass(slots=True)
class Op:
    """One dispatcher call; `node` is the index of the graph node it belongs to."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    node: int
    ins: list[Ref] | None = None

    @property
    def inputs(self) -> list[Ref]:
        """The tensors among its arguments, in order."""
        if self.ins is None:
            self.ins = collect((self.args, self.kwargs) if self.kwargs else self.args, Ref)
        return self.ins


@dataclass(slots=True)
class Tape:
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    made: dict[int, Op] = field(default_factory=dict)

    def maker(self, value: int) -> Op | None:
        """The call that made a value; None for what was there before. Asked for once the tape is complete."""
        if not self.made:
            for op in self.ops:
                for ref in collect(op.outs, Ref):
                    self.made.setdefault(ref.id, op)
        return self.made.get(value)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.values[ref.id].shape


def map_tensors(x: Any, fn: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Any:
    """Replace every instance of `kind` inside nested tuples, lists, dicts and slices."""
    if type(x) in ATOMS:
        return x
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
    if isinstance(x, kind):
        return [x]
    found: list[Any] = []
    gather(x, kind, found)
    return found


def gather(x: Any, kind: type | tuple[type, ...], found: list[Any]) -> None:
    for v in x if isinstance(x, tuple | list) else x.values() if isinstance(x, dict) else ():
        if isinstance(v, kind):
            found.append(v)
        elif type(v) not in ATOMS:
            gather(v, kind, found)
    if isinstance(x, slice):
        gather((x.start, x.stop, x.step), kind, found)


LARGEST_INDEX = 1 << 22  # elements
ELEMENTWISE = frozenset(
    f"aten::{name}"
    for name in [
        *("relu hardtanh hardswish hardsigmoid silu gelu sigmoid tanh leaky_relu elu mish softplus selu".split()),
        *("add sub mul div maximum minimum _softmax _log_softmax".split()),
    ]
)
REDUCTIONS = frozenset(["aten::mean", "aten::sum", "aten::amax", "aten::amin"])
NORMS = frozenset(["aten::native_batch_norm", "aten::native_layer_norm", "aten::native_group_norm"])
# in-place ops that change a tensor's shape rather than its contents: the tensor becomes another value
RESHAPING = frozenset(
    f"aten::{name}"
    for name in [
        "transpose_",
        "t_",
        "squeeze_",
        "unsqueeze_",
        "swapaxes_",
        "swapdims_",
        "as_strided_",
        "resize_",
        "resize_as_",
        "set_",
    ]
)


class Imagination:
    """Results of ops on the meta device, where a shape says all there is to say.

    The general meta kernels are Python, and slow. Here (1) what writes a tensor in place returns it; (2) arithmetic and
    activations of floating tensors of one form keep it; (3) any other pure op is run once for each shape, stride and dtype
    of its arguments. Anything else gets no answer.
    """

    def __init__(self) -> None:
        self.kinds: dict[Any, str] = {}
        self.known: dict[Any, Any] = {}

    def kind(self, func: Any) -> str:
        """What may be assumed of an op, by its schema."""
        found = self.kinds.get(func)
        if found is None:
            found = self.kinds[func] = self.classify(func)
        return found

    def classify(self, func: Any) -> str:
        schema = getattr(func, "_schema", None)
        if schema is None:
            return ""
        if schema.name in NORMS:
            return "norm"
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        named = schema.name.endswith("_") and not schema.name.endswith("__") and schema.name not in RESHAPING
        if named and written[0] and sum(written) == 1 and len(schema.returns) == 1:
            return "in place"
        if schema.name == "aten::convolution":
            return "convolution"
        if schema.name in REDUCTIONS and schema.overload_name in ("dim", "dim_IntList", ""):
            return "reduction"
        if schema.name in ELEMENTWISE:
            return "elementwise"
        pure = not schema.is_mutable and not any(r.alias_info for r in schema.returns)
        return "pure" if pure and all(str(r.type) == "Tensor" for r in schema.returns) else ""

    def result(self, func: Any, args: Any, kwargs: Any) -> Any:
        kind = self.kind(func)
        if not kind or not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
            return None
        if kind == "norm":  # the statistics that it also returns are for training kernels, and have no readers
            return like(args[0]), torch.empty(0, device="meta"), torch.empty(0, device="meta")
        if kind == "in place":
            return args[0]
        if kind == "elementwise" and args[0].is_floating_point() and not any(isinstance(v, Tensor) for v in kwargs.values()):
            others = [a for a in args[1:] if isinstance(a, Tensor)]
            widest = max([args[0], *others], key=Tensor.numel)
            form = (widest.shape, widest.stride(), widest.dtype)
            if all((a.shape, a.stride(), a.dtype) == form or narrower(a, widest) for a in (args[0], *others)):
                return like(widest)
        if kind == "convolution":
            shape = convolved(*args)
            return torch.empty(shape, dtype=args[0].dtype, device="meta") if args[0].is_contiguous() else func(*args)
        if kind == "reduction" and not kwargs and len(args) > 1 and args[0].is_contiguous() and args[0].is_floating_point():
            return torch.empty(reduced(*args), dtype=args[0].dtype, device="meta")
        key = (func, signature(args), signature(kwargs)) if kwargs else (func, signature(args))
        if None in key:
            return None
        made = self.known.get(key)
        if made is None:
            out = func(*args, **kwargs)
            several = isinstance(out, tuple)
            outs = out if several else (out,)
            if all(isinstance(t, Tensor) and t.is_meta and t.layout is torch.strided for t in outs):
                self.known[key] = (several, [(t.shape, t.stride(), t.dtype) for t in outs])
            return out
        several, forms = made
        made_now = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in forms]
        return tuple(made_now) if several else made_now[0]


def narrower(a: Tensor, b: Tensor) -> bool:
    """Whether `a` is broadcast to the shape of `b`, which is contiguous, so that the result is as `b` is."""
    sizes = (1,) * (b.dim() - a.dim()) + tuple(a.shape)
    fits = len(sizes) == b.dim() and all(n in (1, m) for n, m in zip(sizes, b.shape, strict=True))
    return fits and a.dtype == b.dtype and b.is_contiguous()


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    extra: list[int],
    groups: int,
) -> list[int]:
    """The shape of a convolution's result; raises ValueError where the channels do not fit."""
    if x.dim() != weight.dim() or x.shape[1] != (weight.shape[0] if transposed else weight.shape[1] * groups):
        raise ValueError(f"a convolution with a weight of shape {tuple(weight.shape)} is given {tuple(x.shape)}")
    shape = [x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0]]
    for i, (n, k) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        s, p, d = (v[i] if len(v) > 1 else v[0] for v in (stride, padding, dilation))
        reach = d * (k - 1) + 1
        if transposed:
            shape.append((n - 1) * s - 2 * p + reach + (extra[i] if len(extra) > 1 else extra[0]))
        else:
            shape.append((n + 2 * p - reach) // s + 1)
    return shape


def reduced(x: Tensor, dims: Any, keep: bool = False, *_: Any) -> list[int]:
    """The shape of a mean or sum over some dimensions; no dimensions are all of them."""
    ndim = x.dim()
    gone = {d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))} if ndim else set()
    return [1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone]


def like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same form on the meta device (`torch.empty_like` takes a detour through Python there)."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def signature(x: Any) -> Any:
    """What a meta kernel can see of its arguments, hashable; None where they hold more than meta tensors and numbers."""
    if isinstance(x, Tensor):
        return (x.shape, x.stride(), x.dtype) if x.is_meta and type(x) in PLAIN_TENSORS else None
    if type(x) in ATOMS:
        return (type(x), x)
    if isinstance(x, tuple | list):
        parts = tuple(signature(v) for v in x)
        return None if None in parts else parts
    if isinstance(x, dict):
        parts = tuple((k, signature(v)) for k, v in x.items())
        return None if any(v is None for _, v in parts) else parts
    return (type(x), x) if isinstance(x, torch.memory_format | torch.layout) else None


PLAIN_TENSORS = frozenset([Tensor, torch.nn.Parameter, torch.nn.Buffer])


NAMELESS = SimpleNamespace(name="")


class Recorder(TorchDispatchMode):
    """Writes what the dispatcher runs onto a tape while it is `active`.

    Arguments:
        names: the model's own tensors (parameters, buffers, tensor attributes) by identity.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.tape = Tape()
        self.names = names
        self.known: Any = WeakIdKeyDictionary()
        self.held: dict[int, tuple[Tensor, Ref]] = {}  # the model's own, and tensors without contents
        self.imagination = Imagination()
        self.node = -1
        self.active = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # never on while a compiler looks; each call would pay for the wrapper

    def find(self, tensor: Tensor) -> Ref | None:
        held = self.held.get(id(tensor))
        return held[1] if held is not None else self.known.get(tensor) if self.known else None

    def ref(self, tensor: Tensor) -> Ref:
        """The number of a tensor; one never seen is a leaf: the model's own, or a constant."""
        ref = self.find(tensor)
        if ref is None:
            ref = self.add(tensor, from_input=False, name=self.names.get(id(tensor)))
            if not tensor.dtype.is_floating_point and tensor.numel() <= LARGEST_INDEX and not tensor.is_meta:
                self.tape.values[ref.id].data = tensor.detach().clone()
        return ref

    def refs(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.ref(argument)
        return argument if type(argument) in ATOMS else map_tensors(argument, self.ref)

    def add(self, tensor: Tensor, *, from_input: bool, name: str | None = None) -> Ref:
        ref, on_meta = Ref(len(self.tape.values)), tensor.is_meta
        self.tape.values.append(Value(tuple(tensor.shape), tensor.dtype, from_input, name, None, on_meta))
        if on_meta or name is not None:
            self.held[id(tensor)] = (tensor, ref)
        else:
            self.known[tensor] = ref
        return ref

    def has(self, tensor: Tensor) -> bool:
        return self.find(tensor) is not None

    def truncate(self, ops: int) -> None:
        """Forget the calls after the first `ops`: they belonged to an attempt that was given up."""
        del self.tape.ops[ops:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        in_args = tuple([self.refs(a) for a in args])
        in_kwargs = {k: self.refs(v) for k, v in kwargs.items()}
        out = self.imagination.result(func, args, kwargs)
        out = func(*args, **kwargs) if out is None else out
        values = self.tape.values
        from_input = False
        for a in (*in_args, *in_kwargs.values()):
            if type(a) is Ref:
                from_input = from_input or values[a.id].from_input
            elif type(a) not in ATOMS:
                from_input = from_input or any(values[r.id].from_input for r in collect(a, Ref))

        def result(tensor: Tensor) -> Ref:
            ref = self.find(tensor)
            if ref is not None and getattr(func, "_schema", NAMELESS).name not in RESHAPING:  # in-place, or the argument itself
                values[ref.id].from_input |= from_input
                return ref
            ref = self.add(tensor, from_input=from_input)
            number = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            if not (from_input or number or tensor.is_meta or tensor.numel() > LARGEST_INDEX):
                values[ref.id].data = tensor.detach().clone()
            return ref

        outs = result(out) if isinstance(out, Tensor) else map_tensors(out, result)
        self.tape.ops.append(Op(func, in_args, in_kwargs, outs, self.node))
        return out
