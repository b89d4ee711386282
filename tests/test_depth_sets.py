"""Residual branches by what they cost, by a loss without all that went before, and in whole blocks."""

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

LOSS = F.cross_entropy
SEEDED = torch.Generator().manual_seed(0)
DATA = [(torch.randn(n, 5, generator=SEEDED), torch.randint(3, (n,), generator=SEEDED)) for n in (7, 2)]


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


def test_widths_go_before_branches_that_matter_as_much():
    """A branch takes all that its units do: by equal scores for its cost it goes when units are down to the floor."""
    torch.manual_seed(0)
    model = Stack().eval()
    asked = {"params": 0.6, "data": DATA, "loss": LOSS, "freeze_outputs": ["embed"], "verify": False}
    narrow = fxprune.prune(model, example_inputs=V, **asked)
    small = fxprune.prune(model, example_inputs=V, depth=True, depth_criterion=lambda stream, added: 1.0, **asked)
    assert removed(small) == [] and fxprune.plan_of(small) == fxprune.plan_of(narrow)


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


@pytest.mark.parametrize("how", ["influence", "taylor", "loss"])
def test_batches_may_be_of_sizes_that_the_code_goes_by(how):
    torch.manual_seed(3)
    model, x, y = Batched().eval(), torch.randn(6, 5), torch.randint(3, (6,))
    whole, single = [(x, y)], [(x[i : i + 1], y[i : i + 1]) for i in range(6)]
    few, many = (
        removed(fxprune.prune(model, 0.5, V, depth="only", depth_criterion=how, data=data, loss=LOSS))
        for data in (whole, single)
    )
    assert few == many
