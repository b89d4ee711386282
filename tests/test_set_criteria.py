"""Criteria that score the units of a family, or of all families, together: against brute force and closed forms."""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scored import scores
from torch import nn

import fxprune
from fxprune import PruneError
from fxprune.criteria import OSSCAR, Gates
from fxprune.criteria.calibration import Target, prepare_source
from fxprune.criteria.gates import GatedModel
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.costs import Costs
from fxprune.selection.expected_cost import ExpectedCost, expected_use
from fxprune.selection.options import Options

# -- OSSCAR ---------------------------------------------------------------------------------------------------------------


def refit_error(layer, x, gone, channels):
    """The least error of a layer that reads no channel in `gone`, as a share of its result, by brute force.

    The layer is linear in its weight: its result on each single entry of the weight is a column of the least squares problem.
    """
    with torch.no_grad():
        target = (layer(x) - layer.bias.reshape(-1, *[1] * (x.dim() - 2))).reshape(-1)
        masked, columns = x.clone(), []
        masked[:, gone] = 0
        for i in range(layer.weight.numel()):
            weight = torch.zeros_like(layer.weight)
            weight.view(-1)[i] = 1
            made = torch.func.functional_call(layer, {"weight": weight, "bias": torch.zeros_like(layer.bias)}, (masked,))
            columns.append(made.reshape(-1))
        design = torch.stack(columns, 1)
        fitted = design @ (torch.linalg.pinv(design) @ target)
        return float((target - fitted).square().sum() / target.square().sum())


READERS = {
    "linear": (nn.Linear(6, 3), (40,)),
    "conv": (nn.Conv2d(6, 2, 3, stride=2, padding=1, dilation=1), (12, 7, 6)),
    "groups": (nn.Conv1d(6, 4, 3, groups=2), (20, 9)),
    "transposed": (nn.ConvTranspose1d(6, 2, 3, stride=2, padding=1), (20, 6)),
    "transposed groups": (nn.ConvTranspose1d(6, 4, 2, groups=2), (20, 6)),
}


