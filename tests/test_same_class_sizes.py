"""Numbers of a pruned model of the original's class: sizes that its Python hands on, adds up, slices by and lists."""

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import nn

import fxprune
from fxprune.passes.errors import GuardError
from fxprune.passes.rewrite.pruned_module import RewrittenForward
from fxprune.same_class import arguments


def programs(model):
    return [path for path, m in model.named_modules() if isinstance(vars(m).get("forward"), RewrittenForward)]


class Scattering(nn.Module):
    """Groups rows by the values of a router, as mixtures of experts do, and adds them to zeros of a width that it holds."""

    def __init__(self):
        super().__init__()
        self.width = 12
        self.router, self.up, self.down = nn.Linear(8, 2), nn.Parameter(torch.randn(2, 12, 8)), nn.Linear(12, 8)

    def forward(self, x):
        order = self.router(x).argmax(1).sort().indices
        counts = torch.bincount(self.router(x).argmax(1), minlength=2).tolist()
        parts = [nn.functional.linear(rows, self.up[i]) for i, rows in enumerate(x[order].split(counts))]
        return self.down(torch.zeros(len(x), self.width).index_add(0, order, torch.cat(parts)))


def test_zeros_of_a_width_that_a_module_holds_may_shrink():
    torch.manual_seed(0)
    model, x = Scattering(), torch.randn(6, 8)
    graph = fxprune.prune(model, 0.5, example_inputs=x)
    small = fxprune.prune(model, 0.5, example_inputs=x, same_class=True)
    assert graph.up.shape == small.up.shape == (2, 6, 8) and small.width == 6 and not programs(small)
    for other in (torch.randn(6, 8), torch.randn(9, 8)):
        assert torch.allclose(small(other), graph(other), atol=1e-6)


class Prefixed(nn.Module):
    """Has tokens in front of those of the input, and a number that says how many there are."""

    def __init__(self):
        super().__init__()
        self.first, self.more = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 4, 8))
        self.prefix, self.mix, self.head = 5, nn.Linear(8, 8), nn.Linear(8, 3)

    def features(self, x):
        tokens = torch.cat([self.first.expand(len(x), -1, -1), self.more.expand(len(x), -1, -1), x], 1)
        scores = self.mix(tokens) @ tokens.transpose(1, 2)
        return scores.softmax(-1) @ tokens

    def forward(self, x):
        found = self.features(x)
        return self.head(found[:, self.prefix :]).sum(1) + self.head(found[:, : self.prefix]).mean(1)


def test_a_number_that_slices_tokens_follows_them():
    torch.manual_seed(0)
    model, x = Prefixed(), torch.randn(2, 6, 8)
    small = fxprune.prune(model, 0.5, example_inputs=x, same_class=True)
    left = small.more.shape[1]
    assert left < 4 and small.prefix == 1 + left and not programs(small)
    assert small.features(torch.randn(3, 7, 8)).shape[1] == 1 + left + 7


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x, places):
        cos, sin = places
        return self.out(self.query(x) * self.key(torch.cat([cos, sin], -1))).relu()


