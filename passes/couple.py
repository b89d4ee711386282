"""Couple: interpret the tapes on labels, solve the ties once, and read off units and families.

Heads take two readings. The first finds which labels are rows of a head (`Ties.coarse`); the second starts with one label
for each row, so that a shared per-dimension parameter (a query norm, a rotary table) no longer ties heads to one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.passes import rules
from fxprune.passes.alike import follow, read_apart, written_through
from fxprune.passes.capture import Capture, size_source
from fxprune.passes.labels import NONE, Factor, Labels, along, factor
from fxprune.passes.probe import probe
from fxprune.passes.regions import gather_regions
from fxprune.passes.rules import Call
from fxprune.passes.sizes import HANDLERS, function_name
from fxprune.passes.tape import Op, Ref, collect
from fxprune.passes.terms import ONLY, Terms
from fxprune.passes.ties import Event, Pair, Ties, chained, components, row, settle_rows

MET_KEPT = "meets a tensor that keeps every index of that dimension"
SPAN = 1_000_000  # node numbers of one capture
MOST_COMPOSED = 1000  # dimensions made of several others, before the rest is frozen


@dataclass(slots=True)
class Solution:
    """Labels of every value and the classes that removal acts on.

    Attributes:
        captures: the runs that were read.
        leaves: labels of the model's own tensors, by name.
        values: for each capture, the labels of every value on its tape.
        unit: the class of each label; class numbers are the smallest label in it.
        frozen: for each class that is never removed, the number of the reason, else -1 (indexed by label).
        reasons: sentences; `places` the graph nodes they arose at.
        equal: matrices of classes whose rows must keep equally many entries.
        regions: nodes replaced by one gather, so that what they pass through need not be a rectangle.
        pairs: the ties that were solved, as the rules reported them.
        shapes: of the model's own tensors, by name.
        lines: classes of which one at least must stay.
    """

    captures: list[Capture]
    leaves: dict[str, Labels]
    values: list[dict[int, Labels]]
    unit: Tensor
    frozen: np.ndarray
    reasons: list[str]
    equal: list[np.ndarray]
    regions: list[dict[fx.Node, fx.Node]]
    pairs: list[Pair]
    shapes: dict[str, tuple[int, ...]]
    lines: list[np.ndarray]


def solve(captures: Sequence[Capture], terms: Terms, closed: Mapping[str, str] | None = None) -> Solution:
    """Labels for every value of the captured runs, with ties solved.

    Arguments:
        captures: runs of the same model (evaluation, and training where it differs).
        terms: what may go and what may not.
        closed: paths of modules nothing of which is removed, nor of what they read and return, with the reason.
    """
    rules.load()
    leaves, size = leaf_labels(captures)
    seeking = terms.heads and any(has_heads(c) for c in captures)
    scripts = [Script(capture) for capture in captures]
    ties, values = read(scripts, leaves, size, terms, seeking=seeking)
    if seeking:
        if any(len(e.labels[0]) > 1 for e in ties.coarse):
            leaves = by_head(leaves, ties)
        del ties, values  # before as much is made again
        ties, values = read(scripts, leaves, size, terms)
    settled: set[tuple[str, int]] = set()
    while ties.composed:  # what is composed in one reading may ask for more in the next
        settled |= {ties.leaf_starts[start][:2] for start in ties.composed}
        leaves = composed(leaves, ties)
        size = ties.size  # labels that were new in this reading may be among them: the next one numbers its own after them
        last = len(settled) > MOST_COMPOSED
        ties, values = read(scripts, leaves, size, terms, settled=frozenset(settled), compose=not last)
    for name, reason in terms.keep.items():
        for f in leaves.get(name, NONE):
            ties.frozen.append(Event(f.labels, -1, reason))
    for which, (capture, labels) in enumerate(zip(captures, values, strict=True)):
        for path, reason in (closed or {}).items():
            shut(capture, which, labels, path, reason, ties)
    regions = [gather_regions(c, v) for c, v in zip(captures, values, strict=True)]
    inside = {number(c, i, node) for i, (c, r) in enumerate(zip(captures, regions, strict=True)) for node in r}
    ties.product = [e for e in ties.product if e.node not in inside]
    ties.equal = [e for e in ties.equal if e.node not in inside]
    return close(list(captures), leaves, values, ties, regions)


def shut(capture: Capture, which: int, labels: Mapping[int, Labels], path: str, why: str, ties: Ties) -> None:
    """Freeze what a module holds, reads and returns."""
    nodes = [n for n in capture.graph.nodes if n.op == "call_module" and str(n.target) == path]
    for node in nodes:
        for ref in collect([capture.results[n] for n in (*node.all_input_nodes, node)], Ref):
            ties.frozen += [Event(f.labels, number(capture, which, node), why) for f in labels.get(ref.id, NONE)]
    for i, value in enumerate(capture.tape.values):
        if nodes and value.name is not None and f"{capture.prefix}{value.name}".startswith(f"{path}."):
            ties.frozen += [Event(f.labels, number(capture, which, nodes[0]), why) for f in labels.get(i, NONE)]


def has_heads(capture: Capture) -> bool:
    """Whether the tape holds a product with batch dimensions at all."""
    return any("bmm" in op.func._schema.name or "dot_product" in op.func._schema.name for op in capture.tape.ops)


def number(capture: Capture, which: int, node: fx.Node) -> int:
    return which * SPAN + capture.index[node]


def leaf_labels(captures: Sequence[Capture]) -> tuple[dict[str, Labels], int]:
    """A label for every index of every dimension of the model's tensors; returns them and the next free label.

    The weight of a grouped convolution has an input index for each group: its second dimension is labelled group by group.
    """
    groups: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for capture in captures:
        groups.update(grouped_weights(capture))
        shapes.update({v.name: v.shape for v in capture.tape.values if v.name is not None})
    leaves: dict[str, Labels] = {}
    size = 1
    numbers = np.arange(1 + sum(sum(s) * groups.get(n, 1) for n, s in shapes.items()))  # each line is a piece of this
    for name, shape in shapes.items():
        made: list[Factor] = []
        for d, n in enumerate(shape):
            if n == 1:
                continue
            if d == 1 and name in groups:
                g = groups[name]
                vectors = torch.arange(size, size + g * n).view(g, 1, n).expand(g, shape[0] // g, n)
                made.append(Factor(vectors.reshape(shape[0], n, *[1] * (len(shape) - 2)), (0, 1)))
                size += g * n
            else:
                made.append(Factor.line(numbers[size : size + n], d, len(shape), size))
                size += n
        leaves[name] = tuple(made)
    return leaves, size


def grouped_weights(capture: Capture) -> dict[str, int]:
    """Parameters that reach a grouped convolution's weight through ops that keep their first two dimensions."""
    found: dict[str, int] = {}
    for op in capture.tape.ops:
        if "conv" not in op.func._schema.name or len(op.args) < 2 or not isinstance(op.args[1], Ref):
            continue
        arguments = {a.name: v for a, v in zip(op.func._schema.arguments, op.args, strict=False)}
        groups = arguments.get("groups", 1)
        shape = capture.tape.shape(op.args[1])
        if groups == 1 or shape[1] == 1:
            continue
        pending, seen = [op.args[1].id], set()
        while pending:
            current = pending.pop()
            value = capture.tape.values[current]
            if current in seen or value.shape[:2] != shape[:2]:
                continue
            seen.add(current)
            maker = capture.tape.maker(current)
            if value.name is not None:
                found[value.name] = groups
            elif maker is not None:
                pending += [r.id for r in collect((maker.args, maker.kwargs), Ref)]
    return found