@pytest.mark.parametrize("kind", READERS)
def test_osscar_adds_what_refitting_leaves(kind):
    """The scores of those that go first add up to the error of the layer fitted again without them."""
    torch.manual_seed(2)
    layer, (samples, *size) = READERS[kind]
    layer = layer.double()
    first = nn.Linear(5, 6) if kind == "linear" else [nn.Conv1d, nn.Conv2d][len(size) - 1](5, 6, 1)
    model = nn.Sequential(first, nn.ReLU(), layer).double().eval()
    x = torch.randn(samples, 5, *size).double()
    found = scores(model, x, OSSCAR(ridge=0), [x[: samples // 2], x[samples // 2 :]])["0"]
    read, order = model[1](model[0](x)).detach(), found.argsort().tolist()
    errors = [refit_error(layer, read, order[:k], 6) for k in range(1, 6)]
    marginal = np.diff([0.0, *errors])
    expected = np.maximum.accumulate(marginal)
    np.testing.assert_allclose(found[order[:5]].numpy(), expected, rtol=1e-5, atol=1e-9)
    singles = [refit_error(layer, read, [i], 6) for i in range(6)]
    assert order[0] == int(np.argmin(singles))


def test_osscar_takes_the_unit_of_optimal_brain_surgeon():
    """w^2 over the diagonal of the inverse of X'X, for a layer of one output."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 1)).double(), torch.randn(50, 4).double()
    h, w = model[1](model[0](x)).detach(), model[2].weight.detach()[0]
    surgeon = w.square() / (h.T @ h).inverse().diagonal() / (h @ w).square().sum()
    found = scores(model, x, OSSCAR(ridge=0), [x])["0"]
    torch.testing.assert_close(found.min(), surgeon.min())
    assert found.argmin() == surgeon.argmin()


def test_osscar_is_near_the_best_of_all_subsets():
    gaps, others = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 4)).double(), torch.randn(60, 3).double()
        read = model[1](model[0](x)).detach()
        order = scores(model, x, OSSCAR(ridge=0), [x])["0"].argsort().tolist()
        by_size = scores(model, x, "magnitude")["0"].argsort().tolist()
        for k in (2, 3):
            best = min(refit_error(model[2], read, list(gone), 7) for gone in combinations(range(7), k))
            gaps.append(refit_error(model[2], read, order[:k], 7) / best)
            others.append(refit_error(model[2], read, by_size[:k], 7) / best)
    assert min(gaps) >= 1 - 1e-6 and np.median(gaps) < 1.01 and max(gaps) < 2
    assert np.median(others) > 1.3  # so the choice matters


def test_osscar_gives_one_of_two_equal_units_for_nothing():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), torch.randn(50, 4).double()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[1], model[0].bias[1]
        model[2].weight.mul_(torch.tensor([1.0, 10, 1, 10, 1, 1]))
    found = scores(model, x, OSSCAR(ridge=1e-6), [x])["0"]
    assert found.argmin().item() in (1, 3)
    assert found[[1, 3]].min() < 0.01 * found[[0, 2, 4, 5]].min()
    assert found[[1, 3]].max() > found[[0, 2, 4, 5]].max()


def test_osscar_prunes_and_needs_data(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(50, 4)
    small = fxprune.prune(model, 0.5, x[:1], criterion="osscar", data=[x])
    kept = scores(model, x, "osscar", [x])["0"].topk(3).indices.sort().values
    assert torch.equal(small.get_submodule("0").weight, model[0].weight[kept])
    pruner = fxprune.Pruner(model, 0.5, x[:1], steps=2, criterion="osscar", data=[x])
    while not pruner.done:
        small = pruner.step()
    assert small.get_submodule("0").out_features == 3
    with pytest.raises(PruneError, match="needs data"):
        fxprune.prune(model, 0.5, x[:1], criterion="osscar")
    with pytest.raises(PruneError, match="ridge must be"):
        OSSCAR(ridge=-1)


def test_osscar_scores_what_no_weight_reads():
    """Dimensions of queries and keys: by their share of what is written."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    torch.manual_seed(0)
    model, x = Attention().double().eval(), torch.randn(3, 5, 6).double()
    found = scores(model, x, "osscar", [x])
    squares = model.q(x).square().sum((0, 1)) + model.k(x).square().sum((0, 1))
    torch.testing.assert_close(found["q"], (squares / squares.sum()).detach())


# -- gates ----------------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A layer normalisation counts the channels of its inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.b, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x).relu())).relu())


DEAD = [1, 4, 6, 9]


def with_dead_units():
    """The model, four of whose units are always zero on the data, with the largest weights of all."""
    torch.manual_seed(0)
    model = Normed().eval()
    with torch.no_grad():
        model.b.bias[DEAD] = -100.0
        model.head.weight[:, DEAD] *= 10
    return model, torch.randn(128, 6)


def kept_of(model, small):
    return [i for i in range(10) if any(torch.equal(c, model.head.weight[:, i]) for c in small.get_submodule("head").weight.T)]


def a_thousand_times_the_error(out, target):
    return 1000 * F.mse_loss(out, target)


@pytest.mark.parametrize("loss", [None, F.mse_loss, a_thousand_times_the_error])
def test_gates_find_the_units_that_do_nothing(loss):
    model, x = with_dead_units()
    data = [x] if loss is None else [(x, model(x).detach())]
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    options = {"params": 0.7, "ranking": "global", "criterion": Gates(steps=40)}
    small = fxprune.prune(model, example_inputs=x[:2], data=data, loss=loss, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not set(kept_of(model, small)) & set(DEAD)
    by_size = fxprune.prune(model, example_inputs=x[:2], params=0.7, ranking="global")
    assert set(kept_of(model, by_size)) & set(DEAD)
    again = fxprune.prune(model, example_inputs=x[:2], data=data, loss=loss, **options)
    assert again.meta["plan"] == small.meta["plan"]


@pytest.mark.parametrize("norm", [True, False])
def test_a_closed_gate_is_a_removed_unit(norm):
    """With every gate at 0 or 1 the gated model computes what the pruned one does, and what is open in between is not."""
    model, x = with_dead_units()
    model.norm = model.norm if norm else nn.Identity()
    solution = analyse(model, (x,), {}, CouplingOptions())
    found = {f.name: f for f in families(solution, {n for n, _ in model.named_parameters()}) if f.frozen is None}
    gone = {"a": [0, 5, 7], "b": [1, 2]}
    small = fxprune.prune(model, example_inputs=x, remove=gone)
    units = torch.from_numpy(np.sort(np.concatenate([f.units for f in found.values()])))
    with prepare_source(model, [x], None, "gates", solution) as source:
        source.target = Target()
        gated = GatedModel(source, units)
        [batch] = source.batches()
        gated.original(batch)
        assert gated.masked == norm
        gates = torch.ones(gated.size, dtype=torch.float64)
        torch.testing.assert_close(gated_run(gated, gates, batch), model(x))
        for name, indices in gone.items():
            gates[found[name].units[indices]] = 0
        torch.testing.assert_close(gated_run(gated, gates, batch), small(x), rtol=1e-4, atol=1e-5)


def gated_run(gated, gates, batch):
    gated.close(gates)
    return gated.run(*batch.args)


@pytest.mark.parametrize("kind", ["params", "memory", "macs"])
def test_the_expected_cost_of_certain_units_is_the_cost(kind):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    solution = analyse(model, (x,), {}, CouplingOptions())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    free = [f for f in families(solution, set(dict(model.named_parameters()))) if f.frozen is None]
    stays = torch.ones(len(solution.unit_of), dtype=torch.float64)
    stays[np.concatenate([free[0].units[:3], free[1].units[2:4]])] = 0
    costs = Costs(solution, tensors)
    left = costs.of(Slicer((stays > 0)[solution.unit_of]), kind)
    assert float(ExpectedCost(solution, costs, kind)(stays)) == pytest.approx(left)
    use = expected_use(solution, Options.parse(model, budget={kind: 0.5}), free, tensors)
    assert float(use(stays)) == pytest.approx(left / costs.original(kind) / 0.5)


def test_gates_refuse_what_means_nothing():
    model, x = with_dead_units()
    with pytest.raises(PruneError, match="needs data"):
        fxprune.prune(model, 0.5, x, criterion="gates")
    with pytest.raises(PruneError, match="steps must be"):
        Gates(steps=0)
    with pytest.raises(PruneError, match="rate must be"):
        Gates(rate=0.0)
    with pytest.raises(PruneError, match="gates score the units of all families together"):
        Gates()(torch.ones(2))
