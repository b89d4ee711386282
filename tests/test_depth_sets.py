"""Residual branches are chosen together: by the loss terms of a set, by what they cost, and in whole blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_depth import (
    DECODER,
    IDS,
    Layer,
    Stack,
    V,
    X,
    call,
    count,
    least,
    llama,
    randomised,
    removed,
    resnet,
    silenced,
    t5,
    vit,
    without,
)
from torch import nn

import fxprune
from fxprune.selection.depth import removal_order

LOSS = F.cross_entropy
SEEDED = torch.Generator().manual_seed(0)
DATA = [(torch.randn(n, 5, generator=SEEDED), torch.randint(3, (n,), generator=SEEDED)) for n in (7, 2)]


class Gated(nn.Module):
    """A residual stack with a factor at each branch and position, by which a loss is differentiated."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gates = kind, None
        make = (lambda: nn.Conv2d(4, 4, 3, padding=1)) if kind == "image" else lambda: nn.Linear(4, 4)
        self.layers, self.head = nn.ModuleList(make() for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            added = layer(x).tanh()
            x = x + (added if self.gates is None else added * self.gates[i])
        return self.head(x.mean((2, 3)) if self.kind == "image" else x.mean(1))


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_the_terms_of_pairs_are_those_of_a_factor_at_each_branch(kind, tmp_path):
    """Of an image one factor for each sample, of a sequence one for each position."""
    torch.manual_seed(0)
    model = Gated(kind).eval()
    shape, ones = ((4, 5, 5), (1, 1, 1)) if kind == "image" else ((6, 4), (6, 1))
    data = [(torch.randn(n, *shape), torch.randint(3, (n,))) for n in (5, 2)]
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    for x, y in data:
        model.gates = [torch.ones(len(x), *ones, requires_grad=True) for _ in model.layers]
        gradients = torch.autograd.grad(LOSS(model(x), y), model.gates)
        terms = torch.stack([g.flatten() for g in gradients]).double() * len(x)
        wanted += terms @ terms.T
    model.gates = None
    seen = fxprune.calibrate(model, data, "token_taylor", data[0][0], loss=LOSS, depth_criterion="token_taylor")
    assert list(seen.branches) == [f"layers.{i}.bias" for i in range(3)]
    torch.testing.assert_close(torch.tensor(list(seen.branches.values()), dtype=torch.float64), wanted, rtol=1e-4, atol=1e-9)
    seen.save(tmp_path / "seen.safetensors")
    assert fxprune.Calibration.load(tmp_path / "seen.safetensors").branches == seen.branches


def test_each_step_adds_least_for_its_price():
    generator = np.random.default_rng(0)
    for _ in range(20):
        terms, prices = generator.normal(size=(5, 8)), generator.uniform(1, 3, 5)
        order, steps = removal_order(terms @ terms.T, prices)
        total = lambda chosen: float(np.square(terms[chosen].sum(0)).sum()) if chosen else 0.0  # noqa: E731
        for k, branch in enumerate(order):
            adds = {b: (total([*order[:k], b]) - total(order[:k])) / prices[b] for b in range(5) if b not in order[:k]}
            assert branch == min(adds, key=adds.__getitem__)
            assert steps[k] == pytest.approx(max(adds[branch], *steps[:k], -np.inf))


def test_branches_that_make_up_for_one_another_go_together():
    """The second branch undoes half of what the first one does: alone both matter more than the third."""
    scores = np.array([[1.0, -1.1, 0, 0], [-1.1, 1.21, 0, 0], [0, 0, 1.1, 0], [0, 0, 0, 9.0]])
    assert removal_order(scores, np.ones(4))[0] == [0, 1, 2, 3]
    assert removal_order(np.diag(scores), np.ones(4))[0] == [0, 2, 1, 3]


def test_the_loss_decides_where_there_is_one():
    torch.manual_seed(1)
    model = Stack().eval()
    found = {
        how: removed(fxprune.prune(model, 0.5, V, depth="only", depth_criterion=how, data=DATA, loss=LOSS, verify=False))
        for how in (None, "token_taylor", "influence")
    }
    assert found[None] == found["token_taylor"] != found["influence"]
    small = fxprune.prune(model, example_inputs=V, params=0.7, depth="only", data=[x for x, _ in DATA], verify=False)
    seen = fxprune.prune(
        model, example_inputs=V, params=0.7, depth="only", depth_criterion="influence", data=[x for x, _ in DATA], verify=False
    )
    assert removed(small) == removed(seen)


@pytest.mark.parametrize("kind", ["params", "latency"])
def test_a_budget_takes_the_branch_that_costs_least_for_what_it_gives(kind, monkeypatch):
    """A light layer matters least; a heavy one matters twice as much and costs ten times as much."""
    from clocks import counting_clock

    from fxprune.selection import latency

    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    model = Stack().eval()
    heavy = Layer()
    heavy.up, heavy.down = nn.Linear(8, 120), nn.Linear(120, 8)
    model.layers[2] = heavy.eval()
    worth = {p.data_ptr(): (3.0, 1.0, 2.0, 3.0)[i] for i, layer in enumerate(model.layers) for p in layer.parameters()}
    how = {"depth": "only", "criterion": lambda weight: torch.full_like(weight, worth.get(weight.data_ptr(), 9.0))}
    assert removed(fxprune.prune(model, 0.25, V, **how)) == [1]
    assert removed(fxprune.prune(model, example_inputs=V, **{kind: 0.95}, **how)) == [2]


def test_terms_of_units_and_branches_are_on_one_scale():
    """A branch whose terms are far below those of any unit goes first, and one whose terms are far above stays."""
    torch.manual_seed(0)
    model = Stack().eval()
    with torch.no_grad():
        for i, factor in enumerate((1e-3, 1.0, 1.0, 30.0)):
            for p in model.layers[i].down.parameters():
                p.mul_(factor)
    small = fxprune.prune(model, example_inputs=V, params=0.5, depth=True, data=DATA, loss=LOSS, only="layers*")
    assert 0 in removed(small) and 3 not in removed(small) and small.verification.ok


BLOCKS = {
    "vit": (vit, X, "encoder.layers.encoder_layer_{}", ("self_attention", "mlp")),
    "llama": (llama, DECODER, "model.layers.{}", ("self_attn", "mlp")),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_whole_blocks_go(name):
    make, inputs, path, parts = BLOCKS[name]
    torch.manual_seed(0)
    model = randomised(make())
    gone = [f"{path.format(1)}.{part}" for part in parts]
    small = fxprune.prune(model, 0.5, inputs, depth="blocks", criterion=least(model, gone), verify=True)
    assert small.verification.ok and not small.verification.refused
    block = sum(p.numel() for p in model.get_submodule(path.format(1)).parameters())
    assert count(small) == count(model) - block
    torch.testing.assert_close(call(small, inputs), call(silenced(model, gone), inputs), rtol=1e-5, atol=1e-6)


def test_the_influence_of_a_block_is_that_between_its_ends():
    """As ShortGPT has it: of what goes into a block, and what comes out."""
    torch.manual_seed(0)
    model = llama().eval()
    ids = torch.randint(3, 60, (4, 12))
    seen: dict[int, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda m, args, kwargs, out, i=i: seen.setdefault(i, []).extend(
                (args[0], out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(model.model.layers)
    ]
    call(model, {"input_ids": ids, "use_cache": False})
    for hook in hooks:
        hook.remove()
    wanted = [1 - float(F.cosine_similarity(*seen[i], dim=-1).mean()) for i in range(3)]
    data = [{"input_ids": ids, "use_cache": False}]
    found: list[float] = []

    def look(stream, added):
        found.append(1 - float(F.cosine_similarity(stream, stream + added, dim=-1).mean()))
        return found[-1]

    how = {"depth": "blocks", "data": data, "verify": False}
    fxprune.prune(model, 0.34, {"input_ids": ids, "use_cache": False}, depth_criterion=look, **how)
    assert found == pytest.approx(wanted, rel=1e-4)
    small = fxprune.prune(model, 0.34, {"input_ids": ids, "use_cache": False}, depth_criterion="influence", **how)
    lost = {name.split(".")[2] for name in fxprune.plan_of(small).removed}
    assert lost == {str(min(range(3), key=wanted.__getitem__))}


def labelled(ids: torch.Tensor) -> dict[str, object]:
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def test_scores_of_blocks_are_made_of_those_of_branches():
    torch.manual_seed(0)
    model = randomised(llama())
    data = [labelled(torch.randint(3, 60, (2, 12))) for _ in range(2)]
    seen = fxprune.calibrate(model, data, "token_taylor", data[0], depth_criterion="token_taylor")
    assert len(seen.branches) == 6
    how = {"data": data, "depth_criterion": "token_taylor", "verify": False}
    direct = fxprune.prune(model, example_inputs=data[0], params=0.8, depth="blocks", **how)
    kept = fxprune.prune(model, example_inputs=data[0], params=0.8, depth="blocks", criterion=seen, verify=False)
    assert fxprune.plan_of(direct) == fxprune.plan_of(kept)
    rows = np.array(list(seen.branches.values()))
    lost = {name.split(".")[2] for name in fxprune.plan_of(kept).removed}
    pairs = [[k for k, name in enumerate(seen.branches) if name.split(".")[2] == str(i)] for i in range(3)]
    terms = [rows[np.ix_(mine, mine)].sum() for mine in pairs]
    assert lost == {str(int(np.argmin(terms)))}
    single = fxprune.calibrate(model, data, "token_taylor", data[0], depth_criterion="influence")
    with pytest.raises(fxprune.PruneError, match="has scores of single branches, and none of whole blocks"):
        fxprune.prune(model, example_inputs=data[0], params=0.7, depth="blocks", criterion=single, verify=False)


def test_a_block_of_which_a_branch_is_frozen_stays():
    model = randomised(llama())
    with pytest.raises(fxprune.PruneError, match="no block of a list of blocks is made of residual branches that may go"):
        fxprune.prune(model, 0.5, DECODER, depth="blocks", freeze=["*mlp*"])
    small = fxprune.prune(model, 0.5, DECODER, depth="blocks", freeze=["model.layers.0.mlp*"])
    assert {name.split(".")[2] for name in fxprune.plan_of(small).removed} < {"1", "2"}


def test_blocks_of_one_branch_are_branches():
    model = randomised(resnet())
    small, same = (fxprune.prune(model, 0.5, X, depth=depth, verify=True) for depth in ("blocks", "only"))
    assert small.verification.ok and fxprune.plan_of(small) == fxprune.plan_of(same)
    short = fxprune.prune(
        randomised(t5()), 0.3, {"input_ids": IDS, "decoder_input_ids": IDS[:, :7], "use_cache": False}, depth="blocks"
    )
    assert short.verification.ok
    layers = {tuple(name.split(".")[:3]) for name in fxprune.plan_of(short).removed}
    assert len(layers) == 1 and len(list(itertools.chain(*layers))) == 3


def test_blocks_are_removed_by_a_loss_as_by_leaving_them_out():
    torch.manual_seed(3)
    model = Stack().eval()
    with torch.no_grad():
        change = [float(sum((LOSS(without(model, i)(x), y) - LOSS(model(x), y)) * len(x) for x, y in DATA)) for i in range(4)]
    small = fxprune.prune(model, 0.25, V, depth="blocks", depth_criterion="loss", data=DATA, loss=LOSS)
    assert removed(small) == [int(np.argmin(change))]


class Constants(nn.Module):
    """Each branch adds a vector, whatever its input: a loss of what is missing knows the order in which they should go."""

    def __init__(self, *vectors: tuple[float, float], hidden: tuple[int, ...] = (4, 4, 4)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, n), nn.Linear(n, 2)) for n in hidden)
        with torch.no_grad():
            for layer, vector in zip(self.layers, vectors, strict=True):
                layer[1].weight.zero_()
                layer[1].bias.copy_(torch.tensor(vector))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_a_loss_is_measured_without_all_that_went_before():
    """The first two fail together, so the third goes second, though it matters more alone; six losses are measured."""
    vectors = (1.0, 0.0), (1.05, 0.0), (0.0, 1.2)
    model, x = Constants(*vectors).eval(), torch.randn(4, 2)
    calls = 0

    def missing(out, wanted):
        nonlocal calls
        calls += 1
        return (out - wanted).square().sum(1).mean()

    how = {"depth": "only", "depth_criterion": "loss", "data": [(x, x + torch.tensor(vectors).sum(0))], "loss": missing}
    small = fxprune.prune(model, 0.67, x, **how)
    assert {name.split(".")[1] for name in fxprune.plan_of(small).removed} == {"0", "2"} and calls == 6


def test_a_measured_loss_counts_for_what_it_costs(monkeypatch):
    from clocks import counting_clock

    from fxprune.selection import latency

    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    vectors = (1.0, 0.0), (0.0, 1.2), (3.0, 3.0)
    model, x = Constants(*vectors, hidden=(4, 40, 4)).eval(), torch.randn(4, 2)
    how = {"depth": "only", "depth_criterion": "loss", "data": [(x, x + torch.tensor(vectors).sum(0))], "loss": F.mse_loss}
    lost = [
        {name.split(".")[1] for name in fxprune.plan_of(fxprune.prune(model, example_inputs=x, **amount, **how)).removed}
        for amount in ({"ratio": 0.34}, {"params": 0.9}, {"latency": 0.9})
    ]
    assert lost == [{"0"}, {"1"}, {"1"}]


class Batched(Stack):
    """Another way for a batch of one, as models have that look for packed sequences."""

    def forward(self, x):
        return super().forward(x if x.shape[0] == 1 else x * 1.0 + 0.0)


@pytest.mark.parametrize("how", ["influence", "token_taylor", "loss"])
def test_batches_may_be_of_sizes_that_the_code_goes_by(how):
    torch.manual_seed(3)
    model, x, y = Batched().eval(), torch.randn(6, 5), torch.randint(3, (6,))
    whole, single = [(x, y)], [(x[i : i + 1], y[i : i + 1]) for i in range(6)]
    few, many = (
        removed(fxprune.prune(model, 0.5, V, depth="only", depth_criterion=how, data=data, loss=LOSS))
        for data in (whole, single)
    )
    assert few == many
