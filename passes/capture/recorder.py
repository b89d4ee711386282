"""The recorder writes every dispatcher call of one run to an op trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from fxprune.passes.capture.proxy import TensorProxy
from fxprune.passes.errors import PruneError, ReadsValue
from fxprune.passes.ir.index_contents import IndexContents, storage_of
from fxprune.passes.ir.meta_kernels import RESHAPING, MetaKernels
from fxprune.passes.ir.module_tree import PLAIN_TENSORS, like
from fxprune.passes.ir.op_trace import OpCall, OpTrace, TensorInfo, arguments_written, written_by
from fxprune.passes.ir.pytree import ATOMS, TensorRef, gather_refs, map_tensors, tensors
from fxprune.passes.ops.registry import find

LARGEST_INDEX = 1 << 22  # elements
NAMELESS = SimpleNamespace(name="")


class Recorder(TorchDispatchMode):
    """Appends what the dispatcher runs to an op trace while it is `active`.

    Arguments:
        names: the model's own tensors (parameters, buffers, tensor attributes) by identity.

    Attributes:
        active: whether calls are recorded.
        before_write: is called with each tensor before a call writes to it.
        leaks: tensors whose contents Python has taken in the module that is running.
        tracing: whether code of the model's is being traced: then calls on its tensors are none that the graph knows of.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.op_trace = OpTrace()
        self.names = names
        self.known: Any = WeakIdKeyDictionary()
        self.any_known = False  # which it takes a dictionary of this kind long to say
        self.held: dict[int, tuple[Tensor, TensorRef]] = {}  # the model's own, and tensors without contents
        self.imagination = MetaKernels()
        self.contents = IndexContents(self.op_trace)
        self.before_write: Callable[[Tensor], None] = lambda _: None
        self.node = -1
        self.active = True
        self.tracing = False
        self.leaks: list[TensorRef] = []

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # never on while a compiler looks; each call would pay for the wrapper

    def find(self, tensor: Tensor) -> TensorRef | None:
        """The number of a tensor, or of the one that it is, to the dispatcher, as a subclass of tensors (`as_subclass`)."""
        ref = self.seen(tensor)
        if ref is None and (base := tensor._base) is not None and id(tensor) not in self.names:
            same = base.dtype == tensor.dtype and base.shape == tensor.shape and base.stride() == tensor.stride()
            return self.seen(base) if same and base.storage_offset() == tensor.storage_offset() else None
        return ref

    def seen(self, tensor: Tensor) -> TensorRef | None:
        held = self.held.get(id(tensor))
        return held[1] if held is not None else self.known.get(tensor) if self.any_known else None

    def ref(self, tensor: Tensor) -> TensorRef:
        """The number of a tensor; one never seen is a leaf: the model's own, or a constant, or what became of leaks."""
        ref = self.find(tensor)
        if ref is None:
            name = self.names.get(id(tensor))
            ref = self.add(tensor, from_input=name is None and bool(self.leaks), name=name)
            if self.op_trace.values[ref.id].from_input:
                return ref
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

    def add(self, tensor: Tensor, *, from_input: bool, name: str | None = None) -> TensorRef:
        if tensor.is_nested:
            raise PruneError(
                "the forward works on a nested tensor, each entry of which has sizes of its own",
                where=name or "",
                fix="a padded tensor in its place, or prune the modules before and behind on their own",
            )
        values, on_meta = self.op_trace.values, tensor.is_meta
        ref = TensorRef(len(values))
        values.append(TensorInfo(tuple(tensor.shape), tensor.dtype, from_input, name, None, on_meta))
        if on_meta or name is not None:
            self.held[id(tensor)] = (tensor, ref)
        else:
            self.known[tensor] = ref
            self.any_known = True
        return ref

    def truncate(self, ops: int) -> None:
        """Forget the calls after the first `ops`: they belonged to an attempt that was given up."""
        del self.op_trace.ops[ops:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            return by_ops(self, func, args, kwargs)
        if not self.active:
            if self.tracing:
                self.refuse(func, (args, kwargs or {}))
            return func(*args, **(kwargs or {}))
        if (parts := decomposition(func)) is not None:
            with self:
                return parts(*args, **(kwargs or {}))
        return self.recorded(func, args, kwargs or {}, self.imagined)

    def refuse(self, func: Any, given: Any) -> None:
        """Raises ReadsValue where compiled code, which no function of torch's shows, works on what the graph stands for."""
        if any(id(t) in self.names or type(t) is TensorProxy for t in tensors(given)):
            raise ReadsValue(f"a tensor in compiled code ({func})")

    def refuse_own(self, begin: int) -> None:
        """Raises ReadsValue where the calls from there on take tensors of the model's."""
        if any(self.op_trace.values[ref.id].name is not None for op in self.op_trace.ops[begin:] for ref in op.inputs):
            raise ReadsValue("a tensor of the model's in a function that is one node")

    def note_input(self, written: Tensor) -> None:
        """What is computed from an input is written to a tensor: all that lie in its memory depend on the input from now on."""
        if written.layout is torch.strided:
            place = storage_of(written)
            for tensor, ref in [*self.held.values(), *self.known.items()]:
                if tensor.layout is torch.strided and storage_of(tensor) == place:
                    self.op_trace.values[ref.id].from_input = True

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
        values, held = self.op_trace.values, self.held
        in_args: list[Any] = []
        ins: list[TensorRef] = []
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
        from_input = True in [values[ref.id].from_input for ref in ins]
        writes = written_by(func)
        for written in arguments_written(func, args, kwargs) if writes else ():
            if isinstance(written, Tensor):
                self.before_write(written)
                if from_input and not values[self.ref(written).id].from_input:
                    self.note_input(written)
        out = run(func, args, kwargs)

        def result(tensor: Tensor) -> TensorRef:
            ref = self.seen(tensor)
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
        if writes:
            self.contents.note_writing(func, args, kwargs, from_input)
        self.op_trace.ops.append(OpCall(func, tuple(in_args), in_kwargs, outs, self.node, ins))
        return out


@functools.lru_cache(maxsize=4096)
def decomposition(func: Any) -> Callable[..., Any] | None:
    """A function that computes what an op of a backward pass does by other ops, where nothing else is known of the op."""
    if "_backward" not in getattr(func, "_schema", NAMELESS).name or find(func).labels is not None:
        return None
    return decomposition_table.get(func)


def by_ops(mode: TorchDispatchMode, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
    """What an operator that takes functions returns, by way of the ops that it comes to, which the mode is to see."""
    kernel = func.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    if kernel is None:
        raise ReadsValue(f"a function that is handed to {func}")
    if func.name() in STEPPING:  # their kernels refuse to run in a mode
        with mode:
            return STEPPING[func.name()](*args, **(kwargs or {}))
    with mode:
        return kernel(*args, **(kwargs or {}))


def cond(chosen: Any, then: Callable[..., Any], otherwise: Callable[..., Any], operands: Any) -> Any:
    """Both branches, joined: another input takes the other one, whose layers must fit, too."""
    both = [branch(*operands) for branch in (then, otherwise)]
    if isinstance(chosen, Tensor):
        flat = [tree_flatten(out) for out in both]
        joined = [
            torch.where(chosen, a, b) if isinstance(a, Tensor) else a for a, b in zip(flat[0][0], flat[1][0], strict=True)
        ]
        return tree_unflatten(joined, flat[0][1])
    return both[0] if chosen else both[1]


def while_loop(goes_on: Callable[..., Any], step: Callable[..., Any], carried: Any, additional: Any, *options: Any) -> Any:
    """The loop in Python; `options` are for loops that stack what each step carries, which only a backward pass needs."""
    if any(options):
        raise ReadsValue("a loop that keeps what it carries")
    while goes_on(*carried, *additional):
        carried = step(*carried, *additional)
    return tuple(carried)


def scan(combine: Callable[..., Any], init: Any, xs: Any, additional: Any, *options: Any) -> Any:
    """What is carried to the end, and what all steps give, along a new first dimension."""
    carried, found = init, []
    for step in zip(*[x.unbind() for x in xs], strict=True):
        out = combine(*carried, *step, *additional)
        carried = out[: len(init)]
        found.append(out[len(init) :])
    return (*carried, *[None if each[0] is None else torch.stack(each) for each in zip(*found, strict=True)])


STEPPING: dict[str, Callable[..., Any]] = {"cond": cond, "while_loop": while_loop, "scan": scan}
