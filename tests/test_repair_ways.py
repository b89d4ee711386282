"""`prune(model, macs=..., data=..., repair=True)` tries several ways to choose, and keeps what comes closest."""

import pytest
import torch
import torch.nn.functional as F
from clocks import clock_of_calls, counting_clock
from torch import nn

import fxprune
from fxprune.selection import latency

RANDOM = torch.Generator().manual_seed(1)
DATA = torch.randn(128, 3, generator=RANDOM) @ torch.randn(3, 12, generator=RANDOM)  # three axes are all there is
HOW = {"ranking": "global", "attention": "dims", "basis": "principal"}
WAYS = {
    "default": {"attention": "heads"},
    "osscar": {"criterion": "osscar", **HOW},
    "flap": {"criterion": "flap", **HOW},
    "bn_scale": {"criterion": "bn_scale", **HOW},
}


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 16)
        with torch.no_grad():  # four axes are all that is written
            self.down.weight.copy_(torch.randn(16, 4) @ torch.randn(4, 8) / 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def stream():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), Stream(), Stream(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()


def with_batch_norms():
    torch.manual_seed(0)
    layers = [layer for a, b in ((12, 20), (20, 16)) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    model(DATA)
    with torch.no_grad():
        for i, start in ((1, 0), (4, 1)):  # channels that say nothing, as their scales tell and weights around them do not
            model[i].weight[start::2] = 1e-6
            model[i].bias[start::2] = 3.0
            model[i + 2].weight[:, start::2] *= 10
    return model.eval()


def pruned(model, macs=0.4, **how):
    return fxprune.prune(model, example_inputs=DATA[:1], macs=macs, data=DATA.split(32), repair=True, **how)


@pytest.mark.parametrize("make", [stream, with_batch_norms])
@pytest.mark.filterwarnings("ignore:no family can be rotated")
def test_the_way_that_comes_closest_is_kept(make):
    model, names = make(), [name for name in WAYS if name != "bn_scale" or make is with_batch_norms]
    found = {name: pruned(model, **WAYS[name]) for name in names}
    errors = {name: small.meta["repair"].error[1] for name, small in found.items()}
    best = min(errors, key=errors.__getitem__)
    assert best != "default" and errors[best] < errors["default"]
    small = pruned(model)
    assert small.meta["plan"] == found[best].meta["plan"]
    assert small.meta["repair"].error[1] == pytest.approx(errors[best], rel=1e-6)
    said = small.meta["chosen"][-1]
    assert said.startswith(f"way={best} (criterion={best!r}, ranking='global', attention='dims', basis='principal')")
    assert all(f"{name} {error:.1%}" in said for name, error in errors.items() if name != best)
    assert small.meta["verification"].ok and fxprune.count(small, DATA[:1]).macs <= 0.4 * fxprune.count(model, DATA[:1]).macs


@pytest.mark.filterwarnings("ignore:no family can be rotated")
def test_a_latency_is_met_by_the_way_that_comes_closest(monkeypatch):
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    ask = {"example_inputs": DATA[:1], "latency": 0.6, "data": DATA.split(32), "repair": True}
    found = {name: fxprune.prune(stream(), **ask, **WAYS[name]) for name in ("default", "osscar", "flap")}
    errors = {name: small.meta["repair"].error[1] for name, small in found.items()}
    small = fxprune.prune(stream(), **ask)
    assert small.meta["repair"].error[1] == min(errors.values()) < errors["default"]
    assert small.meta["latency"].share <= 0.6
    assert fxprune.count(small, DATA[:1]).macs <= 0.6 * fxprune.count(stream(), DATA[:1]).macs


def test_ways_are_tried_with_branches_and_without():
    """Branches that add as much as the stream holds stay, where channels can go in their place."""
    model = stream()
    with torch.no_grad():
        for i in (1, 2):
            model[i].down.weight.mul_(10)
    small = pruned(model, macs=0.7, depth=True)
    said = small.meta["chosen"][-1]
    assert all(f"{name} without depth " in said for name in ("osscar", "flap")) and "depth only " in said
    assert not small.meta["branches"]
    errors = [float(text.split("%")[0].split()[-1]) for text in said.partition("original's: ")[2].replace(";", ",").split(", ")]
    assert errors == sorted(errors) and small.meta["repair"].error[1] == pytest.approx(errors[0] / 100, abs=1e-3)


def test_branches_go_where_no_channels_save_enough(monkeypatch):
    monkeypatch.setattr(latency, "measure_seconds", clock_of_calls)
    ask = {"example_inputs": DATA[:1], "latency": 0.7, "data": DATA.split(32), "repair": True}
    with pytest.raises(fxprune.PruneError, match="cannot be met"):
        fxprune.prune(stream(), **ask)
    small = fxprune.prune(stream(), **ask, depth=True)
    assert small.meta["branches"] and small.meta["latency"].share <= 0.7
    assert "depth only" in small.meta["chosen"][-1] and "without depth" not in small.meta["chosen"][-1]


@pytest.mark.parametrize(
    "how",
    [
        {"criterion": "flap"},
        {"ranking": "global"},
        {"attention": "heads"},
        {"same_class": True},
        {"macs": None, "ratio": 0.5},
        {"macs": 0.7, "depth": "only"},
    ],
)
def test_what_is_asked_for_is_done(how):
    small = pruned(stream(), **how)
    assert not any(said.startswith("way=") for said in small.meta["chosen"])


def test_labels_are_for_the_default_alone():
    batches = list(zip(DATA.split(32), torch.arange(128).remainder(3).split(32)))
    small = fxprune.prune(stream(), example_inputs=DATA[:1], macs=0.4, data=batches, loss=F.cross_entropy, repair=True)
    assert any(said.startswith("way=") for said in small.meta["chosen"])


def test_where_no_way_meets_the_budget_the_error_is_that_of_the_default():
    with pytest.raises(fxprune.PruneError) as alone:
        pruned(stream(), macs=0.001, attention="heads")
    with pytest.raises(fxprune.PruneError) as found:
        pruned(stream(), macs=0.001)
    assert str(found.value) == str(alone.value)
