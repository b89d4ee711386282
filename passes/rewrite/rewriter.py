"""Rewrite the captured program for the tensors that pruning leaves.

The labels say what shape each argument and result of a node will have. Arguments that are sizes become the pruned size;
numbers that are no sizes (a scale computed from the width of a head) keep their original value, since the masked original
computes with it. Sizes that depend on the inputs stay symbolic. See `size_expressions` for the rules.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.coupling.leaf_labels import is_constant
from fxprune.passes.coupling.shuffles import channel_order
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.labels import counts_channels, counts_entries
from fxprune.passes.ir.op_trace import OpTrace, name_of, writes
from fxprune.passes.ir.program import REGIONS, CapturedProgram, Guard, Waiver, select_by_mode, size_source, sizes_read
from fxprune.passes.ir.pytree import TensorRef, collect, map_tensors
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.ops.convolution import slid, sliding
from fxprune.passes.ops.registry import find_node, spec_of
from fxprune.passes.ops.rewriting import picked
from fxprune.passes.rewrite.call_structures import nodes_in
from fxprune.passes.rewrite.graph_editor import GraphEditor
from fxprune.passes.rewrite.guards import check_input, describe, holds, is_input, sources
from fxprune.passes.rewrite.layer_attributes import LayerAttributes
from fxprune.passes.rewrite.merged_batch import merged_dims
from fxprune.passes.rewrite.opaque_attributes import opaque_attributes
from fxprune.passes.rewrite.programs import FlatProgram, Program, names_in, without_dead, written
from fxprune.passes.rewrite.size_expressions import PrunedShapes, SizeExpressions

NUMBER = (int, float)
LITERALS = frozenset([int, float, bool, str, type(None), torch.dtype])


class Rewriter:
    """Walks over one captured program and makes it the pruned one; its graph is edited in place.

    The handlers of `passes/ops` are called with the rewriter and a node. They ask it for shapes (`before`, `after`, `cuts`,
    `positions`), for what a node evaluated to (`result`, `number_of`), and for new arguments (`new`, `argument`, `size`), and
    create nodes through it (`emit`, `gather`, `constant`, `graph`).

    Attributes:
        capture: the program; consumed.
        constants: index tensors that the new graph refers to, by name; shared by the programs of a module.
        attributes: the attributes that change, by module path.
    """

    def __init__(
        self,
        solution: Solution,
        which: int,
        slicer: Slicer,
        constants: dict[str, Tensor],
        device: torch.device,
        waiver: Waiver | None = None,
    ) -> None:
        self.capture: CapturedProgram = solution.captures[which]
        self.removed = slicer.removed
        self.constants, self.device, self.waiver = constants, device, waiver
        labels, unit_of, may_go = solution.values[which], solution.unit_of.numpy(), solution.frozen < 0
        self.regions = solution.regions[which]
        self.numbers = {} if solution.experts is None else solution.experts.numbers
        self.picks: Mapping[int, Any] = solution.picks[which] if solution.picks else {}
        trace = self.capture.op_trace
        self.shapes = PrunedShapes(trace, labels, slicer)
        self.cuts, self.before, self.after = self.shapes.cuts, self.shapes.before, self.shapes.after
        self.positions = self.shapes.positions
        self.editor = GraphEditor(self.capture.graph, self.capture.only)
        self.graph, self.new, self.emit = self.editor.graph, self.editor.new, self.editor.emit

        merged = merged_dims(trace)

        def channels(ref: TensorRef, dim: int) -> bool:
            return dim not in merged.get(ref.id, ()) and counts_channels(labels.get(ref.id, ()), dim, may_go, unit_of)

        def entries(ref: TensorRef, dim: int | None) -> bool:
            if dim is None or (at := dim % max(1, len(trace.shape(ref)))) in merged.get(ref.id, ()):
                return False
            return counts_entries(labels.get(ref.id, ()), at, may_go, unit_of)

        self.counts_entries = entries
        self.sizes = SizeExpressions(self.capture, self.shapes, channels, self.editor)
        self.size = self.sizes.size
        self.layers = LayerAttributes(self.capture, self.shapes)
        self.attributes: dict[str, dict[str, Any]] = {}
        self.pruned: dict[fx.Node, bool] = {}
        self.guards = {g.node: g for g in sorted(self.capture.guards, key=lambda g: g.how != "bool")}  # the strictest of a node
        self.copying = {op.node for op in trace.ops if name_of(op.func) in ("aten::clone", "aten::_unsafe_view")}
        self.making = {op.node for op in trace.ops if not spec_of(op).views}  # memory of its own, whatever is left to move
        self.sliding = sliding(trace)
        self.memory, self.written = last_writes(trace)

    # -- what handlers ask for ----------------------------------------------------------------------------------------

    def result(self, node: Any) -> Any:
        """What a node evaluated to when it was captured, tensors as references; other values stand for themselves."""
        return self.capture.results.get(node) if isinstance(node, fx.Node) else node

    def number_of(self, given: Any) -> Any:
        """The original value of a number that may be computed in the graph."""
        return self.capture.results[given] if isinstance(given, fx.Node) else given

    def argument(self, x: Any) -> Any:
        """An argument that holds no sizes, in terms of the new graph: its numbers keep their original values."""

        def carried(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return self.device if leaf.type == "meta" else leaf  # it was captured without values
            return self.sizes.original(leaf) if isinstance(self.result(leaf), NUMBER) else self.new[leaf]

        return map_tensors(x, carried, (fx.Node, torch.device))

    def constant(self, data: Tensor) -> fx.Node:
        """A tensor that the new program refers to; equal ones are shared."""
        for name, known in self.constants.items():
            if known.dtype == data.dtype and torch.equal(known, data):
                return self.graph.get_attr(name)
        name = f"_kept_index_{len(self.constants)}"
        self.constants[name] = data
        return self.graph.get_attr(name)

    def gather(self, source: fx.Node, dim: int, positions: Tensor) -> fx.Node:
        """`source` at the given positions of one dimension, in order; itself where that is all of them."""
        size = self.after(self.result(source))[dim]
        if torch.equal(positions, torch.arange(size)):
            return self.new[source]
        return self.pick(self.new[source], self.result(source), dim, positions, size)

    def pick(self, made: fx.Node, ref: TensorRef, dim: int, positions: Tensor, size: int, varies: bool = False) -> fx.Node:
        """`made`, which has this size along a dimension of `ref`, at the given positions of it.

        The positions are those of one size: where it depends on the inputs, as it does if it `varies`, it is checked.
        """
        if varies or not self.counts_entries(ref, dim):
            why = f"the pruned program was captured where dimension {dim} of {made.name} is {size}"
            self.graph.call_function(holds, (self.graph.call_method("size", (made, dim)), size, why))
        return self.graph.call_method("index_select", (made, dim, self.constant(positions)))

    # -- the walk -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[bool, FlatProgram]:
        """The pruned program, by whether it is for training; one alone where both modes have the same."""
        nodes = list(self.graph.nodes)
        for node in nodes:
            pass_input_by_position(node)
        inner: set[fx.Node] = set()
        decided = sources(self.guards)
        for node in nodes:
            self.editor.visit(node)
            end = self.regions.get(node)
            if node in self.removed.nodes:
                inner.add(node)
            elif node in self.removed.streams:
                self.editor.replace(node, self.stream(*self.removed.streams[node]))
            elif end is None or not (self.is_pruned(end) or self.is_pruned(self.chain(end)[0].all_input_nodes[0])):
                self.editor.replace(node, self.carry(node))
                if is_input(node):
                    self.editor.move_past()
                    check_input(node, self.capture.results.get(node), node in decided)
                if node in self.guards:
                    self.editor.move_past()
                    self.guard(node, self.guards[node])
            elif node is end:
                self.editor.replace(node, self.region(node))
            else:
                inner.add(node)
            self.editor.leave(node)
        called = {str(n.target) for n in nodes if n.op == "call_module"}
        self.attributes |= self.layers.read_only(called)
        index = self.capture.index
        otherwise = [n for n, guard in self.guards.items() if n not in inner and self.sizes.value(n) != guard.value]
        without_hooks = [n for n in nodes if n.op == "call_module" and n.target in self.capture.hooked]
        changed = (*self.editor.touched(inner), *otherwise, *without_hooks, *self.with_cut_constants(nodes))
        touched = frozenset(index[n] for n in changed)
        origin = self.editor.origin
        self.graph.inserting_before(self.graph._root)  # at its end
        self.editor.apply(nodes, inner)
        numbers = {node.name: index[origin.get(node, node)] for node in self.graph.nodes}
        has_branches = self.capture.only or any(n.target is select_by_mode for n in nodes)  # a branch may hold parameters alone
        programs = {}
        for mode in (False, True) if has_branches else (False,):
            lines, names = written(self.graph, self.editor.branches, mode)
            names |= {node: names[made] for node, made in self.editor.new.items() if made in names}
            handed = [names.get(n) for call in self.capture.module_calls for n in nodes_in((call.args, call.kwargs, call.out))]
            lines = without_dead(lines, names_in(handed))  # a module may be given what its lines do not use
            programs[mode] = FlatProgram(Program(tuple(lines)), numbers, names, touched, self.removed.nodes)
        return programs

    def with_cut_constants(self, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """The nodes that use a tensor which the forward makes itself, and that is cut: it would make all of it again."""
        for node in nodes:
            if node.op == "get_attr" and is_constant(str(node.target)) and self.is_pruned(node):
                yield from (node, *node.users)

    def carry(self, node: fx.Node) -> fx.Node:
        """What stands for a node in the new graph: itself, with new arguments where it needs any, or another node."""
        if node.op in ("placeholder", "get_attr") or node.target is select_by_mode or node.target in REGIONS:
            return node
        if node in self.numbers:
            picked, number = self.numbers[node]
            place = int(self.shapes.slicer.table[picked[:number]].sum())
            if place != number:
                return self.emit(node, (*self.argument(node.args[:1]), place), {})
        changed = self.is_pruned(node) or any(self.is_pruned(n) for n in node.all_input_nodes)
        if node.op == "call_module" and (changed or str(node.target) in self.capture.opaque):
            self.change_attributes(node)
        wide = slid(self, node) if changed else None
        if wide is not None:
            return wide
        spec = find_node(node)
        if spec.rewrite is not None and (changed or spec.always):
            made = spec.rewrite(self, node)
            if made is not None:
                return self.as_copy(node, made)
        result = self.capture.results.get(node)
        if type(result) is not TensorRef and not collect(result, TensorRef) and result is not None and node.op != "output":
            return node  # arithmetic on numbers: rewritten where it is used
        if self.has_plain_arguments(node) and self.capture.index[node] not in self.copying:
            return node
        return self.as_copy(node, self.emit(node, self.argument(tuple(node.args)), self.argument(dict(node.kwargs))))

    def stream(self, node: fx.Node, copied: bool) -> fx.Node:
        """What stands for an addition to `node` whose other operand is gone; `copied` where it is written to later."""
        return self.graph.call_method("clone", (self.new[node],)) if copied else self.new[node]

    def is_pruned(self, node: fx.Node) -> bool:
        """Whether anything is removed from a node's result."""
        found = self.pruned.get(node)
        if found is None:
            result = self.capture.results.get(node)
            refs = [result] if type(result) is TensorRef else collect(result, TensorRef)
            found = any(map(self.cuts, refs))
            self.pruned[node] = found
        return found

    def has_plain_arguments(self, node: fx.Node) -> bool:
        """Whether a node's arguments are tensors and plain literals alone, so that none of them can change."""
        for a in (*node.args, *node.kwargs.values()) if node.kwargs else node.args:
            if isinstance(a, fx.Node):
                if isinstance(self.capture.results.get(a), NUMBER):
                    return False
            elif isinstance(a, tuple | list):
                if not all(type(v) in LITERALS for v in a):
                    return False
            elif type(a) not in LITERALS:
                return False
        return True

    def as_copy(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """A reshape that copied still copies: with a dimension shrunk to 1 it might become a view, which can be written to.

        So it might behind a slice that takes all that is left, which matters where one of them is written to later.
        """
        copies = self.capture.index[node] in self.copying and isinstance(self.result(node), TensorRef)
        if not copies or made.target == "clone":
            return made
        refs = [r for n in node.all_input_nodes for r in collect(self.result(n), TensorRef)]
        shrunk = any(now == 1 < was for r in refs for was, now in zip(self.before(r), self.after(r), strict=True))
        places = [self.memory.get(r.id, r.id) for r in (*refs, self.result(node))]
        if places[-1] in places[:-1]:  # a module that copies something, and returns what it was given
            return made
        written = any(self.written.get(place, -1) > self.capture.index[node] for place in places) and any(map(self.cuts, refs))
        return self.graph.call_method("clone", (made,)) if shrunk or written else made

    def change_attributes(self, node: fx.Node) -> None:
        """Note the attributes that change of the module that a node calls."""
        path = str(node.target)
        if path in self.capture.opaque:
            edits = opaque_attributes(self.capture, self.layers, path)
        else:
            edits = {path: self.layers.changed(path, [r for n in node.args for r in collect(self.result(n), TensorRef)])}
        for inner, values in edits.items():
            self.attributes.setdefault(inner, {}).update(values)

    # -- chains of reshapes that permute channels -----------------------------------------------------------------------

    def chain(self, end: fx.Node) -> list[fx.Node]:
        """The nodes of a region, which ends there."""
        return [n for n, e in self.regions.items() if e is end]

    def region(self, end: fx.Node) -> fx.Node:
        """A chain of reshapes that permutes channels, as one gather; it may lose some before its end alone."""
        chain = self.chain(end)
        source = chain[0].args[0]
        assert isinstance(source, fx.Node)
        dim = (self.cuts(self.result(end)) or self.cuts(self.result(source)))[0].dims[0]
        order = channel_order(self.capture, chain, dim)
        assert order is not None
        made = self.permuted(source, self.result(source), end, dim, order)
        if made is self.new[source] and any(self.capture.index[n] in self.making for n in chain):
            return self.graph.call_method("clone", (made,))  # what is left needs no permuting, but may be written to
        return made

    def permuted(self, source: fx.Node, ref: TensorRef, end: fx.Node, dim: int, order: Tensor) -> fx.Node:
        """The result of the index map `order` (result index -> source index) among what is kept."""
        return self.gather(source, dim, picked(self, ref, self.result(end), dim, dim, order))

    # -- guards ---------------------------------------------------------------------------------------------------------

    def guard(self, node: fx.Node, guard: Guard) -> None:
        """Keep a decision that Python took by a size as a check: inputs that disagree get an error, not a wrong result."""
        now, value, said = self.sizes.value(node), guard.value, repr(guard.value)
        truth = guard.how == "bool" and type(value) in NUMBER  # `if n:` asks no more than whether it is 0
        if truth:
            now, value, said = bool(now), bool(value), "not 0" if value else "0"
        if not (self.sizes.is_symbolic(node) and now == value):
            return
        read = list(sizes_read(node, self.capture.results)) if guard.how == "len" else []
        if read and all(self.counts_entries(ref, dim) for ref, dim in read):  # pieces of a packed projection
            return
        asked = self.graph.call_function(operator.ne, (self.new[node], 0)) if truth else self.new[node]
        why = f"the pruned program was captured where {describe(node)} is {said}"
        tried: tuple[Any, ...] = ()
        if self.waiver is not None and why in self.waiver.guards and self.asks_for_batch(node):
            name = self.waiver.input
            given = next((n for n in self.graph.nodes if n.op == "placeholder" and n.name == name), None)
            tried = () if given is None else (self.graph.call_method("size", (given, 0)), self.waiver.size)
        self.graph.call_function(holds, (asked, value, why, *tried))

    def asks_for_batch(self, node: fx.Node) -> bool:
        """Whether the input sizes that a number is computed from are all of first dimensions."""
        found = size_source(node, self.capture.results)
        if found is not None:
            return found[1] == 0 or not self.sizes.is_symbolic(node)
        return node.op != "placeholder" and all(self.asks_for_batch(n) for n in node.all_input_nodes)


def pass_input_by_position(node: fx.Node) -> None:
    """`conv(input=x)` as `conv(x)`, which is how handlers know it."""
    if node.op in ("call_module", "call_function") and not node.args and "input" in node.kwargs:
        node.args = (node.kwargs["input"],)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "input"}


def last_writes(trace: OpTrace) -> tuple[dict[int, int], dict[int, int]]:
    """For views the tensor that they show, and for tensors the last node that writes to them or to views of them."""
    shown, found = dict[int, int](), dict[int, int]()
    for op in trace.ops:
        if spec_of(op).views and op.inputs:
            shown.update({ref.id: shown.get(op.inputs[0].id, op.inputs[0].id) for ref in op.outputs})
        found.update({shown.get(ref.id, ref.id): op.node for ref in writes(op)})
    return shown, found
