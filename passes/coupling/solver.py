"""Couple: interpret the tapes on labels, solve the ties once, and read off units and families.

Heads take two readings. The first finds which labels are rows of a head (`Ties.coarse`); the second starts with one label
for each row, so that a shared per-dimension parameter (a query norm, a rotary table) no longer ties heads to one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from fxprune.passes.coupling.propagation import SPAN
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.constraints import PART_OF_ROWS, Constraints, Event, Tie, flat, row, unlike_rows
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.program import CapturedProgram

MET_KEPT = "meets a tensor that keeps every index of that dimension"


def close(
    captures: list[CapturedProgram],
    leaves: dict[str, Labels],
    values: list[dict[int, Labels]],
    constraints: Constraints,
    regions: list[dict[fx.Node, fx.Node]],
) -> Solution:
    """Solve all ties at once and mark the classes that something freezes."""
    pairs: list[Tie] = constraints.pairs + chained(constraints.coarse)
    part, stopped = components(constraints.size, pairs)
    # rows that go whole need not agree in their columns
    uneven = unlike(part, constraints.product)
    if uneven:
        level = chained(uneven, columns=True)
        pairs = pairs + level
        part, more = components(constraints.size, level, part)
        stopped += more
    lines = list(constraints.lines)
    if constraints.rows:
        made, stay = settle_rows(constraints, part)
        lines += stay
        pairs = pairs + made
        part, more = components(constraints.size, made, part)
        stopped += more
    unit = part
    frozen = np.full(constraints.size, -1, np.int64)
    reasons: list[str] = []
    numbers: dict[tuple[str, int], int] = {}
    events = [(row(e.labels), e.why, e.node) for e in constraints.frozen]
    events += [(labels, MET_KEPT, node) for labels, node in stopped]
    for labels, why, node in events:
        if (why, node) not in numbers:
            numbers[why, node] = len(reasons)
            reasons.append(f"{why}{place_of(captures, node)}")
        classes = unit[labels]
        fresh = classes[frozen[classes] < 0]
        frozen[fresh] = numbers[why, node]
    frozen[0] = frozen[0] if frozen[0] >= 0 else 0
    if not reasons:
        reasons.append("is never removed")
    equal = distinct([unit[e.array] for e in constraints.equal])
    shapes = {v.name: v.shape for capture in captures for v in capture.op_trace.values if v.name is not None}
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


def place_of(captures: list[CapturedProgram], node: int) -> str:
    if node < 0:
        return ""
    capture = captures[node // SPAN]
    found = capture.node_at(node % SPAN)
    if found is None or found.op == "output":
        return ""
    module = found.meta.get("module") or (str(found.target) if found.op == "call_module" else "")
    return f" (at %{found.name}{f' in {module}' if module else ''})"


def chained(events: list[Event], *, columns: bool = False) -> list[Tie]:
    """Ties that make every row (or every column) of each matrix one unit."""
    along = 0 if columns else 1
    matrices = [(torch.from_numpy(e.array), e.node) for e in events]
    return [Tie(m.amax(along, keepdim=True).expand_as(m), m, True, node) for m, node in matrices]


def components(
    size: int, pairs: Sequence[Tie], part: np.ndarray | None = None
) -> tuple[np.ndarray, list[tuple[np.ndarray, int]]]:
    """The smallest label tied to each of `size` labels, and for each pair that met label 0 the other labels and its node.

    Label 0 ties nothing together: to meet it is to be frozen. `part` is what earlier pairs came to; these add to it.
    """
    rest = pairs
    if part is None:
        part = np.arange(size)
        rest = whole_lines(part, pairs)
    if not rest:
        return part, []
    sides = [flat(pair) for pair in rest]
    rows, cols = np.concatenate([a for a, _ in sides]), np.concatenate([b for _, b in sides])
    differs = rows != cols
    zero = ((rows == 0) | (cols == 0)) & differs
    stopped: list[tuple[np.ndarray, int]] = []
    if zero.any():
        which = np.repeat(np.arange(len(sides)), [len(a) for a, _ in sides])[zero]
        met = np.maximum(rows, cols)[zero]
        stopped = [(met[which == i], rest[i].node) for i in np.unique(which)]
        differs &= ~zero
    return smallest_tied(part, rows[differs], cols[differs]), stopped


def whole_lines(part: np.ndarray, pairs: Sequence[Tie]) -> list[Tie]:
    """Settle the pairs of arrays that each hold consecutive labels, as nearly all do, array by array; returns the others.

    Arrays that overlap others without being the same are among those. `part` ties nothing yet, and is changed.
    """
    lines = {id(v): (start, v) for p in pairs if p.a.shape == p.b.shape for v, start in zip((p.a, p.b), p.starts, strict=True)}
    known = {k: (start, len(v)) for k, (start, v) in lines.items() if start is not None}
    vectors = {k: row(v) for k, (_, v) in lines.items() if k not in known}
    ends = {k: (v, int(v[0]), int(v[-1]) + 1) for k, v in vectors.items() if len(v)}
    spans = known | {
        k: (start, end - start)
        for k, (v, start, end) in ends.items()
        if start > 0 and end - start == len(v) and bool((v[1:] > v[:-1]).all())
    }
    distinct = sorted(set(spans.values()))
    shared: set[tuple[int, int]] = set()
    end, last = 0, (0, 0)
    for span in distinct:
        if span[0] < end:
            shared |= {span, last}
        if span[0] + span[1] > end:
            end, last = span[0] + span[1], span
    lead = {span: span for span in distinct if span not in shared}

    def find(span: tuple[int, int]) -> tuple[int, int]:
        while lead[span] != span:
            lead[span] = lead[lead[span]]
            span = lead[span]
        return span

    rest = []
    for pair in pairs:
        a, b = spans.get(id(pair.a)), spans.get(id(pair.b))
        if pair.a.shape == pair.b.shape and a in lead and b in lead and a is not None and b is not None and a[1] == b[1]:
            a, b = find(a), find(b)
            lead[max(a, b)] = min(a, b)
        else:
            rest.append(pair)
    for span in lead:
        first = find(span)
        if first != span:
            part[span[0] : span[0] + span[1]] = part[first[0] : first[0] + first[1]]
    return rest


def smallest_tied(part: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The smallest member of each number's connected component, the edges being (rows[i], cols[i]).

    Arguments: `part`, the smallest member of each number's component without these edges (the number itself where it has
    none).

    Roots are hooked to smaller roots and paths halved, all at once (Shiloach and Vishkin, An O(log n) parallel connectivity
    algorithm, 1982).
    """
    rows, cols = part[rows], part[cols]
    apart = rows != cols
    rows, cols = rows[apart], cols[apart]
    if not len(rows):
        return part
    root, met = part.copy(), np.concatenate([rows, cols])  # only roots that are met change
    while len(rows):
        low, high = np.minimum(rows, cols), np.maximum(rows, cols)
        np.minimum.at(root, high, low)  # of several the smallest: with any of them, a star would shrink by one arm a round
        while True:
            further = root[root[high]]
            if np.array_equal(further, root[high]):
                break
            root[high] = further
        rows, cols = root[rows], root[cols]
        apart = rows != cols
        rows, cols = rows[apart], cols[apart]
    while not np.array_equal(further := root[root[met]], root[met]):
        root[met] = further
    return root[part]


