"""What is met again is not run again: with and without that, a capture is the same."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune import analysis
from fxprune.passes import modes
from fxprune.passes.replay import Replay, is_of_torch
from fxprune.passes.tape import Ref, map_tensors
from fxprune.passes.tree import on_meta


def written(capture):
    """All that a capture says, with values numbered in the order in which they are used."""
    numbers, values = {}, capture.tape.values

    def said(ref):
        v = values[ref.id]
        return numbers.setdefault(ref.id, len(numbers)), v.shape, v.dtype, v.from_input, v.name, v.on_meta

    nodes = [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs), capture.only.get(n)) for n in capture.graph.nodes]
    ops = [(str(op.func), map_tensors((op.args, op.kwargs, op.outs), said, Ref)) for op in capture.tape.ops]
    ins = [[numbers[ref.id] for ref in op.inputs] for op in capture.tape.ops]
    where = [capture.nodes[op.node].name for op in capture.tape.ops]
    results = [map_tensors(capture.results.get(n), said, Ref) for n in capture.graph.nodes]
    return nodes, [str(op) for op in ops], ins, where, [str(r) for r in results], len(capture.guards), capture.untracked


def captures(make, inputs):
    with analysis.unobserved(nn.Module()):
        return [written(c)[:6] for c in analysis.programs(make(), inputs, {}, on_meta)]


def replays(make, *inputs):
    """How many nodes were replayed, after a comparison with a capture in which nothing is."""
    count, again = [], Replay.again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "again", lambda *args: count.append(1) or again(*args))
        found = captures(make, inputs)
        patch.setattr(Replay, "whole", lambda *_: None)
        with_all = len(count)
        assert captures(make, inputs) == found
        assert len(count) == with_all
    return with_all


class Chain(nn.Module):
    """Linear layers, each of three calls on an input of three dimensions, and what a test does between them."""

    def __init__(self, depth=5, between=lambda x, i: x, layer=lambda i: nn.Linear(8, 8)):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.between = nn.ModuleList([layer(i) for i in range(depth)]), between

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.between(layer(x), i)
        return x


X = torch.randn(2, 5, 8)


def test_equal_layers_are_replayed():
    """The first is learned from, and so all but the first are written down."""
    assert replays(Chain, X) == 4


def test_one_module_used_twice():
    layer = nn.Linear(8, 8)
    assert replays(lambda: Chain(layer=lambda i: layer), X) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda m, args, out: out * 2),
        lambda layer: layer.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
        lambda layer: setattr(layer, "forward", lambda x: F.linear(x, layer.weight).relu()),
        lambda layer: setattr(layer, "bias", None),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().t())),
        nn.utils.parametrizations.weight_norm,
    ],
    ids=["hook", "pre-hook", "forward", "no bias", "strides", "parametrized"],
)
def test_a_layer_that_is_not_as_the_others_is_run(change):
    def make():
        model = Chain()
        change(model.layers[3])
        return model

    assert replays(make, X) <= 3


def test_an_attribute_of_a_layer_makes_a_difference():
    """1 and True are equal, and not the same; nor are 0.0 and -0.0."""

    def layer(i):
        inner = nn.Linear(8, 8)
        inner.slope = [1, True, 1.0, 0.0, -0.0, 1][i]
        return inner

    assert replays(lambda: Chain(6, layer=layer), X) == 1
    assert replays(lambda: Chain(6, between=lambda x, i: F.softmax(x, -1 - i % 2, dtype=[None, torch.float32][i // 3])), X) == 5


def test_other_ranks_and_dtypes_are_run():
    assert replays(lambda: Chain(4, between=lambda x, i: x.flatten(0, 1) if i == 1 else x), X) == 2
    assert replays(lambda: Chain(4, between=lambda x, i: x[:, 1:] if i < 3 else x), X) == 0


def test_the_same_tensor_twice_is_not_two_tensors():
    """Attention of a tensor with itself makes calls on one tensor."""
    attend = lambda x, i: F.scaled_dot_product_attention(x, x if i % 2 else x * 2, x)  # noqa: E731
    assert replays(lambda: Chain(6, between=attend), X) >= 5


def test_in_place_and_views():
    def between(x, i):
        y = x.chunk(2, -1)[1]
        y.mul_(2)
        x = x.transpose(0, 1).transpose_(0, 1)
        x[:, 1:] = 1
        assert y.storage_offset() == 4
        return F.layer_norm(x, (8,)).relu_()

    replays(lambda: Chain(between=between), X)


class Norm(nn.Module):
    """Becomes one node once it has been looked at: what it did then is taken off the tape."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.dropout(F.linear(x, self.weight), 0.1, self.training)


