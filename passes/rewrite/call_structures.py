"""What a module was called with and what it returned, as arguments of lines and read off their results."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from fxprune.passes.ir.program import Built
from fxprune.passes.rewrite.programs import Line, Name

Steps = tuple[tuple[bool, Any], ...]  # how a part is read off a structure: by attribute or by item, and the key


def nodes_in(x: Any) -> Iterator[fx.Node]:
    return (leaf for _, leaf in parts_of(x) if isinstance(leaf, fx.Node))


def parts_of(x: Any, steps: Steps = ()) -> Iterator[tuple[Steps, Any]]:
    """The leaves of a structure, and how they are read off it."""
    if isinstance(x, Built):
        items: Iterable[tuple[bool, Any, Any]] = ((x.by_attribute, k, v) for k, v in x.parts.items())
    elif isinstance(x, tuple | list):
        items = ((False, i, v) for i, v in enumerate(x))
    elif isinstance(x, dict):
        items = ((False, k, v) for k, v in x.items())
    else:
        yield steps, x
        return
    for by_attribute, key, value in items:
        yield from parts_of(value, (*steps, (by_attribute, key)))


def reading(name: str, source: Name, steps: Steps) -> list[Line]:
    """The lines that read a part off a structure, the last of which has a name."""
    lines: list[Line] = []
    for i, (by_attribute, key) in enumerate(steps):
        last = i == len(steps) - 1
        line_name = name if last else f"{name} {i}"
        lines.append(Line(line_name, "call_function", getattr if by_attribute else operator.getitem, (source, key)))
        source = Name(line_name)
    return lines


def constructed(x: Any, line: Line) -> list[Line]:
    """A line that takes a structure (args, and kwargs where it calls a module), after those that create objects in it."""
    made: list[Line] = []

    def flat(v: Any) -> Any:
        if isinstance(v, Built):
            parts = {k: flat(p) for k, p in v.parts.items()}
            args, kwargs = (tuple(parts.values()), {}) if v.by_position else ((), parts)
            made.append(Line(f"{line.name} {len(made)}", "call_function", v.create, args, kwargs))
            return Name(made[-1].name)
        if isinstance(v, tuple | list):
            return type(v)([flat(p) for p in v])
        return {k: flat(p) for k, p in v.items()} if isinstance(v, dict) else v

    args, kwargs = ((flat(x),), {}) if line.op == "output" else flat(x)
    return [*made, line._replace(args=args, kwargs=kwargs)]