class Placed(nn.Module):
    """Computes waves for each place, and has one dropout for them and for everything else; layers use some of them."""

    def __init__(self):
        super().__init__()
        self.drop, self.first, self.last = nn.Dropout(0.1), nn.Linear(8, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        waves = torch.arange(x.shape[1])[:, None] * torch.pow(100.0, -torch.arange(8) / 8)
        places = self.drop(waves.cos()), self.drop(waves.sin())
        x = self.drop(self.first(x))
        for layer in self.layers:
            x = layer(x, places)
        return self.last(x)


def test_layers_select_from_parts_of_an_argument_that_a_dropout_gave_whole():
    torch.manual_seed(0)
    model, x = Placed().eval(), torch.randn(2, 5, 8)
    graph = fxprune.prune(model, 0.5, example_inputs=x)
    small = fxprune.prune(model, 0.5, example_inputs=x, same_class=True)
    assert not programs(small) and "forward" not in vars(small.drop)
    for other in (x, torch.randn(3, 9, 8)):
        for made in (small, pickle.loads(pickle.dumps(small))):
            assert torch.allclose(made(other), graph(other), atol=1e-6)


def test_a_selection_takes_the_entries_that_were_rounded_otherwise():
    table = torch.linspace(0.1, 6.4, 64).sin().expand(3, 64)
    kept = torch.arange(0, 64, 3)[:20]
    found = arguments.selection_between(table, table[:, kept] * (1 + 1e-7))
    assert found == arguments.Selection(1, 64, tuple(kept.tolist()))
    assert arguments.selection_between(table, table[:, kept] + 0.01) is None
    twice = torch.tensor([[1.0, 5.0, 5.0, 2.0, float("-inf")]])
    assert arguments.selection_between(twice, twice[:, [1, 2, 4]]).entries == (1, 2, 4)


class Branched(nn.Module):
    """Two towers of widths that a tuple says, of which a new head is made, and records of what has no module."""

    def __init__(self):
        super().__init__()
        self.widths, self.window = (12, 20), (12, 12)
        self.num_features = 32
        self.tower_0, self.tower_1 = nn.Linear(4, 12), nn.Linear(4, 20)
        self.heads = nn.ModuleList(nn.Linear(n, 3) for n in self.widths)
        self.info = [{"channels": 12, "stride": 3, "module": "nowhere"}, {"channels": 20, "stride": 5, "module": "tower_1"}]

    def forward(self, x):
        return self.heads[0](self.tower_0(x).relu()) + self.heads[1](self.tower_1(x).relu())

    def reset(self, classes):
        self.heads = nn.ModuleList(nn.Linear(n, classes) for n in self.widths)


def test_tuples_of_widths_their_sum_and_records_of_no_module_follow():
    model, x = Branched(), torch.randn(2, 4)
    small = fxprune.prune(model, {"tower_0": 0.5, "tower_1": 0.25}, example_inputs=x, same_class=True)
    assert small.widths == (6, 15) and small.num_features == 21 and small.meta["stale"] == ()
    assert small.window == (12, 12), "the sides of a window are no widths"
    assert [(record["channels"], record["stride"]) for record in small.info] == [(6, 3), (15, 5)]
    small.reset(7)
    assert small(x).shape == (2, 7) and model.widths == (12, 20)


class Masking(nn.Module):
    """In training replaces some rows by a parameter that evaluation does not read, drawn by NumPy."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 3)
        self.mask, self.never = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))

    def forward(self, x):
        hidden = self.first(x)
        if self.training:
            hidden[torch.tensor(numpy.random.rand(len(x)) < 0.5)] = self.mask
        return self.last(hidden)


def test_parameters_that_training_alone_reads_are_cut_with_what_they_replace(tmp_path):
    model, x = Masking(), torch.randn(6, 8)
    before = numpy.random.get_state()[1].tolist()
    small = fxprune.prune(model, 0.5, example_inputs=x, same_class=True)
    assert numpy.random.get_state()[1].tolist() == before
    kept = [(small.last.weight[0] == row).any().item() for row in model.last.weight[0]]
    assert torch.equal(small.mask, model.mask[kept]) and small.never.shape == (12,)
    small.train()(x).sum().backward()
    assert small.meta["plan"].apply(model, x, same_class=True).mask.shape == (6,)
    fxprune.save(small, tmp_path / "small.safetensors")
    assert torch.equal(fxprune.load(tmp_path / "small.safetensors", Masking(), same_class=True).mask, small.mask)


class Attention(nn.Module):
    """Its code takes it that heads are as wide together as what they are given, so that it cannot run with fewer."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.heads = 4

    def forward(self, x, mask=None, noisy=False):
        q, k, v = (f(x).unflatten(-1, (self.heads, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / 2
        if mask is not None:
            scores = scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape)), None


class Encoder(nn.Module):
    """Makes a mask only where it is captured, as transformers' models do, and returns more if it is asked."""

    def __init__(self):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(8, 16), Attention(), nn.Linear(16, 3)

    def forward(self, x, states=False, mask=None):
        hidden = self.first(x)
        captured = isinstance(x, torch.fx.Proxy)
        mask = torch.zeros(x.shape[1], x.shape[1]) if mask is None and captured else mask
        after = hidden + self.attention(hidden, mask)[0]
        return (self.last(after), hidden) if states else self.last(after)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_has_programs_for_both_ways_it_is_called(inplace):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 5, 8)
    graph = fxprune.prune(model, {"attention.query": 0.5}, example_inputs=x)
    small = fxprune.prune(model, {"attention.query": 0.5}, example_inputs=x, same_class=True, inplace=inplace)
    assert small.attention.query.out_features == 8 and programs(small) == ["attention"]
    made = [small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))]
    for other in made:
        y = torch.randn(3, 7, 8)
        assert torch.allclose(other(y), graph(y), atol=1e-6)
        assert torch.allclose(other(y, states=True)[0], graph(y), atol=1e-6)
        assert torch.allclose(other(y, mask=torch.zeros(7, 7)), graph(y), atol=1e-6), "with a mask, as captured"
        with pytest.raises(GuardError, match="attention was captured with other arguments: False where it is True"):
            other.attention(torch.randn(3, 7, 16), torch.zeros(7, 7), noisy=True)
    for other in made:  # each has its own parameters
        with torch.no_grad():
            other.attention.out.weight.zero_()
            other.attention.out.bias.zero_()
            other.last.weight.zero_()
        assert torch.equal(other(x), other.last.bias.expand(2, 5, 3))


