"""Repair on a little data: what is held out decides what is changed, and batches come in any form that the model takes."""

from collections import UserDict

import pytest
import torch
from refusals import untouched
from stepping import residual, vit
from torch import nn

import fxprune
from fxprune.criteria.calibration import Batch
from fxprune.repairs.held_out import split, t_quantile
from fxprune.repairs.inputs import Matrix
from fxprune.repairs.least_squares import RIDGES, NormalEquations, fit

DOUBLE = torch.float64


def distance(model, other, x):
    with torch.no_grad():
        return float((model(x) - other(x)).square().mean().sqrt())


def mobile():
    """Depthwise convolutions with batch normalisation behind them, at random: what a fit to a few samples is worst for."""
    layers, width = [nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.Hardswish()], 16
    for _ in range(6):
        layers += [nn.Conv2d(width, 48, 1, bias=False), nn.BatchNorm2d(48), nn.Hardswish()]
        layers += [nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), nn.BatchNorm2d(48), nn.Hardswish()]
        layers += [nn.Conv2d(48, width, 1, bias=False), nn.BatchNorm2d(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).double().eval()


MODELS = {
    "mobile": (mobile, (3, 32, 32)),
    "residual": (residual, (3, 8, 8)),
    "transformer": (vit, (3, 16, 16)),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).double(),
        (40,),
    ),
}


@pytest.mark.parametrize("samples", [3, 4, 24])
@pytest.mark.parametrize("kind", MODELS)
def test_other_inputs_are_never_worse_off(kind, samples):
    make, shape = MODELS[kind]
    for seed in range(2):
        torch.manual_seed(seed)
        model, others = make().eval(), torch.randn(64, *shape, dtype=DOUBLE)
        pruned = fxprune.prune(model, 0.5, example_inputs=others[:2])
        better = fxprune.repair(model, pruned, [torch.randn(samples, *shape, dtype=DOUBLE)])
        assert distance(model, better, others) <= 1.02 * distance(model, pruned, others)


def test_enough_data_makes_it_better():
    """So the test above does not hold for want of any change."""
    for kind, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        model, others = make().eval(), torch.randn(64, *shape, dtype=DOUBLE)
        pruned = fxprune.prune(model, 0.5, example_inputs=others[:2])
        better = fxprune.repair(model, pruned, [torch.randn(160, *shape, dtype=DOUBLE)])
        assert distance(model, better, others) < 0.8 * distance(model, pruned, others), kind
        found = better.meta["repair"]
        assert found.samples == (120, 40) and found.share == 1 and found.done