def whole(classes: np.ndarray) -> np.ndarray:
    """For each row of a matrix, whether it is one class."""
    return (classes == classes[:, :1]).all(1)


def settle_rows(constraints: Constraints, part: np.ndarray) -> tuple[list[Tie], list[np.ndarray]]:
    """Ties of row labels to the rows that go whole, and the rows (of labels) that must keep an entry.

    A row label that stands for several rows goes with them if all of them are whole. If not, it is frozen, and with it
    those rows that are. Ties make more rows whole, so this is repeated.
    """
    made: list[Tie] = []
    while True:
        held = np.zeros(len(part), bool)
        goes_whole = []
        for r in constraints.rows:
            alone = whole(part[r.entries.numpy()])
            goes_whole.append(alone)
            held[r.labels.numpy()[~(alone & (r.entries[:, 0].numpy() != 0))]] = True
        new = []
        for r in constraints.rows:
            labels, lead = r.labels.numpy(), r.entries[:, 0].numpy()
            going = ~held[labels] & (part[labels] != part[lead])
            if going.any():
                chosen = torch.from_numpy(going)
                new.append(Tie(r.labels[chosen], r.entries[chosen, 0], False, r.node))
        if not new:
            break
        made += new
        part, _ = components(constraints.size, new, part)
    stay: list[np.ndarray] = []
    for r, alone in zip(constraints.rows, goes_whole, strict=True):
        kept = held[r.labels.numpy()]
        if kept.any():
            entries = r.entries.numpy()
            constraints.frozen.append(Event(r.labels.numpy()[kept], r.node, PART_OF_ROWS))
            constraints.frozen.append(Event(entries[kept & alone, 0], r.node, PART_OF_ROWS))
            stay += list(entries[kept & ~alone])
    return made, stay