class Literal(nn.Module):
    """Has a width in its code, so that the model itself gets a program."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.first(x).view(-1, 2, 6).relu().flatten(1))


def test_a_model_with_a_program_for_its_forward_is_exported():
    x = torch.randn(4, 4)
    small = fxprune.prune(Literal().eval(), 0.5, example_inputs=x, same_class=True)
    assert programs(small) == [""] and small.forward.__name__ == "forward" and not hasattr(small.forward, "unheard_of")
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for made in (exported.module(), copy.deepcopy(small), torch.compile(small, backend="eager", dynamic=True)):
        assert torch.allclose(made(x[:3]), small(x[:3]), atol=1e-6)


@dataclass(frozen=True)
class Sizes:
    width: int = 16
    middle: int = 10
    rate: float = 0.1


class Pair(NamedTuple):
    width: int
    kind: str


class Settings:
    def __init__(self):
        self.width, self.records = 16, [{"module": "a", "channels": 16}, {"module": "left out", "channels": 30}]


class Keeps(nn.Module):
    """Keeps its widths elsewhere than in attributes; other methods than the forward read them."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


KEPT = {
    "dict": ({"width": 16, "middle": 10, "lr": 1, "name": "x"}, {"width": 8, "middle": 5, "lr": 1, "name": "x"}),
    "dict in a dict": ({"in": {"widths": [16, 10]}}, {"in": {"widths": [8, 5]}}),
    "data class": (Sizes(), Sizes(8, 5)),
    "namespace": (SimpleNamespace(width=16), SimpleNamespace(width=8)),
    "named tuple": (Pair(16, "x"), Pair(8, "x")),
    "tensors": ({"x": torch.ones(16), "width": 16}, None),
    "NumPy's": (
        {"width": numpy.int64(16), "widths": (numpy.int32(16), 10)},
        {"width": numpy.int64(8), "widths": (numpy.int32(8), 5)},
    ),
    "a shape": ({"shape": torch.Size([16, 10])}, {"shape": torch.Size([8, 5])}),
    "tuples in a list": ({"widths": [(16, 10), (7, 7)]}, {"widths": [(8, 5), (7, 7)]}),
}


@pytest.mark.parametrize("name", KEPT)
def test_numbers_in_what_a_module_holds_are_brought_up_to_date(name):
    kept, wanted = KEPT[name]
    model, before = Keeps(kept).eval(), copy.deepcopy(kept)
    small = fxprune.prune(model, 0.5, torch.randn(2, 6), same_class=True)
    if wanted is None:
        assert small.kept["width"] == 8 and model.kept["width"] == 16
    else:
        assert small.kept == wanted and model.kept == before
    assert small.meta["stale"] == () and types_in(small.kept) == types_in(kept)


def types_in(kept):
    """The types of what a dict holds, inside out."""
    if isinstance(kept, dict | list | tuple):
        return type(kept), [types_in(part) for part in (kept.values() if isinstance(kept, dict) else kept)]
    return type(kept)


class Square(nn.Module):
    """Takes as many as it returns, and calls one function: which of the two a number counts is not told."""

    def __init__(self):
        super().__init__()
        self.width, self.act = 16, nn.ReLU()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return self.act(x @ self.weight.t())


