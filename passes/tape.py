"""The tape: every dispatcher call of one run, with tensors replaced by numbered values.

Coupling reads the tape, not the model, so it can be repeated without running anything. Activations are not kept: a value
is its shape and dtype. Only the contents of small index tensors that do not depend on the inputs are stored.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fxprune.passes.imagine import ATOMS, PLAIN_TENSORS, RESHAPING, Imagination, like

NAMES: dict[Any, str] = {}


def name_of(func: Any) -> str:
    """The name in a dispatcher function's schema, which torch makes anew each time."""
    name = NAMES.get(func)
    if name is None:
        name = NAMES[func] = func._schema.name
    return name


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
    results: list[Ref] | None = None

    @property
    def inputs(self) -> list[Ref]:
        """The tensors among its arguments, in order."""
        if self.ins is None:
            self.ins = collect((self.args, self.kwargs) if self.kwargs else self.args, Ref)
        return self.ins

    @property
    def outputs(self) -> list[Ref]:
        """The tensors among its results, in order."""
        if self.results is None:
            self.results = [self.outs] if type(self.outs) is Ref else collect(self.outs, Ref)
        return self.results


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
    if isinstance(x, kind):  # (atoms are among what may be replaced: a device is)
        return fn(x)
    if type(x) in ATOMS:
        return x
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
    if kind is Ref:
        gather_refs(x, found)
    else:
        gather(x, kind, found)
    return found


def inside(x: Any) -> Iterable[Any]:
    """What a container holds; nothing where it is none."""
    if type(x) in SEQUENCES or isinstance(x, SEQUENCES):
        return x
    if isinstance(x, dict):
        return x.values()
    return (x.start, x.stop, x.step) if type(x) is slice else ()


def gather(x: Any, kind: type | tuple[type, ...], found: list[Any]) -> None:
    for v in inside(x):
        if isinstance(v, kind):
            found.append(v)
        elif type(v) not in ATOMS:
            gather(v, kind, found)


def gather_refs(x: Any, found: list[Ref]) -> None:
    """The same for references, which is what nearly all that is gathered is."""
    for v in x if type(x) in SEQUENCES else inside(x):
        if type(v) is Ref:
            found.append(v)
        elif type(v) not in ATOMS:
            gather_refs(v, found)


@functools.lru_cache(maxsize=4096)
def written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that a dispatcher function writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)


