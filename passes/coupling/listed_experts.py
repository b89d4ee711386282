"""Experts that are modules of their own: what runs for the sake of one number of a choice.

`index == i` is false everywhere if entry `i` is never chosen. What is computed from it is false, zero, or a list of no
positions; to write to no positions, or to add zeros, changes nothing. Where all that such a number is for ends in that, it goes
with the entry, as a residual branch does, and the numbers of the others become their places among what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from fxprune.passes.coupling.branches import Branches
from fxprune.passes.coupling.liveness import Liveness, memory_of
from fxprune.passes.ir.branches import Branch
from fxprune.passes.ir.op_trace import OpCall, name_of, writes
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.ops.registry import spec_of

Asked = Mapping[int, tuple[np.ndarray, int]]  # by value: the labels of what is chosen from, and the number compared with
Null = dict[int, tuple[int, bool]]  # by value: the unit without which it is zero, or (True) an empty list of positions

OF_ZEROS = frozenset(f"aten::{n}" for n in "_to_copy clone detach alias any sum".split())  # zero if their first argument is
PRODUCTS = frozenset(f"aten::{n}" for n in "mul bitwise_and logical_and".split())  # zero if any argument is
WRITES = frozenset(f"aten::{n}" for n in "index_add index_put _index_put_impl".split())
BOOLEAN = (torch.bool, torch.uint8)


class ListedExperts:
    """What goes with entries that are chosen by value, besides what has their labels.

    Arguments:
        captures: the captured programs of a model.
        asked: for each of them the values that say where a choice is a certain number.
        unit_of: the unit of each label, shape (labels,).

    Attributes:
        numbers: the nodes that compare a choice with a number, with the labels of what is chosen from and the number.
        found: by unit what runs for its sake alone.
        unclear: units of which more may depend on the choice.
    """

    def __init__(self, captures: Sequence[CapturedProgram], asked: Sequence[Asked], unit_of: np.ndarray) -> None:
        self.branches = Branches(captures, {n for c in captures for n in c.tensor_names})
        self.numbers: dict[fx.Node, tuple[np.ndarray, int]] = {}
        self.found: dict[int, Branch] = {}
        self.unclear: set[int] = set()
        cuts: dict[int, dict[fx.Node, fx.Node]] = {}
        null: dict[int, Null] = {}  # by the identity of a capture
        for capture, mine in zip(captures, asked, strict=True):
            makers = {ref.id: op for op in capture.op_trace.ops for ref in op.outputs if ref.id in mine}
            for value, (picked, number) in mine.items():
                node = capture.nodes[makers[value].node]
                if name_of(makers[value].func) != "aten::eq":  # it indexes, and is rewritten as any index
                    continue
                if is_written_out(capture, node, number):
                    self.numbers[node] = picked, number
                else:
                    self.unclear.update(unit_of[picked].tolist())
            units = {value: int(unit_of[picked[number]]) for value, (picked, number) in mine.items()}
            null[id(capture)] = {}
            for unit, node, stream in without_effect(capture, units, null[id(capture)], self.unclear):
                cuts.setdefault(unit, {})[node] = stream
        views = self.branches.views
        readers = [readers_of(view, null[id(view.capture)]) for view in views]
        for unit in {unit for found in null.values() for unit, _ in found.values()} - {0, *self.unclear}:
            ends = cuts.get(unit, {})
            if any(reaches(view, ends, unit, of) for view, of in zip(views, readers, strict=True)):
                self.unclear.add(unit)
            elif ends:
                self.found[unit] = Branch("", frozenset(), ends, frozenset())

    def tensors(self, unit: int) -> frozenset[str]:
        """The names of the model's tensors that go with a unit."""
        return self.branches.remove([self.found[unit]]).tensors if unit in self.found else frozenset()

    def go_with(self, slicer: Slicer, units: np.ndarray) -> None:
        """Add to what is removed what goes with the labels that are not kept; `units` has the unit of each, shape (labels,)."""
        gone = set(np.unique(units[~slicer.table]).tolist())
        mine = [branch for unit, branch in self.found.items() if unit in gone and branch not in slicer.removed.branches]
        if mine:
            slicer.removed = self.branches.remove([*slicer.removed.branches, *mine])


def is_written_out(capture: CapturedProgram, node: fx.Node, number: int) -> bool:
    """Whether a node does nothing but compare its first argument with a number that its second one is."""
    plain = node.op in ("call_function", "call_method") and len(node.args) == 2 and not node.kwargs
    return plain and type(node.args[1]) is int and node.args[1] == number


