"""What was found of one layer of torch's holds for the next that is just like it, and for no other."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.passes.capture import train_eval
from fxprune.passes.capture.layer_cache import is_torchs

X = torch.randn(2, 5, 8)


class Attention(nn.Module):
    """Attention asks for its mode, and does the same in both unless it has a dropout."""

    def __init__(self, change=lambda layers: None, call=lambda layer, x: layer(x, x, x, need_weights=False)[0]):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(5)])
        self.call = call
        change(self.layers)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.call(layer, x) if i == 3 else layer(x, x, x, need_weights=False)[0]
        return x


@pytest.fixture
def twice(monkeypatch):
    """The layers whose forward was captured in both modes."""
    found, whole = [], train_eval.joined
    monkeypatch.setattr(train_eval, "joined", lambda *args: found.append(1) or whole(*args))
    return found


def test_layers_that_are_alike_are_captured_in_both_modes_once(twice, monkeypatch):
    fxprune.couple(Attention().eval(), X)
    assert len(twice) == 2, "what comes out of the first has other strides than what goes in"
    found = {True: fxprune.prune(Attention().eval(), 0.5, example_inputs=X)}
    monkeypatch.setattr(train_eval, "likeness", lambda *_: None)
    found[False] = fxprune.prune(Attention().eval(), 0.5, example_inputs=X)
    for mode in (False, True):
        assert torch.equal(*(small.train(mode)(X) for small in found.values()))


def forward(self, q, k, v, need_weights):
    return (q * 2 if self.training else q), None


CHANGES = {
    "dropout": lambda layers: setattr(layers[3], "dropout", 0.1),
    "hook": lambda layers: layers[3].register_forward_hook(
        lambda m, args, out: (out[0].relu() if m.training else out[0], None)
    ),
    "hook inside": lambda layers: layers[3].out_proj.register_forward_hook(lambda m, args, out: out * (2 if m.training else 1)),
    "forward": lambda layers: setattr(layers[3], "forward", types.MethodType(forward, layers[3])),
    "strides": lambda layers: setattr(layers[3], "in_proj_weight", nn.Parameter(torch.randn(8, 24).t())),
    "no bias": lambda layers: setattr(layers[3], "in_proj_bias", None),
    "an attribute": lambda layers: setattr(layers[3], "add_zero_attn", 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_not_like_the_others_is_looked_at(change, twice):
    net = Attention(CHANGES[change]).eval()
    small = fxprune.prune(net, 0.5, example_inputs=X)
    assert small.verification.ok and len(twice) >= 3
    if change in ("hook", "forward"):
        plain = small(X)
        assert not torch.allclose(small.train()(X), plain)


def autocast(layer, x):
    with torch.autocast("cpu"):
        return layer(x, x, x, need_weights=False)[0].float()


CALLS = {
    "another key": lambda layer, x: layer(x, x * 2, x * 2, need_weights=False)[0],
    "weights": lambda layer, x: layer(x, x, x)[0],
    "other sizes": lambda layer, x: layer(x[:, 1:], x[:, 1:], x[:, 1:], need_weights=False)[0],
    "autocast": autocast,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_layer_that_is_given_something_else_is_looked_at(call, twice):
    fxprune.couple(Attention(call=CALLS[call]).eval(), X)
    assert len(twice) >= 3


class Mine(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_what_says_to_be_of_torch_is_not_believed(monkeypatch):
    plain = nn.Linear.forward

    @functools.wraps(plain)
    def wrapped(self, x):
        return F.relu(plain(self, x))

    assert wrapped.__module__ == plain.__module__
    assert is_torchs(nn.Linear, plain) and is_torchs(nn.MultiheadAttention, nn.MultiheadAttention.forward)
    assert not is_torchs(nn.Linear, wrapped) and not is_torchs(Mine, Mine.forward)
    assert not is_torchs(Mine, nn.MultiheadAttention.forward), "its other methods may be its own"
