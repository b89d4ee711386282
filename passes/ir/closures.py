"""Functions that a copied module tree calls: with the objects of the copy in place of those of the tree."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

DEPTH = 4  # of functions that are variables of functions


class Rebound:
    """A function that was defined inside of another one, with other objects in some of its variables from there.

    The variables belong to the function, which the original tree has, too: they are put there for the time of a call, and so
    are the defaults of its arguments.

    Arguments:
        function: that is called.
        held: by the position of a variable, what it is in a call.
        defaults: of its arguments, in a call.
    """

    def __init__(self, function: types.FunctionType, held: dict[int, Any], defaults: tuple[Any, ...] | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function, self.held, self.defaults = function, held, defaults

    @property
    def __globals__(self) -> dict[str, Any]:
        return self.function.__globals__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cells = self.function.__closure__ or ()
        before, defaults = {i: cells[i].cell_contents for i in self.held}, self.function.__defaults__
        try:
            for i, value in self.held.items():
                cells[i].cell_contents = value
            self.function.__defaults__ = self.defaults
            return self.function(*args, **kwargs)
        finally:
            self.function.__defaults__ = defaults
            for i, value in before.items():
                self.held[i], cells[i].cell_contents = cells[i].cell_contents, value


def rebound(function: Any, memo: Mapping[int, Any], depth: int = DEPTH) -> Any:
    """A function for a copied tree: an object of the tree, a method of one, or one with such a variable, as that of the copy.

    Arguments:
        memo: the copies, by the identity of what they are copies of.
    """
    if id(function) in memo:
        return memo[id(function)]
    if isinstance(function, types.MethodType):
        mine = memo.get(id(function.__self__))
        return function if mine is None else types.MethodType(function.__func__, mine)
    if isinstance(function, functools.partial):
        given = [memo.get(id(a), a) for a in function.args]
        named = {k: memo.get(id(v), v) for k, v in function.keywords.items()}
        return functools.partial(rebound(function.func, memo, depth), *given, **named)
    if isinstance(function, Rebound):
        held = {i: rebound(value, memo, depth) for i, value in function.held.items()}
        return Rebound(function.function, held, function.defaults and tuple(rebound(v, memo, depth) for v in function.defaults))
    if not isinstance(function, types.FunctionType) or not (function.__closure__ or function.__defaults__) or not depth:
        return function
    held = {}
    for i, cell in enumerate(function.__closure__ or ()):
        try:
            value = cell.cell_contents
        except ValueError:  # it is still empty
            continue
        if (mine := rebound(value, memo, depth - 1)) is not value:
            held[i] = mine
    before = function.__defaults__
    defaults = before and tuple(rebound(value, memo, depth - 1) for value in before)
    moved = any(a is not b for a, b in zip(defaults or (), before or (), strict=True))
    return Rebound(function, held, defaults) if held or moved else function


def weakly_held(held: Iterable[Any], memo: Mapping[int, Any]) -> dict[int, Any]:
    """By the identity of the weak references to objects of a tree, what stands for them in the copy.

    It holds on to the copies: of the one at the root, a pruned model is made of what it consists of, and it is dropped.
    """
    found: dict[int, Any] = {}
    for original in held:
        for weak in weakref.getweakrefs(original):
            if type(weak) in (weakref.ref, *weakref.ProxyTypes):
                copied = memo[id(original)]
                found[id(weak)] = functools.partial(itself, copied) if type(weak) is weakref.ref else copied
    return found


def itself(value: Any) -> Any:
    return value