class Script:
    """A capture, and what every reading of it asks that does not depend on labels.

    Attributes:
        uses: the values that a later call, the result or an untracked node reads.
        leaking: opaque modules whose Python took contents; `hidden` are the numbers of other untracked nodes.
        pinned: views that are written into and cannot become copies.
        literals: for each node what `ties.maker` and `ties.literals` are there.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        tape, untracked = capture.tape, capture.untracked
        self.uses = {r.id for op in tape.ops for r in op.inputs} | {r.id for _, r in capture.outputs}
        self.uses |= {r.id for n in untracked for r in collect([capture.results[m] for m in n.all_input_nodes], Ref)}
        self.leaking = [n for n in untracked if n.op == "call_module" and str(n.target) in capture.opaque]
        self.hidden = sorted(capture.index[n] for n in untracked if n not in self.leaking)
        self.pinned = written_through(tape)
        self.named = {i: v.name for i, v in enumerate(tape.values) if v.name is not None}
        self.literals = {i: (maker(capture, i), literals(capture, i)) for i in {op.node for op in tape.ops}}


def read(
    scripts: Sequence[Script],
    leaves: dict[str, Labels],
    size: int,
    terms: Terms,
    *,
    seeking: bool = False,
    compose: bool = True,
    settled: frozenset[tuple[str, int]] = frozenset(),
) -> tuple[Ties, list[dict[int, Labels]]]:
    """Interpret every tape on labels."""
    ties = Ties(size=size, seeking_heads=seeking, leaves=leaves if compose and not seeking else {}, settled=settled)
    every = []
    for which, script in enumerate(scripts):
        capture, tape = script.capture, script.capture.tape
        labels: dict[int, Labels] = {i: leaves[name] for i, name in script.named.items()}
        hidden = list(script.hidden)
        end = Op(None, (), {}, (), len(capture.index))
        ties.pinned = script.pinned
        varying: set[int] = set()
        sized: dict[int, bool] = {}
        for op in [*tape.ops, end]:
            while hidden and hidden[0] < op.node:
                ties.node = which * SPAN + hidden[0]
                hide(capture, capture.nodes[hidden.pop(0)], labels, ties)
            if op is end or (hidden and op.node == hidden[0]):
                continue
            if ties.node != which * SPAN + op.node:
                ties.node = which * SPAN + op.node
                ties.maker, ties.literals = script.literals[op.node]
            call = Call(op, tape, labels, ties, terms.heads, script.uses, varying)
            if op.node not in sized:
                sized[op.node] = takes_input_sizes(capture, op.node, labels, size)
            if sized[op.node] or (varying and any(r.id in varying for r in call.inputs)):
                varying.update(r.id for r in call.outputs)
            apply_rule(call)
        for node in script.leaking:
            ties.node = which * SPAN + capture.index[node]
            freeze_inside(capture, node, labels, ties)
        ties.node = which * SPAN + capture.index[capture.output]
        for name, ref in capture.outputs:
            if not terms.releases(name):
                why = "is an output of the model" + (f", {name}" if name != ONLY else "")
                for f in labels.get(ref.id, NONE):
                    ties.freeze(f.labels, why)
        every.append(labels)
    return ties, every


def tells_channels(labels: Labels, dim: int, owned: int) -> bool:
    """Whether entries along a dimension all differ, and some are labels of the model's own tensors, the first `owned`."""
    for f in labels:
        if dim in f.dims:
            line = f.flat if len(f.nest) == 1 else row(f.labels.movedim(dim, -1).reshape(-1, f.labels.shape[dim])[0])
            if int(line.min()) < owned and (bool((line[1:] > line[:-1]).all()) or len(np.unique(line)) == len(line)):
                return True
    return False


