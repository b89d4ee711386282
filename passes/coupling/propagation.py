"""Label propagation: from the labels of the model's own tensors to those of every value, and the constraints met on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, fx

from fxprune.passes.coupling.aliasing import follow, read_apart, written_through
from fxprune.passes.coupling.leaf_labels import LeafLabels
from fxprune.passes.coupling.picks import finish_picks, follow_picks
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.ir.constraints import SPAN, ConstraintBuilder, LabelArray
from fxprune.passes.ir.input_sizes import dims_sliced, is_input_size, sizes_given
from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ir.op_trace import OpCall, written_by
from fxprune.passes.ir.outputs import ONLY_OUTPUT
from fxprune.passes.ir.program import CapturedProgram, sizes_read
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.propagation_state import LeafDim, PropagationState, SizeSource
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.autograd_probe import NO_RULE, probe
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import find_node, spec_of

TAKEN = "is a tensor whose contents Python takes"


class Program:
    """A captured program, with what propagation asks of it that does not depend on labels.

    Attributes:
        number: of the capture among those of the model.
        uses: values that a later call, the result or an untracked node reads.
        whole: calls of functions of the model's that are one node; `hidden`: the indices of untracked nodes.
        pinned: views that are written into, which cannot become copies.
        named: the names of the model's own tensors among the values.
        rewrites: for each node `rewrite`, `opaque` and `literals` of the state there, and whether it `counts` (see `OpSpec`).
        inside: what sizes in opaque modules are, of other tensors or attributes, by value and dimension.
        sizes: for each node the sizes among its arguments that may be those of the inputs (see `sizes_given`).
    """

    def __init__(self, capture: CapturedProgram, number: int) -> None:
        self.capture, self.number = capture, number
        op_trace, untracked = capture.op_trace, capture.untracked
        self.uses = {r.id for op in op_trace.ops for r in op.inputs} | {r.id for _, r in capture.outputs}
        self.uses |= {r.id for n in untracked for r in collect([capture.results[m] for m in n.all_input_nodes], TensorRef)}
        self.hidden = sorted(capture.index[n] for n in untracked)
        every = capture.graph.nodes if capture.functions else ()
        self.whole = [n for n in every if n.op == "call_function" and n.target in capture.functions]
        self.pinned = written_through(op_trace)
        self.named = {i: v.name for i, v in enumerate(op_trace.values) if v.name is not None}
        nodes = {op.node for op in op_trace.ops}
        self.inside: dict[int, dict[int, SizeSource]] = {}
        for use in capture.followed:
            self.inside.setdefault(use.ref.id, {})[use.dim] = use.tree
        self.rewrites = {i: rewrite_of(capture, i) for i in nodes}
        self.sizes = {i: sizes_given(capture, i) for i in nodes}

    def node(self, index: int) -> int:
        """The number of a node among those of all captures."""
        return self.number * SPAN + index


@dataclass(frozen=True, slots=True)
class Propagated:
    """What came of one propagation: constraints, labels, picks and questions about picks among the values of each
    program, dimensions found to be composed, and lines that lie across such as became one unit each."""

    constraints: ConstraintBuilder
    values: list[dict[int, Labels]]
    picks: list[dict[int, np.ndarray]]
    asked: list[dict[int, tuple[np.ndarray, int]]]
    composed: dict[int, tuple[Tensor, ...]]
    across: list[Tensor]


def propagate(
    programs: Sequence[Program],
    leaves: LeafLabels,
    options: CouplingOptions,
    *,
    seeking_heads: bool = False,
    leaf_dims: dict[int, LeafDim] | None = None,
) -> Propagated:
    """Apply the label rule of every call of every program.

    Arguments:
        leaves: the labels of the model's own tensors.
        seeking_heads: whether only heads are looked for.
        leaf_dims: dimensions of the model's own tensors that may be found to be composed, by first label.
    """
    constraints = ConstraintBuilder(leaves.size, leaves.first_constant, leaves.composed_labels(), not seeking_heads)
    values: list[dict[int, Labels]] = []
    picks: list[dict[int, np.ndarray]] = []
    asked: list[dict[int, tuple[np.ndarray, int]]] = []
    composed: dict[int, tuple[Tensor, ...]] = {}
    across: list[Tensor] = []
    for program in programs:
        state = PropagationState(
            program.capture.op_trace,
            {i: leaves.of[name] for i, name in program.named.items()},
            constraints,
            options.heads,
            program.uses,
            pinned=program.pinned,
            sizes=program.inside,
            seeking_heads=seeking_heads,
            leaf_dims=leaf_dims or {},
            composed=composed,
            across=across,
            choices=bool(options.choices),
        )
        propagate_through(program, state, leaves.size)
        constraints.node = program.node(program.capture.index[program.capture.output])
        freeze_outputs(program.capture, state, options)
        values.append(state.labels)
        picks.append(state.picks)
        asked.append(state.asked)
    return Propagated(constraints, values, picks, asked, composed, across)


def propagate_through(program: Program, state: PropagationState, owned: int) -> None:
    """Apply the rules of one program's calls; the first `owned` labels are those of the model's own tensors."""
    constraints, capture, labels = state.constraints, program.capture, state.labels
    hidden, start = list(program.hidden), program.node(0)
    # (not by way of the state, which would hold itself, and all else, until it is collected)
    state.is_inputs = lambda size: (
        capture.op_trace.values[size.ref.id].from_input and is_input_size((size.ref, size.dim), labels, owned)
    )
    state.input_dims = lambda: dims_of_inputs(capture, constraints.node - start, labels, owned)
    state.sliced_dims = lambda: dims_sliced(capture, constraints.node - start, labels, owned)
    end = OpCall(None, (), {}, (), len(capture.index))
    # whether sizes of the inputs are among the node's arguments, so that contents that it makes vary with them
    sized = counts = False
    for op in progress_bar([*capture.op_trace.ops, end], "coupling", "op"):
        while hidden and hidden[0] < op.node:
            constraints.node = program.node(hidden[0])
            apply_untracked(capture, capture.nodes[hidden.pop(0)], state)
        if op is end or (hidden and op.node == hidden[0]):
            continue
        if constraints.node != start + op.node:
            constraints.node = start + op.node
            state.rewrite, state.opaque, state.literals, counts = program.rewrites[op.node]
            if counts:
                freeze_arguments(capture, op.node, state)
            sized = any(is_input_size(found, labels, owned) for found in program.sizes[op.node])
        call = RuleContext(op, state)
        made = state.opaque and not call.inputs  # by code that may have read sizes of the inputs
        if sized or made or (state.varying and any(r.id in state.varying for r in call.inputs)):
            state.varying.update(r.id for r in call.outputs)
        if not counts:
            apply_rule(call)
    for node in program.whole:
        constraints.node = program.node(capture.index[node])
        freeze_around(capture, node, state)
    freeze_part_read(state)
    for path, leaks in capture.leaks.items():
        calls = [index for node, index in capture.index.items() if node.op == "call_module" and str(node.target) == path]
        constraints.node = program.node(min(calls, default=end.node))
        finish_picks(state, leaks)
        for f in (f for ref in leaks for f in state.labels.get(ref.id, NONE)):
            constraints.freeze(f.labels, TAKEN)


def freeze_part_read(state: PropagationState) -> None:
    """Freeze dimensions that are read as far as an input is long, where the example's inputs leave entries that nothing reads.

    Longer ones read them. Where all are read, as the parts of a packed projection are, the size is one of channels.
    """
    read = {label for part in state.part_read for label in part.taken.tolist()}
    for part in state.part_read:
        if not read.issuperset(part.every.tolist()):
            state.constraints.collected.frozen.append(LabelArray(part.every, part.node, "is read as far as an input is long"))


def freeze_outputs(capture: CapturedProgram, state: PropagationState, options: CouplingOptions) -> None:
    finish_picks(state, [ref for _, ref in capture.outputs], "is chosen by value, and an output of the model says how")
    for name, ref in capture.outputs:
        if not options.releases(name):
            why = "is an output of the model" + (f", {name}" if name != ONLY_OUTPUT else "")
            for f in state.labels.get(ref.id, NONE):
                state.constraints.freeze(f.labels, why)


def dims_of_inputs(capture: CapturedProgram, index: int, labels: dict[int, Labels], owned: int) -> frozenset[int]:
    """The dimensions of a node's result whose sizes are given as sizes of the inputs."""
    node = capture.node_at(index)
    spec = None if node is None or node.op == "call_module" else find_node(node)
    if node is None or spec is None or spec.sizes is None or not isinstance(capture.results[node], TensorRef):
        return frozenset()
    ndim = len(capture.op_trace.shape(capture.results[node]))
    given = [(size, dim) for size, dim in spec.sizes.numbered(node.args, node.kwargs, ndim) if isinstance(size, fx.Node)]
    found = [(dim, sizes_read(size, capture.results)) for size, dim in given]
    return frozenset(dim for dim, read in found if any(is_input_size(source, labels, owned) for source in read))


