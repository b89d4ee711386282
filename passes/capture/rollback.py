"""Restore what forwards store on their modules while a program is captured."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from fxprune.passes.capture.proxy import PROXIES
from fxprune.passes.ir.module_tree import CONTAINERS
from fxprune.passes.ir.pytree import ATOMS, iterate


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
