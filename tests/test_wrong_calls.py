"""Wrong calls of everything public: one PruneError that says what and how to put it right, and no line of the compiler."""

from __future__ import annotations

import importlib
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import counting_clock
from torch import nn

import fxprune
from fxprune import Pruner, criteria, layers, masks, regularizers
from fxprune.passes.ops import registry
from fxprune.selection import latency

X = torch.randn(2, 8)
OWN = str(Path(fxprune.__file__).parent) + os.sep

WRONG = """
fxprune.register_op(5, "movement")
fxprune.register_op()
fxprune.register_op("demo::x", "move")
fxprune.register_op("demo::x", like=5)
fxprune.register_op("demo::x", like="aten::nothing")
fxprune.register_op("demo::x", "frozen", why=5)
fxprune.register_op("demo::x", "movement", handler=5)
fxprune.register_op("demo::x", "movement", masked=5)
fxprune.register_op("demo::x", "movement", macs=5)
fxprune.register_op("demo::x", "movement", foo=1)
fxprune.register_op("demo::x", labels=5)
fxprune.register_op("demo::x", ["movement"])
fxprune.register_op("demo::x", like="mean")
fxprune.progress("on")
fxprune.progress(5)
fxprune.progress(show=True)
fxprune.progress(True, True)
Pruner()
pruner(steps=0)
pruner(steps=1.5)
pruner(steps="3")
pruner(steps=True)
pruner(schedule="quad")
pruner(schedule=5)
pruner(steps=2, schedule=lambda t: 1 / 0)
pruner(steps=2, schedule=lambda t: None)
pruner(steps=3, schedule=lambda t: 1 - t)
pruner(regularizer="l5")
pruner(regularizer=5)
pruner(mask="harder")
pruner(mask=True)
pruner(same_class="yes")
pruner(verify=5)
pruner(verify="always")
pruner(depth=True)
Pruner(model, macs="2G", example_inputs=x)
Pruner(model, memory="10GB", example_inputs=x)
Pruner(model, 0, x)
Pruner(model, 0.001, x)
Pruner(model, {"nix": 0.5}, x)
Pruner(model, {"last": 0.5}, x)
Pruner(model, 0.5)
Pruner(model, x)
pruner().step(5)
pruner().step(other)
pruner().step(interactive="x")
pruner().step(foo=1)
(lambda p: (p.step(), p.step()))(pruner())
pruner().shrink(5)
pruner().shrink(foo=5)
stepped().shrink(other)
stepped().remap_optimizer(5)
pruner().remap_optimizer(torch.optim.SGD(model.parameters(), 0.1))
stepped().remap_optimizer()
stepped().remap_optimizer(torch.optim.SGD(other.parameters(), 0.1))
stepped().remap_average(5)
stepped().remap_average({})
stepped().remap_average(other)
stepped().remap_average({"a": 5})
pruner().load_state_dict(5)
pruner().load_state_dict({})
pruner().load_state_dict()
pruner(steps=3).load_state_dict(pruner(steps=2).state_dict())
pruner().state_dict(5)
pruner().regularize(5)
pruner().regularize()
pruner().regularize(other)
pruner().regularize(model)
proposal["nix"]
proposal[500]
candidate.edit("x")
candidate.edit([99])
candidate.edit()
candidate.edit([1], [1], [1])
candidate.edit([1.5])
plan.apply(5)
plan.apply()
plan.apply(other)
plan.apply(small)
plan.apply(model, foo=1)
plan.apply(model, same_class="x")
plan.apply(model, torch.randn(2, 5))
plan.apply(model, 5)
plan.masks(5)
plan.masks(other)
plan.masks()
plan.check(5)
plan.compose(5)
plan.compose(plan)
plan.compose()
plan.kept_shape("nix")
Plan.from_json(5)
Plan.from_json("x")
Plan.from_json()
Plan.from_json(folder / "a.safetensors")
Plan.from_json(b"\\xff\\xfe")
Plan.from_dict(5)
Plan.from_dict({})
plan.in_basis(5)
Plan()
plan.to_json(1)
coupling.group()
coupling.group("nix")
coupling.group(5)
coupling.group(other)
coupling.group("first", 5)
coupling.group("first", "x")
coupling.group("first", [99])
coupling.group("first", [])
coupling.group("first", [1.5])
coupling.group("first", [True])
coupling.group("first", [-1])
coupling.group("first", idx=[1])
coupling.to_networkx(5)
coupling.to_dict(5)
group.apply("x")
group.apply(verify="x")
group.apply(same_class=3)
group.to_dict(3)
report.to_html()
report.to_html(5)
report.to_html(folder)
report.to_html(folder / "no" / "x.html")
report.to_html(folder / "x.html", foo=1)
fxprune.report(5, small)
fxprune.report(model)
fxprune.report(model, model)
fxprune.report(small, model)
fxprune.report(model, 5)
fxprune.report(model, small, 5)
fxprune.report(model, small, x, ratios="x")
fxprune.report(model, small, x, measure="x")
fxprune.report(model, small, x, criterion="x")
swept.front("x")
swept.front(5)
swept.plot(5)
swept.plot(folder)
swept.plot()
swept.to_html(5)
sensitive.plot(5)
sensitive.plot(folder / "no" / "x.svg")
swept.points[0].model(5)
swept.original.model()
layers.remove_outputs()
layers.remove_outputs(5, [1])
layers.remove_outputs(torch.randn(3, 3), [1])
layers.remove_outputs(nn.Linear(3, 3), 5)
layers.remove_outputs(nn.Linear(3, 3), "x")
layers.remove_outputs(nn.Linear(3, 3), [0, 1, 2])
layers.remove_outputs(nn.Linear(3, 3), [9])
layers.remove_outputs(nn.Linear(3, 3), [1, 1])
layers.remove_outputs(nn.Linear(3, 3), [])
layers.remove_outputs(nn.Linear(3, 3), None)
layers.remove_outputs(nn.Linear(3, 3), [1], dim=5)
layers.remove_outputs(nn.LayerNorm(3), [1], dim="x")
layers.remove_outputs(nn.Linear(3, 3), [1], inplace="x")
layers.remove_outputs(nn.Linear(3, 3).weight, [1], inplace="x")
layers.remove_outputs(nn.ReLU(), [1])
layers.remove_outputs(model, [1])
layers.remove_outputs(nn.Parameter(torch.tensor(1.0)), [0])
layers.remove_outputs(nn.Parameter(torch.ones(3)), [0], dim=3)
layers.remove_inputs(nn.Parameter(torch.tensor(1.0)), [0])
layers.remove_inputs(nn.Embedding(3, 4), [0])
layers.remove_outputs(nn.Conv2d(4, 4, 1, groups=2), [0])
layers.remove_heads(5, [1])
layers.remove_heads(nn.Linear(3, 3), [1])
layers.remove_heads(nn.MultiheadAttention(8, 2), [0, 1])
layers.remove_heads(nn.MultiheadAttention(8, 2), [9])
layers.remove_heads(nn.MultiheadAttention(8, 2), [1], embedding=5)
layers.remove_heads(nn.MultiheadAttention(8, 2), [1], embedding="xyz")
layers.remove_heads(nn.MultiheadAttention(8, 2), [1], embedding=[99])
layers.remove_heads(nn.MultiheadAttention(8, 2), [1], inplace=2)
layers.remove_heads(nn.MultiheadAttention(8, 2), [1], foo=2)
masks.masked(5, plan)
masks.masked(model, 5)
masks.masked(model)
masks.hold(model, 5)
masks.zeroed(model, 5)
masks.zeroed(model, {"x": 1})
masks.zeroed(model, {"first.weight": torch.ones(2, 2, dtype=torch.bool)})
masks.prune_zeros(model, x)
masks.prune_zeros(5, x)
criteria.Magnitude(p="x")
fxprune.prune(model, 0.5, x, criterion=criteria.Magnitude(reduce="x"))
criteria.Magnitude(foo=1)
criteria.find("x")
fxprune.prune(model, 0.5, x, criterion=criteria.Random(seed="x"))
Pruner(model, 0.5, x, regularizer=regularizers.GroupLasso("x"))
Calibration()
Calibration.load(5)
Calibration.load("nowhere")
Calibration.load(folder)
Calibration.load(folder / "bin")
calibration.save(5)
calibration.save(folder / "no" / "x")
calibration.save(folder)
fxprune.calibrate(model)
fxprune.calibrate(model, 5)
fxprune.calibrate(model, [])
fxprune.save(5, folder / "x.safetensors")
fxprune.save(model, folder / "x.safetensors")
fxprune.save(small)
fxprune.save(small, 5)
fxprune.save(small, folder)
fxprune.load(5)
fxprune.load("nowhere.safetensors", model)
fxprune.load(folder / "a.safetensors", 5)
fxprune.load(folder / "a.safetensors", other)
fxprune.load(folder / "bin", model)
fxprune.load(folder / "a.safetensors", model, same_class="x")
fxprune.count(5, x)
fxprune.count(model, 5)
fxprune.count(model, x)[5]
fxprune.count(model)["firts"]
fxprune.prune(model, 0.5, x.long())
fxprune.prune(model, 0.5, x, freeze={"first": True})
fxprune.prune(model, 0.5, x, criterion="wanda", data=broken())
fxprune.prune(model, 0.5, x, data=broken(), repair=True)
fxprune.repair(model, small, broken())
pruner(steps=10**9)
layers.remove_inputs(nn.Linear(1, 3), [0])
layers.remove_outputs(nn.PReLU(), [0])
fxprune.save(small, "")
fxprune.verify(model)
fxprune.verify(model, model, x)
fxprune.verify(small, model, x)
fxprune.verify(model, small, x, sizes="x")
fxprune.verify(model, small, 5)
fxprune.verify(model, small)
fxprune.plan_of(5)
fxprune.plan_of()
fxprune.feasible(model, x, ratio="x")
fxprune.sensitivity(model, x, score, ratios="x")
fxprune.sensitivity(model, x, score, ratios=[2])
fxprune.sensitivity(model, x, 5)
fxprune.sensitivity(model, x, lambda m: None)
fxprune.sweep(model, x, score)
fxprune.sweep(model, x, score, budgets={"mac": [0.5]})
fxprune.sweep(model, x, score, budgets={"macs": [0.5]}, folder=5)
fxprune.search(model, x, score)
fxprune.search(model, x, score, macs=0.5, steps="x")
fxprune.search(model, x, score, macs=0.5, start=5)
fxprune.repair(model, small)
fxprune.repair(model, small, 5)
fxprune.repair(model, small, [x], method="x")
fxprune.repair(model, small, [x], method=5)
fxprune.repair(small, model, [x])
fxprune.prune_checkpoint("nowhere", "out", 0.5)
fxprune.prune_checkpoint(5, "out", 0.5)
fxprune.prune_checkpoint()
HFCallback()
HFCallback(every="x", example_inputs=x)
HFCallback(every=0, example_inputs=x)
HFCallback(every=5, example_inputs=x, pruning_ratio=0.5)
LightningCallback()
LightningCallback("net", every="x")
LightningCallback(5, every=3)
LightningCallback("net", every=3, pruning_ratio=0.5)
HFCallback(every=2, example_inputs=x, ratio=7)
HFCallback(every=2, example_inputs=x, steps=0)
HFCallback(every=2, example_inputs=x, criterion="magnitud")
LightningCallback("net", every=2, example_inputs=x, ratio="x")
LightningCallback("net", every=2, example_inputs=x, params=0.5, schedule="quad")
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.mid(self.first(x).relu()).relu())


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, Any]:
    """What the calls are written with."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "bin").write_bytes(b"\xff\xfe")
    model, x = Net().eval(), X
    small = fxprune.prune(model, 0.5, x)
    fxprune.save(small, folder / "a.safetensors")
    coupling = fxprune.couple(model, x)

    def pruner(**asked):
        return Pruner(model, 0.5, x, **asked)

    def stepped():
        made = pruner(steps=2)
        made.step()
        return made

    def score(net):
        return 1.0

    def broken():
        raise OSError("the disk is full")
        yield

    targets = torch.zeros(2, dtype=torch.long)
    proposal = pruner().step(interactive=True)

    return {
        **locals(),
        "fxprune": fxprune,
        "torch": torch,
        "nn": nn,
        "Plan": fxprune.Plan,
        "Calibration": fxprune.Calibration,
        "Pruner": Pruner,
        "criteria": criteria,
        "layers": layers,
        "masks": masks,
        "regularizers": regularizers,
        "HFCallback": importlib.import_module("fxprune.integrations.transformers").PruningCallback,
        "LightningCallback": importlib.import_module("fxprune.integrations.lightning").PruningCallback,
        "other": nn.Sequential(nn.Linear(4, 4)),
        "plan": small.plan,
        "group": coupling.group("first", [1, 2]),
        "report": fxprune.report(model, small),
        "swept": fxprune.sweep(model, x, score, budgets={"macs": [0.5]}, criteria="magnitude", measure=False),
        "sensitive": fxprune.sensitivity(model, x, score, ratios=[0.5]),
        "calibration": fxprune.calibrate(model, [(x, targets)], "taylor", x, loss=nn.functional.cross_entropy),
        "candidate": next(iter(proposal)),
    }


