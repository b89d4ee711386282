"""Criteria that need no data, and their options, against slow, obvious references: loops over units, and closed forms."""

import copy

import numpy as np
import pytest
import torch
from refusals import untouched
from scored import SPANS, agree, batch, built, scores, summed
from torch import nn

import fxprune
from fxprune import criteria
from fxprune.criteria.aggregation import NORMALISE, REDUCE


@pytest.fixture
def small():
    return built()


@pytest.mark.parametrize("p", [1, 2, 3, 0.5])
def test_magnitude_is_the_sum_of_powers(small, p):
    wanted = summed(small, lambda n: small.get_parameter(n).abs() ** p)
    agree(scores(small, batch()[0], fxprune.Magnitude(p=p)), wanted)


def test_magnitude_by_name_is_l2(small):
    agree(scores(small, batch()[0], "magnitude"), scores(small, batch()[0], fxprune.Magnitude(p=2)))


def test_lamp_is_the_papers_formula_times_the_number_of_units():
    """Every weight's square over the sum of the squares of those that are not smaller; a unit is one of n."""
    made = NORMALISE["lamp"]
    values = torch.rand(9, generator=torch.Generator().manual_seed(0)).double().numpy()
    for v, got in zip(values, made(values)):
        assert got == pytest.approx(9 * v / sum(u for u in values if u >= v))
    assert max(made(values)) == 9.0


def test_lamp_takes_the_same_share_of_families_of_equal_units():
    """Whatever their size: one threshold on the paper's scores would leave each of them the same number of units."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    small = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 4), criterion="lamp", ranking="global")
    assert [small.get_submodule(n).out_features for n in ("0", "2")] == [4, 16]


def test_lamp_compares_units_of_different_layers():
    """Half of all units go: those with the lowest scores, worked out one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2)).double()
    with torch.no_grad():
        for tensor in (model[0].weight.T, model[0].bias, model[2].weight):
            tensor *= 4.0 ** torch.arange(6)  # a few units of the first layer count for nearly all of it
    one, two, three = model[0], model[2], model[4]
    lamp = []
    for made, read in ((one, two), (two, three)):
        square = [
            sum(v.square().sum().item() for v in (made.weight[i], made.bias[i], read.weight[:, i]))
            for i in range(len(made.bias))
        ]
        lamp.append([len(square) * v / sum(u for u in square if u >= v) for v in square])
    lowest = sorted(v for layer in lamp for v in layer)[:8]
    wanted = [sum(v > lowest[-1] for v in layer) for layer in lamp]
    x = torch.randn(2, 3).double()
    small = fxprune.prune(model, 0.5, example_inputs=x, criterion="lamp", ranking="global", floor=0)
    assert [small.get_submodule(n).out_features for n in ("0", "2")] == wanted
    assert wanted != [3, 5]


def test_fpgm_is_the_sum_of_distances_to_the_other_filters(small):
    one, two, head = small.one.weight, small.two.weight, small.head.weight

    def to_others(weight, dim):
        rows = weight.movedim(dim, 0).flatten(1)
        return torch.stack([sum(torch.dist(a, b) for b in rows) for a in rows])

    wanted = {"one": to_others(one, 0) + to_others(two, 1), "two": to_others(two, 0) + to_others(head, 1)}
    agree(scores(small, batch()[0], "fpgm"), wanted)


def test_fpgm_of_a_filter_that_occurs_twice():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4, 0, 0], [3, 4, 0, 0], [0, 0, 0, 0]]))
        model[2].weight.zero_()
    assert scores(model, torch.randn(1, 4), "fpgm")["0"].tolist() == [5, 5, 10]


def test_bn_scale_is_the_scale(small):
    agree(scores(small, batch()[0], "bn_scale"), {"one": small.norm.weight.abs()})


class ByHand(nn.Module):
    """RMS normalisation in plain tensor operations: nothing here says that `gain` is a scale."""

    def __init__(self, norm=None):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)
        self.norm = norm
        self.gain = nn.Parameter(torch.randn(8)) if norm is None else None

    def forward(self, x):
        x = self.up(x)
        if self.norm is not None:
            return self.down(self.norm(x))
        return self.down(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(8), nn.BatchNorm1d(8), nn.RMSNorm(8)], ids=str)
def test_bn_scale_asks_for_no_layer(norm):
    model = ByHand(norm).eval()
    scale = model.gain if norm is None else norm.weight
    with torch.no_grad():
        scale.normal_()
    found = scores(model, torch.randn(2, 5), "bn_scale")["up"]
    torch.testing.assert_close(found, scale.detach().abs().double())


def test_a_family_without_a_scale_stays_whole_under_bn_scale(small):
    pruned = fxprune.prune(small, 0.5, example_inputs=batch()[0], criterion="bn_scale")
    assert pruned.one.out_channels == 4 and pruned.two.out_channels == 6


