"""Repair without training, against what can be computed by hand, by `torch.linalg.lstsq`, or from the original."""

import copy

import pytest
import torch
import torch.nn.functional as F
from refusals import IMAGES, net, refuses, untouched
from torch import nn

import fxprune
from fxprune.repairs import least_squares
from fxprune.repairs.look_ahead import Path, Trace

DOUBLE = torch.float64


def pruned_by_half(model, x, **options):
    return fxprune.prune(model, 0.5, example_inputs=x, **options)


def kept(pruned, name):
    """Which indices of the first dimension of a parameter are left."""
    return fxprune.plan_of(pruned).slices[name][0].keep


def repaired(model, pruned, x, method, held_out=0, **options):
    """Fitted to all of the data, as the formulas are."""
    return fxprune.repair(model, pruned, [x], method=method, held_out=held_out, **options)


def same(a, b, **options):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, **options)


# -- reconstruct ----------------------------------------------------------------------------------------------------------


def optimum(layer, source, target):
    """The result closest to `target` that a layer can have by any weight and bias: a column for each of their entries."""
    layer = copy.deepcopy(layer)
    columns = []
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        for p in layer.parameters():
            for i in range(p.numel()):
                p.view(-1)[i] = 1
                columns.append(layer(source).reshape(-1))
                p.view(-1)[i] = 0
    matrix = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(matrix, target.reshape(-1, 1), driver="gelsd").solution
    return (matrix @ solution).reshape(target.shape)


