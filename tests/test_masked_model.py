"""Verification: what the masked original is, and that nothing of it is made twice."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from graphs.registry import linear, net, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.passes.ir.labels import along, fill_removed
from fxprune.passes.ops import masking
from fxprune.passes.verification.index_order import InIndexOrder, draws_numbers
from fxprune.passes.verification.masked_model import MaskedOriginal


def test_what_is_removed_is_zero_whatever_it_was() -> None:
    """Also where it is infinite or not a number; what stays is the same bit for bit."""
    given = torch.tensor([[1.0, math.inf, -2.0], [math.nan, 3.0, math.inf]])
    table = torch.tensor([True, True, False, True, True])
    got = fill_removed(given, (along(torch.tensor([1, 2, 3]), 1, 2), along(torch.tensor([3, 4]), 0, 2)), table, 0.0)
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.0, -2.0], [math.nan, 0.0, math.inf]]), rtol=0, atol=0, equal_nan=True)


def test_nothing_is_copied_where_nothing_is_removed() -> None:
    given = torch.ones(2, 3)
    assert fill_removed(given, (along(torch.tensor([1, 2, 3]), 1, 2),), torch.ones(4, dtype=torch.bool), 0.0) is given


class WritesItsWeight(nn.Module):
    """Every forward adds one to a weight, and then uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)  # which nothing is removed from

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.last.weight.add_(1.0)
            self.scale.add_(1.0)
        return self.scale * self.last(torch.relu(self.first(x))) / self.last.weight.norm(dim=1)


def test_what_a_forward_writes_to_weights_is_masked_and_taken_back() -> None:
    torch.manual_seed(0)
    model = WritesItsWeight().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 6)
    untried = fxprune.prune(model, ratio=0.5, example_inputs=x, verify=False)
    pruned = fxprune.prune(model, ratio=0.5, example_inputs=x, verify=True)
    assert pruned.last.weight.shape == (4, 4)
    assert pruned.verification.compared == ("the example inputs", "another batch")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, untried.state_dict()[name]), name


class Attention(nn.Module):
    """Weights are looked at transposed, split and expanded over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.last = (
            nn.MultiheadAttention(16, 4, batch_first=True),
            nn.LayerNorm(16),
            nn.Linear(16, 3),
        )
        self.into = nn.Linear(5, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.last(self.norm(x + self.attention(x, x, x)[0]))


def test_weights_are_masked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each size, and not again for each product that they enter."""
    copies: dict[str, Tensor] = {}
    filled_later: list[Tensor] = []
    zeroed = MaskedOriginal.zeroed

    def counted(self: MaskedOriginal, name: str, tensor: Tensor) -> Tensor:
        assert name not in copies
        copies[name] = zeroed(self, name, tensor)
        return copies[name]

    def noted(tensor: Tensor, *rest: Any) -> Tensor:
        out = fill_removed(tensor, *rest)
        if out is not tensor:
            filled_later.append(tensor)
        return out

    monkeypatch.setattr(MaskedOriginal, "zeroed", counted)
    monkeypatch.setattr(masking, "fill_removed", noted)
    model = Attention()
    x = torch.randn(1, 7, 5)
    pruned = fxprune.prune(model, ratio=0.5, example_inputs=x, verify=False)
    found = fxprune.verify(model, pruned, x)
    assert found.ok and found.compared == ("the example inputs", "another batch")
    assert copies.keys() == dict(model.named_parameters()).keys()
    weights = {t.untyped_storage().data_ptr() for t in copies.values()}
    assert filled_later
    assert not weights & {t.untyped_storage().data_ptr() for t in filled_later}


def test_outputs_that_are_all_zero_are_said_to_say_little() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2), nn.Threshold(1e6, 0.0))
    found = fxprune.prune(model, ratio=0.5, example_inputs=torch.randn(1, 3), verify=True).verification
    assert found.ok
    assert found.blank
    assert str(found) == (
        "exact: largest relative error 0.0e+00 against the masked and the zeroed original"
        " (the example inputs; another batch; all outputs are zero, which says little)"
    )
    nn.init.constant_(model[2].bias, 2e6)
    assert not fxprune.prune(model, ratio=0.5, example_inputs=torch.randn(1, 3), verify=True).verification.blank


