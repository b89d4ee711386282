"""Attributes that change inside an opaque module: a module kept as one node of the graph, with its own Python code.

Its tensors are sliced like any others. Sizes in its code come from integer attributes: while the module was captured, each
attribute was an integer that remembers its origin, and where one turned up as a size of a tensor, the attribute must become
the pruned size. Standard layers inside are looked up in `layer_attributes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxprune.passes.capture.opaque import OPERATORS
from fxprune.passes.ir.module_tree import fetch
from fxprune.passes.ir.program import CapturedProgram, SizeUse, TensorSize, attributes_of_size
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.rewrite.layer_attributes import LayerAttributes
from fxprune.passes.rewrite.size_expressions import PrunedShapes


def opaque_attributes(capture: CapturedProgram, layers: LayerAttributes, path: str) -> dict[str, dict[str, Any]]:
    """The attributes that change inside the opaque module at `path`, by module path."""
    edits: dict[str, dict[str, Any]] = {}
    for call in capture.calls.get(path, ()):
        edits.setdefault(call.module, {}).update(layers.changed(call.module, collect(call.args, TensorRef)))
    for (module, name), value in solve_attributes(capture, layers.shapes, capture.sizes.get(path, ())).items():
        edits.setdefault(module, {})[name] = value
    return edits


def solve_attributes(capture: CapturedProgram, shapes: PrunedShapes, uses: Sequence[SizeUse]) -> dict[tuple[str, str], int]:
    """The attributes that change so that every size comes to the pruned one.

    Attributes that are sizes themselves come first; of a size computed from several, the one that is still unknown changes.
    """
    known: dict[tuple[str, str], int] = {}
    computed: list[tuple[Any, int]] = []
    for use in uses:
        wanted = shapes.after(use.ref)[use.dim]
        if is_computed(use.tree):
            computed.append((use.tree, wanted))
        elif use.tree not in known or wanted != shapes.before(use.ref)[use.dim]:
            known[use.tree] = wanted
    for tree, wanted in sorted(computed, key=lambda item: len(attributes_of_size(item[0]))):
        for name, value in solve_for(capture, shapes, tree, wanted, known).items():
            known.setdefault(name, value)
    return {name: value for name, value in known.items() if value != original_value(capture, name)}


def original_value(capture: CapturedProgram, attribute: tuple[str, str]) -> int:
    path, name = attribute
    return int(getattr(fetch(capture.root, path) if path else capture.root, name))


def is_computed(tree: Any) -> bool:
    """Whether a number is that of an operator and its two sides, rather than an attribute, which is a path and a name."""
    return isinstance(tree, tuple) and len(tree) > 2


def value_of(capture: CapturedProgram, shapes: PrunedShapes, tree: Any, known: Mapping[tuple[str, str], int]) -> int:
    """The value of an expression over attributes and sizes; an attribute that is not known has its original value."""
    if isinstance(tree, int):
        return tree
    if isinstance(tree, TensorSize):
        return shapes.after(tree.ref)[tree.dim]
    if not is_computed(tree):
        return known[tree] if tree in known else original_value(capture, tree)
    a, b = (value_of(capture, shapes, side, known) for side in tree[1:])
    return OPERATORS[tree[0]](a, b) if b or tree[0] != "floordiv" else 0


def solve_for(
    capture: CapturedProgram, shapes: PrunedShapes, tree: Any, wanted: int, known: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], int]:
    """The value of the one unknown attribute for which an expression comes to `wanted`.

    Empty where it does so already, or where no value does.
    """
    if isinstance(tree, int | TensorSize) or value_of(capture, shapes, tree, known) == wanted:
        return {}
    if not is_computed(tree):
        return {} if tree in known else {tree: wanted}
    name, a, b = tree
    free = [side for side in (a, b) if attributes_of_size(side) - known.keys()]
    if len(free) != 1:
        return {}
    other = value_of(capture, shapes, b if free[0] is a else a, known)
    if name == "add":
        needed = wanted - other
    elif name == "sub":
        needed = wanted + other if free[0] is a else other - wanted
    elif name == "mul":
        needed = wanted // other if other and wanted % other == 0 else 0
    else:
        needed = wanted * other if free[0] is a else (other // wanted if wanted else 0)
    return solve_for(capture, shapes, free[0], needed, known) if needed > 0 else {}
