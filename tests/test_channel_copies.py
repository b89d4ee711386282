"""Copies of a channel that a reduction sums over: they go with the parameters of the channel, all together or not at all.

No parameter stands behind a single copy. Were one removed, the original whose removed parameters are zero would still count it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune

MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_interleave": lambda y: y.repeat_interleave(2, -1),
    "flat_repeat_interleave": lambda y: y.repeat_interleave(2).view(*y.shape[:-1], -1),
    "expand_flatten": lambda y: y.unsqueeze(-1).expand(*y.shape, 2).flatten(-2),
    "expand_reshape": lambda y: y.unsqueeze(-1).expand(-1, -1, -1, 2).reshape(*y.shape[:-1], -1),
    "expand_before": lambda y: y.unsqueeze(-2).expand(-1, -1, 2, -1).flatten(-2),
    "repeated_index": lambda y: y[..., torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7])],
    "stack_flatten": lambda y: torch.stack([y, y], -1).flatten(-2),
    "cat": lambda y: torch.cat([y, y], -1),
    "repeat": lambda y: y.repeat(1, 1, 2),
    "tile": lambda y: torch.tile(y, (2,)),
    "zeros_written": lambda y: put(y.new_zeros(*y.shape[:-1], 16), y),
    "ones_times": lambda y: (y.unsqueeze(-1) * torch.ones(2)).flatten(-2),
    "einsum_outer": lambda y: torch.einsum("btc,k->btck", y, torch.tensor([1.0, 2.0])).flatten(-2),
    "one_channel": lambda y: y.sum(-1, keepdim=True).expand(-1, -1, 16),
    "one_channel_repeat": lambda y: y.sum(-1, keepdim=True).repeat(1, 1, 16),
    "padded": lambda y: F.pad(y, (0, 8), value=0.5),
    "kron": lambda y: torch.kron(y, torch.ones(1, 1, 2)),
}

# what zero channels add nothing to: the original with its removed parameters zeroed is a reference
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "gram": lambda y: (y @ y.mT) @ y,
    "bmm": lambda y: torch.bmm(torch.bmm(y, y.transpose(1, 2)), y),
    "einsum": lambda y: torch.einsum("btc,bsc,bsd->btd", y, y, y),
    "norm": lambda y: y * y.norm(dim=-1, keepdim=True),
    "normalize": lambda y: F.normalize(y, dim=-1),
    "cosine_similarity": lambda y: y * F.cosine_similarity(y, y.flip(1), dim=-1).unsqueeze(-1),
    "cdist": lambda y: torch.cdist(y, y.flip(1)) @ y,
    "sum": lambda y: y * y.square().sum(-1, keepdim=True),
    "attention": lambda y: F.scaled_dot_product_attention(y, y, y, scale=0.3),
    "channel_gram": lambda y: y @ (y.mT @ y),
    "cumsum": lambda y: y * y.cumsum(-1)[..., -1:],
}

STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda y: y.softmax(-1),
    "mean": lambda y: y - y.mean(-1, keepdim=True),
    "var": lambda y: y * y.var(-1, keepdim=True),
    "amax": lambda y: y * y.amax(-1, keepdim=True),
    "layer_norm": lambda y: F.layer_norm(y, y.shape[-1:]),
    "rms_norm": lambda y: F.rms_norm(y, y.shape[-1:]),
    "logsumexp": lambda y: y + y.logsumexp(-1, keepdim=True),
}


def put(out: Tensor, y: Tensor) -> Tensor:
    out[..., :8] = y
    out[..., 8:] = y
    return out


class Model(nn.Module):
    def __init__(self, make: Callable[[Tensor], Tensor], use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.use = make, use
        self.a, self.b = nn.Linear(6, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(self.make(self.a(x))))


def zeroed(model: nn.Module, pruned: nn.Module) -> nn.Module:
    """The model with everything that was removed from its parameters set to zero."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in fxprune.plan_of(pruned).masks(model).items():
            made.get_parameter(name).mul_(mask)
    return made


