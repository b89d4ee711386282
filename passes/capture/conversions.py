"""What Python answers itself about sizes and tensors: `int(size)`, `float(size)`, `len(tensor)`, `type(tensor)`, and texts.

Python insists that `int` and `float` return plain numbers. While a program is captured, classes of the same names stand in
their place in files that convert sizes. Which files do is known once they have: the capture starts again then. For `len` and
`type` there is something in every file of the model's.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.capture.patches import CHECKS, STAND_INS, not_a_models
from fxprune.passes.capture.proxy import PROXIES, Items, TensorProxy

PLAIN: dict[str, Any] = {"int": int, "float": float}
ASKING = ("isinstance", "issubclass")


class Conversions:
    """What a capture knows of conversions.

    Attributes:
        files: the variables of each file whose conversions are nodes.
        expected: whether a conversion in another file starts the capture again.
        compare_dtypes: whether a file asks whether a dtype `is` another, which a proxy for it would not be.
    """

    compare_dtypes = False

    def __init__(self, files: tuple[dict[str, Any], ...] = (), *, expected: bool = True) -> None:
        self.files, self.expected = files, expected

    def after(self, error: BaseException) -> Conversions:
        """What is known once a conversion has raised `ConvertsSize`; none is expected once one cannot be a node."""
        names = converting_file(error)
        if names is None or any(names is known for known in self.files) or not can_stand_in(names):
            return Conversions(self.files, expected=False)
        return Conversions((*self.files, names))


@functools.lru_cache(maxsize=4096)
def compares_dtypes(path: str) -> bool:
    try:
        return re.search(r"dtype\s+is\s+(not\s+)?torch\.", Path(path).read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False


def converting_file(error: BaseException) -> dict[str, Any] | None:
    """The variables of the innermost file of the model's that an error came through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if not not_a_models(trace.tb_frame.f_globals):
            found = trace.tb_frame.f_globals
        trace = trace.tb_next
    return found


def can_stand_in(names: dict[str, Any]) -> bool:
    """Whether the functions of a file use `int` and `float` for conversions and questions by `isinstance` alone.

    What is asked otherwise (`type(x) is int`, `dtype=float`), another class would not answer.
    """
    path = names.get("__file__")
    return isinstance(path, str) and not names.keys() & PLAIN.keys() and only_converts(path)


@functools.lru_cache(maxsize=512)
def only_converts(path: str) -> bool:
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return False
    fine: set[ast.AST] = set()
    used: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            fine.add(node.func)
            if node.func.id in ASKING:
                fine.update(inner for argument in node.args[1:] for inner in ast.walk(argument))
        said = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        fine.update(inner for hint in said if isinstance(hint, ast.AST) for inner in ast.walk(hint))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            body = node.body if isinstance(node.body, list) else [node.body]
            used.update(inner for part in body for inner in ast.walk(part))
    return all(node in fine for node in used if isinstance(node, ast.Name) and node.id in PLAIN)


class Converting(type):
    """The class of what stands for `int` or `float`; `plain` is that, and `tracer` captures in `thread`, or None afterwards."""

    plain: Any
    tracer: Any
    thread: int

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        tracer = cls.tracer if threading.get_ident() == cls.thread else None
        if tracer is None or not tracer.recorder.tracing or len(args) != 1 or kwargs or type(args[0]) not in PROXIES:
            return cls.plain(*args, **kwargs)
        given = args[0]
        if isinstance(given.value, Tensor) and given.value.numel() == 1 and tracer.is_made_of_sizes(given.node):
            given = tracer.read_numbers(given, "item")
        if type(given.value) not in (int, float, bool):
            return cls.plain(given)
        tracer.check_size(given, cls.plain.__name__)
        return tracer.create_proxy("call_function", cls.plain, (given,), {})

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.plain)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.plain)


@contextlib.contextmanager
def seen_conversions(tracer: Any) -> Iterator[None]:
    """While a tracer runs, the conversions in the files that it knows are nodes; the lock of `Patches` must be held."""
    made = {name: Converting(name, (plain,), {"plain": plain, "tracer": tracer}) for name, plain in PLAIN.items()}
    for kind in made.values():
        kind.thread = threading.get_ident()
    try:
        for names in tracer.conversions.files:
            names.update(made)
        yield
    finally:
        for names in tracer.conversions.files:
            for name in made:
                del names[name]
        for kind in made.values():
            kind.tracer = None


# -- what is asked in every file -----------------------------------------------------------------------------------------


class Kind(type):
    """The class of what stands for `type` in files of the model's: a proxy is of the class of what it stands for."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return type(*args, **kwargs)
        kind = type(args[0])
        if kind in PROXIES or kind is Items:
            kind = type(args[0].value)
        return STAND_INS.get(id(kind), kind)  # as the file names it

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)


def see_questions(patches: Any) -> None:
    """`len(tensor)` is a size, of which Python would make a plain number, and a proxy's class is that of its value."""

    def length(x: Any) -> Any:
        return x.shape[0] if type(x) is TensorProxy and x.value.dim() and patches.tracing() else len(x)

    patches.shadows |= {"len": length, "type": Kind("type", (type,), {})}


def see_messages(patches: Any) -> None:
    """A size that is written into a message decides nothing: the guards that its text has led to go again."""

    def taking(function: Any, level: int | None = None, *, paused: bool = True) -> Any:
        """A function that takes messages; as argument number `level`, which of its callers it is said to have.

        It is no step of the program, unless it has a stand-in of its own that is to see proxies: then nothing is `paused`.
        """

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if level is not None and len(args) > level:
                args = (*args[:level], args[level] + 1, *args[level + 1 :])
            elif level is not None:
                kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            if not patches.tracing():
                return function(*args, **kwargs)
            said = " ".join([a for a in (*args, *kwargs.values()) if type(a) is str])
            tracer = patches.tracer
            tracer.guards = [g for g in tracer.guards if g.how != "text" or str(g.value) not in said]
            with tracer.paused() if paused else contextlib.nullcontext():
                return function(*args, **kwargs)

        patches.stand_ins[id(function)] = wrapper
        patches.replaced.append((function, wrapper))
        return wrapper

    for name in ("_assert", *CHECKS):
        patches.patch(torch, name, taking(getattr(torch, name), paused=name not in CHECKS))
    patches.patch(builtins, "print", taking(print))
    patches.patch(warnings, "warn", taking(warnings.warn, 2))
    for name in ("debug", "info", "warning", "error"):
        patches.patch(logging.Logger, name, taking(getattr(logging.Logger, name), sys.maxsize))
