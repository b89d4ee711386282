"""Shrink: the new GraphModule, with cut tensors, changed attributes and the rewritten programs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxprune.passes.ir.slices import TensorSlice, cut_shape, picked

Room = dict[torch.dtype, Tensor]  # memory for what is wanted for a moment: fresh memory takes longer than copying into it
LARGE = 1 << 22  # elements of a tensor that is cut a block at a time
BLOCK = 1 << 20  # elements of such a block: what one cut leaves is still in the cache for the next
RUN = 4  # elements that lie together from which on
MANY = 1 << 17  # elements are cut along two dimensions at once


def cut(source: Tensor, cuts: Sequence[TensorSlice], room: Room) -> Tensor:
    """A new tensor with what the cuts leave of one; a parameter where that is one."""
    new = source.data
    if len(cuts) > 1 and cuts[0].dims == (0,) and new.is_cpu:
        if new.numel() > LARGE:
            new = in_blocks(new, cuts, room)
        elif has_runs(new, cuts):
            new = runs_of(new, cuts[0].keep, cuts[1].keep)
        else:
            new = rows_of(new, cuts[0].keep, room)
            for each in cuts[1:]:
                new = each.take(new)
            new = new.contiguous()
    else:
        for each in cuts:
            new = each.take(new)
        new = new.contiguous() if cuts else new.clone()
    return nn.Parameter(new, requires_grad=source.requires_grad) if isinstance(source, nn.Parameter) else new


def has_runs(source: Tensor, cuts: Sequence[TensorSlice]) -> bool:
    """Whether a large tensor is cut along its first two dimensions, and enough lies together along the others."""
    if source.numel() < MANY or len(cuts) != 2 or cuts[1].dims != (1,) or not source.is_contiguous():
        return False
    return source.numel() >= RUN * source.shape[0] * source.shape[1]


def runs_of(source: Tensor, rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """What lies at some rows and columns, read once and written once."""
    width, run = source.shape[1], source[0, 0].numel()
    at = (rows * width).unsqueeze(1).add(columns).view(-1)
    if out is None:
        out = source.new_empty(len(rows), len(columns), *source.shape[2:])
    torch.index_select(source.view(-1, run), 0, at, out=out.view(-1, run))
    return out


def rows_of(source: Tensor, rows: Tensor, room: Room) -> Tensor:
    """Some rows of a tensor, for a moment: the next call may write over them."""
    size = len(rows) * source[0].numel()
    if source.dtype not in room or room[source.dtype].numel() < size:
        room[source.dtype] = source.new_empty(max(size, BLOCK))
    return torch.index_select(source, 0, rows, out=room[source.dtype][:size].view(len(rows), *source.shape[1:]))


def in_blocks(source: Tensor, cuts: Sequence[TensorSlice], room: Room) -> Tensor:
    """What cuts leave, the first of them along the first dimension, without a second large tensor on the way."""
    made = source.new_empty(cut_shape(source.shape, cuts))
    step = max(1, BLOCK * len(source) // source.numel())
    *between, last = cuts[1:]
    runs = has_runs(source, cuts)
    for rows, place in zip(cuts[0].keep.split(step), made.split(step), strict=True):
        if runs:
            runs_of(source, rows, last.keep, place)
            continue
        part = rows_of(source, rows, room)
        for each in between:
            part = each.take(part)
        if len(last.dims) == 1:
            picked(part, last.dims[0], last.keep, place)
        else:
            place.copy_(last.take(part))
    return made
