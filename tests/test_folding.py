"""Model folding: the order in which units merge, and merging, against closed forms and where it must be exact."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scored import scores
from torch import nn

import fxprune
from fxprune import PruneError
from fxprune.criteria import Folding
from fxprune.folding.clusters import merge_errors
from fxprune.repairs.merge import NOT_BY_UNIT, correlations, variance_of_mean


class ConvNet(nn.Module):
    """Batch norms, a depthwise convolution between them, and a flattened map."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.after = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8)
        self.two, self.slope = nn.Conv2d(8, 6, 1), nn.PReLU(6)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = F.gelu(self.after(self.deep(F.relu(self.norm(self.one(x))))))
        return self.head(F.avg_pool2d(self.slope(self.two(x)), 2).flatten(1))


class Block(nn.Module):
    """A block of a ViT whose queries, keys and values are one layer."""

    def __init__(self, width=12, heads=4):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, 12, 4, stride=4), Block()
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.norm(self.block(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


class MLP(nn.Module):
    def __init__(self, middle=None):
        super().__init__()
        self.one, self.middle, self.two = nn.Linear(5, 8), middle or nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.middle(self.one(x)))


class Product(nn.Module):
    """Products of two families are summed: what reads a unit is no weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(1, 3)

    def forward(self, x):
        return self.head((self.a(x) * self.b(x)).sum(-1, keepdim=True))


MODELS = {"convolutions": (ConvNet, (3, 8, 8)), "mlp": (MLP, (5,)), "attention": (ViT, (3, 8, 8))}
WRITERS = {
    "convolutions": {"one.weight": 8, "norm": 8, "deep": 8, "after": 8, "two": 6, "slope": 6},
    "mlp": {"one": 8},
    "attention": {"block.qkv": 4, "block.up": 24},
}


def random_model(kind, seed=0):
    """A model in double precision, with statistics that are no zeros and ones, and its inputs."""
    torch.manual_seed(seed)
    cls, size = kind if isinstance(kind, tuple) else MODELS[kind]
    model = cls().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model, torch.randn(4, *size, dtype=torch.float64)


def with_pairs(model, writers):
    """Each second unit made equal to the one before it: rows of everything that writes it, heads as blocks of q, k and v."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        units = next((n for key, n in writers.items() if name.startswith(key)), None)
        if units and tensor.dim():
            with torch.no_grad():
                rows = tensor.view(3, units, -1) if "qkv" in name else tensor.view(1, units, -1)
                rows[:, 1::2] = rows[:, ::2].clone()
    return model


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_equal_units_merge_without_error(kind, same_class):
    model, x = random_model(kind)
    with_pairs(model, WRITERS[kind])
    before = copy.deepcopy(model.state_dict())
    freeze = ["patch"] if kind == "attention" else []  # units of the residual stream meet in its norms
    small = fxprune.prune(model, 0.5, x, criterion="folding", freeze=freeze, same_class=same_class)
    state = copy.deepcopy(small.state_dict())
    better = fxprune.repair(model, small, method="merge")
    torch.testing.assert_close(better(x), model(x), rtol=1e-9, atol=1e-9)
    assert (small(x) - model(x)).abs().max() > 1e-2
    assert better.meta["repair"].done and not better.meta["repair"].skipped
    assert better.meta["repair"].error is None and "no data" in str(better.meta["repair"])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(state[name], t) for name, t in small.state_dict().items())