def test_random_depends_on_its_seed_alone(small):
    x = batch()[0]
    state = torch.get_rng_state()
    a, b, c = (scores(small, x, criteria.Random(seed=s))["one"] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_any_callable_is_a_criterion(small):
    def cubes(weight):
        return weight.abs() ** 3

    agree(scores(small, batch()[0], cubes), scores(small, batch()[0], fxprune.Magnitude(p=3)))


def test_a_callable_sees_whole_parameters():
    """One that is not marked as elementwise may compare elements: it is never given a block."""
    model = nn.Sequential(nn.Linear(64, 8192), nn.ReLU(), nn.Linear(8192, 2))
    seen = []

    def relative(weight):
        seen.append(tuple(weight.shape))
        return weight.abs() / weight.abs().max()

    scores(model, torch.randn(1, 64), relative)
    assert set(seen) == {(8192, 64), (8192,), (2, 8192)}


@pytest.mark.parametrize("reduce", REDUCE)
def test_layers_of_a_family_are_put_together_as_asked(small, reduce):
    layers = {
        family: torch.stack(
            [
                torch.stack([small.get_parameter(n).detach().abs().select(d, i).sum() for n, d in places])
                for i in range(small.get_parameter(places[0][0]).shape[0])
            ]
        )
        for family, places in SPANS.items()
    }
    by_hand = {
        "sum": lambda v: v.sum(1),
        "mean": lambda v: v.sum(1) / v.shape[1],
        "max": lambda v: v.max(1).values,
        "prod": lambda v: v.prod(1),
        "first": lambda v: v[:, 0],
        "geometric": lambda v: v.prod(1) ** (1 / v.shape[1]),
    }
    wanted = {family: by_hand[reduce](v) for family, v in layers.items()}
    agree(scores(small, batch()[0], fxprune.Magnitude(p=1, reduce=reduce)), wanted)


@pytest.mark.parametrize("normalise", NORMALISE)
def test_normalisers_keep_the_order(normalise):
    values = torch.rand(11, generator=torch.Generator().manual_seed(1)).double().numpy()
    made = NORMALISE[normalise](values)
    assert (made.argsort() == values.argsort()).all()


def test_normalisers_are_what_they_say():
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).numpy()
    assert (NORMALISE["none"](values) == values).all()
    assert NORMALISE["mean"](values).mean() == pytest.approx(1)
    assert NORMALISE["max"](values).max() == 1
    assert NORMALISE["sum"](values).sum() == pytest.approx(1)
    made = NORMALISE["standardise"](values)
    assert made.mean() == pytest.approx(0) and made.std() == pytest.approx(1)
    flat = NORMALISE["standardise"](values * 0 + 3)
    assert (flat == 0).all(), "a family of equal scores has no spread to divide by"


@pytest.mark.parametrize(
    "change", [lambda w: w.detach().abs_(), lambda w: w.data.zero_() + 1, lambda w: w.detach().to_sparse()]
)
def test_a_function_of_ones_own_does_not_change_the_model(change):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict())
    assert fxprune.prune(model, 0.5, x, criterion=change)[0].out_features == 4
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@pytest.mark.parametrize(
    "what, give", [("complex numbers", torch.Tensor.cfloat), ("a tensor without values", lambda w: w.to("meta"))]
)
def test_scores_that_are_no_numbers_are_refused(what, give):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(fxprune.PruneError, match=f" returns {what}\n"):
        fxprune.prune(model, 0.5, torch.randn(3, 4), criterion=give)


class Methods:
    """A criterion whose methods are those that are given."""

    def __init__(self, **methods):
        vars(self).update(methods)

    def __call__(self, weight):
        return weight.abs()


WRONG_METHODS = {
    "raises ZeroDivisionError": {"score_dims": lambda weight, evidence, dims: 1 / 0},
    r"returns shape \(7,\) for dimensions \(0,\) of shape": {"score_dims": lambda weight, evidence, dims: torch.zeros(7)},
    "raises ZeroDivisionError: ": {"score_units": lambda count: 1 / 0},
    "returns an? (ndarray|array)": {"score_units": lambda count: np.zeros(3)},
    "returns 'many' for": {"score_units": lambda count: "many"},
    "raises KeyError": {"finish_layer": lambda layer: {}["layer"]},
    "returns 3.0 for": {"finish_layer": lambda layer: 3.0},
}


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("what", WRONG_METHODS)
def test_methods_of_a_criterion_that_are_wrong_are_named(what, plain):
    with untouched(plain), pytest.raises(fxprune.PruneError, match=f"^the criterion Methods ({what})"):
        fxprune.prune(plain, 0.5, torch.ones(3, 4), criterion=Methods(**WRONG_METHODS[what]))


def test_a_method_of_a_criterion_does_not_change_the_model(plain):
    def score_dims(weight, evidence, dims):
        rest = [d for d in range(weight.dim()) if d not in dims]
        return weight.abs_().amax(rest, keepdim=True) if rest else weight.abs_()

    with untouched(plain):
        fxprune.prune(plain, 0.5, torch.ones(3, 4), criterion=Methods(score_dims=score_dims))