class Backbone(nn.Module):
    """Layers of one width, of which a number means the last."""

    def __init__(self):
        super().__init__()
        self.features, self.num_features = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Square()), numpy.int64(16)
        self.before, self.head = nn.Sequential(nn.Linear(16, 10), nn.ReLU()), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.before(self.features(x).relu()))


def test_what_modules_hand_to_one_another_tells_where_the_nearest_tensors_do_not():
    ratios = {"features.0": 0.5, "features.2.weight": 0.25}
    small = fxprune.prune(Backbone().eval(), ratios, torch.randn(2, 6), same_class=True)
    assert [tuple(t.shape) for t in small.features.parameters()] == [(8, 6), (8,), (12, 8)]
    assert small.num_features == 12 and type(small.num_features) is numpy.int64
    assert small.features[2].width == 16 and small.meta["stale"] == ("features.2.width",)


class Stages(nn.Module):
    """Two stages of one width, of which numbers mean one: that of the head, and that of what another method returns."""

    def __init__(self, widths=(12, 16, 16)):
        super().__init__()
        self.num_features = self.hidden_size = widths[-1]
        self.middle_width: int = widths[1]
        self.stem, self.middle, self.last = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 16)
        self.head = nn.Linear(self.num_features, 3)
        self.info = [{"channels": n, "module": f"stage{i}"} for i, n in enumerate(widths)]

    def forward_stages(self, x):
        stages = [self.stem(x).relu()]
        stages.append(self.middle(stages[0]).relu())
        return x, [*stages, self.last(stages[1]).relu()]

    def forward(self, x):
        return self.head(self.forward_stages(x)[1][-1])

    def reset(self, classes):
        self.head = nn.Linear(self.num_features, classes)


def test_layers_that_a_class_makes_with_a_number_and_lists_that_its_methods_return_tell_what_it_counts():
    model, x = Stages().eval(), torch.randn(2, 6)
    small = fxprune.prune(model, {"stem": 0.5, "middle": 0.25, "last": 0.375}, x, same_class=True)
    assert [tuple(t.shape) for t in small.forward_stages(x)[1]] == [(2, 6), (2, 12), (2, 10)]
    assert small.num_features == small.hidden_size == 10
    assert [record["channels"] for record in small.info] == [6, 12, 10]
    assert small.middle_width == 16 and small.meta["stale"] == ("middle_width",), "no layer is seen to be made with it"
    small.reset(7)
    assert small(x).shape == (2, 7) and model.num_features == model.info[1]["channels"] == 16


def test_settings_of_which_most_are_no_sizes_stay():
    """A number of a run may happen to be a width; that one is named."""
    run = {"batch_size": 16, "epochs": 90, "workers": 7, "steps": 500}
    small = fxprune.prune(Keeps(dict(run)).eval(), 0.5, torch.randn(2, 6), same_class=True)
    assert small.kept == run and small.meta["stale"] == ("kept.batch_size",)


def test_records_in_an_object_are_brought_up_to_date():
    model = Keeps(Settings()).eval()
    small = fxprune.prune(model, 0.5, torch.randn(2, 6), same_class=True)
    assert small.kept.width == 8 and [r["channels"] for r in small.kept.records] == [8, 30]
    assert model.kept.width == 16 and [r["channels"] for r in model.kept.records] == [16, 30]


def test_a_number_that_modules_share_and_that_is_in_doubt_stays():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Keeps({"width": 16}), Keeps({"width": 16})
            self.second.kept = self.first.kept

        def forward(self, x):
            return self.first(x) + self.second(x)

    small = fxprune.prune(Two().eval(), {"first.a": 0.5, "second.a": 0.25}, torch.randn(2, 6), same_class=True)
    assert small.first.kept == {"width": 16} and small.meta["stale"] == ("first.kept.width",)


class WritesItsWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        y = self.one(x)
        return self.two(y.reshape(-1, 16).relu().view(y.shape))


def test_a_width_that_is_written_down_and_fits_the_example_by_chance():
    """Of 2 x 5 rows of 8 entries 5 rows of 16 are made, of 3 x 7 rows none."""
    model = WritesItsWidth().eval()
    small = fxprune.prune(model, 0.5, torch.randn(2, 5, 4), same_class=True)
    assert type(small) is WritesItsWidth and small.one.out_features == 8
    x = torch.randn(3, 7, 4)
    assert torch.allclose(small(x), fxprune.prune(model, 0.5, torch.randn(2, 5, 4))(x))
