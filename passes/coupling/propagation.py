"""Reading: what the calls on a tape do to labels, and the ties that the rules report of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import fx

from fxprune.passes.coupling.aliasing import follow, read_apart, written_through
from fxprune.passes.ir.constraints import Constraints, row
from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ir.op_trace import OpCall
from fxprune.passes.ir.options import CouplingOptions
from fxprune.passes.ir.program import ONLY_OUTPUT, CapturedProgram, size_source
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.autograd_probe import probe
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import find, find_node

SPAN = 1_000_000  # node numbers of one capture


def number(capture: CapturedProgram, which: int, node: fx.Node) -> int:
    return which * SPAN + capture.index[node]


class Script:
    """A capture, and what every reading of it asks that does not depend on labels.

    Attributes:
        uses: the values that a later call, the result or an untracked node reads.
        leaking: opaque modules whose Python took contents; `hidden` are the numbers of other untracked nodes.
        pinned: views that are written into and cannot become copies.
        named: the model's own tensors among the values.
        literals: for each node `rewrite`, `opaque` and `literals` of the constraints there.
        sizes: for each node the sizes among its arguments that may be those of the inputs (see `sizes_given`).
    """

    def __init__(self, capture: CapturedProgram) -> None:
        self.capture = capture
        op_trace, untracked = capture.op_trace, capture.untracked
        self.uses = {r.id for op in op_trace.ops for r in op.inputs} | {r.id for _, r in capture.outputs}
        self.uses |= {r.id for n in untracked for r in collect([capture.results[m] for m in n.all_input_nodes], TensorRef)}
        self.leaking = [n for n in untracked if n.op == "call_module" and str(n.target) in capture.opaque]
        self.hidden = sorted(capture.index[n] for n in untracked if n not in self.leaking)
        self.pinned = written_through(op_trace)
        self.named = {i: v.name for i, v in enumerate(op_trace.values) if v.name is not None}
        nodes = {op.node for op in op_trace.ops}
        self.literals = {i: rewriting(capture, i) for i in nodes}
        self.sizes = {i: sizes_given(capture, i) for i in nodes}


def read(
    scripts: Sequence[Script],
    leaves: dict[str, Labels],
    size: int,
    coupling_options: CouplingOptions,
    *,
    seeking: bool = False,
    compose: bool = True,
    settled: frozenset[tuple[str, int]] = frozenset(),
) -> tuple[Constraints, list[dict[int, Labels]]]:
    """Interpret every tape on labels."""
    constraints = Constraints(
        size=size, seeking_heads=seeking, leaves=leaves if compose and not seeking else {}, settled=settled
    )
    every = []
    for which, script in enumerate(scripts):
        capture, op_trace = script.capture, script.capture.op_trace
        labels: dict[int, Labels] = {i: leaves[name] for i, name in script.named.items()}
        hidden = list(script.hidden)
        end = OpCall(None, (), {}, (), len(capture.index))
        constraints.pinned, constraints.alike, constraints.read_before = script.pinned, {}, set()  # by number in this capture
        varying: set[int] = set()
        sized = False  # whether the node has sizes of the inputs among its arguments: what it makes of nothing varies with them
        for op in [*op_trace.ops, end]:
            while hidden and hidden[0] < op.node:
                constraints.node = which * SPAN + hidden[0]
                hide(capture, capture.nodes[hidden.pop(0)], labels, constraints)
            if op is end or (hidden and op.node == hidden[0]):
                continue
            if constraints.node != which * SPAN + op.node:
                constraints.node = which * SPAN + op.node
                constraints.rewrite, constraints.opaque, constraints.literals = script.literals[op.node]
                sized = any(is_input_size(found, labels, size) for found in script.sizes[op.node])
            call = RuleContext(op, op_trace, labels, constraints, coupling_options.heads, script.uses, varying)
            if sized or (varying and any(r.id in varying for r in call.inputs)):
                varying.update(r.id for r in call.outputs)
            apply_rule(call)
        for node in script.leaking:
            constraints.node = which * SPAN + capture.index[node]
            freeze_inside(capture, node, labels, constraints)
        constraints.node = which * SPAN + capture.index[capture.output]
        for name, ref in capture.outputs:
            if not coupling_options.releases(name):
                why = "is an output of the model" + (f", {name}" if name != ONLY_OUTPUT else "")
                for f in labels.get(ref.id, NONE):
                    constraints.freeze(f.labels, why)
        every.append(labels)
    return constraints, every


def tells_channels(labels: Labels, dim: int, owned: int) -> bool:
    """Whether entries along a dimension all differ, and some are labels of the model's own tensors, the first `owned`."""
    for f in labels:
        if dim in f.dims and f.start is not None:
            if f.start < owned:
                return True
        elif dim in f.dims:
            line = f.flat if len(f.major_to_minor) == 1 else row(f.labels.movedim(dim, -1).reshape(-1, f.labels.shape[dim])[0])
            if int(line.min()) < owned and (bool((line[1:] > line[:-1]).all()) or len(np.unique(line)) == len(line)):
                return True
    return False


