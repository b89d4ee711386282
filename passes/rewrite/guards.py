"""Guards: what Python decided by a size at capture, asked again of each input that the program is given.

Where a batch of one takes a path of its own (`if positions.shape[0] != batch`), the other path often computes the same for
it. A guard that fails there is *waived* at the size where that was tried, and stands at all others.

Where sizes are symbols (`torch.compile`, `torch.export`), a guard asks a symbol as the original's own code did: so it becomes
a guard of the compiled code, or a constraint of the exported program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.capture.proxy import PROXIES
from fxprune.passes.errors import GuardError
from fxprune.passes.rewrite.programs import Line, Name, Program

NOTES: ContextVar[list[str] | None] = ContextVar("NOTES", default=None)


@fx.node.has_side_effect
def holds(value: Any, expected: Any, why: str, size: Any = None, tried: int | None = None) -> None:
    """Raise where a decision taken at capture would be another one now, unless it was `tried` at this size."""
    if isinstance(value, fx.Proxy):  # a tracer of FX's own goes over the program, to which the guard belongs
        value.tracer.create_proxy("call_function", holds, (value, expected, why, size, tried), {})
        return
    found = agrees(value, expected, size, tried)
    if isinstance(found, torch.SymBool) and type(found) not in PROXIES:  # those of a capture stand for a truth value
        torch._check(found, lambda: why)
    elif not found:
        notes = NOTES.get()
        if notes is None:
            raise GuardError(f"{why}, and here it is {value!r}: prune with example inputs of this size")
        notes.append(why)


def agrees(value: Any, expected: Any, size: Any, tried: int | None) -> Any:
    """Whether the decision is the same, as a truth value or a symbol; torch does not compare its symbols with truth values."""
    if expected is False:
        same = torch.sym_not(value) if isinstance(value, torch.SymBool) else not value
    else:
        same = value if expected is True else value == expected
    return same if tried is None else same | (size == tried)


@fx.node.has_side_effect
def given_as_captured(values: Sequence[Any], expected: Sequence[Any], why: str) -> None:
    """Raise where a module is called with other plain arguments (flags, numbers, None) than at capture.

    `expected` has an ellipsis for a tensor.
    """
    proxy = next((value for value in values if isinstance(value, fx.Proxy)), None)
    if proxy is not None:  # as for `holds`
        proxy.tracer.create_proxy("call_function", given_as_captured, (values, expected, why), {})
        return
    for value, wanted in zip(values, expected, strict=True):
        if wanted is ...:
            if value is None or isinstance(value, bool | int | float | str):
                raise GuardError(f"{why}: a tensor where it is {value!r} now")
        elif value is not wanted and (isinstance(value, Tensor) or value != wanted):
            raise GuardError(f"{why}: {wanted!r} where it is {value!r} now")


def parts_of_input(value: Any) -> Any:
    """How many parts an input has that is a container, and those in it: None for what is none."""
    if isinstance(value, tuple | list):
        return tuple(parts_of_input(v) for v in value)
    return {k: parts_of_input(v) for k, v in value.items()} if isinstance(value, dict) else None


@fx.node.has_side_effect
def has_parts(value: Any, parts: Any, why: str) -> None:
    """Raise where an input has other parts than at capture (see `parts_of_input`): the program reads those that were there."""
    if parts is None:
        return
    if isinstance(value, fx.Proxy):  # as for `holds`
        value.tracer.create_proxy("call_function", has_parts, (value, parts, why), {})
        return
    if len(value) != len(parts):
        what = f"{why} has {len(parts)} parts, and here it has {len(value)}"
        raise GuardError(f"{what}: prune with example inputs of this form, or same_class=True")
    for key, inner in parts.items() if isinstance(parts, dict) else enumerate(parts):
        if inner is not None:
            has_parts(value[key], inner, why)


def describe(node: fx.Node) -> str:
    module = node.meta.get("module")
    return f"%{node.name}{f' in {module}' if module else ''}"


def guards_of(pruned: Any) -> list[Any]:
    """The lines of a pruned module's programs that are guards."""
    return [line for program in vars(pruned)["_flat"].values() for line in program.lines if line.target is holds]


GUARDS = frozenset([holds, given_as_captured, has_parts])  # the third argument is what they say


def with_texts_as_arguments(program: Program) -> tuple[Program, tuple[str, ...]]:
    """A program that is given what its guards say before its other arguments, and these texts."""
    lines: list[Line] = []
    texts: list[str] = []
    for line in program.lines:
        if line.target in GUARDS:
            texts.append(line.args[2])
            line = line._replace(args=(*line.args[:2], Name(f"guard_text_{len(texts)}"), *line.args[3:]))
        lines.append(line)
    given = [Line(f"guard_text_{i + 1}", "placeholder", f"guard_text_{i + 1}") for i in range(len(texts))]
    return Program((*given, *lines)), tuple(texts)


@contextmanager
def noting() -> Iterator[list[str]]:
    """Have programs go on where a guard fails, in this thread; what failed is put into the list."""
    found: list[str] = []
    token = NOTES.set(found)
    try:
        yield found
    finally:
        NOTES.reset(token)
