"""Couple: interpret the tapes on labels, solve the ties once, and read off units and families.

Heads take two readings. The first finds which labels are rows of a head (`Ties.coarse`); the second starts with one label
for each row, so that a shared per-dimension parameter (a query norm, a rotary table) no longer ties heads to one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.passes import rules
from fxprune.passes.capture import Capture
from fxprune.passes.labels import NONE, Factor, Labels, along, factor
from fxprune.passes.reading import SPAN, Script, number, read
from fxprune.passes.regions import gather_regions
from fxprune.passes.tape import Ref, collect, name_of
from fxprune.passes.terms import Terms
from fxprune.passes.ties import Event, Pair, Ties, chained, components, row, settle_rows, unlike_rows

MET_KEPT = "meets a tensor that keeps every index of that dimension"
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
    return any("bmm" in name or "dot_product" in name for name in {name_of(op.func) for op in capture.tape.ops})


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
            if n < 2:  # nothing to remove; some models have tables of no entries
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
        if "conv" not in name_of(op.func) or len(op.args) < 2 or not isinstance(op.args[1], Ref):
            continue
        groups = dict(zip(rules.signature(op.func)[0], op.args, strict=False)).get("groups", 1)
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
    uneven = unlike(part, ties.product)
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
    for m in matrices:
        key = (m.shape, m.tobytes())
        if m.shape[0] < 2 or key in seen or whole_rows(m):
            continue
        seen[key] = m[unlike_rows(m)]
    left = {(m.shape, m.tobytes()): m for m in seen.values() if m.shape[0] > 1}
    return list(left.values())


def unlike(part: np.ndarray, events: Sequence[Event]) -> list[Event]:
    """Matrices of classes whose rows are not all whole, each once, with equal rows once: a detector picks the scores of one
    class after the other out of the same matrix, whose rows repeat for every place of the image.
    """
    found: dict[object, Event] = {}
    for event in events:
        classes = part[event.array]
        key = (classes.shape, classes.tobytes())
        if key not in found and not whole_rows(classes):
            found[key] = Event(classes[unlike_rows(classes)], event.node)
    return list(found.values())


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