DRAWS = {
    "randn_like": torch.randn_like,
    "rand_like": lambda t: torch.rand_like(t, memory_format=torch.preserve_format),
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda t: t.clone().bernoulli_(0.5),
    "normal_": lambda t: t.clone().normal_(),
    "dropout": lambda t: F.dropout(t, 0.5, training=True),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_are_drawn_in_the_order_of_indices(draw):
    plain = torch.rand(4, 5, 6)
    moved = plain.transpose(0, 2).contiguous().transpose(0, 2)  # equal, in another layout
    found = []
    for given in (plain, moved):
        with torch.random.fork_rng(), InIndexOrder():
            torch.manual_seed(3)
            found.append(draw(given))
    assert torch.equal(found[0], found[1])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(found[0], draw(plain))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_draws_numbers_where_it_drops_some(dropout: float) -> None:
    q = torch.randn(1, 2, 5, 4)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    before = torch.get_rng_state()
    for args, kwargs in (((q, q, q, dropout), {}), ((q, q, q), {"dropout_p": dropout})):
        assert draws_numbers(attention, args, kwargs) == (dropout > 0)
    F.scaled_dot_product_attention(q, q, q, dropout_p=dropout)
    assert torch.equal(before, torch.get_rng_state()) == (dropout == 0)
    assert draws_numbers(torch.ops.aten.bernoulli.p, (q, 0.5), {})
    assert not draws_numbers(torch.ops.aten.relu.default, (q,), {})


def test_samples_with_labels_of_their_own_hide_no_heads() -> None:
    """The tokens are written into a tensor of zeros: a second sample has labels, beside those of heads."""

    def forward(self: Any, x: Tensor) -> Any:
        t = torch.zeros(x.shape[0], x.shape[1], 18, dtype=x.dtype)
        t[..., :9] = x
        t[..., 9:] = x
        q, k, v = self.qkv(t).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 4, 1).unbind(0)
        x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.head(self.norm(x.permute(0, 3, 1, 2).flatten(2)))

    parts = {"scale": nn.Parameter(torch.ones(2, 1, 1)), "norm": nn.LayerNorm(4)}
    model = net(forward, qkv=linear(18, 12), head=linear(4, 2), **parts).double().eval()
    randomise(model)
    x = torch.randn(1, 4, 9, dtype=torch.double)
    pruned = fxprune.prune(model, 0.5, x, attention="dims", verify=False)
    assert pruned.get_parameter("scale").numel() == 1
    found = fxprune.verify(model, pruned, x)
    assert found.ok and "another batch" in found.compared