def sizes_given(capture: CapturedProgram, index: int) -> list[tuple[TensorRef, int | None]]:
    """The sizes that the numbers among a node's arguments come from, of tensors that depend on the inputs.

    Each is a tensor and a dimension; None where any of its dimensions may be meant.
    """
    node, results = capture.node_at(index), capture.results
    if node is None:
        return []
    sizes: list[tuple[TensorRef, int | None]] = []
    numbers = [n for n in node.all_input_nodes if type(results[n]) is not TensorRef and not collect(results[n], TensorRef)]
    while numbers:
        number = numbers.pop()
        found = size_source(capture, number)
        if found is None:
            numbers += [n for n in number.all_input_nodes if not collect(results[n], TensorRef)]
        elif capture.op_trace.values[found[0].id].from_input:
            ref, dim = found
            sizes.append((ref, None if dim is None else dim % max(1, len(capture.op_trace.shape(ref)))))
    return list(dict.fromkeys(sizes))


def is_input_size(found: tuple[TensorRef, int | None], labels: dict[int, Labels], owned: int) -> bool:
    """Whether a size is one of the inputs', and no number of channels.

    The first `owned` labels are those of the model's own tensors: they tell a channel.
    """
    ref, dim = found
    return dim is None or not tells_channels(labels.get(ref.id, NONE), dim, owned)


def apply_rule(call: RuleContext) -> None:
    """Store the labels of an op's results; an op without a rule is probed through autograd, else frozen."""
    if not call.outputs:
        return
    alike = call.constraints.alike
    met = bool(alike) and any(r.id in alike for r in call.inputs)
    shared = read_apart(call) if met else {}
    rule = find(call.op.func).labels
    if rule is not None:
        result = rule(call)
    elif not any(call.labels(r) for r in call.inputs):
        return
    else:
        result = probe(call)
    results = result if isinstance(result, list) else [result]
    for ref, labels in zip(call.outputs, results, strict=False):
        if ref not in call.inputs:  # else it is written in place: the ties say it all
            call.known[ref.id] = labels
    if shared:
        call.known.update(shared)
    if met:
        follow(call)


def rewriting(capture: CapturedProgram, index: int) -> tuple[Any, bool, frozenset[int]]:
    """How a node is rewritten; whether it is an opaque module; and the numbers written out in a call that has no rewrite.

    Those may be sizes, and are never changed.
    """
    node = capture.node_at(index)
    if node is None:
        return None, False, frozenset()
    rewrite = find_node(node).rewrite
    opaque = node.op == "call_module" and str(node.target) in capture.opaque
    if rewrite is not None or node.op not in ("call_function", "call_method"):
        return rewrite, opaque, frozenset()
    numbers = collect((node.args, dict(node.kwargs)), int)
    return None, opaque, frozenset(v for v in numbers if not isinstance(v, bool) and v > 1)


def hide(capture: CapturedProgram, node: fx.Node, labels: dict[int, Labels], constraints: Constraints) -> None:
    """A node whose results did not come out of the dispatcher: autograd says what it does, or what went in stays."""
    call = RuleContext(as_op(capture, node), capture.op_trace, labels, constraints, False, set())
    for ref, found in zip(call.outputs, probe(call), strict=True):
        labels[ref.id] = found


def freeze_inside(capture: CapturedProgram, node: fx.Node, labels: dict[int, Labels], constraints: Constraints) -> None:
    """Nothing that an opaque module holds or is given can go: its Python took contents where no rule sees them."""
    given = collect([capture.results[n] for n in node.all_input_nodes], TensorRef)
    held = [TensorRef(i) for i, v in enumerate(capture.op_trace.values) if v.name and v.name.startswith(f"{node.target}.")]
    for ref in [*given, *held]:
        for f in labels.get(ref.id, NONE):
            constraints.freeze(f.labels, "is in a module whose Python takes the contents of tensors")


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
