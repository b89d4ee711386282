"""Parts written into a tensor at constant places, pooling along channels, and products of sizes by NumPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune

PLACES = torch.tensor([1, 3, 5, 7])


class Between(nn.Module):
    """A wide and a narrow layer over the last dimension, what is made of both, and a layer over that."""

    def __init__(self, between) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.wide, self.narrow = nn.Linear(5, 12), nn.Linear(5, 4)
        self.last = nn.Linear(between(torch.zeros(2, 4, 12), torch.zeros(2, 4, 4)).shape[-1], 3)

    def forward(self, x):
        return self.last(self.between(self.wide(x), self.narrow(x)))


def check(between, ratio=0.5):
    """The pruned model, which is exact at another batch and length too; also by the original with zeros."""
    model, x = Between(between).double().eval(), torch.randn(2, 4, 5).double()
    pruned = fxprune.prune(model, ratio, example_inputs=x)
    masks = fxprune.plan_of(pruned).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
        for y in (x, torch.randn(3, 6, 5).double()):
            assert torch.allclose(pruned(y), model(y), atol=1e-10)
    assert pruned.meta["capture"] == "symbolic"
    return pruned


def in_place(wide, narrow):
    wide = wide.clone()
    wide.index_copy_(2, PLACES, narrow)
    wide.scatter_add_(2, PLACES.expand_as(narrow), narrow)
    return wide


def rows(narrow):
    return PLACES.expand(narrow.shape[0], narrow.shape[1], 4)


WRITES = {
    "index_copy": lambda wide, narrow: wide.index_copy(2, PLACES, narrow),
    "index_copy of zeros": lambda wide, narrow: wide + wide.new_zeros(wide.shape).index_copy(-1, PLACES, narrow),
    "index_add": lambda wide, narrow: wide.index_add(2, PLACES, narrow, alpha=2.0),
    "index_add twice to one": lambda wide, narrow: wide.index_add(2, torch.tensor([1, 1, 5, 7]), narrow),
    "in place": in_place,
    "scatter": lambda wide, narrow: wide.scatter(2, rows(narrow), narrow),
    "scatter_add": lambda wide, narrow: wide.scatter_add(-1, rows(narrow), narrow),
    "slice_scatter": lambda wide, narrow: wide.slice_scatter(narrow, 2, 4, 8),
    "slice_scatter by steps": lambda wide, narrow: wide.slice_scatter(narrow, 2, 0, None, 3),
    "select_scatter": lambda wide, narrow: wide.select_scatter(narrow[..., 0], 2, 3),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_parts_written_along_channels(write):
    pruned = check(write)
    assert pruned.wide.out_features < 8 and pruned.narrow.out_features < 4


def most(wide):
    """Positions of tokens, computed from the input."""
    return wide.detach().sum((0, 2)).argsort()


def into_copy(wide, *index, of=None):
    wide = wide.clone()
    wide[index] = wide.flip(1) * 2 if of is None else of
    return wide


TOKENS = {
    "index of tokens": lambda wide, narrow: into_copy(wide, slice(None), most(wide)),
    "index of tokens, dots": lambda wide, narrow: into_copy(wide, ..., most(wide), slice(None)),
    "index of tokens, one for all": lambda wide, narrow: into_copy(wide, slice(None), most(wide)[:2], of=wide[:, :1]),
    "index of tokens, a column": lambda wide, narrow: into_copy(wide, slice(None), most(wide)[:, None], of=wide.unsqueeze(2)),
    "index of flags": lambda wide, narrow: into_copy(wide, slice(None), most(wide) < 2, of=wide[:, 1:3]),
    "index_copy": lambda wide, narrow: wide.index_copy(1, torch.tensor([0, 2]), wide[:, 1:3] * 2),
    "scatter": lambda wide, narrow: wide.scatter(1, torch.tensor([0, 2]).view(1, 2, 1).expand_as(wide[:, :2]), wide[:, 1:3]),
    "slice_scatter": lambda wide, narrow: wide.slice_scatter(wide[:, :2] * 2, 1, 1, 3),
    "select_scatter": lambda wide, narrow: wide.select_scatter(wide[:, 0] * 2, 1, 2),
}


@pytest.mark.parametrize("write", TOKENS.values(), ids=TOKENS.keys())
def test_parts_written_along_other_dimensions(write):
    assert check(write).wide.out_features == 6


def test_an_index_of_a_size_of_its_own_stays():
    """On larger inputs it writes to some samples and tokens alone."""
    assert (
        check(lambda wide, narrow: wide.scatter(1, torch.zeros(2, 1, 12, dtype=torch.int64), wide[:, 1:])).wide.out_features
        == 6
    )
    with pytest.raises(fxprune.PruneError, match="is indexed by a tensor computed from the inputs"):
        check(lambda wide, narrow: wide.scatter(2, PLACES.expand(2, 4, 4), narrow))


POOLS = {
    "max": (lambda wide, narrow: F.max_pool1d(wide, 2), 6),
    "mean": (lambda wide, narrow: F.avg_pool1d(wide, 4), 8),
    "of heads": (lambda wide, narrow: F.max_pool2d(wide.unflatten(2, (3, 4)), (1, 2)).flatten(2), 6),
    "without positions": (lambda wide, narrow: F.max_pool1d(wide, 3, return_indices=True)[0], 6),
}


@pytest.mark.parametrize(("pool", "left"), POOLS.values(), ids=POOLS.keys())
def test_windows_of_channels_go_whole(pool, left):
    assert check(pool).wide.out_features == left


KEPT = {
    "overlapping": lambda wide, narrow: F.max_pool1d(wide, 3, stride=1),
    "padded": lambda wide, narrow: F.avg_pool1d(wide, 2, padding=1),
    "a rest": lambda wide, narrow: F.max_pool1d(wide, 5),
    "positions": lambda wide, narrow: sum(F.max_pool1d(wide, 2, return_indices=True)),
}


@pytest.mark.parametrize("pool", KEPT.values(), ids=KEPT.keys())
def test_other_windows_of_channels_stay(pool):
    assert check(pool).wide.out_features == 12


def test_products_of_sizes_by_numpy_fix_nothing():
    check(lambda wide, narrow: wide.reshape(int(np.prod(wide.shape[:2])), 12).view(*wide.shape[:2], 12))
    check(lambda wide, narrow: wide.reshape(np.prod([wide.shape[0], wide.shape[1]]), 12).view_as(wide))


def test_sizes_that_numpy_rounds_fix_nothing():
    check(lambda wide, narrow: torch.cat(wide.chunk(int(np.ceil(wide.shape[1] / 8)), 1), 1))
    check(lambda wide, narrow: wide[:, : int(np.floor(wide.shape[1] / 3))] + np.ceil(wide.shape[0] / 3))


# -- what is written to a tensor that the forward makes ----------------------------------------------------------------


def seen_afterwards(x, places):
    canvas = torch.zeros(12, 8)
    canvas[:, places] = x
    return canvas[None]


def seen_before(x, places):
    canvas = torch.zeros(1, 12, 8)
    canvas[0][:, places] = x
    return canvas


def seen_before_and_afterwards(x, places):
    canvas = torch.zeros(8, 12)
    rows = canvas.t()
    rows[:, places] = x
    canvas.mul_(2)
    return torch.stack([rows + 1, canvas.t()])


class Scatters(nn.Module):
    def __init__(self, write) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write, self.first, self.last = write, nn.Linear(5, 12), nn.Conv1d(12, 3, 1)

    def forward(self, x, places):
        return self.last(self.write(self.first(x).t(), places))


@pytest.mark.parametrize("write", [seen_afterwards, seen_before, seen_before_and_afterwards])
def test_views_of_a_tensor_of_numbers_see_what_is_written_to_it(write):
    model, inputs = Scatters(write).eval(), (torch.randn(4, 5), PLACES)
    pruned = fxprune.prune(model, 0.5, example_inputs=inputs)
    assert pruned.first.weight.shape == (6, 5) and pruned.meta["capture"] == "symbolic"
    masks = fxprune.plan_of(pruned).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks[name])
    for given in (inputs, (torch.randn(2, 5), torch.tensor([6, 0]))):
        for _ in range(2):  # what a call writes is not there in the next one
            torch.testing.assert_close(pruned(*given), model(*given))