def storage_of(tensor: Tensor) -> int:
    """What tells memory from other memory; what looks on does not take it for a question of the model's."""
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not say."""
    return 0 if tensor.is_inference() else tensor._version


class Contents:
    """The contents of index tensors, kept right where a forward writes to one.

    A value has one set of contents. What is written before anything was looked up by it takes the place of what was there;
    of a tensor that changes after that the contents count as unknown.
    """

    def __init__(self, tape: Tape) -> None:
        self.values = tape.values
        self.holders: dict[int, list[tuple[weakref.ref[Tensor], Ref]]] = {}  # by storage
        self.read: set[int] = set()

    def keep(self, tensor: Tensor, ref: Ref) -> None:
        self.values[ref.id].data = tensor.detach().clone()
        self.holders.setdefault(storage_of(tensor), []).append((weakref.ref(tensor), ref))

    def note_reading(self, ins: list[Ref], outs: Any) -> None:
        """Indices computed from indices have contents of their own; all else is lost on a change."""
        if any(self.values[ref.id].data is None for ref in collect(outs, Ref)):
            self.read.update(ref.id for ref in ins)

    def note_writing(self, func: Any, args: Any, kwargs: Any, from_input: bool) -> None:
        """Raises NeedsValues where something without contents was written into a tensor that has some."""
        given = collect((args, kwargs), Tensor)
        for at, name in written_by(func):
            tensor = args[at] if at < len(args) else kwargs.get(name)
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout is not torch.strided:
                continue
            if any(t.is_meta for t in given):
                raise NeedsValues
            for holder, ref in self.holders.get(storage_of(tensor), ()):
                held, value = holder(), self.values[ref.id]
                if held is None:
                    continue
                value.from_input |= from_input
                unknown = value.from_input or ref.id in self.read
                value.data = None if unknown else held.detach().clone()


SEQUENCES = (tuple, list)
LARGEST_INDEX = 1 << 22  # elements
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
        self.any_known = False  # which it takes a dictionary of this kind long to say
        self.held: dict[int, tuple[Tensor, Ref]] = {}  # the model's own, and tensors without contents
        self.imagination = Imagination()
        self.contents = Contents(self.tape)
        self.node = -1
        self.active = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # never on while a compiler looks; each call would pay for the wrapper

    def find(self, tensor: Tensor) -> Ref | None:
        held = self.held.get(id(tensor))
        return held[1] if held is not None else self.known.get(tensor) if self.any_known else None

    def ref(self, tensor: Tensor) -> Ref:
        """The number of a tensor; one never seen is a leaf: the model's own, or a constant."""
        ref = self.find(tensor)
        if ref is None:
            ref = self.add(tensor, from_input=False, name=self.names.get(id(tensor)))
            if not tensor.dtype.is_floating_point and tensor.numel() <= LARGEST_INDEX and not tensor.is_meta:
                self.contents.keep(tensor, ref)
        return ref

    def refs(self, argument: Any) -> Any:
        if type(argument) in ATOMS:
            return argument
        if isinstance(argument, Tensor):
            held = self.held.get(id(argument))
            return self.ref(argument) if held is None else held[1]
        if type(argument) is list:
            plain = ATOMS.issuperset(map(type, argument))
            return argument if plain else [map_tensors(v, self.ref) for v in argument]
        return map_tensors(argument, self.ref)

    def add(self, tensor: Tensor, *, from_input: bool, name: str | None = None) -> Ref:
        values, on_meta = self.tape.values, tensor.is_meta
        ref = Ref(len(values))
        values.append(Value(tuple(tensor.shape), tensor.dtype, from_input, name, None, on_meta))
        if on_meta or name is not None:
            self.held[id(tensor)] = (tensor, ref)
        else:
            self.known[tensor] = ref
            self.any_known = True
        return ref

    def has(self, tensor: Tensor) -> bool:
        return self.find(tensor) is not None

    def truncate(self, ops: int) -> None:
        """Forget the calls after the first `ops`: they belonged to an attempt that was given up."""
        del self.tape.ops[ops:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.active:
            return func(*args, **(kwargs or {}))
        return self.recorded(func, args, kwargs or {}, self.imagined)

    def imagined(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = self.imagination.result(func, args, kwargs)
        return self.imagination.ran(func, args, kwargs) if out is None else out

    def as_one(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a dispatcher function that is written down as one call, whatever it comes to."""
        return self.recorded(func, args, kwargs, self.unseen(self.imagined))

    def tied(self, first: Tensor, second: Tensor) -> Tensor:
        """A copy of the first, written down as the sum of two: its labels are those of both."""
        copy = self.unseen(lambda *_: like(first) if first.is_meta else first.clone())
        return self.recorded(torch.ops.aten.add.Tensor, (first, second), {}, copy)

    def unseen(self, run: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
        """A function whose own calls are not written down."""

        def quietly(func: Any, args: Any, kwargs: Any) -> Any:
            self.active = False
            try:
                return run(func, args, kwargs)
            finally:
                self.active = True

        return quietly

    def recorded(self, func: Any, args: Any, kwargs: Any, run: Callable[[Any, Any, Any], Any]) -> Any:
        values, held = self.tape.values, self.held
        in_args: list[Any] = []
        ins: list[Ref] = []
        for a in args:
            if type(a) in PLAIN_TENSORS:
                known = held.get(id(a))
                ref = self.ref(a) if known is None else known[1]
                in_args.append(ref)
                ins.append(ref)
            elif type(a) in ATOMS:
                in_args.append(a)
            else:
                found = self.refs(a)
                in_args.append(found)
                if found is not a:
                    gather_refs((found,), ins)
        in_kwargs = {k: self.refs(v) for k, v in kwargs.items()} if kwargs else {}
        if in_kwargs:
            gather_refs(in_kwargs, ins)
        out = run(func, args, kwargs)
        from_input = True in [values[ref.id].from_input for ref in ins]

        def result(tensor: Tensor) -> Ref:
            ref = self.find(tensor)
            if ref is not None and getattr(func, "_schema", NAMELESS).name not in RESHAPING:  # in-place, or the argument itself
                values[ref.id].from_input |= from_input
                return ref
            ref = self.add(tensor, from_input=from_input)
            known = not (from_input or tensor.is_meta or tensor.numel() > LARGEST_INDEX)
            if known and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
                self.contents.keep(tensor, ref)
            return ref

        outs = result(out) if isinstance(out, Tensor) else map_tensors(out, result)
        if any(values[ref.id].data is not None for ref in ins):
            self.contents.note_reading(ins, outs)
        if written_by(func):
            self.contents.note_writing(func, args, kwargs, from_input)
        self.tape.ops.append(Op(func, tuple(in_args), in_kwargs, outs, self.node, ins))
        return out
