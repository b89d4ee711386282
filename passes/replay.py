"""Replay: what a node left on the tape, written once more for a node that is the same and is given the same.

Without values, what torch does depends on shapes, strides, dtypes and numbers. A layer of torch.nn or a function of torch
that is met again with arguments that look the same is not run: the calls that it made are written down once more, with other
tensors in the places of those it was given. "The same" is all that it could have looked at (`Replay.key`). What code that is
not torch's depends on is not known: it always runs, as does whatever leaves more behind than calls on tensors that are
accounted for (`Replay.learned`). So does what makes a single call, as most layers do: to look at all that it depends on takes
as long as to run it.
"""

from __future__ import annotations

import functools
import marshal
import operator
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxprune.passes.imagine import ATOMS, META, PLAIN_TENSORS, RESHAPING, empty_strided
from fxprune.passes.tape import Op, Recorder, Ref, Value, collect, map_tensors

if TYPE_CHECKING:
    from fxprune.passes.tracer import ValueTracer

FIXED = ATOMS | {type(Ellipsis), torch.memory_format, torch.layout}
SEQUENCES = frozenset([tuple, list, torch.Size])
# What every module holds beside its own attributes: containers, which are empty in a layer that does nothing but its forward.
EVERY = frozenset(vars(nn.Module())) - {"training"}
EMPTY = operator.itemgetter(*sorted(EVERY - {"_parameters", "_buffers", "_modules", "_is_full_backward_hook"}))
# What else torch looks at, as it is outside of a trace: where any of these says yes, nothing is replayed ...
UNUSUAL: tuple[Callable[[], Any], ...] = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch._C._is_any_autocast_enabled,
    torch._C._is_torch_function_mode_enabled,
    nn.modules.module._has_any_global_hook,
    lambda: torch._C._len_torch_dispatch_stack() != 1,  # which is the recorder
)
# ... and these make a difference.
SETTINGS: tuple[Callable[[], Any], ...] = (
    torch.get_default_dtype,
    torch._C._get_flash_sdp_enabled,
    torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled,
    torch._C._get_deterministic_algorithms,
)
without_modes = torch._C._DisableTorchDispatch


@dataclass(slots=True, eq=False)
class Form:
    """All that an op sees of a tensor without contents. There is one object for each, so that they compare by identity."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    learned: bool

    def empty(self) -> Tensor:
        if not self.offset:
            return empty_strided(self.shape, self.stride, dtype=self.dtype, device=META)
        return empty_strided((), (), dtype=self.dtype, device=META).as_strided(self.shape, self.stride, self.offset)


class Key:
    """All that a node can depend on, and the tensors that it is given.

    Each tensor has a place: those that were given come first, then what the calls make, in order.
    """

    __slots__ = ("kind", "parts", "places", "tensors", "with_contents")

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.with_contents = False  # whether a module holds tensors with contents, which are not looked at
        self.parts: Any = []
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}  # by identity


@dataclass(slots=True, eq=False)
class Place:
    """A tensor in what was learned."""

    at: int


@dataclass(slots=True)
class Step:
    """A call on the tape, with places for its tensors.

    Attributes:
        flat: position and place of each tensor among the arguments; None where some are inside of others.
        ins: the places of all of them, in order.
        made: shape and dtype of each new tensor.
        written: the places of old tensors among the results.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    flat: list[tuple[int, int]] | None
    ins: list[int]
    made: list[tuple[tuple[int, ...], torch.dtype]]
    written: list[int]


@dataclass(slots=True)
class Met:
    """A node that was met once: its calls, and from where to where the values that they made are numbered."""

    module: nn.Module | None
    key: Key
    calls: list[Op]
    values: tuple[int, int]
    result: Any


@dataclass(slots=True)
class Learned:
    """What a node did: its calls, its result with places for tensors, and the forms of those that are new."""

    steps: list[Step]
    result: Any
    forms: dict[int, Form]


