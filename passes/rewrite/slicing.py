"""Slice tensors: what pruning leaves of a parameter or buffer, as a new tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fxprune.passes.ir.slices import TensorSlice, apply_slices, cut_shape

LARGE = 1 << 22  # elements of a tensor from which on it is sliced a block of rows at a time
BLOCK = 1 << 20  # elements of such a block, so that the next slice finds it in the cache


def slice_tensor(source: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
    """A new contiguous tensor with what slices leave of one; a parameter where that is one."""
    data = source.data
    if not slices:
        new = data.clone()
    elif len(slices) > 1 and slices[0].dims == (0,) and data.is_cpu and data.numel() > LARGE:
        new = slice_in_blocks(data, slices)
    else:
        new = apply_slices(slices, data).contiguous()
    return nn.Parameter(new, requires_grad=source.requires_grad) if isinstance(source, nn.Parameter) else new


def slice_in_blocks(source: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
    """The same where the first slice is along the first dimension, without a second large tensor on the way."""
    made = source.new_empty(cut_shape(source.shape, slices))
    rows_per_block = max(1, BLOCK * len(source) // source.numel())
    for rows, place in zip(slices[0].keep.split(rows_per_block), made.split(rows_per_block), strict=True):
        place.copy_(apply_slices(slices[1:], source.index_select(0, rows)))
    return made