def pruned_model(make: Callable[[Tensor], Tensor], use: Callable[[Tensor], Tensor]) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Model(make, use).double().eval(), torch.randn(3, 5, 6, dtype=torch.float64)
    return model, fxprune.prune(model, 0.5, example_inputs=x, criterion="random"), x


@pytest.mark.parametrize("use", SUMS)
@pytest.mark.parametrize("make", MAKERS)
def test_the_original_with_zeroed_parameters_agrees(make: str, use: str) -> None:
    model, pruned, x = pruned_model(MAKERS[make], SUMS[use])
    assert pruned.verification.ok
    torch.testing.assert_close(pruned(x), zeroed(model, pruned)(x))


@pytest.mark.parametrize("use", sorted({*SUMS, *STATISTICS} - {"nothing"}))  # which does not count them
@pytest.mark.parametrize("make", MAKERS)
def test_all_copies_of_a_channel_go_or_none(make: str, use: str) -> None:
    """What a channel is copied to is seen by setting it alone to one; the layer behind tells which copies are left."""
    model, pruned, _ = pruned_model(MAKERS[make], (SUMS | STATISTICS)[use])
    assert pruned.verification.ok
    ones = torch.eye(8, dtype=torch.float64).unsqueeze(1)
    copies = (MAKERS[make](ones) - MAKERS[make](torch.zeros_like(ones))).squeeze(1) != 0
    left = fxprune.plan_of(pruned).masks(model)["b.weight"][0]
    for channel in copies:
        assert left[channel].all() or not left[channel].any()


class Streams(nn.Module):
    """Copies of a stream, mixed by weights that a parameter and the copies themselves add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.fixed, self.moving = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        streams = self.a(x).unsqueeze(-2).expand(-1, -1, 4, -1)
        mix = torch.tanh(streams @ self.moving) + self.fixed
        return self.b(torch.einsum("btsm,btsd->btmd", mix, streams).sum(-2))


def test_a_parameter_that_is_added_to_copies_stands_behind_none() -> None:
    torch.manual_seed(0)
    model, x = Streams().double().eval(), torch.randn(3, 5, 6, dtype=torch.float64)
    pruned = fxprune.prune(model, 0.5, example_inputs=x, criterion="random")
    assert pruned.get_parameter("fixed").shape[0] == 4
    assert pruned.get_parameter("moving").shape[0] < 8
    torch.testing.assert_close(pruned(x), zeroed(model, pruned)(x))


class ChannelAttention(nn.Module):
    """Products of channels with one another, subtracted from copies of the largest (DANet)."""

    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.weigh = nn.Linear(6, 8), nn.Linear(8, 3), weigh

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).mT
        energy = y @ y.mT
        energy = energy.max(-1, keepdim=True)[0].expand_as(energy) - energy
        return self.b((self.weigh(energy) @ y).mT)


@pytest.mark.parametrize(("weigh", "left"), [(lambda e: e.softmax(-1), 4), (lambda e: e / e.sum(-1, keepdim=True), 8)])
def test_only_where_shares_are_made_something_may_be_added_to_copies(weigh: Callable[[Tensor], Tensor], left: int) -> None:
    torch.manual_seed(0)
    model, x = ChannelAttention(weigh).double().eval(), torch.randn(3, 5, 6, dtype=torch.double)
    if left == 8:
        with pytest.raises(fxprune.PruneError, match="is a copy or a constant in a sum over channels"):
            fxprune.prune(model, 0.5, x)
        return
    pruned = fxprune.prune(model, 0.5, x)
    kept = fxprune.plan_of(pruned).masks(model)["a.bias"]
    assert kept.sum() == left
    y = model.a(x)[..., kept].mT
    energy = y @ y.mT
    energy = energy.amax(-1, keepdim=True) - energy
    torch.testing.assert_close(pruned(x), F.linear((weigh(energy) @ y).mT, model.b.weight[:, kept], model.b.bias))


class Pairs(nn.Module):
    """Magnitudes of pairs of channels, which stay, and the sum of two copies of each, of which a reader may lose some."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.make = nn.Linear(7, 6, bias=False), nn.Linear(3, 2), make

    def forward(self, x: Tensor) -> Tensor:
        copies = self.make(self.body(x).unflatten(1, (3, 2)).square().sum(2))
        return self.head(copies[:, ::2] + copies[:, 1::2])


PAIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "interleaved": lambda v: v.repeat_interleave(2, dim=1),
    "with its size": lambda v: torch.repeat_interleave(v, 2, -1, output_size=6),
    "by counts": lambda v: v.repeat_interleave(torch.tensor([2, 2, 2]), dim=1),
    "expanded": lambda v: v.unsqueeze(2).expand(-1, -1, 2).reshape(len(v), 6),
    "flat": lambda v: v.repeat_interleave(2).view(len(v), 6),
}


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_not_of_each_entry_equally_many(make):
    """Both copies of an entry go, which stays itself."""
    torch.manual_seed(0)
    model, x = Pairs(make).double().eval(), torch.randn(4, 7, dtype=torch.double)
    pruned = fxprune.prune(model, 0.5, x)
    assert pruned.verification.ok and pruned.body.out_features in (3, 4) and pruned.head.in_features == 2


@pytest.mark.parametrize(("ratio", "round_to", "left"), [(0.2, 1, 8), (0.5, 4, 7)])
def test_what_a_selection_leaves_out_need_not_be_a_rectangle(ratio, round_to, left):
    """Three groups of three, of which one is used, whole: the others lose what they lose, and are gathered past."""

    class Selected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(7, 9), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            group = self.body(x).unflatten(1, (3, 3)).select(1, 2)
            return self.head(group.unsqueeze(2).expand(-1, -1, 3).flatten(1, 2))

    torch.manual_seed(0)
    model = Selected().eval()
    pruned = fxprune.prune(model, ratio, torch.randn(4, 7), round_to=round_to)
    assert pruned.verification.ok and pruned.body.out_features == left


class GroupOfEach(nn.Module):
    """Each group of a convolution sees a copy of all channels and makes some of its own."""

    halved = ("a",)

    def __init__(self, outputs: int, convolve: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.convolve = nn.Conv1d(3, 8, 3), nn.Conv1d(3 * outputs, 2, 1), convolve
        shape = (24, outputs, 3) if convolve is F.conv_transpose1d else (3 * outputs, 8, 3)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.convolve(self.a(x).relu().repeat(1, 3, 1), self.weight, groups=3).relu())


class Tracker(nn.Module):
    """A sample searches for its own template: samples are groups (SiamFC, arXiv:1606.09549)."""

    halved = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 16, 3), nn.Conv1d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        template, x = (self.b(self.a(part).relu()) for part in (x[..., :9], x))
        found = F.conv1d(x.reshape(1, -1, x.shape[-1]), template, groups=len(x))
        return found.reshape(len(x), -1, found.shape[-1])


@pytest.mark.parametrize(
    "make",
    [
        *(lambda o=o, c=c: GroupOfEach(o, c) for o in (1, 2) for c in (F.conv1d, F.conv_transpose1d)),
        Tracker,
    ],
)
def test_groups_of_a_convolution_that_see_the_same_channels(make) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(3, 3, 12, dtype=torch.float64)
    pruned = fxprune.prune(model, 0.5, x)
    for name in model.halved:
        assert len(pruned.get_submodule(name).weight) == len(model.get_submodule(name).weight) // 2
    for batch in (x, x[:2], x[:1]):
        torch.testing.assert_close(pruned(batch), zeroed(model, pruned)(batch))
