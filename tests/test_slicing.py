"""Slices: the sizes of what a mask keeps, and what is left of a tensor, in one piece and block by block."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fxprune.passes.ir.slices import TensorSlice, fast_index_select, rectangle
from fxprune.passes.rewrite import rewrite
from fxprune.passes.rewrite.rewrite import slice_tensor


def half(size: int, dim: int, seed: int) -> TensorSlice:
    keep = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: size // 2].sort().values
    return TensorSlice((dim,), keep, (len(keep),))


SHAPES = [(12, 10), (12, 10, 3, 3), (6, 5, 2), (12, 10, 1, 1), (7, 6, 2, 2), (128, 12, 9, 11), (400, 500)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("large", [1 << 22, 1 << 6])
def test_two_dimensions_of_a_tensor(shape, dtype, large, monkeypatch):
    monkeypatch.setattr(rewrite, "LARGE", large)
    monkeypatch.setattr(rewrite, "BLOCK", 1 << 5)
    source = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    rows, columns = half(shape[0], 0, 0), half(shape[1], 1, 1)
    found = slice_tensor(source, [rows, columns])
    assert torch.equal(found, source[rows.keep][:, columns.keep]) and found.is_contiguous()


@pytest.mark.parametrize("large", [1 << 22, 1])
def test_a_tensor_that_is_not_contiguous(large, monkeypatch):
    monkeypatch.setattr(rewrite, "LARGE", large)
    source = nn.Parameter(torch.randn(3, 3, 8, 6).permute(2, 3, 0, 1))
    rows, columns = half(8, 0, 2), half(6, 1, 3)
    found = slice_tensor(source, [rows, columns])
    assert isinstance(found, nn.Parameter) and torch.equal(found, source[rows.keep][:, columns.keep])


@pytest.mark.parametrize("large", [1 << 22, 1])
def test_three_dimensions_of_which_two_are_nested(large, monkeypatch):
    """Rows, and pairs of indices of the other two of which every row keeps equally many."""
    monkeypatch.setattr(rewrite, "LARGE", large)
    source = torch.randn(8, 3, 4)
    rows, nested = half(8, 0, 4), TensorSlice((1, 2), torch.tensor([0, 2, 9, 11]), (2, 2))
    wanted = source[rows.keep].flatten(1)[:, nested.keep].reshape(4, 2, 2)
    assert torch.equal(slice_tensor(source, [rows, nested]), wanted)


def test_what_stays_whole_is_a_copy():
    source = torch.randn(3, 4)
    found = slice_tensor(source, [])
    assert torch.equal(found, source) and found.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape, dim", [((400, 500), 1), ((400, 500), 0), ((500,), 0), ((30, 20, 300), 2), ((30, 20, 300), 1)])
def test_picking_along_a_dimension(shape, dim, dtype, monkeypatch):
    """By whichever of torch's functions."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    source = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    keep = half(shape[dim], dim, 6).keep
    wanted = source.numpy(force=True)[(slice(None),) * dim + (keep.numpy(),)] if dtype != torch.bfloat16 else None
    wanted = torch.from_numpy(wanted) if wanted is not None else source[(slice(None),) * dim + (keep,)]
    assert torch.equal(fast_index_select(source, dim, keep), wanted)


def sizes_by_definition(mask):
    """Level by level: how many indices have anything left, for each row that has."""
    sizes = []
    for level in range(mask.ndim):
        alive = mask.reshape(*mask.shape[: level + 1], -1).any(-1)
        counts = {int(c) for c in alive.sum(-1).reshape(-1) if c}
        if len(counts) != 1:
            return None
        sizes += counts
    return tuple(sizes)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2), (2, 2, 2), (1, 4)])
def test_sizes_of_every_mask(shape):
    for bits in itertools.product([False, True], repeat=int(np.prod(shape))):
        mask = np.array(bits).reshape(shape)
        assert rectangle(mask) == sizes_by_definition(mask)