@pytest.mark.parametrize("call", WRONG.strip().splitlines())
def test_one_error_says_what_and_how(names, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FXPRUNE_TRACEBACK")
    specs = dict(registry.SPECS)
    with pytest.raises(fxprune.PruneError) as caught:
        eval(call, names)
    assert caught.value.fix and len(caught.value.what) < 250
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [f.filename for f in frames if f.filename.startswith(OWN)] == [OWN + "arguments.py"]
    assert specs == registry.SPECS and not any(tmp_path.iterdir())


@pytest.mark.parametrize("budget", ["params", "macs", "memory", "latency"])
def test_a_pruner_says_that_a_budget_removes_nothing(names, budget, monkeypatch):
    """As `prune` does."""
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    with pytest.warns(fxprune.PruneWarning, match=f"{budget}=1.0 removes nothing"):
        Pruner(names["model"], example_inputs=X, **{budget: 1.0})


def test_an_op_that_is_not_defined_yet_is_told():
    specs = dict(registry.SPECS)
    try:
        with pytest.warns(fxprune.PruneWarning, match="there is no op demo::never so far"):
            rule = fxprune.register_op("demo::never")
        with pytest.raises(fxprune.PruneError, match="labels must be a function, not 5"):
            rule(5)
    finally:
        registry.SPECS.clear()
        registry.SPECS.update(specs)
        registry.forget()