@pytest.mark.parametrize("method", [None, "reconstruct", "compensate"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_branches_that_went_are_gone_from_what_is_repaired(norm, method):
    """Errors are those of the models themselves, and what is left makes up for the branches."""
    torch.manual_seed(0)
    model, x, others = Layers(8, 3, norm).double().eval(), torch.randn(200, 8).double(), torch.randn(100, 8).double()
    pruned = fxprune.prune(model, 0.5, example_inputs=x[:2], depth=True)
    assert pruned.meta["branches"]
    better = fxprune.repair(model, pruned, [x], method=method, held_out=0)
    off = [distance(model, m, x) / float(model(x).detach().square().mean().sqrt()) for m in (pruned, better)]
    assert better.meta["repair"].error == pytest.approx(off)
    assert distance(model, better, others) < distance(model, pruned, others)


class Layers(nn.Module):
    """Layers of linear maps and norms, of any width."""

    def __init__(self, width, depth, norm):
        super().__init__()
        self.norms = nn.ModuleList(norm(width) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(up(norm(x)).relu())
        return self.head(x)


def noisy(rows):
    """A hidden layer of 64 of which the fit sees few samples, and a first layer that no data could repair."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    x = torch.randn(rows, 200, dtype=DOUBLE)
    return model, fxprune.prune(model, 0.5, example_inputs=x[:2]), x


def test_a_layer_that_gets_no_closer_keeps_its_weights():
    model, pruned, x = noisy(8)
    better = fxprune.repair(model, pruned, [x], method="reconstruct", ridge=0)
    found = better.meta["repair"]
    assert [(s.layer, s.done) for s in found.steps] == [("2.weight", False)]
    before, after = found.steps[0].error
    assert after > before, "8 samples for 32 inputs"
    assert found.steps[0].note == "on the data held out its result would be no closer to the original's"
    assert all(torch.equal(a, b) for a, b in zip(better.state_dict().values(), pruned.state_dict().values(), strict=True))
    assert found.share == 0 and found.error[0] == found.error[1] == pytest.approx(before)


def test_errors_are_those_on_the_rows_held_out():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double(), torch.randn(160, 4, dtype=DOUBLE)
    pruned = fxprune.prune(model, 0.5, example_inputs=x[:2])
    found = fxprune.repair(model, pruned, [x], method="reconstruct")
    held = x[3::4]
    with torch.no_grad():
        errors = [float((m(held) - model(held)).norm() / model(held).norm()) for m in (pruned, found)]
    report = found.meta["repair"]
    assert report.error == pytest.approx(errors) and report.steps[0].error == pytest.approx(errors)
    assert "of the output on 40 samples held out was" in str(report)


def test_layers_that_help_alone_are_undone_if_the_model_does_not_come_closer():
    """Behind the repaired layer the original is constant, and what is pruned is trained to be nearly so."""

    class Parity(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 2)

        def forward(self, x):
            return torch.frac(self.down(self.up(x).tanh()) * 1e6)

    torch.manual_seed(0)
    model, x = Parity().double(), torch.randn(200, 6, dtype=DOUBLE)
    pruned = fxprune.prune(model, 0.5, example_inputs=x[:2], verify=False)
    better = fxprune.repair(model, pruned, [x])
    found = better.meta["repair"]
    assert found.share == 0 and not found.done
    assert {s.note for s in found.steps} == {
        "on the samples held out the output of the model would be no closer to the original's"
    }
    assert all(torch.equal(a, b) for a, b in zip(better.state_dict().values(), pruned.state_dict().values(), strict=True))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_too_few_samples_to_hold_any_out(samples):
    model, pruned, x = noisy(samples)
    better = fxprune.repair(model, pruned, [x])
    assert all(torch.equal(a, b) for a, b in zip(better.state_dict().values(), pruned.state_dict().values(), strict=True))
    why = f"{samples} sample{'s' * (samples > 1)}: too few to hold some out; four are needed, or held_out=0"
    assert {(s.done, s.note) for s in better.meta["repair"].steps} == {(False, why)}


def test_a_head_of_zeros_has_no_error():
    model, _, x = noisy(20)
    nn.init.zeros_(model[2].weight), nn.init.zeros_(model[2].bias)
    pruned = fxprune.prune(model, 0.5, example_inputs=x[:2])
    assert fxprune.repair(model, pruned, [x]).meta["repair"].error == (0.0, 0.0)


def test_the_ridge_is_the_one_with_the_least_error_on_what_is_held_out():
    torch.manual_seed(0)
    for rows, noise in ((12, 3.0), (30, 1.0), (2000, 0.1)):
        weight = torch.randn(1, 20, 4, dtype=DOUBLE)
        parts = []
        for count in (rows, 400):
            x = torch.randn(1, count, 20, dtype=DOUBLE)
            parts.append((x, x @ weight + noise * torch.randn(1, count, 4, dtype=DOUBLE)))
        normal, held = NormalEquations(True), NormalEquations(True)
        for equations, (x, r) in zip((normal, held), parts, strict=True):
            equations.add(Matrix(x), r)
        change, shift, _ = fit(normal, None, held.left)
        x, r = parts[1]
        error = lambda c, s: float((r - x @ c - s).square().sum())  # noqa: E731
        assert error(change, shift) == pytest.approx(min(error(*normal.solve(ridge)) for ridge in RIDGES))


def test_what_is_held_out_lies_among_the_rest():
    def parts(sizes, share):
        batches = [Batch((torch.arange(n),), {}, (), n) for n in sizes]
        return [(b.args[0].tolist(), held) for b, held in split(batches, share)]

    assert parts([4], 0.25) == [([0, 2], False), ([1, 3], True)]
    assert parts([8], 0.25) == [([0, 1, 2, 4, 5, 6], False), ([3, 7], True)]
    assert parts([2, 1, 1], 0.25) == [([0], False), ([1], True), ([0], False), ([0], True)]
    assert parts([3], 0.25) == [([0, 1, 2], False)] and parts([9], 0) == [([*range(9)], False)]
    many = parts([5] * 8, 0.25)
    assert [rows for rows, _ in many] == [[*range(5)]] * 8 and [i for i, (_, held) in enumerate(many) if held] == [3, 7]


# -- batches of any form --------------------------------------------------------------------------------------------------


class Optional(nn.Module):
    """Takes a mask, a shift and a kind for each position, or does not; and skips every second one of long inputs."""

    def __init__(self):
        super().__init__()
        self.up, self.kinds, self.down = nn.Linear(5, 12), nn.Embedding(3, 12), nn.Linear(12, 3)

    def hidden(self, x, mask=None, shift=None, kind=None):
        h = self.up(x)
        if x.shape[1] > 10:
            h = h[:, ::2]
        if shift is not None:
            h = h + shift.unsqueeze(-1)
        if kind is not None:
            h = h + self.kinds(kind)
        h = h.tanh()
        return h if mask is None else h * mask.unsqueeze(-1)

    def forward(self, x, mask=None, *, shift=None, kind=None):
        return self.down(self.hidden(x, mask, shift, kind))


def example(batch, length, *names):
    made = {"mask": (torch.rand(batch, length) > 0.3).double(), "shift": torch.randn(batch, length, dtype=DOUBLE)}
    made["kind"] = torch.randint(3, (batch, length))
    return {"x": torch.randn(batch, length, 5, dtype=DOUBLE)} | {name: made[name] for name in names}


FORMS = {
    "more keywords": ((), [(4, "mask"), (5, "mask", "shift"), (6,)]),
    "fewer keywords": (("mask", "shift"), [(4,), (6, "shift"), (5, "mask", "shift")]),
    "a layer of their own": ((), [(4, "kind"), (5, "kind", "mask"), (4,)]),
    "a layer that is not always used": (("kind",), [(4, "kind"), (4,), (5, "mask")]),
    "lengths that Python decides by": ((), [(4,), (14,), (6,), (11,)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_several_forms_are_one_least_squares_problem(form):
    torch.manual_seed(0)
    model = Optional().double().eval()
    names, forms = FORMS[form]
    pruned = fxprune.prune(model, 0.5, example_inputs=example(2, 4, *names))
    data = [example(3, *each) for each in forms]
    with untouched(model), untouched(pruned):
        better = fxprune.repair(model, pruned, data, method="reconstruct", ridge=0, held_out=0)
    stays = fxprune.plan_of(pruned).slices["up.bias"][0].keep
    small = Optional().double()
    with torch.no_grad():
        small.up.weight, small.up.bias = nn.Parameter(model.up.weight[stays]), nn.Parameter(model.up.bias[stays])
        small.kinds.weight = nn.Parameter(model.kinds.weight[:, stays])
        rows = torch.cat([small.hidden(**batch).flatten(0, 1) for batch in data])
        wanted = torch.cat([model(**batch).flatten(0, 1) for batch in data])
        columns = torch.cat([rows, torch.ones(len(rows), 1, dtype=DOUBLE)], 1)
        solution = torch.linalg.lstsq(columns, wanted).solution
    torch.testing.assert_close(better.get_parameter("down.weight").detach(), solution[:-1].T, rtol=1e-7, atol=1e-9)
    assert better(**example(2, 4, *names)).shape == (2, 4, 3)


class Longer(nn.Module):
    """Long inputs go through a layer that the pruned model does not know."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.more = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x):
        h = self.up(x).tanh()
        return self.more(h) if x.shape[1] > 10 else self.down(h)


def test_a_layer_that_the_pruned_model_does_not_hold_is_left():
    torch.manual_seed(0)
    model = Longer().double().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 4, 5, dtype=DOUBLE))
    data = [torch.randn(16, length, 5, dtype=DOUBLE) for length in (4, 12, 6, 5, 7)]
    found = fxprune.repair(model, pruned, data, method="reconstruct").meta["repair"]
    assert [(s.layer, s.done, s.note) for s in found.steps if s.layer != "up.weight"] == [
        ("more.weight", False, "the pruned model does not hold it"),
        ("down.weight", True, ""),
    ]


@pytest.mark.parametrize("form", ["pair", "dict", "mapping", "pair of a mapping", "tuple"])
def test_a_batch_is_what_a_loader_yields(form):
    torch.manual_seed(0)
    model = Optional().double().eval()
    batch = example(40, 4, "mask")
    pruned = fxprune.prune(model, 0.5, example_inputs=batch)
    labels = torch.zeros(40)
    given = {
        "pair": ([batch["x"], batch["mask"]], labels),
        "dict": batch,
        "mapping": UserDict(batch),
        "pair of a mapping": (UserDict(batch), labels),
        "tuple": ((batch["x"], batch["mask"]), labels),
    }[form]
    wanted = fxprune.repair(model, pruned, [batch]).state_dict()
    found = fxprune.repair(model, pruned, [given])
    assert found.meta["repair"].done
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("criterion", ["wanda", "flap", "taylor", "fisher"])
def test_data_of_a_criterion_may_have_other_keywords_than_the_example(criterion):
    if criterion not in fxprune.criteria.CRITERIA:
        criterion = sorted(fxprune.criteria.CRITERIA)[0]
    torch.manual_seed(0)
    model = Optional().double().eval()
    data = [example(3, 4, "mask"), UserDict(example(2, 6, "mask", "shift")), (UserDict(example(2, 5)), torch.zeros(2))]
    loss = lambda out, *_: out.square().mean()  # noqa: E731
    pruned = fxprune.prune(model, 0.5, example_inputs=example(2, 4), criterion=criterion, data=data, loss=loss)
    assert pruned.get_parameter("up.weight").shape[0] == 6


def test_one_mapping_is_no_list_of_batches():
    model = Optional().double().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=example(2, 4))
    with pytest.raises(fxprune.PruneError, match="data must be batches, not a UserDict"):
        fxprune.repair(model, pruned, UserDict(example(2, 4)))


def test_quantiles_of_t_are_those_of_the_tables():
    for degrees, value in {1: 25.452, 2: 6.205, 3: 4.177, 5: 3.163, 10: 2.634, 30: 2.360, 10**6: 2.241}.items():
        assert t_quantile(degrees) == pytest.approx(value, rel=0.02)