def takes_input_sizes(capture: Capture, index: int, labels: dict[int, Labels], owned: int) -> bool:
    """Whether a node has sizes of the inputs among its arguments, so that what it makes of nothing varies with them.

    The first `owned` labels are those of the model's own tensors: they tell a channel.
    """
    node, results = capture.node_at(index), capture.results
    if node is None:
        return False
    numbers = [n for n in node.all_input_nodes if type(results[n]) is not Ref and not collect(results[n], Ref)]
    while numbers:
        number = numbers.pop()
        found = size_source(capture, number)
        if found is None:
            numbers += [n for n in number.all_input_nodes if not collect(capture.results[n], Ref)]
            continue
        ref, dim = found
        if capture.tape.values[ref.id].from_input:
            at = None if dim is None else dim % max(1, len(capture.tape.shape(ref)))
            if at is None or not tells_channels(labels.get(ref.id, NONE), at, owned):
                return True
    return False


def apply_rule(call: Call) -> None:
    """Store the labels of an op's results; an op without a rule is probed through autograd, else frozen."""
    if not call.outputs:
        return
    alike = call.ties.alike
    met = bool(alike) and any([r.id in alike for r in call.inputs])
    shared = read_apart(call) if met else {}
    ruled = rules.find(call.op.func)
    if ruled is not None:
        result = ruled(call)
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


