"""Guards: what Python decided by a size at capture, asked again of each input that the program is given.

Where a batch of one takes a path of its own (`if positions.shape[0] != batch`), the other path often computes the same for
it. A guard that fails there is *waived* at the size where that was tried, and stands at all others.

Where sizes are symbols (`torch.compile`, `torch.export`), a guard asks a symbol as the original's own code did: so it becomes
a guard of the compiled code, or a constraint of the exported program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.capture.proxy import PROXIES
from fxprune.passes.errors import GuardError
from fxprune.passes.ir.program import keyword
from fxprune.passes.ir.pytree import TensorRef, collect
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
        now = "a tensor" if isinstance(value, Tensor) else repr(value)
        if wanted is ...:
            if value is None or isinstance(value, bool | int | float | str):
                raise GuardError(f"{why}: a tensor where it is {now} now")
        elif value is not wanted and (isinstance(value, Tensor) or value != wanted):
            raise GuardError(f"{why}: {wanted!r} where it is {now} now")


OTHERWISE = "prune with this {} in example_inputs, or with same_class=True: the program was captured with another"
NUMBERS = (bool, int, float)


def is_input(node: fx.Node) -> bool:
    """Whether a node is an argument of the program, or a plain one of those that come by `**`."""
    return node.op == "placeholder" or node.target is keyword


def sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes and all that they are computed from."""
    pending, seen = [*nodes], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return seen


def check_input(node: fx.Node, value: Any, decided: bool) -> None:
    """Write down what is checked of an argument, and what it is where it is left out and forward has a default for it.

    That is the example's value, so that the program runs as it was captured; a number that it computes with has the default of
    forward, unless something was `decided` by it.
    """
    graph, why = node.graph, OTHERWISE.format(node.name)
    if node.op == "placeholder" and node.args:
        plain = value is None or type(value) in (*NUMBERS, str)
        if not plain:
            node.args = (None,)
            graph.call_function(given_as_captured, ((node,), (...,), why))  # type: ignore[arg-type]
        elif decided or not node.users or not all(type(v) in NUMBERS for v in (value, node.args[0])):
            node.args = (value,)
    if node.meta.get("fixed"):
        graph.call_function(given_as_captured, ((node,), (value,), why))
    elif parts := parts_of_input(value):
        if str(node.target)[:2] == "**":
            parts = {k: parts[k] if collect(v, TensorRef) else ... for k, v in value.items()}
        graph.call_function(has_parts, (node, parts, f"the pruned program was captured where {node.name}"))


def parts_of_input(value: Any) -> Any:
    """How many parts an input has that is a container, and those in it: None for what is none."""
    if isinstance(value, tuple | list):
        return tuple(parts_of_input(v) for v in value)
    return {k: parts_of_input(v) for k, v in value.items()} if isinstance(value, dict) else None


@fx.node.has_side_effect
def has_parts(value: Any, parts: Any, why: str) -> None:
    """Raise where an input has other parts than at capture (see `parts_of_input`): the program reads those that were there.

    A part that may be left out is an ellipsis.
    """
    if parts is None:
        return
    if isinstance(value, fx.Proxy):  # as for `holds`
        value.tracer.create_proxy("call_function", has_parts, (value, parts, why), {})
        return
    left_out = [k for k, inner in parts.items() if inner is ... and k not in value] if isinstance(parts, dict) else []
    if len(value) != len(parts) - len(left_out) or (isinstance(value, dict) and not value.keys() <= dict(parts).keys()):
        named = isinstance(value, dict) and isinstance(parts, dict)
        had, has = (", ".join(map(str, x)) or "none" if named else len(x) for x in (parts, value))
        what = f"{why} has {had if named else f'{had} parts'}, and here it has {has}"
        raise GuardError(f"{what}: prune with example inputs of this form, or same_class=True")
    for key, inner in parts.items() if isinstance(parts, dict) else enumerate(parts):
        if inner is not None and inner is not ...:
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