def test_what_is_taken_back_is_not_learned_from_by_its_place_on_the_tape():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.weight = Norm(), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            x = self.norm(x).tanh().exp() + F.layer_norm(x, (8,)).sin()
            return F.linear(F.linear(x, self.weight), self.weight).cos()

    assert replays(Model, X) == 2


STATE = {"calls": 0}


def counted(x):
    STATE["calls"] += 1
    return F.linear(x, torch.ones(8, 8)) if STATE["calls"] % 2 else F.linear(x, torch.ones(8, 8)).relu()


class Branches(nn.Linear):
    """A layer of one's own that looks at a global, in a class that inherits nearly all."""

    def forward(self, x):
        STATE["calls"] += 1
        return super().forward(x) if STATE["calls"] % 3 else super().forward(x).relu()


def test_what_looks_at_a_global_is_run(monkeypatch):
    STATE["calls"] = 0
    assert replays(lambda: STATE.update(calls=0) or Chain(6, layer=lambda i: Branches(8, 8)), X) >= 0
    forward = nn.Linear.forward

    def patched(self, x):
        STATE["calls"] += 1
        return forward(self, x) if STATE["calls"] % 3 else forward(self, x).relu()

    monkeypatch.setattr(nn.Linear, "forward", patched)
    assert replays(lambda: STATE.update(calls=0) or Chain(6), X) == 0


def test_what_says_to_be_of_torch_is_not_believed():
    @functools.wraps(F.linear)
    def mine(x, w):
        return F.linear(x, w)

    @functools.wraps(F.relu)
    def other(x):
        return x

    assert other.__module__ == "torch.nn.functional"
    assert not is_of_torch(mine) and not is_of_torch(other) and not is_of_torch(Branches.forward)
    assert is_of_torch(F.relu) and is_of_torch(torch.relu) and is_of_torch(torch.Tensor.view) and is_of_torch(F.linear)


def test_settings_make_a_difference():
    def between(x, i):
        if i == 2:
            with torch.enable_grad():
                return F.scaled_dot_product_attention(x, x, x)
        if i == 3:
            with torch.autocast("cpu"):
                return F.scaled_dot_product_attention(x, x, x)
        if i == 4:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(x, x, x)

    replays(lambda: Chain(8, between=between), X)


def test_statistics_and_dropout_in_either_mode():
    """A model that asks for its mode is captured in training mode too, where layers count and draw."""

    class Model(Chain):
        def forward(self, x):
            if self.training:
                x = x + 1
            return super().forward(x)

    def layer(i):
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.InstanceNorm1d(5))

    assert replays(lambda: Model(layer=layer), X) >= 4
    pruned = fxprune.prune(Model(layer=layer).eval(), 0.5, example_inputs=X)
    assert pruned.verification.ok


class Attention(nn.Module):
    def __init__(self, depth=4, change=lambda layers: None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(depth)])
        change(self.layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, x, x, need_weights=False)[0]
        return x


def runs(make, patch):
    """How often attention is run in a capture."""
    count, whole = [], modes.joined
    patch.setattr(modes, "joined", lambda *args: count.append(1) or whole(*args))
    captures(make, (X,))
    return len(count)


def test_modules_that_do_the_same_in_both_modes_are_run_in_both_once(monkeypatch):
    replays(Attention, X)
    assert runs(Attention, monkeypatch) == 2, "what comes out of the first has other strides than what goes in"


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: setattr(layers[2], "dropout", 0.1),
        lambda layers: layers[2].out_proj.register_forward_hook(lambda m, args, out: out.relu() if m.training else out),
        lambda layers: layers[2].register_forward_hook(lambda m, args, out: (out[0].relu() if m.training else out[0], None)),
        lambda layers: setattr(
            layers[2], "forward", lambda q, k, v, need_weights: (q.relu() if layers[2].training else q, None)
        ),
    ],
    ids=["dropout", "hook inside", "hook", "forward"],
)
def test_a_module_that_does_not_do_the_same_in_both_modes_is_run_in_both(change, monkeypatch):
    make = lambda: Attention(change=change)  # noqa: E731
    replays(make, X)
    model = make().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=X)
    assert pruned.verification.ok
    assert runs(make, monkeypatch) >= 1


def test_pruned_the_same(monkeypatch):
    """The same code comes out, name for name."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3).eval()
    x = torch.randn(2, 5, 16)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    monkeypatch.setattr(Replay, "whole", lambda *_: None)
    plain = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.code == plain.code and pruned.verification.ok
    assert torch.equal(pruned(x), plain(x))
