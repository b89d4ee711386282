"""Opaque modules: one node of the graph, run under the recorder, rewritten by changing what their forward reads.

The tensors inside are cut like any others. Sizes in their Python code come from integer attributes: while the module runs,
each attribute is an integer that remembers where it came from, and where one turns up as a size of a tensor, the pruned
size of that tensor is what the attribute must become. Standard layers inside have the table of attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fxprune.passes.capture.opaque import OPERATORS
from fxprune.passes.ir.module_tree import fetch
from fxprune.passes.ir.program import SizeUse
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


def opaque_attributes(r: Rewriter, path: str) -> dict[str, dict[str, Any]]:
    """Attribute edits by module path for everything inside an opaque module."""
    edits: dict[str, dict[str, Any]] = {}
    for call in r.capture.calls.get(path, ()):
        edits.setdefault(call.module, {}).update(r.edits(call.module, collect(call.args, TensorRef)))
    for (module, name), value in solved(r, r.capture.sizes.get(path, ())).items():
        edits.setdefault(module, {})[name] = value
    return edits


def solved(r: Rewriter, uses: Sequence[SizeUse]) -> dict[tuple[str, str], int]:
    """Attributes that change, so that each size comes to what is wanted of it.

    First those that are sizes themselves; then, of a size computed from attributes, one that is not known yet.
    """
    known: dict[tuple[str, str], int] = {}
    computed: list[tuple[Any, int]] = []
    for use in uses:
        wanted = r.after(use.ref)[use.dim]
        if use.tree[0] in OPERATORS:
            computed.append((use.tree, wanted))
        elif use.tree not in known or wanted != r.before(use.ref)[use.dim]:
            known[use.tree] = wanted
    for tree, wanted in sorted(computed, key=lambda item: len(attributes_of(item[0]))):
        for name, value in inverted(r, tree, wanted, known).items():
            known.setdefault(name, value)
    return {name: value for name, value in known.items() if value != original(r, name)}


def original(r: Rewriter, attribute: tuple[str, str]) -> int:
    return int(getattr(fetch(r.capture.root, attribute[0]) if attribute[0] else r.capture.root, attribute[1]))


def attributes_of(tree: Any) -> set[tuple[str, str]]:
    if isinstance(tree, int):
        return set()
    return {tree} if tree[0] not in OPERATORS else attributes_of(tree[1]) | attributes_of(tree[2])


def value_of(r: Rewriter, tree: Any, known: Mapping[tuple[str, str], int]) -> int:
    """What a tree comes to; an attribute that nothing is known of has its original value."""
    if isinstance(tree, int):
        return tree
    if tree[0] not in OPERATORS:
        return known[tree] if tree in known else original(r, tree)
    a, b = value_of(r, tree[1], known), value_of(r, tree[2], known)
    return OPERATORS[tree[0]](a, b) if b or tree[0] != "floordiv" else 0


def inverted(r: Rewriter, tree: Any, wanted: int, known: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """The value that the one unknown attribute of a tree must have; none where the tree is right already, or it cannot be."""
    if isinstance(tree, int) or value_of(r, tree, known) == wanted:
        return {}
    if tree[0] not in OPERATORS:
        return {} if tree in known else {tree: wanted}
    name, a, b = tree
    free = [side for side in (a, b) if attributes_of(side) - known.keys()]
    if len(free) != 1:
        return {}
    other = value_of(r, b if free[0] is a else a, known)
    if name == "add":
        needed = wanted - other
    elif name == "sub":
        needed = wanted + other if free[0] is a else other - wanted
    elif name == "mul":
        needed = wanted // other if other and wanted % other == 0 else 0
    else:
        needed = wanted * other if free[0] is a else (other // wanted if wanted else 0)
    return inverted(r, free[0], needed, known) if needed > 0 else {}
