"""Restore units until every tensor of a choice is a full, non-empty rectangle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import NotARectangle
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.rewrite.rewrite import tensor_cuts

BATCH = 1 << 20  # units that are looked at in one call


def restore_rectangles(
    solution: Solution, removed: np.ndarray, score: np.ndarray, nonempty: Sequence[np.ndarray], before: np.ndarray | None = None
) -> tuple[Tensor, Slicer]:
    """Which labels are kept where only those removals are done that leave every tensor a rectangle with an entry.

    Arguments:
        solution: the coupling.
        removed: for each unit whether it is to be removed, shape (labels,); changed.
        score: importance by unit: the most important units are restored first.
        nonempty: see `find_nonempty_sets`.
        before: for each unit whether an earlier choice of this kind removed it; these stay removed.
    """
    unit = solution.unit_of.numpy()
    if before is not None:
        removed = removed | before
    for some in batches(nonempty, BATCH):
        starts = np.cumsum([0, *(len(units) for units in some[:-1])])
        for i in np.flatnonzero(np.logical_and.reduceat(removed[np.concatenate(some)], starts)).tolist():
            if removed[some[i]].all():
                mine = some[i] if before is None else some[i][~before[some[i]]]
                removed[mine[np.argmax(score[mine])]] = False
    for _ in range(len(removed) + 1):
        restore_enough(solution, removed, score, before)
        restore_even_rows(solution, removed, score)
        try:
            kept = torch.from_numpy(~removed[unit])
            slicer = Slicer(kept)
            tensor_cuts(solution, kept, slicer)
            check_activations(solution, slicer)
            return kept, slicer
        except NotARectangle as error:
            units = unit[error.labels.numpy()]
            removed[units] = False if before is None else before[units]
    raise AssertionError("restoring units always ends in a rectangle")


def batches(arrays: Sequence[np.ndarray], size: int) -> Iterator[Sequence[np.ndarray]]:
    """The arrays in their order, about `size` elements at a time."""
    ends = np.cumsum([len(a) for a in arrays])
    start = 0
    while start < len(arrays):
        reached = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, reached + size)))
        yield arrays[start:end]
        start = end


def restore_even_rows(solution: Solution, removed: np.ndarray, score: np.ndarray) -> None:
    """Restore units, the most important first, until the rows of each constraint keep equally many entries."""
    uneven = True
    while uneven:
        uneven = False
        for matrix in solution.equal_rows:
            counts = (~removed[matrix]).sum(1)
            if (counts == counts[0]).all():
                continue
            uneven = True
            for row in matrix[counts < counts.max()]:
                mine = row[removed[row]]
                if len(mine):  # another row may have restored them
                    removed[mine[np.argmax(score[mine])]] = False


def restore_enough(solution: Solution, removed: np.ndarray, score: np.ndarray, before: np.ndarray | None) -> None:
    """Restore units, the most important first, until as many entries stay as some call chooses."""
    for units, count in solution.at_least:
        while (~removed[units]).sum() < count:
            mine = units[removed[units] if before is None else removed[units] & ~before[units]]
            if not len(mine):
                break
            removed[mine[np.argmax(score[mine])]] = False


def find_nonempty_sets(solution: Solution) -> list[np.ndarray]:
    """Sets of units of which at least one is kept: those of every distinct array of labels."""
    unit = solution.unit_of.numpy()
    seen: set[int] = set()
    found = list(solution.some_stay)
    for values in solution.values:
        for labels in values.values():
            for f in labels:
                if id(f.base) not in seen:
                    seen.add(id(f.base))
                    found.append(f.lookup(unit))
    return found


def check_activations(solution: Solution, slicer: Slicer) -> None:
    """Raise NotARectangle where an activation outside of a gathered region would not be one, or would be empty."""
    for capture, values, regions in zip(solution.captures, solution.values, solution.regions, strict=True):
        shown = [result for node, result in capture.results.items() if regions.get(node, node) is node]
        sized = [use.ref for uses in capture.sizes.values() for use in uses]  # inside opaque modules
        for ref in (*collect(shown, TensorRef), *sized):
            labels = values.get(ref.id, ())
            if any(len(f.major_to_minor) > 1 for f in labels) or len({f.major_to_minor for f in labels}) < len(labels):
                slicer(labels, capture.op_trace.shape(ref))
