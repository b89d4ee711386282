"""Guards: what Python decided by a size at capture, asked again of each input that the program is given.

Where a batch of one takes a path of its own (`if positions.shape[0] != batch`), the other path often computes the same for
it. A guard that fails there is *waived* at the size where that was tried, and stands at all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from fxprune.passes.errors import GuardError


def holds(value: Any, expected: Any, why: str, size: Any = None, tried: int | None = None) -> None:
    """Raise where a decision taken at capture would be another one now, unless it was `tried` at this size."""
    if fails(value, expected, size, tried):
        raise GuardError(f"{why}, and here it is {value!r}: prune with example inputs of this size")


def fails(value: Any, expected: Any, size: Any, tried: int | None) -> bool:
    return bool(value != expected) and (tried is None or size != tried)


def describe(node: fx.Node) -> str:
    module = node.meta.get("module")
    return f"%{node.name}{f' in {module}' if module else ''}"


def guards_of(program: fx.GraphModule) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is holds]


@contextmanager
def noting(program: fx.GraphModule) -> Iterator[list[str]]:
    """Have a program go on where a guard fails; what failed is put into the list."""
    found: list[str] = []

    def note(value: Any, expected: Any, why: str, size: Any = None, tried: int | None = None) -> None:
        if fails(value, expected, size, tried):
            found.append(why)

    nodes = guards_of(program)
    try:
        aim(program, nodes, note)
        yield found
    finally:
        aim(program, nodes, holds)


def aim(program: fx.GraphModule, nodes: list[fx.Node], target: Any) -> None:
    for node in nodes:
        node.target = target
    program.recompile()
