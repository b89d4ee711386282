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


# What computes both channels of a pair anew, from the two of them.
TOGETHER: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda y: y.softmax(2),
    "log_softmax": lambda y: y.log_softmax(2),
    "cumsum": lambda y: y.cumsum(2),
    "times_magnitude": lambda y: y * y.norm(dim=2, keepdim=True),
    "over_sum": lambda y: y / (1 + y.abs().sum(2, keepdim=True)),
    "squash": lambda y: y * (n := y.square().sum(2, keepdim=True)).sqrt() / (1 + n),
    "gate": lambda y: y * (y.norm(dim=2, keepdim=True) > 0.5),
}


class InPairs(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.compute(self.a(x).unflatten(1, (-1, 2))).flatten(1, 2))


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", TOGETHER)
def test_pairs_that_stay_pairs_go_whole(name: str, ratio: float) -> None:
    """Of each pair both channels go or none does, so what stays is computed of both, as in the original."""
    torch.manual_seed(0)
    model, x = InPairs(TOGETHER[name]).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    small = fxprune.prune(model, ratio, example_inputs=x)
    kept = fxprune.plan_of(small).masks(model)["a.weight"].flatten(1).any(1)
    assert int((~kept).sum()) == 2 * int(ratio * 16)
    assert torch.equal(kept[0::2], kept[1::2])
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        zeroed.b.weight[:, ~kept] = 0
        torch.testing.assert_close(small(x), zeroed(x), rtol=0, atol=1e-12)


def test_a_variance_over_heads_and_their_channels_keeps_two() -> None:
    """Heads and the channels in them go one by one along one dimension: one of either is one entry, which has no variance."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(9, 2, 2)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum("bnc,chd->bnhd", x, self.a).flatten(-2)
            return self.b(y * y.std(2, keepdim=True).tanh())

    torch.manual_seed(0)
    small = fxprune.prune(Heads().double().eval(), 0.5, torch.randn(3, 4, 9, dtype=torch.float64))
    assert small.verification.ok and small.get_parameter("a").shape[1:].numel() == 2


class Overwritten(nn.Module):
    """A number stands in place of two channels of different pairs; with `kept` no pair may go: one is read by its index."""

    def __init__(self, number: float, *, kept: bool) -> None:
        super().__init__()
        self.number, self.kept = number, kept
        self.a, self.b = nn.Conv2d(3, 12, 1, bias=False), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 1:3] = self.number
        y = (y.unflatten(1, (-1, 2)).square().sum(2) + 1e-3).sqrt()
        return self.b(y * (1 + y[:, 2:3]) if self.kept else y)


@pytest.mark.parametrize("number", [0.0, 0.5])
@pytest.mark.parametrize("kept", [False, True])
def test_a_number_that_is_written_over_channels_goes_with_its_pair_alone(number: float, kept: bool) -> None:
    """Zero may go by itself: it adds nothing. Of another number the pair would lose a part that no parameter stands for."""
    torch.manual_seed(0)
    model, x = Overwritten(number, kept=kept).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    if kept and number:
        with pytest.raises(fxprune.PruneError, match="nothing in the model can be pruned"):
            fxprune.prune(model, 0.5, x)
        return
    pruned = fxprune.prune(model, 0.5, x)
    pairs = pruned.b.in_channels
    assert (pairs, pruned.a.out_channels) == (6, 6) if kept else pairs < 6 and pruned.a.out_channels == 2 * pairs
    zeroed = copy.deepcopy(model)
    slices = fxprune.plan_of(pruned).slices
    with torch.no_grad():
        for weight, dim in ((zeroed.a.weight, 0), (zeroed.b.weight, 1)):
            for cut in slices.get("a.weight" if dim == 0 else "b.weight", ()):
                gone = [i for i in range(weight.shape[dim]) if i not in cut.keep.tolist()]
                weight.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0.0)
    torch.testing.assert_close(pruned(x), zeroed(x))