class Latent(nn.Module):
    """The hidden layer `a` goes through a function."""

    def __init__(self, function, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.a, self.b, self.c = function, nn.Linear(4, 8), nn.Linear(width, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(torch.tanh(self.b(self.function(self.a(x)))))


DRAWN = {
    "a latent variable": lambda y: y + y.exp().sqrt() * torch.randn_like(y),
    "numbers of a shape": lambda y: y + torch.randn(y.shape),
    "a factor": lambda y: y * torch.rand(*y.shape),
    "dropout that stays on": lambda y: F.dropout(y, 0.5, training=True),
    "a slope for each": lambda y: F.rrelu(y, training=True),
    "gumbel": lambda y: F.gumbel_softmax(y, dim=-1),
    "in place": lambda y: y + torch.zeros_like(y).uniform_(-1, 1),
    "flags": lambda y: y * torch.bernoulli(torch.full_like(y, 0.5)),
    "numbers in a range": lambda y: y * torch.randint(1, 3, y.shape),
    "around each": lambda y: torch.normal(y, y.exp()),
    "a normal factor": lambda y: y * torch.normal(0.0, 1.0, size=y.shape),
    "counts": lambda y: y + torch.poisson(y.exp()),
    "by an old name": lambda y: y + y.new(y.shape).normal_(),
    "a distribution": lambda y: D.Normal(y, y.exp()).rsample() + D.Normal(y, 1.0).log_prob(y * 0.5),
    "a distribution of one scale": lambda y: D.Laplace(y, 1.0).rsample(),
    "a divergence": lambda y: D.kl_divergence(D.Laplace(y, y.exp()), D.Laplace(y * 0, 1.0)) * D.Laplace(y, y.exp()).rsample(),
    "twice": lambda y: (y + torch.randn_like(y)) * torch.randn(y.shape[0], 1),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_reference_draws_for_what_is_kept_what_the_pruned_model_draws(name):
    found = fxprune.prune(Latent(DRAWN[name]).eval(), 0.5, torch.randn(3, 4))
    assert found.a.out_features == 4 and found.verification.ok
    assert found.verification.masked is not None and found.verification.masked < 1e-5
    assert "it draws numbers for what is removed" in str(found.verification)


def test_a_wrong_program_that_draws_is_found(monkeypatch):
    """The numbers of a pruned model that draws for another channel are no excuse."""
    model, x = Latent(DRAWN["a latent variable"]).eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, x)
    with torch.no_grad():
        small.b.weight.copy_(small.b.weight[:, [1, 0, 2, 3]])
    assert not fxprune.verify(model, small, x).ok


ramp = torch.arange(8) / 4
CONSTANTS = {
    "of a closure": lambda y: (y + ramp).softmax(-1),
    "made in the forward": lambda y: (y + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])).softmax(-1),
    "flags": lambda y: y.masked_fill(ramp > 1, -1e9).softmax(-1),
    "chosen where": lambda y: torch.where(ramp < 1.6, y + ramp, y - ramp).softmax(-1),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_cut_in_the_reference_as_in_the_program(name):
    """A softmax over channels counts those alone that are kept, also of a sum with a constant."""
    model, x = Latent(CONSTANTS[name]).eval(), torch.randn(3, 4)
    found = fxprune.prune(model, {"a": 0.25}, x)
    assert found.verification.ok and found.a.out_features == 6
    kept = [i for i in range(8) if any(torch.equal(model.a.weight[i], row) for row in found.a.weight)]
    y = model.a(x)[:, kept]
    if name == "of a closure":  # said once more in plain words
        want = model.c(torch.tanh(F.linear((y + ramp[kept]).softmax(-1), model.b.weight[:, kept], model.b.bias)))
        torch.testing.assert_close(found(x), want)


square = torch.arange(64.0).sin().view(8, 8)
CONSTANT_OPERANDS = {
    "a product": lambda y: y @ square,
    "a layer": lambda y: F.linear(y.relu(), square, ramp),
    "a convolution": lambda y: F.conv1d(y.unsqueeze(-1), square.unsqueeze(-1)).squeeze(-1),
    "a mean": lambda y: y * ramp.mean(),
    "a softmax": lambda y: y * ramp.softmax(0),
}


@pytest.mark.parametrize("name", CONSTANT_OPERANDS)
def test_a_constant_that_a_masked_form_reads_first_has_a_fate(name):
    model, x = Latent(CONSTANT_OPERANDS[name]).eval(), torch.randn(3, 4)
    small = fxprune.prune(model, {"a": 0.25}, x)
    assert small.a.out_features == 6 and fxprune.verify(model, small, x).ok
    kept = [i for i in range(8) if any(torch.equal(model.a.weight[i], row) for row in small.a.weight)]
    with torch.no_grad():
        mask = torch.zeros(8).index_fill(0, torch.tensor(kept), 1)
        model.a.weight.mul_(mask[:, None])
        model.a.bias.mul_(mask)
    torch.testing.assert_close(small(x), model(x))


def test_columns_of_classes_go_where_any_class_may_be_encoded():
    model = Latent(lambda y: F.one_hot(y.argmax(-1), 8).float() * y.detach().flip(0)).eval()
    found = fxprune.prune(model, {"b": 0.5}, torch.randn(3, 4))
    assert found.verification.ok

    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.v, self.b = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(F.one_hot(self.a(x).argmax(-1), 8).float() * self.v(x))

    found = fxprune.prune(Chosen().eval(), {"v": 0.5}, torch.randn(3, 4))
    assert found.verification.ok and found.v.out_features == 4 and found.a.out_features == 8
