"""Arguments and models that nobody foresaw: one PruneError that says what it is, or a right result."""

import copy
import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxprune
from fxprune.passes.errors import GuardError


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
    """Draws a number in every forward, and may read values: it is one node of the program."""

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


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("draw", DRAWS, ids=["random", "numpy"])
def test_numbers_of_other_generators_are_the_same_for_both(draw, reads):
    model, before = Drawing(draw, reads).eval(), states()
    pruned = fxprune.prune(model, 0.5, X)
    assert states() == before
    assert pruned.verification.ok
    assert not torch.equal(pruned(X), pruned(X))


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


# -- arguments that forward has defaults for ----------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, doubled=None, scale=2.0, mask=None, *, shift=None, **more):
        y = self.a(x).relu() * scale
        if doubled is None:
            doubled = True
        y = y * 2 if doubled else y
        y = y if mask is None else y * mask
        y = y if shift is None else y + shift
        y = self.b(y + 1 if more.get("raised") else y)
        return (y,) if more.get("named") is False else {"y": y}["y"]


def optional(**given):
    x = torch.randn(3, 8)
    model = Optional().eval()
    return x, fxprune.prune(model, 0.5, example_inputs={"x": x, **given}), model


def test_an_argument_with_a_default_may_be_left_out_and_means_what_the_example_gave():
    x, pruned, _ = optional(doubled=False, shift=None, raised=True)
    wanted = pruned(x, doubled=False, shift=None, raised=True)
    kept = (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), pruned.flat(), torch.compile(pruned, backend="eager"))
    exported = torch.export.export(pruned, (x,)).module()
    for model in (pruned, *kept, exported):
        assert torch.equal(model(x), wanted)
    for mode in (pruned.train(), pruned.eval()):
        assert torch.equal(mode(x), wanted) and torch.equal(mode(x, False), wanted)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("doubled", True, "False where it is True now"),
        ("doubled", None, "False where it is None now"),
        ("shift", torch.ones(1), "None where it is a tensor now"),
        ("mask", None, "a tensor where it is None now"),
        ("raised", False, "True where it is False now"),
        ("lowered", True, "where more has raised, and here it has lowered"),
    ],
)
def test_another_value_than_the_programs_is_an_error_not_ignored(name, value, said):
    x, pruned, _ = optional(doubled=False, shift=None, mask=torch.ones(1), raised=True)
    with pytest.raises(GuardError, match=f"{said}"):
        pruned(x, **{"mask": torch.ones(1), name: value})


def test_a_flag_may_be_asked_for_by_identity():
    x, pruned, _ = optional(named=False)
    assert type(pruned(x)) is type(pruned(x, named=False)) is tuple


def test_export_by_name_where_the_example_left_out_arguments_before():
    """What is exported is called by place inside: the program has no arguments but those that the example gives."""
    x, pruned, _ = optional(mask=torch.ones(1), shift=None)
    given = {"x": x, "mask": torch.full((1,), 0.5), "shift": None}
    assert torch.allclose(torch.export.export(pruned, (), given).module()(**given), pruned(**given))


def test_a_tracer_of_fx_goes_over_a_keyword():
    x, pruned, _ = optional(raised=True)
    assert torch.equal(torch.fx.symbolic_trace(pruned)(x, raised=True), pruned(x))


def test_a_number_that_the_program_computes_with_has_the_default_of_forward():
    x, pruned, model = optional(scale=3.0)
    kept = fxprune.prune(model, 0.5, example_inputs=x)
    assert torch.allclose(pruned(x), kept(x)) and not torch.allclose(pruned(x, scale=3.0), kept(x))


def test_a_tensor_with_a_default_is_asked_for_where_it_is_left_out():
    x, pruned, _ = optional(mask=torch.ones(16)[:1], doubled=True)
    with pytest.raises(GuardError, match=r"prune with this mask in example_inputs.*: a tensor where it is None now"):
        pruned(x)
