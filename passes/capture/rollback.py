"""Restore what forwards store on their modules while a program is captured."""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.passes.capture.proxy import PROXIES, TensorProxy
from fxprune.passes.errors import ReadsValue
from fxprune.passes.ir.contents import CONTAINERS, Contents, changeable, contents, refill, same_bits
from fxprune.passes.ir.index_contents import storage_of
from fxprune.passes.ir.module_tree import named_parameters, walk
from fxprune.passes.ir.op_trace import OpTrace, writes
from fxprune.passes.ir.pytree import ATOMS, TensorRef, iterate
from fxprune.passes.ops.registry import spec_of

KEPT = {"_buffers", "_parameters", "_modules", "training"}  # by other means
HELD_BY_ALL = nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType


class ModuleState:
    """The attributes of modules, as they were before the capture.

    `counted` are the names of numbers that the forward has changed.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.before: dict[nn.Module, tuple[dict[str, Any], dict[str, Contents]]] = {}
        self.buffers: dict[nn.Module, dict[str, Any]] = {}
        self.counted: list[str] = []
        seen: set[int] = set()
        for module in modules:
            held: dict[str, Contents] = {}
            for name, value in [item for item in vars(module).items() if type(item[1]) not in ATOMS and item[0] != "_modules"]:
                if not is_filled(value):
                    held[name] = [] if type(value) is tuple else [value.clear]
                elif changeable(value):
                    held[name] = contents(value, seen)
            self.before[module], self.buffers[module] = (dict(vars(module)), held), dict(module._buffers)

    def numbers_changed(self, module: nn.Module) -> list[str]:
        """The attributes of a module that were numbers, and are others now."""
        before = self.before[module][0]
        plain = ((name, v) for name, v in vars(module).items() if type(v) in (int, float) and type(before.get(name)) is type(v))
        return [name for name, value in plain if value != before[name]]

    def put(self, module: nn.Module, name: str, value: Any) -> Callable[[], None]:
        """Give a module an attribute that it did not have, and that stays until the function that is returned takes it away."""
        boxes = [vars(module), *(self.before[module][:1] if module in self.before else ())]
        for box in boxes:
            box[name] = value

        def take_away() -> None:
            for box in boxes:
                box.pop(name, None)

        return take_away

    def assigned(self, module: nn.Module) -> Iterator[tuple[Tensor, Any]]:
        """The tensors of a module in whose place a forward has put others, and those."""
        now = module._buffers, vars(module)
        if not any(TensorProxy in map(type, held.values()) for held in now):
            return
        before, buffers = self.before.get(module, ({},))[0], self.buffers.get(module, {})
        for old, new in zip((buffers, before), now, strict=True):
            for name, tensor in old.items():
                if new.get(name) is not tensor and type(new.get(name)) is TensorProxy and isinstance(tensor, Tensor):
                    yield tensor, new[name]

    def restore_all(self, index: Mapping[fx.Node, int]) -> None:
        """Put back every attribute that was there, and what containers held: also what code put there that is not captured.

        What a forward has set for the first time is no attribute of the model: it sets it again.
        """
        self.counted = [name for module in self.before for name in self.numbers_changed(module)]
        self.restore(index, 0)
        self.put_back()

    def put_back(self) -> None:
        """The attributes that were there, and what they held, as they were."""
        for module, (before, _) in self.before.items():
            for name in [k for k in vars(module) if k not in before and not k.startswith("_tensor_constant")]:
                del vars(module)[name]  # (a constant is the program's)
            vars(module).update(before)
        for held in [held for _, held in self.before.values()]:
            for box in held.values():
                refill(box)

    def take_back(
        self, first: ModuleState, index: Mapping[fx.Node, int], begin: int
    ) -> list[tuple[dict[str, Any], str, Any, Any]]:
        """Put back all but the model's tensors, in whose place a forward may have put others (`assigned`).

        Arguments: `first`, the state before the capture; `index` and `begin`, as of `restore`.

        Returns: where attributes stand for such nodes: all attributes, the name, what was there, and what stood in its place.
        """
        found = []
        for module, (before, held) in self.before.items():
            now, tensors = vars(module), first.before.get(module, ({}, {}))[0]
            mine = {k for k in {*now, *before} if k not in KEPT and not isinstance(tensors.get(k), Tensor)}
            for name in [k for k in mine & now.keys() if type(now[k]) not in ATOMS and stands_for(now[k], index, begin)]:
                value = now[name]
                found.append((now, name, before.get(name), copy.copy(value) if changeable(value) else value))
            for name in mine:
                if name in before:
                    now[name] = before[name]
                    refill(held.get(name, ()))
                elif not name.startswith("_tensor_constant"):
                    del now[name]
        return found

    def restore(self, index: Mapping[fx.Node, int], begin: int) -> None:
        """Put back every attribute that stands for a node numbered `begin` or later.

        Arguments: `index`, the numbers of the nodes.
        """
        for module, (before, held) in self.before.items():
            now = vars(module)
            same = len(now) == len(before) and all(map(operator.is_, now.values(), before.values()))
            if same and not any(stands_for(v, index, begin) for v in map(before.get, held) if is_filled(v)):
                continue
            stored = [(k, v) for k, v in now.items() if type(v) not in ATOMS and not (type(v) in CONTAINERS and not v)]
            for name in [k for k, v in stored if k != "_modules" and stands_for(v, index, begin)]:
                if name not in before:
                    del now[name]
                    continue
                if now[name] is before[name]:  # something was put into it
                    refill(held.get(name, ()))
                now[name] = before[name]


class ParameterWrites:
    """Parameters, which the tree that is captured shares with the original, are put back as they were.

    In its context they are without gradients, to which a forward may add.

    Arguments:
        watched: whether code may write to them that the dispatcher does not show, as NumPy does.
    """

    def __init__(self, root: nn.Module, *, watched: bool = False) -> None:
        self.held = [(p, p.detach()) for p in named_parameters(root).values() if not p.is_meta and not p.is_sparse]
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.unwritten: dict[int, list[Tensor]] = {}  # by storage
        for _, memory in self.held:
            self.unwritten.setdefault(storage_of(memory), []).append(memory)
        self.watched: list[tuple[Tensor, Tensor]] = []
        self.written_unseen = False  # what the dispatcher has not shown
        if watched:
            self.watch()

    def watch(self) -> None:
        """Note what all parameters hold now."""
        if not self.watched:
            self.watched = [(memory, memory.clone()) for _, memory in self.held if storage_of(memory) in self.unwritten]

    def before_write(self, tensor: Tensor) -> None:
        """Note what parameters hold in the memory that is about to be written to."""
        if self.unwritten and not tensor.is_meta and not tensor.is_sparse:
            self.saved += [(memory, memory.clone()) for memory in self.unwritten.pop(storage_of(tensor), ())]

    @property
    def found(self) -> bool:
        return bool(self.saved) or any(storage_of(p) != storage_of(memory) for p, memory in self.held)

    def __enter__(self) -> None:
        self.gradients = [(p, p.grad) for p, _ in self.held]
        for p, gradient in self.gradients:
            if gradient is not None:
                p.grad = None

    def __exit__(self, *error: object) -> None:
        for parameter, memory in self.held:
            if storage_of(parameter) != storage_of(memory):
                parameter.data = memory
        for memory, before in self.saved:
            memory.copy_(before)
        for memory, before in self.watched:
            if not same_bits(memory, before):
                memory.copy_(before)
                self.written_unseen = True
        for p, gradient in self.gradients:
            if p.grad is not gradient:
                p.grad = gradient


def run_outside(tracer: Any, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch returns that no tensor of the graph goes into.

    Raises: ReadsValue where it writes to a tensor of an object that the model holds, which is there in the next call.
    """
    name = getattr(method, "__name__", "")
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
    target = next(iter((*args, *kwargs.values())), None) if in_place else kwargs.get("out")
    if isinstance(target, Tensor) and target.layout is torch.strided:
        if tracer.held is None:
            tracer.held = held_by_objects(tracer.root)
        if storage_of(target) in tracer.held:
            raise ReadsValue("a tensor that is there from call to call and is written to")
    return method(*args, **kwargs)


