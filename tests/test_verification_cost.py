"""What a verification by default does not run and does not copy, and that it finds what it found before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.registry import conv, linear, net, randomise
from test_verification_fails import as_prune_verifies, check_caught, chosen, pruned_correctly, runs_of_a_prune
from torch import Tensor, nn

import fxprune
from fxprune.passes.verification.outlook import Outlook, outlook
from fxprune.passes.verification.zeroed_model import ZeroedOriginal


def outlook_of(model: nn.Module, x: Any) -> tuple[Outlook, ZeroedOriginal]:
    """What a capture says of the model halved, and the original with the zeros that it needs."""
    pruned = pruned_correctly(model, x)
    compilation, choice = chosen(model, pruned, x)
    expected = outlook(choice.solution, choice.kept.numpy(), compilation.tensors)
    return expected, ZeroedOriginal(model, choice.slices, needed=expected.zeros)


def normed() -> tuple[nn.Module, Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        return self.head(self.b(x).relu().mean((2, 3)))

    model = net(forward, a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 6), head=linear(6, 4)).double().eval()
    randomise(model)
    return model, torch.randn(1, 3, 12, 12, dtype=torch.double)


def test_weights_are_zeroed_where_it_counts() -> None:
    """Before a batch norm nowhere, else where they make channels: what reads a channel that is zero may stay."""
    model, x = normed()
    expected, zeroed = outlook_of(model, x)
    assert {name: set(dims) for name, dims in expected.zeros.items()} == {
        "a.weight": set(),
        "b.weight": {0},
        "head.weight": {0},
    }
    for name in ("a.weight", "head.weight"):  # of the latter no row is removed
        assert zeroed.tensors[name].data_ptr() == model.get_parameter(name).data_ptr()
    mine, theirs = zeroed.tensors["b.weight"].flatten(1), model.get_parameter("b.weight").flatten(1)
    rows = mine.any(1)
    assert rows.sum() == 3 and torch.equal(mine[rows], theirs[rows])


@pytest.mark.parametrize("read", ["tied", "summed", "normalised together"])
def test_a_weight_that_more_than_products_read_is_zeroed_all_over(read: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if read == "tied":
            return F.linear(self.norm(self.b(F.embedding(x, self.a.weight))).relu(), self.a.weight)
        if read == "summed":
            return self.c(self.a(x.double()) * self.a.weight.sum(1))
        return self.c(self.norm(self.a(x.double())))  # the norm counts every channel

    layers = {"a": linear(6, 8), "b": linear(6, 6), "c": linear(8, 3), "norm": nn.LayerNorm(6 if read == "tied" else 8)}
    model = net(forward, **layers).double().eval()
    randomise(model)
    x = torch.randint(8, (2, 5)) if read == "tied" else torch.randint(9, (2, 6))
    needed = {name: set(dims) for name, dims in outlook_of(model, x)[0].zeros.items()}
    assert needed["a.weight"] == ({0} if read == "normalised together" else {0, 1})


def test_all_zeros_are_there_where_those_that_are_needed_do_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a sigmoid a removed channel is one half: what reads it has to be zero as well."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3)).double().eval()
    randomise(model)
    x = torch.randn(4, 5, dtype=torch.double)
    runs = runs_of_a_prune(monkeypatch, model, x)
    assert runs == [("ZeroedOriginal", torch.Size([n, 5])) for n in (1, 2, 2)]


def test_what_a_forward_writes_to_is_a_copy() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.runs = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.runs.add_(1)
            return self.b(self.a(x).relu()) * self.runs

    model = Counts().double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fxprune.prune(model, 0.5, torch.randn(2, 5, dtype=torch.double)).verification.ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_a_forward_writes_to_for_other_inputs_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one is no example here, so that the capture knows nothing of what is written then."""

    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                self.b.weight.data.clamp_(-0.1, 0.1)
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    model = Clips().double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = runs_of_a_prune(monkeypatch, model, torch.randn(3, 5, dtype=torch.double))
    assert runs[:2] == [("ZeroedOriginal", torch.Size([1, 5])), ("ZeroedOriginal", torch.Size([2, 5]))]  # the first one ended
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- one sample of the original, at both ends of a batch ------------------------------------------------------------


def first_of_three(out: Tensor) -> Tensor:
    return torch.cat([out[:1] * 1.5, out[1:]])


def last_of_three(out: Tensor) -> Tensor:
    return torch.cat([out[:-1], out[-1:] * 1.5])


def mixed(out: Tensor) -> Tensor:
    return out + out.mean(0)


def first_one_everywhere(out: Tensor) -> Tensor:
    return out[:1].expand_as(out).clone()


@pytest.mark.parametrize("wrong", [first_of_three, last_of_three, mixed])
def test_what_is_wrong_in_some_samples_is_caught(wrong: Callable[[Tensor], Tensor]) -> None:
    model, x = normed()
    pruned = pruned_correctly(model, x)
    pruned.register_forward_hook(lambda module, given, out: wrong(out))
    check_caught(model, pruned, x)


def test_a_batch_that_is_made_of_its_first_sample_is_caught_where_it_has_several() -> None:
    model, _ = normed()
    x = torch.randn(4, 3, 12, 12, dtype=torch.double)
    pruned = pruned_correctly(model, x)
    pruned.register_forward_hook(lambda module, given, out: first_one_everywhere(out))
    assert not fxprune.verify(model, pruned, x).ok


def test_a_model_that_mixes_samples_is_compared_as_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x - x.mean(0)).relu())

    runs = runs_of_a_prune(monkeypatch, Centred().double().eval(), torch.randn(4, 5, dtype=torch.double))
    assert runs[0] == ("ZeroedOriginal", torch.Size([1, 5])) and runs[-1] == ("ZeroedOriginal", torch.Size([2, 5]))


# -- other sizes ----------------------------------------------------------------------------------------------------


def test_where_small_images_are_not_taken_larger_ones_are_a_second_batch_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = normed()
    tall = nn.Sequential(nn.AvgPool2d(220), nn.Upsample(scale_factor=12), *[model]).double().eval()
    runs = runs_of_a_prune(monkeypatch, tall, torch.randn(1, 3, 224, 224, dtype=torch.double))
    assert runs == [("ZeroedOriginal", torch.Size([1, 3, 256, 256]))]


def test_no_size_is_tried_twice() -> None:
    sizes = [
        tuple(inputs.args[0].shape[-2:]) for _, inputs in fxprune.inputs.ExampleInputs((torch.randn(1, 3, 32, 32),), {}).fewer()
    ]
    assert sizes == [(16, 16), (32, 32)]


def test_numbers_that_are_drawn_in_training_are_not_drawn_in_a_verification() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            if self.training:
                x = x * torch.empty_like(x).bernoulli_(0.5)
            return self.b(x)

    model, x = Noisy().double().eval(), torch.randn(4, 5, dtype=torch.double)
    assert not outlook_of(model, x)[0].draws
    assert as_prune_verifies(model, pruned_correctly(model, x), x).ok