def maker(capture: Capture, index: int) -> str:
    node = capture.node_at(index)
    if node is None or node.op == "output":
        return ""
    if node.op == "call_module":
        return "opaque" if str(node.target) in capture.opaque else "module"
    return str(getattr(node.target, "__name__", node.target))


def literals(capture: Capture, index: int) -> frozenset[int]:
    """Numbers written out in a call whose arguments are not known to be sizes, and so are never changed."""
    node = capture.node_at(index)
    if node is None or node.op not in ("call_function", "call_method") or function_name(node) in HANDLERS:
        return frozenset()
    return frozenset(v for v in collect((node.args, dict(node.kwargs)), int) if not isinstance(v, bool) and v > 1)


def hide(capture: Capture, node: fx.Node, labels: dict[int, Labels], ties: Ties) -> None:
    """A node whose results did not come out of the dispatcher: autograd says what it does, or what went in stays."""
    call = Call(as_op(capture, node), capture.tape, labels, ties, False, set())
    for ref, found in zip(call.outputs, probe(call), strict=True):
        labels[ref.id] = found


def freeze_inside(capture: Capture, node: fx.Node, labels: dict[int, Labels], ties: Ties) -> None:
    """Nothing that an opaque module holds or is given can go: its Python took contents where no rule sees them."""
    given = collect([capture.results[n] for n in node.all_input_nodes], Ref)
    held = [Ref(i) for i, v in enumerate(capture.tape.values) if v.name and v.name.startswith(f"{node.target}.")]
    for ref in [*given, *held]:
        for f in labels.get(ref.id, NONE):
            ties.freeze(f.labels, "is in a module whose Python takes the contents of tensors")


