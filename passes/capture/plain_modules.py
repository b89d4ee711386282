"""Modules that are a node of the program without being a layer of torch.nn.

A norm with an activation, a norm of one's own: a forward that computes with its tensors and flags and nothing else. There is
nothing in it to rewrite, whatever is removed, and it does the same in training up to flags. Such a module stays a module: a
node for a dozen, captured once for all of its kind and width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from torch import fx, nn

from fxprune.passes.capture.builder import GraphBuilder
from fxprune.passes.capture.frames import Frame
from fxprune.passes.capture.modules import own_call
from fxprune.passes.capture.proxy import TensorProxy
from fxprune.passes.capture.train_eval import Modes
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.program import select_by_mode
from fxprune.passes.ir.pytree import ATOMS, TensorRef, collect


class PlainModules:
    """What is known of such modules: their kinds, and which whole numbers on them a forward has not asked for."""

    def __init__(self) -> None:
        self.kinds: set[Hashable] = set()
        self.unread: dict[type, frozenset[str]] = {}
        self.withdrawn: dict[nn.Module, dict[str, int]] = {}
        self.read: Any = None  # the `__getattr__` that asks for `answer`

    def kind(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_training: bool = False
    ) -> Hashable | None:
        """What a forward's path through its Python can depend on, contents of tensors apart; None where that is not clear.

        With `in_training` modules are in the mode that they have in training, for which their kind is the same.
        """
        own = type(module)
        if own.__getattr__ is not self.read or own.__getattribute__ is not object.__getattribute__:
            return None  # `watching` would not be told
        if kwargs or module._forward_hooks or module._forward_pre_hooks or own_call(own) is not None:
            return None
        inner = [(name, m) for name, m in module._modules.items() if m is not None]
        if any(m._modules or m._parameters or m._buffers for _, m in inner):
            return None
        given = [(a.value.dim(), a.value.dtype) for a in args if type(a) is TensorProxy]
        if len(given) < len(args):
            return None
        tensors = (*module._parameters.items(), *module._buffers.items())
        held: list[Any] = [(name, None if t is None else t.dim()) for name, t in tensors]
        for path, each in (("", module), *inner):
            unread = self.unread.get(type(each), frozenset()) if each is module else frozenset()
            for name, value in vars(each).items():
                if name == "training" and in_training:
                    held.append((path, name, False))
                elif type(value) in ATOMS:
                    held.append((path, name, None if name in unread else value))
                elif name[0] != "_" or type(value) is TensorProxy:
                    return None  # a container, something that cannot be compared, or what another call has stored
            held.append((path, type(each)))
        return (tuple(given), tuple(held))

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Iterator[dict[str, int]]:
        """Take a module's whole numbers away from it; those its forward asks for are given back by `answer`."""
        held = vars(module)
        numbers = {k: v for k, v in held.items() if type(v) is int and k[0] != "_" and not hasattr(type(module), k)}
        order = dict(held)
        for name in numbers:
            del held[name]
        self.withdrawn[module] = numbers
        try:
            yield numbers
        finally:
            del self.withdrawn[module]
            late = {k: v for k, v in held.items() if k not in order}
            now = {k: held.get(k, v) for k, v in order.items() if k in held or k in numbers}
            held.clear()
            held.update(now | late)

    def answer(self, module: nn.Module, name: str) -> int | None:
        """A number that was taken away and is asked for."""
        numbers = self.withdrawn.get(module)
        if numbers is None or name not in numbers:
            return None
        vars(module)[name] = numbers[name]
        return numbers.pop(name)

    def add(self, module: nn.Module, args: tuple[Any, ...], unread: Iterable[str]) -> None:
        """A module of this kind needs no second look; `unread` are its numbers that were not asked for."""
        known = self.unread.get(type(module))
        self.unread[type(module)] = frozenset(unread) if known is None else known & frozenset(unread)
        self.kinds.add(self.kind(module, args, {}))


def is_plain(builder: GraphBuilder, modes: Modes, frame: Frame, stored: dict[str, Any]) -> bool:
    """Whether a forward that was just captured leaves nothing to rewrite in either mode.

    Every node creates a tensor from tensors, flags and fractions; no size is read, nothing is decided by one, nothing is stored
    on the module (`stored` are its attributes from before).
    """
    begin, index = frame.begin, builder.index
    if modes.in_training or modes.separate or any(index[g.node] >= begin for g in builder.guards):
        return False
    if any(outer.asked for outer in builder.frames if outer is not frame):  # what it does in training was not captured
        return False
    now = vars(frame.module)
    if len(now) != len(stored) or any(now[k] is not v for k, v in stored.items()):
        return False
    if not all(b.alike for b in modes.branches if b.begin >= begin):
        return False
    created = itertools.takewhile(lambda n: n.op != "root" and index[n] >= begin, reversed(builder.graph.nodes))
    return all(is_simple(builder, n) for n in created)


def is_simple(builder: GraphBuilder, node: fx.Node) -> bool:
    if node.op == "get_attr" or node.target is select_by_mode:
        return True
    if type(builder.results[node]) is not TensorRef or node in builder.evaluator.untracked:
        return False
    if node.op == "call_module" and not bare(builder.modules[str(node.target)]):
        return False
    given = collect((node.args, dict(node.kwargs)), int)
    return all(isinstance(v, bool) or v in (-1, 0, 1) for v in given)


def bare(module: nn.Module) -> bool:
    """Whether a layer has no tensors and no numbers that could be sizes."""
    public = [v for k, v in vars(module).items() if k[0] != "_"]
    return next(named_tensors(module), None) is None and all(type(v) in ATOMS - {int} for v in public)