def apply_rule(call: RuleContext) -> None:
    """Store the labels of an op's results; an op without a rule is probed through autograd, else frozen."""
    handled = follow_picks(call) if call.state.choices else None
    if not call.outputs:
        if written_by(call.op.func) and spec_of(call.op).labels is None:
            for ref in call.inputs:
                call.freeze(call.labels(ref), f"{NO_RULE} ({call.op.func._schema.name})")
        return
    uniform = call.state.uniform
    met = bool(uniform) and any(r.id in uniform for r in call.inputs)
    shared = read_apart(call) if met else {}
    rule = spec_of(call.op).labels
    if handled is not None:
        result = handled
    elif rule is not None:
        result = rule(call)
    elif not any(call.labels(r) for r in call.inputs):
        return
    else:
        result = probe(call)
    results = result if isinstance(result, list) else [result]
    for ref, labels in zip(call.outputs, results, strict=False):
        if ref not in call.inputs:
            call.known[ref.id] = labels
        else:  # it was written in place
            for f in call.labels(ref):
                for g in labels:
                    if g.major_to_minor == f.major_to_minor and g.base is not f.base:
                        call.constraints.note_written(f, g)
    for ref in call.inputs if call.state.unread else ():
        call.state.unread.pop(ref.id, None)
    if shared:
        call.known.update(shared)
    if met:
        follow(call)