LAYERS = {
    "linear": (nn.Linear(8, 3), (40, 5)),
    "linear without bias": (nn.Linear(8, 3, bias=False), (40, 5)),
    "conv1d": (nn.Conv1d(8, 4, 3, padding=1), (6, 3, 9)),
    "strided, padded": (nn.Conv2d(8, 4, 3, stride=2, padding=1), (8, 3, 7, 6)),
    "dilated": (nn.Conv2d(8, 4, 3, dilation=2, padding=(2, 1)), (8, 3, 7, 6)),
    "uneven": (nn.Conv2d(8, 4, (3, 1), stride=(1, 2), padding=(0, 1), bias=False), (8, 3, 7, 6)),
    "grouped": (nn.Conv2d(8, 4, 3, groups=2, padding=1), (8, 3, 6, 6)),
    "conv3d": (nn.Conv3d(8, 2, 2), (6, 3, 4, 5, 4)),
    "transposed": (nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1), (6, 3, 4, 5)),
    "transposed, grouped": (nn.ConvTranspose1d(8, 4, 4, stride=3, groups=2, dilation=2), (9, 3, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_reconstruct_reaches_the_least_squares_optimum(kind):
    torch.manual_seed(1)
    layer, shape = LAYERS[kind]
    layer.reset_parameters()  # made at import, before any seed; by chance there may be nothing to gain
    before = nn.Linear(5, 8) if len(shape) == 2 else {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](3, 8, 1)
    model = nn.Sequential(before, nn.Tanh(), copy.deepcopy(layer)).double().eval()
    x = torch.randn(shape, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    assert pruned.get_submodule("0").weight.shape[0] == 4
    with torch.no_grad():
        hidden = pruned.get_submodule("0")(x).tanh()
        wanted = optimum(pruned.get_submodule("2"), hidden, model(x))
        result = repaired(model, pruned, x, "reconstruct", ridge=0)
        same(result(x), wanted)
        assert (pruned(x) - model(x)).norm() > 1.2 * (wanted - model(x)).norm(), "there was something to gain"


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("ridge", [0.01, 0.3])
def test_a_layer_with_too_many_inputs_for_the_normal_equations_is_fitted_in_steps(kind, ridge, monkeypatch):
    """Both ways solve the same least squares: the same weights, and the same errors reported."""
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    layer.reset_parameters()  # made at import, before any seed
    before = nn.Linear(5, 8) if len(shape) == 2 else {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)](3, 8, 1)
    model = nn.Sequential(before, nn.Tanh(), copy.deepcopy(layer)).double().eval()
    batches = torch.randn(shape, dtype=DOUBLE).split(3)
    pruned = pruned_by_half(model, batches[0])
    at_once = fxprune.repair(model, pruned, batches, method="reconstruct", ridge=ridge, held_out=0)
    monkeypatch.setattr(least_squares, "WIDE", 0)
    monkeypatch.setattr(least_squares, "STEPS", 500)
    monkeypatch.setattr(least_squares, "ENOUGH", 1e-10)
    in_steps = fxprune.repair(model, pruned, batches, method="reconstruct", ridge=ridge, held_out=0)
    assert [s.note.endswith("inputs: in steps") for s in in_steps.meta["repair"].steps] == [True]
    for a, b in zip(at_once.state_dict().values(), in_steps.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    for a, b in zip(at_once.meta["repair"].steps, in_steps.meta["repair"].steps, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-6, abs=1e-9)


def test_what_a_call_adds_to_its_product_is_no_part_of_it(monkeypatch):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = nn.Linear(5, 8), nn.Parameter(torch.randn(8, 5))

        def forward(self, x):
            return torch.addmm(x, self.first(x).tanh(), self.weight)

    torch.manual_seed(0)
    model = Adds().double().eval()
    x = torch.randn(40, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    at_once = repaired(model, pruned, x, "reconstruct", ridge=0.1)
    assert [s.done for s in at_once.meta["repair"].steps] == [True]
    monkeypatch.setattr(least_squares, "WIDE", 0)
    monkeypatch.setattr(least_squares, "ENOUGH", 1e-10)
    same(repaired(model, pruned, x, "reconstruct", ridge=0.1)(x), at_once(x))


def test_a_layer_with_very_many_inputs_takes_no_large_matrix():
    """30,000 inputs: the normal equations alone would be 1.8 GB in the pruned layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 30, 3), nn.Tanh(), nn.Flatten(), nn.Linear(30 * 32 * 32, 4))
    images = torch.randn(64, 3, 34, 34)
    pruned = pruned_by_half(model, images)
    better = repaired(model, pruned, images, "reconstruct")
    before, after = better.meta["repair"].error
    assert after < 0.2 * before
    assert better.meta["repair"].steps[-1].note == "15,360 inputs: in steps"


def test_reconstruct_fits_what_repaired_layers_hand_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x = torch.randn(60, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    with torch.no_grad():
        result = repaired(model, pruned, x, "reconstruct", ridge=0)
        first = pruned.get_submodule("0")(x).tanh()
        middle = model[2](model[0](x).tanh())[:, kept(pruned, "2.weight")]
        second = optimum(pruned.get_submodule("2"), first, middle)
        same(result.get_submodule("2")(first), second)
        same(result(x), optimum(pruned.get_submodule("4"), second.tanh(), model(x)))


@pytest.mark.parametrize("grouped", [nn.Conv1d(8, 8, 3, groups=2), nn.ConvTranspose1d(8, 8, 3, stride=2, groups=2)])
def test_what_is_fitted_are_the_outputs_that_are_left(grouped):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Tanh(), copy.deepcopy(grouped), nn.Tanh(), nn.Conv1d(8, 2, 1)).double()
    x = torch.randn(8, 3, 9, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    rows = kept(pruned, "2.bias")
    assert rows.tolist() != [0, 1, 2, 3]
    with torch.no_grad():
        hidden = pruned.get_submodule("0")(x).tanh()
        target = model[2](model[0](x).tanh())[:, rows]
        result = repaired(model, pruned, x, "reconstruct", ridge=0)
        same(result.get_submodule("2")(hidden), optimum(pruned.get_submodule("2"), hidden, target))
        for method in ("compensate", "reconstruct"):
            result = repaired(model, pruned, x, method)
            same(result.get_submodule("2")(hidden).mean((0, 2)), target.mean((0, 2)))


def test_each_expert_keeps_outputs_of_its_own():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.middle = nn.Parameter(torch.randn(4, 5, 8)), nn.Parameter(torch.randn(8, 24))
            self.down = nn.Parameter(torch.randn(24, 2))

        def forward(self, x):
            middle = self.middle.view(8, 4, -1).permute(1, 0, 2)
            return torch.bmm(torch.bmm(torch.bmm(x, self.up).tanh(), middle).tanh(), self.down.view(4, -1, 2))

    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(4, 30, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x, attention="dims")
    stays = fxprune.plan_of(pruned).masks(model)["middle"].any(0).view(4, 6)
    assert len({tuple(s.tolist()) for s in stays}) > 1, "experts that keep different outputs"
    result = repaired(model, pruned, x, "reconstruct", ridge=0)
    with torch.no_grad():
        hidden = torch.bmm(x, pruned.up).tanh()
        target = torch.bmm(torch.bmm(x, model.up).tanh(), model.middle.view(8, 4, 6).permute(1, 0, 2))
        for i, mask in enumerate(stays):
            wanted = torch.linalg.lstsq(hidden[i], target[i][:, mask]).solution
            same(result.middle.view(len(wanted), 4, -1)[:, i].detach(), wanted)


def test_ridge_is_towards_the_weight_there_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    x = torch.randn(30, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    weight = pruned.get_submodule("2").weight
    with torch.no_grad():
        hidden = pruned.get_submodule("0")(x).tanh()
        damping = 0.3 * hidden.square().sum(0).mean()
        rows = torch.cat([hidden, damping.sqrt() * torch.eye(4, dtype=DOUBLE)])
        targets = torch.cat([model(x), damping.sqrt() * weight.T])
        wanted = torch.linalg.lstsq(rows, targets).solution.T
        same(repaired(model, pruned, x, "reconstruct", ridge=0.3).get_submodule("2").weight.detach(), wanted)
        stiff = repaired(model, pruned, x, "reconstruct", ridge=1e12).get_submodule("2").weight
        torch.testing.assert_close(stiff, weight, rtol=1e-6, atol=1e-9)


class Products(nn.Module):
    """A loose weight on either side of a product, and one for each entry of a batch."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.up = kind, nn.Linear(5, 8)
        shape = {"right": (8, 3), "left": (3, 8), "vector": (3, 8), "experts": (4, 8, 3)}[kind]
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        h = self.up(x).tanh()
        if self.kind == "right":
            return h @ self.weight
        if self.kind == "left":
            return self.weight @ h.T
        if self.kind == "vector":
            return self.weight @ h[0]
        return torch.bmm(h, self.weight)


@pytest.mark.parametrize("kind", ["right", "left", "experts"])
def test_reconstruct_knows_products_not_layers(kind):
    torch.manual_seed(0)
    model = Products(kind).double()
    x = torch.randn((4, 20, 5) if kind == "experts" else (20, 5), dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    with torch.no_grad():
        hidden = pruned.get_submodule("up")(x).tanh()
        target = model(x).mT if kind == "left" else model(x)
        wanted = torch.linalg.lstsq(hidden, target).solution
        found = repaired(model, pruned, x, "reconstruct", ridge=0).weight.detach()
        same(found.mT if kind == "left" else found, wanted)


def test_a_product_with_one_row_is_fitted_exactly_by_the_smallest_change():
    torch.manual_seed(0)
    model = Products("vector").double()
    x = torch.randn(2, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    with torch.no_grad():
        hidden = pruned.get_submodule("up")(x)[0].tanh()
        residual = model(x) - pruned(x)
        result = repaired(model, pruned, x, "reconstruct", ridge=0)
        same(result(x), model(x))
        same(result.weight - pruned.weight, torch.outer(residual, hidden) / hidden.square().sum())
    assert [s.note for s in result.meta["repair"].done] == ["1 samples and positions for 4 inputs: more data would help"]


def test_two_batches_are_one(every):
    model, x = every
    pruned = pruned_by_half(model, x)
    for method in ("reconstruct", "compensate", "recalibrate"):
        whole = repaired(model, pruned, x, method)
        parts = fxprune.repair(model, pruned, [x[:5], x[5:]], method=method, held_out=0)
        for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.fixture
def every():
    """A model with a normalisation behind a convolution without bias, a branch, groups and a linear layer."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            x = self.depthwise(torch.relu(x + self.branch(x)))
            return self.head(F.gelu(x).mean((2, 3)))

    model = Net().double().eval()
    for norm in (model.stem[1], model.branch[1]):
        for value in (norm.weight, norm.running_var):
            nn.init.uniform_(value, 0.5, 1.5)
        for value in (norm.bias, norm.running_mean):
            nn.init.normal_(value, std=0.3)
    return model, torch.randn(12, 3, 8, 8, dtype=DOUBLE)


def test_reconstruct_brings_the_output_closer_and_says_by_how_much(every):
    model, x = every
    pruned = pruned_by_half(model, x)
    result = repaired(model, pruned, x, "reconstruct")
    found = result.meta["repair"]
    with torch.no_grad():
        for module, error in zip((pruned, result), found.error):
            assert error == pytest.approx(float((module(x) - model(x)).norm() / model(x).norm()), rel=1e-9)
    assert found.error[1] < 0.5 * found.error[0]
    assert [s.layer for s in found.done] == ["branch.0.weight", "depthwise.weight", "head.weight"]
    assert all(after < before for before, after in (s.error for s in found.done))
    assert all(s.note == "" for s in found.done), "there was data enough"
    assert not found.skipped


# -- compensate -----------------------------------------------------------------------------------------------------------


def test_compensate_is_the_mean_of_what_went(every):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(30, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    gone = [i for i in range(8) if i not in kept(pruned, "0.weight").tolist()]
    result = repaired(model, pruned, x, "compensate")
    with torch.no_grad():
        baseline = model[1](model[0](x)).mean(0)  # FLAP, equation 5
        same(result.get_submodule("2").bias.detach(), model[2].bias + model[2].weight[:, gone] @ baseline[gone])
    same(result.get_submodule("2").weight, pruned.get_submodule("2").weight)


def test_compensate_makes_means_those_of_the_original(every):
    model, x = every
    pruned = pruned_by_half(model, x)
    result = repaired(model, pruned, x, "compensate")
    assert result.state_dict().keys() == pruned.state_dict().keys(), "no parameter is added"
    with torch.no_grad():
        same(result(x).mean(0), model(x).mean(0))
        assert (pruned(x).mean(0) - model(x).mean(0)).abs().max() > 1e-3
        means = {}
        for name, module in (("model", model), ("result", result)):
            hook = module.get_submodule("branch.1").register_forward_hook(lambda m, i, o, n=name: means.update({n: o}))
            module(x)
            hook.remove()
        wanted = means["model"].mean((0, 2, 3))[kept(pruned, "branch.1.weight")]
        same(means["result"].mean((0, 2, 3)), wanted)


# -- fold -----------------------------------------------------------------------------------------------------------------


def with_dead_channels(consumer, dead=(1, 4, 5)):
    """Three of six channels have scale 0 behind a normalisation, and a bias that is not."""
    torch.manual_seed(0)
    flat = isinstance(consumer, nn.Linear)
    first = nn.Linear(3, 6) if flat else nn.Conv2d(3, 6, 3)
    norm = nn.BatchNorm1d(6) if flat else nn.BatchNorm2d(6)
    model = nn.Sequential(first, norm, nn.GELU(), consumer).double().eval()
    with torch.no_grad():
        nn.init.normal_(norm.bias)
        norm.weight.fill_(1.0)
        norm.weight[list(dead)] = 0.0
    x = torch.randn(7, 3, dtype=DOUBLE) if flat else torch.randn(4, 3, 8, 8, dtype=DOUBLE)
    pruned = pruned_by_half(model, x, criterion="bn_scale")
    assert {*range(6)} - {*kept(pruned, "1.weight").tolist()} <= {*dead}, "only dead ones went"
    return model, pruned, x


@pytest.mark.parametrize("consumer", [nn.Linear(6, 2), nn.Conv2d(6, 4, 3, stride=2), nn.ConvTranspose2d(6, 4, 1)])
def test_fold_is_exact(consumer):
    model, pruned, x = with_dead_channels(consumer)
    result = repaired(model, pruned, x[:2], "fold")
    with torch.no_grad():
        same(result(x), model(x))  # on what the fold has not seen, too
        assert (pruned(x) - model(x)).abs().max() > 0.01
    assert [(s.layer, s.note) for s in result.meta["repair"].steps] == [("3.weight", "")]


def test_fold_adds_nothing_for_a_constant_that_stays():
    model, pruned, x = with_dead_channels(nn.Conv2d(6, 4, 3), dead=(0, 1, 3, 4))
    with torch.no_grad():
        same(repaired(model, pruned, x, "fold")(x), model(x))
        assert (pruned(x) - model(x)).abs().max() > 0.01


def test_fold_into_the_normalisation_behind_a_layer_without_bias():
    model, pruned, x = with_dead_channels(nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    result = repaired(model, pruned, x, "fold")
    with torch.no_grad():
        same(result(x), model(x))
        assert (pruned(x) - model(x)).abs().max() > 0.01


def test_fold_is_exact_away_from_a_border_of_zeros():
    model, pruned, x = with_dead_channels(nn.Conv2d(6, 4, 3, padding=1))
    result = repaired(model, pruned, x, "fold")
    with torch.no_grad():
        same(result(x)[..., 1:-1, 1:-1], model(x)[..., 1:-1, 1:-1])
        assert (result(x) - model(x)).abs().max() > 0.01, "the border is what cannot be folded"
    assert [s.note for s in result.meta["repair"].done] == ["exact but for the border, where zero padding enters"]


def test_fold_leaves_what_has_no_place_or_no_single_value():
    model, pruned, x = with_dead_channels(nn.Conv2d(6, 4, 3, bias=False))
    found = repaired(model, pruned, x, "fold").meta["repair"]
    assert [s.note for s in found.skipped] == ["it has no bias, and no normalisation with running statistics behind it"]
    model, pruned, x = with_dead_channels(nn.ConvTranspose2d(6, 4, 3, stride=2))
    found = repaired(model, pruned, x, "fold").meta["repair"]
    assert [s.note for s in found.skipped] == ["what the removed inputs contribute differs from place to place"]


def test_fold_leaves_what_varies(every):
    model, x = every
    pruned = pruned_by_half(model, x)
    result = repaired(model, pruned, x, "fold")
    assert result.meta["repair"].steps == ()
    assert all(torch.equal(a, b) for a, b in zip(result.state_dict().values(), pruned.state_dict().values()))


# -- recalibrate ----------------------------------------------------------------------------------------------------------


def test_recalibrate_is_the_statistics_of_the_data(every):
    model, x = every
    pruned = pruned_by_half(model, x)
    result = repaired(model, pruned, x, "recalibrate")
    with torch.no_grad():
        first = pruned.get_submodule("stem.0")(x)
        norm = result.get_submodule("stem.1")
        same(norm.running_mean, first.mean((0, 2, 3)))
        same(norm.running_var, first.movedim(1, 0).flatten(1).var(1))
        h = F.relu(F.batch_norm(first, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps))
        second = pruned.get_submodule("branch.0")(h)  # of what the first, recalibrated, hands on
        norm = result.get_submodule("branch.1")
        same(norm.running_mean, second.mean((0, 2, 3)))
        same(norm.running_var, second.movedim(1, 0).flatten(1).var(1))
    for name, value in pruned.named_parameters():
        assert torch.equal(result.get_parameter(name), value)


def test_methods_take_turns_at_each_layer(every):
    """A norm that a layer was fitted through is what that fit needs; others take their turn."""
    model, x = every
    pruned = pruned_by_half(model, x)
    result = repaired(model, pruned, x, ("reconstruct", "recalibrate"), ridge=0)
    steps = [(s.layer, s.method) for s in result.meta["repair"].done]
    assert steps == [
        ("stem.1.running_mean", "recalibrate"),
        ("branch.0.weight", "reconstruct"),
        ("depthwise.weight", "reconstruct"),
        ("head.weight", "reconstruct"),
    ]
    assert torch.equal(result.get_submodule("branch.1").running_var, pruned.get_submodule("branch.1").running_var)


# -- what is left alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fold", "reconstruct", "compensate", "recalibrate"])
def test_neither_model_is_touched(every, method):
    model, x = every
    model.train()
    pruned = pruned_by_half(model, x)
    pruned.get_submodule("stem.1").eval()
    with untouched(model), untouched(pruned):
        result = fxprune.repair(model, pruned, [(x, None)], method=method)
    assert result.training and not result.get_submodule("stem.1").training and result.get_submodule("branch.1").training
    assert not {t.data_ptr() for t in result.state_dict().values()} & {t.data_ptr() for t in pruned.state_dict().values()}
    assert fxprune.plan_of(result) == fxprune.plan_of(pruned) and "repair" not in pruned.meta


@pytest.mark.parametrize("same_class", [False, True])
def test_what_is_repaired_trains(every, same_class):
    model, x = every
    model.train()
    pruned = pruned_by_half(model, x, same_class=same_class)
    result = repaired(model, pruned, x, "reconstruct")
    again = copy.deepcopy(result)
    norm = result.get_submodule("stem.1")
    before = norm.running_mean.clone()
    out = result(x)
    with torch.no_grad():
        same(out, again(x))
        assert (pruned(x) - out).abs().max() > 1e-3, "the program for training has the repaired weights, too"
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in result.parameters())
    same(norm.running_mean, 0.9 * before + 0.1 * result.get_submodule("stem.0")(x).mean((0, 2, 3)))


def test_of_the_original_class(every):
    model, x = every
    a = repaired(model, pruned_by_half(model, x), x, "reconstruct")
    b = repaired(model, pruned_by_half(model, x, same_class=True), x, "reconstruct")
    assert type(b) is type(model)
    with torch.no_grad():
        same(a(x), b(x))
    assert b.meta["repair"].error[1] < b.meta["repair"].error[0]


class Plain(nn.Module):
    """`Reading` computes the same, but reads a value on the way, so that all of it is one node of the program."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.more, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu_(self.norm(self.conv(x)))
        return self.head(torch.relu_(self.more(x)).mean((2, 3)))


class Reading(Plain):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("method", ["reconstruct", "compensate", "recalibrate", ("reconstruct", "recalibrate")])
def test_an_opaque_module_is_repaired_site_by_site(method, monkeypatch):
    """Each for its own result: what becomes of it stays within the module."""
    monkeypatch.setattr(Trace, "path", lambda *_: Path())
    x, found = torch.randn(6, 3, 8, 8, dtype=DOUBLE), []
    for kind in (Plain, Reading):
        torch.manual_seed(0)
        model = kind().double().eval()
        nn.init.uniform_(model.norm.weight, 0.5, 1.5)
        pruned = pruned_by_half(model, x)
        assert ("opaque" in pruned.meta["capture"]) == (kind is Reading)
        with torch.no_grad():
            found.append(fxprune.repair(model, pruned, [x[:2], x[2:]], method=method, held_out=0))
    with torch.no_grad():
        same(found[1](x), found[0](x))
        assert (found[0](x) - pruned(x)).abs().max() > 1e-3
    assert [s.layer for s in found[0].meta["repair"].steps] == [s.layer for s in found[1].meta["repair"].steps]


class Writing(Plain):
    """Writes to its input, and to what a layer has read."""

    def forward(self, x):
        y = self.norm(self.conv(x.mul_(0.5)))
        z = self.more(y)
        y.add_(z)
        return self.head(y.relu_().mean((2, 3)))


class Fresh(Plain):
    def forward(self, x):
        y = self.norm(self.conv(x * 0.5))
        return self.head((y + self.more(y)).relu().mean((2, 3)))


class WritingInside(Writing):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("kind", [Writing, WritingInside])
def test_programs_that_write_in_place(kind, monkeypatch):
    if kind is WritingInside:  # of an opaque module each layer is repaired for its own result
        monkeypatch.setattr(Trace, "path", lambda *_: Path())
    x, found = torch.randn(6, 3, 8, 8, dtype=DOUBLE), []
    for chosen in (Fresh, kind):
        torch.manual_seed(0)
        model = chosen().double().eval()
        pruned = pruned_by_half(model, x.clone())
        given = x.clone()
        found.append(fxprune.repair(model, pruned, [given[:2], given[2:]], held_out=0))
        assert torch.equal(given, x)
    with torch.no_grad():
        same(found[1](x.clone()), found[0](x))
    assert found[1].meta["repair"].error == pytest.approx(found[0].meta["repair"].error)
    assert len(found[0].meta["repair"].done) == 3


class Shared(nn.Module):
    """A weight for two products, one that is computed, and one that a recurrent layer uses at every step."""

    def __init__(self):
        super().__init__()
        self.up, self.twice = nn.Linear(5, 8), nn.Linear(8, 8)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.cell, self.down = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        h = self.up(x).relu()
        h = self.twice(self.twice(h).tanh())
        return self.down(self.cell(self.computed(h.tanh()))[0])


def test_weights_that_are_not_one_products_alone_are_left(every):
    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(10, 4, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    result = repaired(model, pruned, x, "reconstruct")
    found = result.meta["repair"]
    assert {(s.layer, s.note) for s in found.skipped} == {
        ("twice.weight", "its weight is used 2 times"),
        ("cell.weight_hh_l0", "its weight is used 4 times"),
    }
    assert found.computed == 1
    assert {s.layer for s in found.done} == {"cell.weight_ih_l0", "down.weight"}
    for name in ("up.weight", "twice.weight", "cell.weight_hh_l0"):
        assert torch.equal(result.get_parameter(name), pruned.get_parameter(name))
    assert found.error[1] < found.error[0]


def test_parts_of_one_parameter_are_fitted_one_by_one():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.packed = nn.Linear(5, 8), nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            a, b = self.packed.split(3)
            return F.linear(self.up(x).tanh(), a) + F.linear(self.up(x).relu(), b)

    torch.manual_seed(0)
    model, x = Packed().double(), torch.randn(40, 5, dtype=DOUBLE)
    pruned = pruned_by_half(model, x)
    result = repaired(model, pruned, x, "reconstruct", ridge=0)
    with torch.no_grad():
        hidden, left = pruned.get_submodule("up")(x), torch.zeros(40, 3, dtype=DOUBLE)
        for act, part in ((torch.tanh, slice(0, 3)), (torch.relu, slice(3, 6))):
            target = act(model.up(x)) @ model.packed[part].T + left  # the second makes up for what the first one lacks
            wanted = torch.linalg.lstsq(act(hidden), target).solution
            left = target - act(hidden) @ wanted
            same(result.packed[part].detach(), wanted.T)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        y = self.first(x)
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])


@pytest.mark.parametrize("method", ["compensate", "reconstruct"])
@pytest.mark.parametrize("sizes", [(16, 1), (1, 16)])
def test_a_linear_map_that_adds_its_bias_apart_in_some_batches(method, sizes):
    """With one sample the tokens of `batch_first` are contiguous, and torch computes another product for them."""
    torch.manual_seed(0)
    model, batches = Attends().eval(), [1 + torch.randn(n, 5, 6) for n in sizes]
    pruned = fxprune.prune(model, 0.5, example_inputs=batches[0])
    result = fxprune.repair(model, pruned, batches, method=method)
    with torch.no_grad():
        error = [sum(float((m(x) - model(x)).square().sum()) for x in batches) for m in (pruned, result)]
    assert error[1] < error[0]


def test_in_half_precision_and_with_keywords():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).bfloat16()
    x = torch.randn(64, 5).bfloat16()
    result = fxprune.repair(model, pruned_by_half(model, x), [{"input": x}], method="reconstruct", held_out=0)
    before, after = result.meta["repair"].error
    assert after < 0.6 * before
    assert {p.dtype for p in result.parameters()} == {torch.bfloat16}


def test_the_report_and_its_data(every):
    model, x = every
    found = repaired(model, pruned_by_half(model, x), x, ("compensate", "recalibrate")).meta["repair"]
    lines = str(found).splitlines()
    assert lines[0].startswith("repaired by compensate, recalibrate: the error of the output on the data was ")
    assert lines[1] == "5 changes; 0 sites not changed"
    data = found.to_dict()
    assert data["methods"] == ["compensate", "recalibrate"] and len(data["steps"]) == 5


# -- what is refused ------------------------------------------------------------------------------------------------------

BATCHES = "data=[(images, labels), ...], or a DataLoader of such pairs"


def test_bad_input():
    model = net()
    pruned = pruned_by_half(model, IMAGES)

    def refused(data=(IMAGES,), what="", fix=BATCHES, where=None, of=pruned, **options):
        refuses(lambda: fxprune.repair(model, of, data, **options), model, pruned, what=what, fix=fix, where=where)

    methods = "refit, block, merge, or one or more of fold, reconstruct, compensate, recalibrate"
    refused(method="magic", what="there is no method 'magic'", fix=methods)
    refused(method=("fold", "magic"), what="there is no method 'magic'", fix=methods)
    refused(method=(), what="there is no method ()", fix=methods)
    refused(ridge=-1, what="ridge must be a number of 0 or more, or None, not -1", fix="ridge=0.01")
    refused(held_out=0.9, what="held_out must be a share from 0 to 0.5, not 0.9", fix="held_out=0.25")
    empty = f"{BATCHES}; one that was read to its end is empty"
    refused(data=[], what="data holds no batches", fix=empty)
    refused(data=[IMAGES[:0]], what="the batches of data hold no samples", fix=empty)
    refused(data=IMAGES, what="data must be batches, not a Tensor")
    refused(data=[("a", "b")], what="a batch of type tuple holds no tensor")
    refused(data=[{"y": IMAGES}], what="a batch of data does not fit the model: missing a required argument: 'x'")
    refused(of=model, what="this module carries no plan", fix="pass what fxprune.prune returned", where="Net")


def test_a_batch_the_model_cannot_run():
    model = net()
    pruned = pruned_by_half(model, IMAGES)
    with pytest.raises(fxprune.PruneError) as caught:
        fxprune.repair(model, pruned, [IMAGES[:, :2]])
    assert caught.value.what.startswith("the model raises on a batch of data: RuntimeError: ") and caught.value.fix == BATCHES


@pytest.mark.parametrize("method", ["reconstruct", "compensate", "recalibrate"])
def test_what_is_not_finite_is_left(method):
    model = net()
    pruned = pruned_by_half(model, IMAGES)
    bad = IMAGES.clone()
    bad[0, 0, 0, 0] = float("nan")
    result = repaired(model, pruned, bad, method)
    assert {s.note for s in result.meta["repair"].skipped} == {"its inputs or its result are not finite"}
    assert all(torch.equal(a, b) for a, b in zip(result.state_dict().values(), pruned.state_dict().values()))


def test_some_of_many_positions_are_drawn(monkeypatch):
    """A fit to 64 positions for each input is as good as one to all of them, to a few hundredths."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.nn.functional.interpolate(torch.randn(64, 2, 8, 8), scale_factor=8, mode="bilinear")
    pruned = fxprune.prune(model, 0.5, example_inputs=x[:1])
    rows: list[int] = []
    add = least_squares.NormalEquations.add_moments

    def noted(self, inputs):
        rows.append(inputs.shape[1])
        add(self, inputs)

    monkeypatch.setattr(least_squares.NormalEquations, "add_moments", noted)
    monkeypatch.setattr(least_squares, "FEWEST_ROWS", 1 << 14)
    drawn = fxprune.repair(model, pruned, [x], method="reconstruct").meta["repair"].error[1]
    # the first layer lost no input, so that its rows differ by nothing; the second one reads four channels
    assert max(rows) < 64 * 62 * 62 / 10
    monkeypatch.setattr(least_squares, "ENOUGH_ROWS", 1 << 30)
    whole = fxprune.repair(model, pruned, [x], method="reconstruct").meta["repair"].error[1]
    assert max(rows) == 48 * 62 * 62 and drawn == pytest.approx(whole, rel=0.05)


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x, edges):
        x = (edges @ self.first(x)).relu()
        return self.last((edges @ self.second(x)).relu())


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("method", [["reconstruct", "compensate"], "refit"])
def test_sparse_inputs_are_one_sample(method, layout):
    torch.manual_seed(0)
    model, edges = Graph().eval(), (torch.rand(30, 30) < 0.2).float() / 6 + torch.eye(30)
    graphs = [((torch.randn(30, 6), edges), 0) for _ in range(9)]
    sparse = [((x, edges.to_sparse(layout=layout)), 0) for (x, _), _ in graphs]
    small = fxprune.prune(model, 0.5, sparse[0][0])
    dense, found = (fxprune.repair(model, small, data, method=method, held_out=0) for data in (graphs, sparse))
    assert found.meta["repair"].samples == (9, 0)
    torch.testing.assert_close(found.state_dict(), dense.state_dict(), rtol=1e-3, atol=1e-4)
    assert fxprune.repair(model, small, sparse, method=method).meta["repair"].samples == (7, 2)
    fxprune.prune(model, 0.5, sparse[0][0], criterion="fisher", data=sparse, loss=lambda out, target: out.square().mean())


class ByValue(nn.Module):
    """Each sample goes to one of two layers, so that a batch may have none for one of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)])

    def forward(self, x):
        out = x.new_zeros(len(x), 3)
        for i, layer in enumerate(self.layers):
            if len(rows := ((x[:, 0] > 0) == bool(i)).nonzero().flatten()):
                out.index_copy_(0, rows, layer(x[rows]))
        return out


def test_a_layer_that_a_batch_does_not_call_is_left():
    """It was an IndexError."""
    torch.manual_seed(0)
    model, x = ByValue().eval(), torch.randn(8, 4)
    x[:, 0] = torch.tensor([1.0, -1.0] * 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    better = fxprune.repair(model, small, [x, torch.randn(9, 4).abs()], held_out=0)
    notes = {step.layer: step.note for step in better.meta["repair"].steps}
    assert "has no such product" in notes["layers.0.2.weight"] and not notes["layers.1.2.weight"]
