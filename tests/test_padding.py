"""Padding that takes entries away as well, and other windows that move: by channels, heads and positions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune

HEADS = (2, 6)


class Between(nn.Module):
    """Two linear layers over the last dimension, and what is done in between."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.first = nn.Linear(5, 12)
        self.last = nn.Linear(between(torch.zeros(2, 4, 12)).shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def check(between: Callable[[Tensor], Tensor], ratio: float = 0.5) -> nn.Module:
    model, x = Between(between).double().eval(), torch.randn(2, 4, 5, dtype=torch.float64)
    pruned = fxprune.prune(model, ratio, example_inputs=x, verify=False)
    assert pruned(x).shape == model(x).shape
    assert fxprune.verify(model, pruned, x).error < 1e-10
    return pruned


def in_heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, HEADS)


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("amounts", [(2, -2), (-2, 2), (-1, -1), (3, -5), (-5, 1), (12, -12), (-12, 2), (-3, 0)])
def test_pads_of_either_sign(amounts: tuple[int, int], value: float) -> None:
    check(lambda y: F.pad(y, amounts, value=value))
    check(lambda y: F.pad(y, (*amounts, 1, -1), value=value))


@pytest.mark.parametrize("amounts", [(1, -1, 2, -2), (2, -2, 0, 0), (-1, -1, 0, -1), (-6, 6, -1, 1)])
def test_pads_of_heads_and_their_channels(amounts: tuple[int, ...]) -> None:
    """A head all of which is taken away in padding was the labels of none."""
    check(lambda y: F.pad(in_heads(y), amounts, value=0.5).flatten(2), 0.75)


def test_all_that_is_left_of_channels_are_new_ones() -> None:
    """Their rows were forgotten: the fuzzer's seed 9004673."""

    def padded(y: Tensor) -> Tensor:
        return F.pad(y.unflatten(-1, (2, 6)).transpose(2, 3), (2, -2), value=0.5).sum(3)

    with pytest.raises(fxprune.PruneError, match="has all its entries taken away in padding"):
        check(padded)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("amounts", [(2, -1), (-2, 3), (-1, -1)])
def test_pads_with_copies_take_entries_away(mode: str, amounts: tuple[int, int]) -> None:
    check(lambda y: F.pad(y.transpose(1, 2), amounts, mode=mode).transpose(1, 2))
    assert check(lambda y: y + F.pad(y, (0, 0, 1, -1))).first.out_features == 6


@pytest.mark.parametrize(("shifts", "dims"), [((1, 2), (-1, -1)), ((5, -3), (2, 2)), ((1, 1, 1), (2, 1, 2)), (-7, 2)])
def test_rolls_of_one_dimension_twice(shifts: object, dims: object) -> None:
    assert check(lambda y: y.roll(shifts, dims)).first.out_features == 6
