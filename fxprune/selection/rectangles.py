"""Choice: from a request to what is kept, so that every tensor stays a full rectangle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import NotARectangle
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.rewrite.rewrite import tensor_cuts


def settle_removals(
    solution: Solution,
    removed: np.ndarray,
    score: np.ndarray,
    spans: Sequence[np.ndarray],
    held: np.ndarray | None = None,
) -> tuple[Tensor, Slicer]:
    """What is kept. Choices that would not leave rectangles, or would leave a tensor empty, are taken back.

    Classes that are `held` stay removed: an earlier choice of this kind, to which this one adds.
    """
    unit = solution.unit_of.numpy()
    if held is not None:
        removed = removed | held
    for some in portions(spans, PORTION):
        starts = np.cumsum([0, *(len(classes) for classes in some[:-1])])
        for i in np.flatnonzero(np.logical_and.reduceat(removed[np.concatenate(some)], starts)).tolist():
            if removed[some[i]].all():  # the best scored unit stays
                mine = some[i] if held is None else some[i][~held[some[i]]]
                removed[mine[np.argmax(score[mine])]] = False
    for _ in range(len(removed) + 1):
        even_rows(solution, removed, score)
        try:
            kept = torch.from_numpy(~removed[unit])
            slicer = Slicer(kept)
            tensor_cuts(solution, kept, slicer)
            activations_are_rectangles(solution, slicer)
            return kept, slicer
        except NotARectangle as error:
            classes = unit[error.labels.numpy()]
            removed[classes] = False if held is None else held[classes]
    raise AssertionError("restoring units always ends in a rectangle")


PORTION = 1 << 20  # classes looked at in one go


def portions(arrays: Sequence[np.ndarray], size: int) -> Iterator[Sequence[np.ndarray]]:
    """The arrays in their order, so many at a time that they have about so many elements."""
    ends = np.cumsum([len(a) for a in arrays])
    start = 0
    while start < len(arrays):
        reached = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, reached + size)))
        yield arrays[start:end]
        start = end


def even_rows(solution: Solution, removed: np.ndarray, score: np.ndarray) -> None:
    """Take back removals, those of the best scored units first, until the rows of each constraint keep equally many entries."""
    uneven = True
    while uneven:
        uneven = False
        for matrix in solution.equal_rows:
            counts = (~removed[matrix]).sum(1)
            if (counts == counts[0]).all():
                continue
            uneven = True
            for row in matrix[counts < counts.max()]:
                gone = row[removed[row]]
                if len(gone):  # else what another row took back was its, too
                    removed[gone[np.argmax(score[gone])]] = False


def never_emptied(solution: Solution) -> list[np.ndarray]:
    """The classes of every distinct array of labels: each must keep at least one entry."""
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


def activations_are_rectangles(solution: Solution, slicer: Slicer) -> None:
    """Raise NotARectangle where a value outside of a gathered region would not be one, or would be empty."""
    for capture, values, regions in zip(solution.captures, solution.values, solution.regions, strict=True):
        for node, result in capture.results.items():
            if node in regions and regions[node] is not node:
                continue
            for ref in collect(result, TensorRef):
                labels = values.get(ref.id, ())
                if any(len(f.major_to_minor) > 1 for f in labels) or len({f.major_to_minor for f in labels}) < len(labels):
                    slicer(labels, capture.op_trace.shape(ref))