def as_op(capture: Capture, node: fx.Node) -> Op:
    """A node of the graph in the form of a dispatcher call."""
    name = str(getattr(node.target, "__name__", node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: capture.results[n])
    run = node.target
    if node.op == "call_module":
        run = capture.root.get_submodule(str(node.target))
    elif node.op == "call_method":
        run = lambda x, *a, **k: getattr(x, name)(*a, **k)  # noqa: E731
    func = Outside(run, SimpleNamespace(name=name, arguments=[]))
    return Op(func, args, kwargs, capture.results[node], capture.index[node])


@dataclass(frozen=True, slots=True)
class Outside:
    """A function outside of the dispatcher, with what a rule reads of an op."""

    run: Any
    _schema: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def composed(leaves: dict[str, Labels], ties: Ties) -> dict[str, Labels]:
    """Leaf labels in which a dimension over pairs of channels carries the labels of both."""
    changed = dict(leaves)
    for start, vectors in ties.composed.items():
        name, dim, _ = ties.leaf_starts[start]
        ndim = next(f.labels.dim() for f in leaves[name])
        others = tuple(f for f in changed[name] if f.nest != (dim,))
        changed[name] = others + tuple(along(v, dim, ndim) for v in vectors)
    return changed


def by_head(leaves: dict[str, Labels], ties: Ties) -> dict[str, Labels]:
    """Leaf labels with one label for each row of a head. Broadcast ties are not followed: they join heads to one another."""
    aligned = [p for p in ties.pairs if not p.broadcast]
    unit, _ = components(ties.size, chained(ties.coarse) + aligned)
    touched = np.zeros(len(unit), bool)
    for event in ties.coarse:
        touched[unit[row(event.labels)]] = True
    lines = np.where(touched[unit], unit, np.arange(ties.size))
    lines[0] = 0
    table = torch.from_numpy(lines)

    def renamed(f: Factor) -> Factor:
        if len(f.nest) > 1:
            return factor(table[f.labels], f.nest)
        vector = lines[f.flat]
        return Factor.line(vector, f.nest[0], f.ndim) if bool((vector != vector[0]).any()) else Factor(f.labels, ())

    # a dimension that is one single head has nothing to remove: it is left without labels, and so kept
    return {name: tuple(g for f in labels if (g := renamed(f)).nest) for name, labels in leaves.items()}


def close(
    captures: list[Capture],
    leaves: dict[str, Labels],
    values: list[dict[int, Labels]],
    ties: Ties,
    regions: list[dict[fx.Node, fx.Node]],
) -> Solution:
    """Solve all ties at once and mark the classes that something freezes."""
    pairs: list[Pair] = ties.pairs + chained(ties.coarse)
    part, stopped = components(ties.size, pairs)
    # rows that go whole need not agree in their columns
    uneven = [e for e in ties.product if not whole_rows(part[e.array])]
    if uneven:
        level = chained(uneven, columns=True)
        pairs = pairs + level
        part, more = components(ties.size, level, part)
        stopped += more
    lines = list(ties.lines)
    if ties.rows:
        made, stay = settle_rows(ties, part)
        lines += stay
        pairs = pairs + made
        part, more = components(ties.size, made, part)
        stopped += more
    unit = part
    frozen = np.full(ties.size, -1, np.int64)
    reasons: list[str] = []
    numbers: dict[tuple[str, int], int] = {}
    events = [(row(e.labels), e.why, e.node) for e in ties.frozen]
    events += [(labels, MET_KEPT, node) for labels, node in stopped]
    for labels, why, node in events:
        if (why, node) not in numbers:
            numbers[why, node] = len(reasons)
            reasons.append(f"{why}{place(captures, node)}")
        classes = unit[labels]
        fresh = classes[frozen[classes] < 0]
        frozen[fresh] = numbers[why, node]
    frozen[0] = frozen[0] if frozen[0] >= 0 else 0
    if not reasons:
        reasons.append("is never removed")
    equal = distinct([unit[e.array] for e in ties.equal])
    shapes = {v.name: v.shape for capture in captures for v in capture.tape.values if v.name is not None}
    stay = [unit[e] for e in lines]
    return Solution(captures, leaves, values, torch.from_numpy(unit), frozen, reasons, equal, regions, pairs, shapes, stay)


def distinct(matrices: list[np.ndarray]) -> list[np.ndarray]:
    """Constraints without repetitions, and without those that hold by themselves."""
    seen: dict[object, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for m in matrices:
        key = (m.shape, m.tobytes())
        if m.shape[0] < 2 or key in seen or whole_rows(m):
            continue
        # equal rows are found by their product with a random vector: sorting whole rows takes far longer
        sums = m.astype(np.uint64) @ rng.integers(1, 1 << 62, size=m.shape[1]).astype(np.uint64)
        _, first = np.unique(sums, return_index=True)
        seen[key] = m[np.sort(first)]
    unlike = {(m.shape, m.tobytes()): m for m in seen.values() if m.shape[0] > 1}
    return list(unlike.values())


def whole_rows(classes: np.ndarray) -> bool:
    """Whether every row is one class, so that it stays or goes as a whole."""
    return bool((classes == classes[:, :1]).all())


def place(captures: list[Capture], node: int) -> str:
    if node < 0:
        return ""
    capture = captures[node // SPAN]
    found = capture.node_at(node % SPAN)
    if found is None or found.op == "output":
        return ""
    module = found.meta.get("module") or (str(found.target) if found.op == "call_module" else "")
    return f" (at %{found.name}{f' in {module}' if module else ''})"
