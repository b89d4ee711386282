"""Slices: the sizes of what a mask keeps, and what is left of a tensor, in one piece and block by block."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
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
    found = slice_tensor(source, [columns])
    assert torch.equal(found, source[:, columns.keep]) and found.is_contiguous()


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


FORMATS = [  # a shape, and the order of its dimensions in memory
    ((12, 10, 3, 3), (0, 2, 3, 1)),  # channels_last
    ((12, 10, 1, 1), (0, 2, 3, 1)),
    ((12, 1, 3, 3), (0, 2, 3, 1)),
    ((12, 10, 3, 3), (0, 1, 2, 3)),
    ((8, 6, 2, 3, 2), (0, 2, 3, 4, 1)),  # channels_last_3d
    ((8, 6, 4), (2, 0, 1)),
    ((12, 10), (1, 0)),
]


@pytest.mark.parametrize("large", [1 << 22, 1])
@pytest.mark.parametrize(("shape", "order"), FORMATS)
def test_the_order_of_dimensions_in_memory_stays(shape, order, large, monkeypatch):
    monkeypatch.setattr(rewrite, "LARGE", large)
    source = torch.empty_permuted(shape, order).normal_()
    cuts = [half(n, d, d) for d, n in enumerate(shape[:2]) if n > 1]
    found, wanted = slice_tensor(source, cuts), source
    for cut in cuts:
        wanted = wanted.index_select(cut.dims[0], cut.keep)
    assert torch.equal(found, wanted) and found.stride() == torch.empty_permuted(wanted.shape, order).stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_model_stays_in_its_memory_format(memory_format):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 4, 3)
    model = nn.Sequential(*layers).to(memory_format=memory_format)
    x = torch.randn(2, 3, 12, 12).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=x)
    small = pruner.step()
    pruner.remap_optimizer(optimizer)
    assert small(x).stride() == model(x).stride()
    for p in small.parameters():
        fresh = torch.empty_like(p, memory_format=torch.contiguous_format)
        wanted = fresh.to(memory_format=memory_format).stride() if p.dim() == 4 else (1,)
        assert p.stride() == wanted and optimizer.state[p]["momentum_buffer"].stride() == wanted


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