class Replay:
    """What is known of nodes, by all that they can depend on."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.known: dict[Any, Any] = {}
        self.single: set[Any] = set()  # functions, methods and classes that were seen to make one call, or none
        self.alike: dict[Any, Form] = {}
        self.own: dict[tuple[str, ...], Any] = {}  # by names of attributes: gets those that are a class's own

    # -- what a node can depend on ------------------------------------------------------------------------------------

    def key(self, tracer: ValueTracer, node: fx.Node, args: Any, kwargs: Any) -> Key | None:
        """All that a node can depend on; None where that is not clear, or not worth to be asked."""
        target: Any = node.target
        module = tracer.modules[target] if node.op == "call_module" else None
        kind: Any = target if module is None else type(module)
        if kind in self.single or target in tracer.opaque:
            return None
        if module is None and not is_of_torch(getattr(Tensor, target, None) if node.op == "call_method" else target):
            return None
        return self.whole(Key(kind), module, args, kwargs)

    def whole(self, key: Key, module: nn.Module | None, args: Any, kwargs: Any) -> Key | None:
        """A key with all that a call may depend on."""
        key.parts.append(key.kind)
        if any(ask() for ask in UNUSUAL) or (module is not None and not self.look_at(module, key)):
            return None
        if not self.see(args, key) or (kwargs and not self.see((kwargs,), key)):
            return None
        key.parts = (*key.parts, *[ask() for ask in SETTINGS])
        return key

    def look_at(self, module: nn.Module, key: Key) -> bool:
        """Add what a module of torch.nn is and holds to a key; False for another one."""
        kind: Any = type(module)
        held = self.state(module) if is_known_layer(kind, kind.forward) else None
        if held is None:
            return False
        key.parts += (kind, *held)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key.parts.append(name)
            if tensor is not None and not tensor.is_meta:  # if a layer uses it, that shows (`learned`)
                key.parts += (tensor.shape, tensor.dtype)
                key.with_contents = True
            elif not self.see((tensor,), key):
                return False
        for name, child in module._modules.items():
            key.parts.append(name)
            if child is not None and not self.look_at(child, key):
                return False
        return True

    def state(self, module: nn.Module) -> Any:
        """What a layer holds beside its tensors; None where that is more than numbers: a hook, a forward of its own."""
        held = vars(module)
        names = tuple(held)
        own = self.own.get(names)
        if own is None:
            mine = [name for name in names if name not in EVERY]
            own = self.own[names] = operator.itemgetter(*mine) if held.keys() >= EVERY else lambda held: None
        try:
            return None if any(EMPTY(held)) else (own, marshal.dumps(own(held), 0))  # which tells 1 from True and 1.0
        except (KeyError, ValueError):
            return None

    def see(self, items: Iterable[Any], key: Key) -> bool:
        """Add values to a key; False if there is one of which more may matter than can be told."""
        parts, tensors = key.parts, key.tensors
        for x in items:
            kind = type(x)
            if kind in PLAIN_TENSORS:
                form = self.form(x)
                if form is None:
                    return False
                at = key.places.setdefault(id(x), len(tensors))
                if at == len(tensors):
                    tensors.append(x)
                parts += (form, at)
            elif kind in FIXED:
                parts += (kind, x if kind is not float else repr(x))  # 0.0 == -0.0
            elif kind in SEQUENCES:
                parts += (kind, len(x))
                if not self.see(x, key):
                    return False
            elif kind is dict:
                parts += (kind, len(x), *x)
                if not self.see(x.values(), key):
                    return False
            elif kind is slice:
                parts.append(kind)
                if not self.see((x.start, x.stop, x.step), key):
                    return False
            else:
                return False
        return True

    def form(self, tensor: Tensor) -> Form | None:
        """The form of a tensor; None of one that has contents, or is not what it seems."""
        if not tensor.is_meta or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            return None
        if tensor.is_inference() or vars(tensor):
            return None
        seen: Any = (tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset(), tensor.requires_grad)
        form = self.alike.get(seen)
        if form is None:
            form = self.alike[seen] = Form(tuple(seen[0]), *seen[1:])
        return form

    # -- what it did --------------------------------------------------------------------------------------------------

    def meet(self, met: Met) -> None:
        """Keep in mind what a node did that nothing is known of."""
        if len(met.calls) < 2:
            self.single.add(met.key.kind)
        else:
            self.known[met.key.parts] = met

    def find(self, key: Key) -> Any:
        """What is known of a node: learned from the first one, if this is the second."""
        known = self.known.get(key.parts)
        if type(known) is Met:
            known = self.known[key.parts] = self.learned(known) or UNCLEAR
        return known

    def learned(self, met: Met) -> Learned | None:
        """What a node did, if all of it is calls on what it was given and on what they made themselves."""
        values, key, module = self.recorder.tape.values, met.key, met.module
        if module is not None:  # it did nothing to itself?
            own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.is_meta]
            if self.state(module) != key.parts[2:4] or not all(id(t) in key.places for t in own):
                return None
        first, last = met.values
        places = {ref.id: Place(i) for i, ref in enumerate(map(self.recorder.find, key.tensors)) if ref is not None}
        before = first + sum([first <= number < last for number in places])  # with tensors of a layer that nothing used so far
        end = len(key.tensors)
        steps: list[Step] = []
        for op in met.calls:
            schema, ins = getattr(op.func, "_schema", None), op.inputs
            if schema is None or schema.name in RESHAPING or not all(ref.id in places for ref in ins):
                return None
            outs = dict.fromkeys([ref.id for ref in collect(op.outs, Ref)])
            written = [places[number].at for number in outs if number in places]
            made = [(number, values[number]) for number in outs if number not in places]
            for number, value in made:
                if number < first or value.name is not None or not value.on_meta:
                    return None
                places[number] = Place(end)
                end += 1
            flat = [(i, places[a.id].at) for i, a in enumerate(op.args) if type(a) is Ref]
            args, kwargs, results = [map_tensors(x, lambda ref: places[ref.id], Ref) for x in (op.args, op.kwargs, op.outs)]
            shapes = [(value.shape, value.dtype) for _, value in made]
            at = [places[ref.id].at for ref in ins]
            steps.append(Step(op.func, args, kwargs, results, flat if len(flat) == len(ins) else None, at, shapes, written))
        if last - before != end - len(key.tensors):
            return None  # a constant made on the way
        forms: dict[int, Form] = {}
        placed = self.placed(met.result, places, len(key.tensors), forms)
        return None if placed is UNCLEAR else Learned(steps, placed, forms)

    def placed(self, result: Any, places: dict[int, Place], given: int, forms: dict[int, Form]) -> Any:
        """A node's result with places for its tensors; the forms of new ones are noted."""
        if isinstance(result, Tensor):
            ref = self.recorder.find(result)
            place = None if ref is None else places.get(ref.id)
            if place is None:
                return UNCLEAR
            if place.at >= given:
                form = self.form(result)
                if form is None or form.learned or type(result) is not Tensor:
                    return UNCLEAR
                forms[place.at] = form
            return place
        if type(result) in ATOMS or type(result) is torch.Size:
            return result
        if type(result) not in (tuple, list):
            return UNCLEAR
        items = [self.placed(v, places, given, forms) for v in result]
        return UNCLEAR if any(v is UNCLEAR for v in items) else type(result)(items)

    def again(self, learned: Learned, key: Key) -> Any:
        """Write down what a node did, with other tensors; its result."""
        recorder, tensors = self.recorder, key.tensors
        values, ops, node = recorder.tape.values, recorder.tape.ops, recorder.node
        refs: list[Any] = [recorder.find(t) for t in tensors]
        for step in learned.steps:
            for at in step.ins:
                if refs[at] is None:
                    refs[at] = recorder.ref(tensors[at])
            ins = [refs[at] for at in step.ins]
            from_input = True in [values[ref.id].from_input for ref in ins]
            for at in step.written:
                values[refs[at].id].from_input |= from_input
            for shape, dtype in step.made:
                refs.append(Ref(len(values)))
                values.append(Value(shape, dtype, from_input, None, None, True))
            args: Any = step.args
            if step.flat is None:
                args = filled(args, refs)
            else:
                args = [*args]
                for i, at in step.flat:
                    args[i] = refs[at]
                args = tuple(args)
            kwargs = filled(step.kwargs, refs) if step.kwargs else {}
            ops.append(Op(step.func, args, kwargs, filled(step.outs, refs), node, ins))
        made: dict[int, Tensor] = {}
        if learned.forms:
            with without_modes():
                for at, form in learned.forms.items():
                    made[at] = tensor = form.empty()
                    recorder.held[id(tensor)] = (tensor, refs[at])
        tensor_at = lambda place: made[place.at] if place.at in made else tensors[place.at]  # noqa: E731
        return tensor_at(learned.result) if type(learned.result) is Place else map_tensors(learned.result, tensor_at, Place)


def filled(x: Any, refs: list[Ref]) -> Any:
    """With references in their places."""
    return refs[x.at] if type(x) is Place else map_tensors(x, lambda place: refs[place.at], Place)


@functools.lru_cache(maxsize=4096)
def is_known_layer(kind: type, forward: Any) -> bool:
    """Whether all that layers of a class do is written in torch.nn, and asks nothing but what they hold and are given."""
    if issubclass(kind, nn.RNNBase | nn.RNNCellBase):
        return False  # whose kernels are chosen at the time (`plain_rnn`)
    return is_of_torch(forward) and all(k.__module__.split(".")[0] in ("torch", "builtins") for k in kind.__mro__)


@functools.lru_cache(maxsize=4096)
def is_of_torch(function: Any) -> bool:
    """Whether a function is torch's own. (What it says of itself can be copied; where it looks up names cannot.)"""
    if type(function) is types.MethodDescriptorType:
        return issubclass(Tensor, function.__objclass__)
    if type(function) is types.FunctionType:
        home = function.__globals__.get("__name__", "")
    elif type(function) is types.BuiltinFunctionType:
        home = function.__module__ or ""
    else:
        return False
    return home in ("torch", "_operator") or home.startswith("torch.")


UNCLEAR: Any = object()
