"""Restore what forwards store on their modules while a program is captured."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from fxprune.passes.capture.proxy import PROXIES, TensorProxy
from fxprune.passes.ir.module_tree import CONTAINERS
from fxprune.passes.ir.op_trace import OpTrace, writes
from fxprune.passes.ir.pytree import ATOMS, TensorRef, iterate
from fxprune.passes.ops.registry import find


class ModuleState:
    """The attributes of modules, as they were before the capture."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.before = {}
        for module in modules:
            boxes = containers(module)
            held = {k: copy.copy(v) for k, v in boxes.items() if v}
            self.before[module] = dict(vars(module)), list(boxes.values()), held

    def expect(self, module: nn.Module, name: str, value: Any) -> None:
        """An attribute that a module has from now on."""
        if module in self.before:
            self.before[module][0][name] = value

    def assigned(self, module: nn.Module) -> Iterator[tuple[Tensor, Any]]:
        """The tensors of a module in whose place a forward has put others, and those."""
        before, _, held = self.before.get(module, ({}, [], {}))
        now = vars(module)
        for old, new in ((held.get("_buffers", {}), module._buffers), (before, now)):
            for name, tensor in old.items():
                if isinstance(tensor, Tensor) and new.get(name) is not tensor and type(new.get(name)) is TensorProxy:
                    yield tensor, new[name]

    def restore_tensors(self) -> None:
        """Put back the tensors that code which is not captured has put others in the place of."""
        for module, (before, _, held) in self.before.items():
            module._buffers.update(held.get("_buffers", {}))
            vars(module).update({name: value for name, value in before.items() if isinstance(value, Tensor)})

    def restore(self, index: Mapping[fx.Node, int], begin: int) -> None:
        """Put back every attribute that stands for a node numbered `begin` or later.

        Arguments: `index`, the numbers of the nodes.
        """
        for module, (before, boxes, held) in self.before.items():
            now = vars(module)
            same = len(now) == len(before) and all(map(operator.is_, now.values(), before.values()))
            if same and not any(box and stands_for(box, index, begin) for box in boxes):
                continue
            stored = [(k, v) for k, v in now.items() if type(v) not in ATOMS and not (type(v) in CONTAINERS and not v)]
            for name in [k for k, v in stored if k != "_modules" and stands_for(v, index, begin)]:
                if name not in before:
                    del now[name]
                    continue
                if now[name] is before[name]:  # something was put into it
                    refill(now[name], held.get(name, ()))
                now[name] = before[name]


def written_in_place(capture: OpTrace, but_for: Collection[int]) -> set[str]:
    """The names of tensors that a program writes to in place, by nodes other than these (by their numbers)."""
    found: set[str] = set()
    shown: dict[int, TensorRef] = {}  # by a view, the tensor that it shows
    for op in capture.ops:
        if find(op.func).views and op.inputs:
            shown.update({ref.id: shown.get(op.inputs[0].id, op.inputs[0]) for ref in op.outputs})
        for ref in writes(op) if op.node not in but_for else ():
            name = capture.values[shown.get(ref.id, ref).id].name
            found |= set() if name is None else {name}
    return found


def stands_for(stored: Any, index: Mapping[fx.Node, int], begin: int) -> bool:
    """Whether something is, or holds, a proxy for a node that is as new as that."""
    if type(stored) is dict and not any(type(v) in PROXIES or type(v) in CONTAINERS for v in stored.values()):
        return False
    return any(type(v) in PROXIES and index.get(v.node, begin) >= begin for v in iterate(stored))


def containers(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that a forward can put something into."""
    return {k: v for k, v in vars(module).items() if type(v) in CONTAINERS and k != "_modules"}


def refill(box: Any, held: Any) -> None:
    """Have a container hold what it held; a tuple always does."""
    if isinstance(box, list):
        box[:] = held
    elif isinstance(box, dict | set):
        box.clear()
        box.update(held)
