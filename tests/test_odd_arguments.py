"""Arguments and models that nobody foresaw: one PruneError that says what it is, or a right result."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxprune


def two_layers():
    return nn.Sequential(nn.Linear(40, 80), nn.ReLU(), nn.Linear(80, 2)).eval()


X = torch.randn(2, 40)


@pytest.mark.parametrize("name", ["params", "macs", "memory", "latency", "ratio"])
@pytest.mark.parametrize(
    "value",
    [10**400, -(10**400), 10**5000, Fraction(10**400), float("inf"), float("nan")],
    ids=["huge", "negative", "too long", "fraction", "infinite", "nan"],
)
def test_numbers_that_no_float_can_be(name, value):
    with pytest.raises(
        fxprune.PruneError, match=f"{name} must be a (positive )?(number|share)|{name} must be a share"
    ) as error:
        fxprune.prune(two_layers(), example_inputs=X, **{name: value})
    assert len(str(error.value)) < 300


def test_a_share_that_no_latency_has():
    with pytest.raises(fxprune.PruneError, match="latency must be a share up to 1, or a time, not 1e-320"):
        fxprune.prune(two_layers(), example_inputs=X, latency=1e-320)


@pytest.mark.parametrize(
    "name", ["ratio", "params", "freeze", "release", "scopes", "ranking", "verify", "round_to", "criterion"]
)
def test_a_tensor_is_told_by_its_shape(name):
    model = two_layers()
    weight = model[0].weight
    given = {"ratio": {weight: 0.5}} if name == "ratio" else {name: weight}
    if name not in ("ratio", "params"):
        given["ratio"] = 0.5
    with pytest.raises(fxprune.PruneError, match=r"a Parameter of shape \(80, 40\)"):
        fxprune.prune(model, example_inputs=X, **given)


@pytest.mark.parametrize("given", [{"data": 5}, {"data": X}, {"loss": 5}])
def test_data_is_checked_by_criteria_that_need_none(given):
    with pytest.raises(fxprune.PruneError, match=r"data must be batches|loss must be a function"):
        fxprune.prune(two_layers(), 0.5, X, **given)


def test_elements_of_complex_parameters_count_as_two():
    first = nn.Linear(4, 6, dtype=torch.complex64)
    model = nn.Sequential(first, nn.Linear(6, 2, dtype=torch.complex64)).eval()
    pruned = fxprune.prune(model, 0.5, torch.randn(3, 4, dtype=torch.complex64))
    score = first.weight.abs().square().sum(1) + first.bias.abs().square() + model[1].weight.abs().square().sum(0)
    assert torch.equal(pruned[0].weight, first.weight[score.topk(3).indices.sort().values])
    assert pruned.verification.ok


def test_fake_tensors():
    with FakeTensorMode():
        model = two_layers()
    with pytest.raises(fxprune.PruneError, match=r"0\.weight is a FakeTensor: it has no values"):
        fxprune.prune(model, 0.5, X)


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")])
def test_modes_that_the_caller_is_in(mode):
    model = two_layers()
    with mode():
        pruned = fxprune.prune(model, 0.5, X)
    assert pruned.verification.ok
    assert type(pruned(X)) is torch.Tensor and not pruned(X).is_meta


class Drawing(nn.Module):
    """Draws a number in every forward; where it reads values as well, it is one node of the program."""

    def __init__(self, draw, reads):
        super().__init__()
        self.first, self.last = nn.Linear(40, 8), nn.Linear(8, 2)
        self.draw, self.reads = draw, reads

    def forward(self, x):
        h = self.first(x)
        if self.reads and float(h.detach().sum()) > 1e9:
            h = -h
        return self.last(h * self.draw())


DRAWS = [lambda: random.uniform(1, 2), lambda: float(np.random.rand() + 1)]


def states():
    return random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("draw", DRAWS, ids=["random", "numpy"])
def test_numbers_of_other_generators_are_the_same_for_both(draw):
    model, before = Drawing(draw, reads=True).eval(), states()
    pruned = fxprune.prune(model, 0.5, X)
    assert states() == before
    assert pruned.verification.ok
    assert not torch.equal(pruned(X), pruned(X))


@pytest.mark.parametrize("draw", DRAWS, ids=["random", "numpy"])
def test_a_number_that_would_be_that_of_the_capture_for_ever_is_refused(draw):
    before = states()
    with pytest.raises(fxprune.PruneError, match="not exact") as error:
        fxprune.prune(Drawing(draw, reads=False).eval(), 0.5, X)
    assert error.value.fix == "torch.rand in place of random and numpy.random"
    assert states() == before


def test_the_report_names_layers_that_the_example_does_not_use():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.auxiliary = nn.Linear(40, 8), nn.Linear(8, 2), nn.Linear(8, 3)
            self.norm = nn.BatchNorm1d(8)  # its count of batches is not used in evaluation

        def forward(self, x, more=False):
            h = self.norm(self.first(x))
            return self.auxiliary(h) if more else self.last(h)

    model = Auxiliary().eval()
    found = fxprune.report(model, fxprune.prune(model, 0.5, X))
    assert found.unused == ("auxiliary",)
    assert "not used on the example inputs, and so left as they are: auxiliary" in str(found)


def test_the_plan_of_a_model_pruned_twice_says_what_it_is_of():
    model = two_layers()
    once = fxprune.prune(model, 0.5, X)
    twice = fxprune.prune(once, 0.5, X)
    plan = fxprune.plan_of(twice)
    torch.testing.assert_close(plan.apply(model)(X), twice(X))
    torch.testing.assert_close(twice.meta["step"].apply(once)(X), twice(X))
    with pytest.raises(fxprune.PruneError, match=r"which was pruned already") as error:
        plan.apply(once)
    assert "meta['step']" in error.value.fix