def held_by_objects(root: nn.Module) -> dict[int, Tensor]:
    """All tensors that a model's modules hold, in containers and objects, too, by their memory."""
    found, seen = dict[int, Tensor](), set[int]()
    pending: list[Any] = [vars(module) for module in walk(root)]
    while pending:
        box = pending.pop()
        if isinstance(box, Tensor) and type(box) not in PROXIES and box.layout is torch.strided:
            found[storage_of(box)] = box
        if type(box) in ATOMS or isinstance(box, HELD_BY_ALL) or id(box) in seen:
            continue
        seen.add(id(box))
        if isinstance(box, Mapping):
            pending += box.values()
        elif isinstance(box, list | tuple | set | frozenset):
            pending += box
        elif type(getattr(box, "__dict__", None)) is dict:
            pending.append(vars(box))
    return found


def written_in_place(capture: OpTrace, but_for: Collection[int]) -> set[str]:
    """The names of tensors that a program writes to in place, by nodes other than these (by their numbers)."""
    found: set[str] = set()
    shown: dict[int, TensorRef] = {}  # by a view, the tensor that it shows
    for op in capture.ops:
        if spec_of(op).views and op.inputs:
            shown.update({ref.id: shown.get(op.inputs[0].id, op.inputs[0]) for ref in op.outputs})
        for ref in writes(op) if op.node not in but_for else ():
            name = capture.values[shown.get(ref.id, ref).id].name
            found |= set() if name is None else {name}
    return found


def facts_written(tracer: Any) -> frozenset[str]:
    """The names of tensors that a forward writes to and whose contents Python has read."""
    return frozenset(tracer.facts & written_in_place(tracer.recorder.op_trace, ())) if tracer.facts else frozenset()


def is_filled(value: Any) -> bool:
    return type(value) not in CONTAINERS or bool(value)


def stands_for(stored: Any, index: Mapping[fx.Node, int], begin: int) -> bool:
    """Whether something is, or holds, a proxy for a node that is as new as that."""
    if not is_filled(stored):
        return False
    if type(stored) is dict and not any(type(v) in PROXIES or type(v) in CONTAINERS for v in stored.values()):
        return False
    return any(type(v) in PROXIES and index.get(v.node, begin) >= begin for v in iterate(stored))
