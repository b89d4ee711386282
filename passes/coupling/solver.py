"""Solve the constraints on labels: units, the reasons for the frozen ones, and what a choice of units must respect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from fxprune.passes.coupling.components import Components
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.constraints import SPAN, Constraints, LabelArray, RowLabels, Tie, distinct_rows
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.program import CapturedProgram

TIED_TO_KEPT = "is tied to channels that are all kept"
ROW_STAYS = "stands for rows of channels that are removed one by one, so that every row keeps some"


def solve(
    captures: list[CapturedProgram],
    leaves: dict[str, Labels],
    values: list[dict[int, Labels]],
    constraints: Constraints,
    size: int,
    regions: list[dict[fx.Node, fx.Node]],
    picks: Sequence[dict[int, np.ndarray]] = (),
) -> Solution:
    """The units of `size` labels, and which of them something freezes.

    (1) Ties, heads that go whole, and what nothing reads of rows that go whole otherwise.
    (2) Rows that do not go whole keep the same columns where the rules ask for it.
    (3) Labels of rows go with their rows where those go whole.
    """
    units = Components(size)
    units.add(constraints.ties + chain(constraints.head_rows))  # (1)
    tie_unread(constraints.parts, units)
    units.add(chain(partial_rows(units.unit_of, constraints.same_columns), columns=True))  # (2)
    frozen = list(constraints.frozen)
    some_stay = list(constraints.some_stay)
    if constraints.row_labels:  # (3)
        tie_whole_rows(constraints, units)
        frozen += settle_rows(constraints.row_labels, units, some_stay)
    frozen += [LabelArray(labels, node, TIED_TO_KEPT) for labels, node in units.tied_to_zero]
    reason_of, reasons = numbered_reasons(frozen, units.unit_of, captures)
    apart = [e for e in constraints.equal_rows if not go_whole(units.unit_of, e)]
    equal_rows = distinct([units.unit_of[e.array] for e in apart])
    shapes = {v.name: v.shape for capture in captures for v in capture.op_trace.values if v.name is not None}
    some_stay = [units.unit_of[labels] for labels in some_stay]
    unit_of = torch.from_numpy(units.unit_of)
    at_least = [(units.unit_of[labels], count) for labels, count in constraints.at_least]
    return Solution(
        captures,
        leaves,
        values,
        unit_of,
        reason_of,
        reasons,
        equal_rows,
        regions,
        units.ties,
        shapes,
        some_stay,
        at_least,
        list(picks),
    )


def numbered_reasons(
    frozen: Sequence[LabelArray], unit_of: np.ndarray, captures: list[CapturedProgram]
) -> tuple[np.ndarray, list[str]]:
    """For each unit the number of the reason why it is frozen, or -1, and the reasons."""
    reason_of = np.full(len(unit_of), -1, np.int64)
    numbers: dict[tuple[str, int], int] = {}
    reasons: list[str] = []
    for event in frozen:
        key = (event.why, event.node)
        if key not in numbers:
            numbers[key] = len(reasons)
            reasons.append(f"{event.why}{place_of(captures, event.node)}")
        units = unit_of[event.flat]
        reason_of[units[reason_of[units] < 0]] = numbers[key]
    reason_of[0] = max(reason_of[0], 0)
    return reason_of, reasons or ["is never removed"]


def distinct(matrices: list[np.ndarray]) -> list[np.ndarray]:
    """Matrices of units whose rows must keep equally many, each once."""
    seen: dict[object, np.ndarray] = {}
    for m in matrices:
        key = (m.shape, m.tobytes())
        if m.shape[0] < 2 or key in seen:
            continue
        seen[key] = m[distinct_rows(m)]
    left = {(m.shape, m.tobytes()): m for m in seen.values() if m.shape[0] > 1}
    return list(left.values())


def partial_rows(unit_of: np.ndarray, matrices: Sequence[LabelArray]) -> list[LabelArray]:
    """The matrices, as units, whose rows do not all go whole, each once and with equal rows once.

    A detector picks the scores of one class after the other out of one matrix, whose rows repeat for every place of the image.
    """
    found: dict[object, LabelArray] = {}
    for event in matrices:
        units = unit_of[event.array]
        key = (units.shape, units.tobytes())
        if key not in found and not bool(one_unit_rows(units).all()):
            found[key] = LabelArray(units[distinct_rows(units)], event.node)
    return list(found.values())


def go_whole(unit_of: np.ndarray, rows: LabelArray) -> bool:
    """Whether each row, or what it is a part of, is one unit, so that those that stay keep equally many by themselves."""
    return bool(one_unit_rows(unit_of[rows.array if rows.whole is None else rows.whole.numpy()]).all())


def one_unit_rows(units: np.ndarray) -> np.ndarray:
    """For each row of a matrix, whether it is one unit, so that it stays or goes whole."""
    return (units == units[:, :1]).all(1)


def place_of(captures: list[CapturedProgram], node: int) -> str:
    if node < 0:
        return ""
    capture = captures[node // SPAN]
    found = capture.node_at(node % SPAN)
    if found is None or found.op == "output":
        return ""
    module = found.meta.get("module") or (str(found.target) if found.op == "call_module" else "")
    return f" (at %{found.name}{f' in {module}' if module else ''})"


def chain(matrices: Sequence[LabelArray], *, columns: bool = False) -> list[Tie]:
    """Ties that make every row (or every column) of each matrix one unit."""
    along = 0 if columns else 1
    arrays = [(torch.from_numpy(e.array), e.node) for e in matrices]
    return [Tie(m.amax(along, keepdim=True).expand_as(m), m, True, node) for m, node in arrays]


def tie_unread(parts: Sequence[LabelArray], units: Components) -> None:
    """Where all that is read of a row is one unit, the rest goes with it, so that the row can go whole."""
    for event in reversed(parts):  # of slices of slices, the innermost one first
        assert event.whole is not None
        rows, part = units.unit_of[event.whole.numpy()], units.unit_of[event.array]
        read = one_unit_rows(part) & (part[:, 0] != 0)
        if read.any():
            whole = torch.from_numpy(rows[read])
            units.add([Tie(torch.from_numpy(part[read, :1]).expand_as(whole), whole, True, event.node)])


def tie_whole_rows(constraints: Constraints, units: Components) -> None:
    """Rows that were reduced to one label each go whole where that is the finer step than to shorten all of them alike.

    Maxout over 16 pairs of channels loses 2 channels at a time, not 16. Nothing in a row or
    behind its label may be frozen, and no row have to keep some of its entries.
    """
    held = np.zeros(len(units.unit_of), bool)
    held[0] = True
    for event in constraints.frozen:
        held[units.unit_of[event.flat]] = True
    for labels in [*constraints.some_stay, *(labels for labels, _ in units.tied_to_zero)]:
        held[units.unit_of[labels]] = True
    for rows in constraints.row_labels:
        entries, labels = rows.entries.numpy(), rows.labels.numpy()
        count, length = entries.shape
        if rows.whole and count > length and not held[units.unit_of[entries]].any() and not held[units.unit_of[labels]].any():
            units.add(chain([LabelArray(entries, rows.node)]))


def settle_rows(row_labels: Sequence[RowLabels], units: Components, some_stay: list[np.ndarray]) -> list[LabelArray]:
    """Tie labels of rows to the rows that go whole; returns what is frozen.

    A label that stands for several rows goes with them if all of them are one unit. If not it is frozen, and with it those that
    are; of the others some entry must stay, which is added to `some_stay`. Ties make more rows one unit, so this is repeated.
    """
    while True:
        kept = np.zeros(len(units.unit_of), bool)
        whole = []
        for r in row_labels:
            entries = r.entries.numpy()
            whole.append(one_unit_rows(units.unit_of[entries]))
            kept[r.labels.numpy()[~(whole[-1] & (entries[:, 0] != 0))]] = True
        new = []
        for r in row_labels:
            labels, first = r.labels.numpy(), r.entries[:, 0].numpy()
            going = ~kept[labels] & (units.unit_of[labels] != units.unit_of[first])
            if going.any():
                new.append(Tie(labels[going], first[going], False, r.node))
        if not new:
            break
        units.add(new)
    frozen: list[LabelArray] = []
    for r, alone in zip(row_labels, whole, strict=True):
        labels, entries = r.labels.numpy(), r.entries.numpy()
        stays = kept[labels]
        if stays.any():
            frozen.append(LabelArray(labels[stays], r.node, ROW_STAYS))
            frozen.append(LabelArray(entries[stays & alone, 0], r.node, ROW_STAYS))
            some_stay += list(entries[stays & ~alone])
    return frozen
