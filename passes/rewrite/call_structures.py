"""What a module was called with and what it returned, as arguments of lines and read off their results."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

from fxprune.passes.ir.program import Built
from fxprune.passes.ir.pytree import ATOMS
from fxprune.passes.rewrite.programs import Line, Name

Steps = tuple[tuple[bool, Any], ...]  # how a part is read off a structure: by attribute or by item, and the key


def nodes_in(x: Any) -> list[fx.Node]:
    return [leaf for _, leaf in parts_of(x) if isinstance(leaf, fx.Node)]


def parts_of(x: Any, steps: Steps = ()) -> list[tuple[Steps, Any]]:
    """The leaves of a structure, and how they are read off it."""
    if type(x) is fx.Node or type(x) in ATOMS:
        return [(steps, x)]
    items: Iterable[tuple[Any, Any]]
    by_attribute = False
    if isinstance(x, Built):
        items, by_attribute = x.parts.items(), x.by_attribute
    elif isinstance(x, tuple | list):
        items = enumerate(x)
    elif isinstance(x, dict):
        items = x.items()
    else:
        return [(steps, x)]
    return [part for key, value in items for part in parts_of(value, (*steps, (by_attribute, key)))]


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
    args, kwargs = ((flat(x, line, made),), {}) if line.op == "output" else flat(x, line, made)
    return [*made, line._replace(args=args, kwargs=kwargs)]


def flat(x: Any, line: Line, made: list[Line]) -> Any:
    """A structure in which names stand for objects, which the lines that are added to `made` create."""
    if isinstance(x, Built):
        parts = {k: flat(p, line, made) for k, p in x.parts.items()}
        args, kwargs = (tuple(parts.values()), {}) if x.by_position else ((), parts)
        made.append(Line(f"{line.name} {len(made)}", "call_function", x.create, args, kwargs))
        return Name(made[-1].name)
    if isinstance(x, tuple | list):
        return type(x)([flat(p, line, made) for p in x])
    return {k: flat(p, line, made) for k, p in x.items()} if isinstance(x, dict) else x