def test_merging_writes_the_mean_and_reads_the_sum():
    model, x = random_model("mlp")
    with torch.no_grad():
        model.one.weight[1] = model.one.weight[0] + 1e-3
        model.one.bias[1] = model.one.bias[0] - 1e-3
    small = fxprune.prune(model, example_inputs=x, remove={"one": [1]})
    better = fxprune.repair(model, small, method="merge")
    one, two = better.get_submodule("one"), better.get_submodule("two")
    torch.testing.assert_close(one.weight[0], model.one.weight[:2].mean(0))
    torch.testing.assert_close(one.bias[0], model.one.bias[:2].mean(0))
    torch.testing.assert_close(two.weight[:, 0], model.two.weight[:, :2].sum(1))
    torch.testing.assert_close(one.weight[1:], model.one.weight[2:], rtol=0, atol=0)
    torch.testing.assert_close(two.weight[:, 1:], model.two.weight[:, 2:], rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_variance_of_a_mean(count, rho):
    """The paper's closed form, and what channels with that correlation do."""
    every = torch.full((count, count), rho, dtype=torch.float64).fill_diagonal_(1)
    found = float(variance_of_mean(torch.full((count,), 2.5, dtype=torch.float64), every))
    assert found == pytest.approx(2.5 * (1 + (count - 1) * rho) / count)
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(200_000, 1, generator=random, dtype=torch.float64)
    own = torch.randn(200_000, count, generator=random, dtype=torch.float64)
    channels = 2.5**0.5 * (rho**0.5 * shared + (1 - rho) ** 0.5 * own)
    assert found == pytest.approx(float(channels.mean(1).var()), rel=0.02)


def test_a_batch_norm_gets_the_variance_of_the_mean():
    """On white inputs, whose statistics a batch norm holds, what it makes of a merged channel varies as before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(100_000, 6, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0] + torch.randn(6) * 0.2
        made = model[0](x)
        model[1].running_mean.copy_(made.mean(0))
        model[1].running_var.copy_(made.var(0))
    small = fxprune.prune(model.eval(), example_inputs=x[:2], remove={"0": [1]})
    better = fxprune.repair(model, small, method="merge")
    torch.testing.assert_close(
        better.get_submodule("1").running_var[0], better.get_submodule("0")(x)[:, 0].var(), rtol=0.02, atol=0
    )
    assert better.get_submodule("1").running_var[0] < model[1].running_var[:2].mean()


def test_correlations_of_rows_that_are_zero():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    wanted = torch.tensor([[1, 0, 1, 0], [0, 1, 0, -0.8], [1, 0, 1, 0], [0, -0.8, 0, 1]])
    torch.testing.assert_close(correlations(rows), wanted)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("kind", MODELS)
def test_units_that_are_not_alike_merge_to_finite_values(kind, scale):
    model, x = random_model(kind, 3)
    with torch.no_grad():
        for p in model.parameters():
            p *= scale
    before = copy.deepcopy(model.state_dict())
    small = fxprune.prune(model, 0.75, x, criterion="folding", repair="merge")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert small.meta["repair"].done
    assert all(bool(t.isfinite().all()) for t in small.state_dict().values())
    assert bool(small(x).isfinite().all())


LEFT = {
    "a norm over units": (lambda: MLP(nn.LayerNorm(8)), {}),
    "a softmax over units": (lambda: MLP(nn.Softmax(-1)), {}),
    "a product of two families": (Product, {}),
}


@pytest.mark.parametrize("kind", LEFT)
def test_units_that_meet_one_another_are_left(kind):
    model, x = random_model((LEFT[kind][0], (5,)))
    small = fxprune.prune(model, 0.5, x, criterion="folding")
    better = fxprune.repair(model, small, method="merge")
    assert {s.note for s in better.meta["repair"].skipped} == {NOT_BY_UNIT} and not better.meta["repair"].done
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), better.state_dict().values(), strict=True))


def test_dimensions_within_heads_are_left_and_other_families_merge():
    model, x = random_model("attention")
    small = fxprune.prune(model, 0.5, x, criterion="folding", attention="dims")
    found = fxprune.repair(model, small, method="merge").meta["repair"]
    assert [s.layer for s in found.done] == ["block.up"]
    assert len(found.skipped) >= 2


class Rounded(nn.Module):
    """Computes a part in single precision, whatever its inputs are in."""

    def forward(self, x):
        return F.silu(x.float()).to(x.dtype)


def test_a_part_in_single_precision_is_no_reason_to_leave_it():
    model, x = random_model((lambda: MLP(Rounded()), (5,)))
    small = fxprune.prune(model, 0.5, x, criterion="folding", repair="merge")
    assert [s.layer for s in small.meta["repair"].done] == ["one"]


def test_what_is_not_rotated_merges_behind_a_change_of_basis():
    model, x = random_model("attention")
    small = fxprune.prune(model, 0.5, x, criterion="folding", data=[x], basis="principal")
    assert [f.name for f in small.meta["basis"].families] == ["patch"]
    found = fxprune.repair(model, small, method="merge").meta["repair"]
    assert [s.layer for s in found.done] == ["block.qkv", "block.up"]


def test_gains_that_are_zero_hide_nothing():
    """Where nothing of a family reaches the output, whether its units may merge is still found out."""
    model, x = random_model((lambda: MLP(nn.LayerNorm(8)), (5,)))
    nn.init.zeros_(model.two.weight)
    small = fxprune.prune(model, 0.5, x, criterion="folding")
    assert not fxprune.repair(model, small, method="merge").meta["repair"].done


def test_grouped_weights_are_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 6, 1, groups=2), nn.ReLU(), nn.Conv1d(6, 2, 1)).eval()
    small = fxprune.prune(model, 0.5, torch.randn(2, 3, 5), criterion="folding")
    notes = {s.layer: s.note for s in fxprune.repair(model, small, method="merge").meta["repair"].skipped}
    assert "groups" in notes["0"]


def test_data_that_are_given_judge_it():
    """A unit that nothing reads: merging it spoils the one that it is nearest to, and with data nothing is changed."""
    model, x = random_model("mlp")
    with torch.no_grad():
        model.two.weight[:, 1] = 0
    data = [torch.randn(200, 5, dtype=torch.float64)]
    small = fxprune.prune(model, example_inputs=x, remove={"one": [1]})
    judged, alone = fxprune.repair(model, small, data, method="merge"), fxprune.repair(model, small, method="merge")
    assert alone.meta["repair"].done and (alone(x) - model(x)).abs().max() > 1e-3
    found = judged.meta["repair"]
    assert found.samples == (150, 50) and found.share == 0 and not found.done
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), judged.state_dict().values(), strict=True))
    few = fxprune.repair(model, small, [x[:2]], method="merge").meta["repair"]
    assert not few.done and "too few" in few.skipped[0].note


def test_verify_is_of_the_cut_alone():
    model, x = random_model("mlp")
    small = fxprune.prune(model, 0.5, x, criterion="folding", repair={"method": "merge"})
    assert small.meta["verification"].ok and not fxprune.verify(model, small, x).ok


def test_bad_input():
    model, x = random_model("mlp")
    small = fxprune.prune(model, 0.5, x)
    with pytest.raises(PruneError, match="there are none"):
        fxprune.repair(model, small)
    with pytest.raises(PruneError, match="merge goes with no other method"):
        fxprune.repair(model, small, method=["merge", "fold"])
    with pytest.raises(PruneError, match="carries no plan"):
        fxprune.repair(model, model, method="merge")
    with pytest.raises(PruneError, match="parameter alone"):
        Folding()(torch.ones(3))
    trained = copy.deepcopy(small)
    trained.get_submodule("one").bias.data += 1
    with pytest.raises(PruneError, match=r"one\.bias"):
        fxprune.repair(model, trained, method="merge")
    with torch.no_grad():
        model.one.weight[0, 0] = float("nan")
    with pytest.raises(PruneError, match="NaN"):
        fxprune.prune(model, 0.5, x, criterion="folding")


def cluster_error(rows, sets):
    return sum(float((rows[s] - rows[s].mean(0)).square().sum()) for s in map(list, sets))


@pytest.mark.parametrize("seed", range(4))
def test_each_merge_is_the_one_that_costs_least(seed):
    """By brute force: of all pairs of clusters the one whose merge adds least to the squared distances to the means."""
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, clusters = merge_errors(rows), [frozenset([i]) for i in range(7)]
    assert len(np.unique(found)) == 7
    for unit in found.argsort()[:-1]:
        options = {(a, b): cluster_error(rows, [a | b]) - cluster_error(rows, [a, b]) for a, b in combinations(clusters, 2)}
        a, b = min(options, key=options.get)
        assert found[unit] * float(rows.square().sum()) == pytest.approx(options[a, b])
        assert unit in a | b
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]


def test_equal_units_go_first_and_one_of_each_stays():
    model, x = random_model("convolutions")
    with_pairs(model, WRITERS["convolutions"])
    for name, units in (("one", 8), ("two", 6)):
        order = scores(model, x, "folding")[name].argsort().tolist()
        assert sorted(i // 2 for i in order[: units // 2]) == list(range(units // 2))