def rewrite_of(capture: CapturedProgram, index: int) -> tuple[Any, bool, frozenset[int], bool]:
    """How a node is rewritten; whether it is an opaque module; the numbers written out in a call that has no rewrite (they may
    be sizes, and are never changed); and whether it computes with a size that is not among its arguments.
    """
    node = capture.node_at(index)
    if node is None:
        return None, False, frozenset(), False
    spec = find_node(node)
    opaque = node.op == "call_module" and str(node.target) in capture.opaque
    counts = spec.counts is not None and spec.counts(node)
    if spec.rewrite is not None or node.op not in ("call_function", "call_method"):
        return spec.rewrite, opaque, frozenset(), counts
    numbers = collect((node.args, dict(node.kwargs)), int)
    return None, opaque, frozenset(v for v in numbers if not isinstance(v, bool) and v > 1), counts


def apply_untracked(capture: CapturedProgram, node: fx.Node, state: PropagationState) -> None:
    """The labels of a node whose results did not come out of the dispatcher, by autograd; else its arguments are frozen."""
    finish_picks(state, collect([capture.results[n] for n in node.all_input_nodes], TensorRef))
    call = RuleContext(as_op(capture, node), PropagationState(state.op_trace, state.labels, state.constraints))
    for ref, found in zip(call.outputs, probe(call), strict=True):
        state.labels[ref.id] = found


def freeze_arguments(capture: CapturedProgram, index: int, state: PropagationState) -> None:
    """Freeze what a function is given that computes with its size."""
    given = collect([capture.results[n] for n in capture.nodes[index].all_input_nodes], TensorRef)
    finish_picks(state, given)
    for ref in given:
        for f in state.labels.get(ref.id, NONE):
            state.constraints.freeze(f.labels, "goes through a function that computes with its size")


def freeze_around(capture: CapturedProgram, node: fx.Node, state: PropagationState) -> None:
    """Freeze what a function that is one node is given and returns: sizes may be written out in it."""
    given = collect([*(capture.results[n] for n in node.all_input_nodes), capture.results[node]], TensorRef)
    finish_picks(state, given)
    for ref in given:
        for f in state.labels.get(ref.id, NONE):
            state.constraints.freeze(f.labels, TAKEN)


def as_op(capture: CapturedProgram, node: fx.Node) -> OpCall:
    """A node of the graph in the form of a dispatcher call."""
    name = str(getattr(node.target, "__name__", node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: capture.results[n])
    run = node.target
    if node.op == "call_module":
        run = capture.root.get_submodule(str(node.target))
    elif node.op == "call_method":
        run = lambda x, *a, **k: getattr(x, name)(*a, **k)  # noqa: E731
    func = Outside(run, SimpleNamespace(name=name, arguments=[]))
    return OpCall(func, args, kwargs, capture.results[node], capture.index[node])


@dataclass(frozen=True, slots=True)
class Outside:
    """A function outside of the dispatcher, with what a rule reads of an op."""

    run: Any
    _schema: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)
