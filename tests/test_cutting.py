"""Cutting tensors: whichever way is taken, what is left is what indexing leaves."""

import pytest
import torch
from torch import nn

from fxprune.passes.ir.slices import TensorSlice, picked
from fxprune.passes.rewrite import slicing
from fxprune.passes.rewrite.slicing import cut


def half(size: int, dim: int, seed: int) -> TensorSlice:
    keep = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: size // 2].sort().values
    return TensorSlice((dim,), keep, (len(keep),))


SHAPES = [(12, 10), (12, 10, 3, 3), (6, 5, 2), (12, 10, 1, 1), (7, 6, 2, 2), (128, 12, 9, 11), (400, 500)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("large, many", [(1 << 22, 1 << 17), (1 << 22, 0), (1 << 6, 0), (1 << 6, 1 << 30)])
def test_a_tensor_cut_along_two_dimensions(shape, dtype, large, many, monkeypatch):
    """In one piece and block by block, in runs of elements and one dimension after the other."""
    monkeypatch.setattr(slicing, "LARGE", large)
    monkeypatch.setattr(slicing, "BLOCK", 1 << 5)
    monkeypatch.setattr(slicing, "MANY", many)
    source = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    rows, columns = half(shape[0], 0, 0), half(shape[1], 1, 1)
    room: slicing.Room = {}
    found = cut(source, [rows, columns], room)
    assert torch.equal(found, source[rows.keep][:, columns.keep]) and found.is_contiguous()
    again = cut(source + 1, [rows, columns], room)  # the room is used again
    assert torch.equal(again, found + 1)


@pytest.mark.parametrize("many", [0, 1 << 30])
def test_a_tensor_that_is_not_contiguous_is_cut_too(many, monkeypatch):
    monkeypatch.setattr(slicing, "MANY", many)
    source = nn.Parameter(torch.randn(3, 3, 8, 6).permute(2, 3, 0, 1))
    rows, columns = half(8, 0, 2), half(6, 1, 3)
    found = cut(source, [rows, columns], {})
    assert isinstance(found, nn.Parameter) and torch.equal(found, source[rows.keep][:, columns.keep])


def test_another_dimension_is_cut_one_after_the_other(monkeypatch):
    monkeypatch.setattr(slicing, "MANY", 0)
    source = torch.randn(8, 6, 10)
    cuts = [half(8, 0, 4), half(10, 2, 5)]
    assert torch.equal(cut(source, cuts, {}), source[cuts[0].keep][:, :, cuts[1].keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape, dim", [((400, 500), 1), ((400, 500), 0), ((500,), 0), ((30, 20, 300), 2), ((30, 20, 300), 1)])
def test_picking_along_a_dimension(shape, dim, dtype, monkeypatch):
    """By whichever of torch's functions, with and without memory to write to."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    source = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    keep = half(shape[dim], dim, 6).keep
    wanted = source.numpy(force=True)[(slice(None),) * dim + (keep.numpy(),)] if dtype != torch.bfloat16 else None
    wanted = torch.from_numpy(wanted) if wanted is not None else source[(slice(None),) * dim + (keep,)]
    assert torch.equal(picked(source, dim, keep), wanted)
    out = torch.empty_like(wanted)
    picked(source, dim, keep, out)
    assert torch.equal(out, wanted)
