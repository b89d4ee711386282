"""Shapes of every value of a captured program, before and after pruning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ir.slices import Slicer, TensorSlice, cut_shape


class PrunedShapes:
    """What pruning leaves of each value on an op trace.

    Arguments:
        op_trace: the trace, whose values have their original shapes.
        labels: the labels of each value, by its number.
        slicer: the slices that remove the chosen labels.
    """

    def __init__(self, op_trace: OpTrace, labels: Mapping[int, Labels], slicer: Slicer) -> None:
        self.op_trace, self.labels, self.slicer = op_trace, labels, slicer
        self.slices: dict[int, list[TensorSlice]] = {}

    def cuts(self, ref: TensorRef) -> list[TensorSlice]:
        """The slices that pruning takes of a value; empty where all of it stays."""
        found = self.slices.get(ref.id)
        if found is None:
            found = self.slices[ref.id] = self.slicer(self.labels.get(ref.id, ()), self.op_trace.shape(ref))
        return found

    def before(self, ref: TensorRef) -> tuple[int, ...]:
        return self.op_trace.shape(ref)

    def after(self, ref: TensorRef) -> tuple[int, ...]:
        return cut_shape(self.before(ref), self.cuts(ref))

    def positions(self, ref: TensorRef, dim: int) -> Tensor:
        """The kept indices along a dimension; along the minor dimension of a joint factor, those of the first row that stays.

        Other rows may keep other indices, but equally many of them, and as many before any place at which they are split.
        """
        shape = self.before(ref)
        for cut in self.cuts(ref):
            if dim in cut.dims:
                mask = cut.kept(shape)
                at = cut.dims.index(dim)
                rows = mask.flatten(at + 1).any(-1) if at + 1 < mask.dim() else mask
                rows = rows.reshape(-1, shape[dim])
                return rows[int(rows.any(-1).int().argmax())].nonzero().flatten()
        return torch.arange(shape[dim])
