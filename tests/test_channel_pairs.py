"""Pairs of channels that are reduced to one: a pair goes whole, with the column of the layer behind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune

REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "maxout": lambda y: y.view(y.shape[0], -1, 2, *y.shape[2:]).amax(2),
    "maxout_unflatten": lambda y: y.unflatten(1, (-1, 2)).max(dim=2).values,
    "magnitude": lambda y: y.view(y.shape[0], -1, 2, *y.shape[2:]).norm(dim=2),
    "magnitude_by_hand": lambda y: y.unflatten(1, (-1, 2)).square().sum(2).sqrt(),
    "mean": lambda y: y.unflatten(1, (-1, 2)).mean(2),
    "logsumexp": lambda y: y.unflatten(1, (-1, 2)).logsumexp(2),
    "windows": lambda y: y.unfold(1, 2, 2).sum(-1),
    "slices": lambda y: torch.maximum(y[:, 0::2], y[:, 1::2]),
}


class Paired(nn.Module):
    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce = reduce
        self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.reduce(self.a(x)))


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", REDUCED)
def test_pairs_go_whole(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    model, x = Paired(REDUCED[name]).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    pruned = fxprune.prune(model, ratio, example_inputs=x, criterion="random")
    assert pruned.verification.ok
    masks = fxprune.plan_of(pruned).masks(model)
    pairs = masks["a.bias"].view(16, 2)
    assert bool((pairs[:, 0] == pairs[:, 1]).all())
    assert torch.equal(masks["b.weight"][0, :, 0, 0], pairs[:, 0])
    assert int((~pairs[:, 0]).sum()) == int(ratio * 16)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in masks:
            zeroed.get_parameter(parameter).mul_(masks[parameter])
    torch.testing.assert_close(pruned(x), zeroed(x))


class Gated(nn.Module):
    """Groups are wider than many: every group loses equally many channels instead, in steps that are finer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).unflatten(1, (4, 8)).sum(2))


def test_rows_are_shortened_where_that_is_finer() -> None:
    torch.manual_seed(0)
    model, x = Gated().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    pruned = fxprune.prune(model, 0.25, example_inputs=x)
    assert dict(pruned.named_parameters())["a.weight"].shape[0] == 24
    assert dict(pruned.named_parameters())["b.weight"].shape[1] == 4