def without_effect(
    capture: CapturedProgram, units: Mapping[int, int], null: Null, unclear: set[int]
) -> Iterator[tuple[int, fx.Node, fx.Node]]:
    """The nodes that change nothing where a unit is never chosen, with the unit and the argument that stands for each.

    Arguments:
        units: the values that are false where a unit is not chosen.
        null: filled with all that is zero, or empty, where a unit is never chosen.
        unclear: units are added of which something like that is written over.
    """
    values, trace = capture.op_trace.values, capture.op_trace
    form = lambda ref: (values[ref.id].shape, values[ref.id].dtype)  # noqa: E731
    memory = memory_of(capture)
    place = lambda ref: memory.get(ref.id, ref.id)  # noqa: E731
    by_node: dict[int, list[OpCall]] = {}
    for op in trace.ops:
        by_node.setdefault(op.node, []).append(op)
    for op in trace.ops:
        outs = op.outputs
        if outs and outs[0].id in units:
            null[outs[0].id] = units[outs[0].id], False
        read = [ref for ref in op.inputs if ref.id in null]
        written = {place(ref) for ref in writes(op)}
        if written:
            unclear.update(unit for value, (unit, _) in null.items() if memory.get(value, value) in written)
        if len({null[ref.id][0] for ref in read}) != 1:
            continue
        unit, name = null[read[0].id][0], name_of(op.func)
        name = name.removesuffix("_") if not name.endswith("__") else name
        zero = {ref.id for ref in read if not null[ref.id][1]}
        stays = kept_operand(op, name, zero, {r.id for r in read if r.id not in zero or values[r.id].dtype in BOOLEAN})
        if stays is not None and form(stays) == form(outs[0]):
            node = capture.nodes[op.node]
            others = [other for other in by_node[op.node] if other is not op]
            given = [(n, capture.results.get(n)) for n in node.all_input_nodes]
            streams = [n for n, ref in given if type(ref) is TensorRef and place(ref) == place(stays)]
            if node.op in ("call_function", "call_method") and streams and all(spec_of(o).moves for o in others):
                yield unit, node, streams[0]
            continue
        first = isinstance(op.args[0], TensorRef) and op.args[0].id in null
        if first and spec_of(op).moves:
            null.update({ref.id: (unit, null[op.args[0].id][1]) for ref in outs})
        elif first and name == "aten::nonzero":
            null[outs[0].id] = unit, True
        elif (first and name in OF_ZEROS and op.args[0].id in zero) or (name in PRODUCTS and zero):
            null.update({ref.id: (unit, False) for ref in outs})


def kept_operand(op: OpCall, name: str, zero: set[int], nowhere: set[int]) -> TensorRef | None:
    """The argument that a call returns, or leaves as it is, where some arguments are zero and others say no position."""
    if name in WRITES:
        where = collect(op.args[2 if name == "aten::index_add" else 1], TensorRef)
        return op.args[0] if any(ref.id in nowhere for ref in where) else None
    if name == "aten::where" and len(op.args) == 3 and op.args[0].id in zero & nowhere:
        return op.args[2] if isinstance(op.args[2], TensorRef) else None
    if name == "aten::add" and len(op.inputs) == 2:
        a, b = op.inputs
        return (b if a.id in zero else a) if len({a.id, b.id} & zero) == 1 else None
    return None


def readers_of(view: Liveness, null: Null) -> dict[int, set[fx.Node]]:
    """By unit the nodes that read what is zero, or empty, where it is never chosen."""
    results = view.capture.results
    found: dict[int, set[fx.Node]] = {}
    for node in view.nodes:
        refs = [r for op in view.ops.get(node, ()) for r in op.inputs]
        for ref in [*refs, *collect([results.get(n) for n in view.inputs(node)], TensorRef)]:
            if ref.id in null:
                found.setdefault(null[ref.id][0], set()).add(node)
    return found


def reaches(view: Liveness, ends: Mapping[fx.Node, fx.Node], unit: int, readers: Mapping[int, set[fx.Node]]) -> bool:
    """Whether a program's results, or what it writes, depend on a unit other than by nodes that change nothing without it."""
    members, roots = set(view.nodes), set(view.roots)
    pending = [node for node in readers.get(unit, ()) if node not in ends]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if node in roots:
            return True
        after = {n for n in node.users if n in members}
        written = {view.memory.get(r.id, r.id) for op in view.ops.get(node, ()) for r in writes(op)}
        if written:
            after |= {n for n in view.nodes if view.index[n] > view.index[node] and view.touched[n] & written}
        if any(ends.get(n) is node for n in after):
            return True
        pending += [n for n in after if n not in ends]
    return False
