"""A schedule that is interrupted after any step goes on bit by bit in a new process, with optimizer and moving average."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stepping import IMAGES, TARGETS, residual, vit
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune
from fxprune import PruneError
from fxprune.passes.ir.module_tree import named_tensors

STEPS = 3
SGD = (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9})
ADAM = (torch.optim.AdamW, {"lr": 0.001})
# the model, the optimizer, and what the pruner is asked for
CASES = {
    "sgd": (residual, SGD, {"regularizer": "growing"}),
    "adam": (vit, ADAM, {"criterion": "lamp", "ranking": "global", "schedule": "cubic"}),
    "hold": (residual, SGD, {"mask": "hold"}),
    "soft": (residual, ADAM, {"mask": "soft"}),
}


class Run:
    """A schedule with training in between: what a user would write."""

    def __init__(self, name, model):
        _, (kind, options), asked = CASES[name]
        self.pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, steps=STEPS, **asked)
        self.make = lambda parameters: kind(parameters, **options)
        self.start()

    def start(self):
        self.optimizer = self.make(self.pruner.model.parameters())
        self.average = AveragedModel(self.pruner.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def train(self):
        model = self.pruner.model.train()
        for _ in range(3):
            self.optimizer.zero_grad()
            F.cross_entropy(model(IMAGES), TARGETS).backward()
            self.pruner.regularize(model)
            self.optimizer.step()
            self.average.update_parameters(model)

    def step(self):
        self.train()
        self.pruner.step()
        self.pruner.remap_optimizer(self.optimizer)
        self.average = self.pruner.remap_average(self.average)
        self.train()

    def state_dict(self):
        parts = {"pruner": self.pruner, "optimizer": self.optimizer, "average": self.average}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state):
        self.pruner.load_state_dict(state["pruner"])
        self.start()
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])

    def result(self):
        model = self.pruner.model.eval()
        tensors = {name: t.detach() for name, t in [*named_tensors(model), *self.average.state_dict().items()]}
        with torch.no_grad():
            tensors["output"] = self.pruner.shrink(model)(IMAGES)
        return {"tensors": tensors, "history": str(self.pruner.history), "plan": self.pruner.plan.to_json()}


def resume(name, at, folder):
    """In another process: the architecture anew, with other weights."""
    model = CASES[name][0]()
    if at:  # before the first step it is the model itself
        for parameter in model.parameters():
            nn.init.uniform_(parameter)
    run = Run(name, model)
    run.load_state_dict(torch.load(Path(folder) / f"{name}{at}.pt", weights_only=True))
    while not run.pruner.done:
        run.step()
    wanted = torch.load(Path(folder) / f"{name}.pt", weights_only=True)
    found = run.result()
    assert found["history"] == wanted["history"] and found["plan"] == wanted["plan"]
    assert found["tensors"].keys() == wanted["tensors"].keys()
    differ = [n for n, t in wanted["tensors"].items() if not torch.equal(t, found["tensors"][n])]
    print(name, at, differ or "equal")


def test_schedules_go_on_in_a_new_process(tmp_path):
    for name, (build, _, _) in CASES.items():
        run = Run(name, build())
        for at in range(STEPS):
            torch.save(run.state_dict(), tmp_path / f"{name}{at}.pt")
            run.step()
        torch.save(run.result(), tmp_path / f"{name}.pt")
    calls = "; ".join(f"t.resume({name!r}, {at}, {str(tmp_path)!r})" for name in CASES for at in range(STEPS))
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, "-W", "ignore", "-c", f"import test_pruner_state as t; {calls}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert not done.returncode, done.stderr
    assert done.stdout.splitlines() == [f"{name} {at} equal" for name in CASES for at in range(STEPS)]


def test_states_of_other_pruners_are_refused():
    pruner = fxprune.Pruner(residual(), 0.5, example_inputs=IMAGES, steps=STEPS)
    pruner.step()
    state = pruner.state_dict()

    def loaded(state, model=None, ratio=0.5, **asked):
        other = fxprune.Pruner(model or residual(), ratio, example_inputs=IMAGES, **{"steps": STEPS, **asked})
        before = repr(other), other.model
        with pytest.raises(PruneError) as caught:
            other.load_state_dict(state)
        assert (repr(other), other.model) == before and "\n" not in caught.value.what and caught.value.fix
        return caught.value.what

    assert loaded(None) == "this is no state of a Pruner: its format is 'None'"
    assert loaded({**state, "format": "fxprune.pruner/2"}).endswith("its format is 'fxprune.pruner/2'")
    assert loaded(state, steps=4).startswith("the state is of a Pruner with shares [0.333")
    assert loaded(state, mask="hold") == "the state is of a Pruner with mask None, and this one has 'hold'"
    assert loaded(state, ratio=0.4) == "the state is of a Pruner with request ratio=0.5, and this one has ratio=0.4"
    said = "the state is of a Pruner with request ratio=0.5, and this one has ratio=0.5, uniform=True"
    assert loaded(state, uniform=True) == said
    assert "the plan is for another model" in loaded(state, model=vit())
    wider = residual()
    wider.head = nn.Linear(20, 6).double()
    assert "head.weight has shape (6, 20), not (5, 20)" in loaded(state, model=wider)
    for name, value in (
        ("kept", state["kept"][:-1]),
        ("gone", state["gone"].int()),
        ("calls", "3"),
        ("model", {}),
        ("plan", "{}"),
    ):
        assert loaded({**state, name: value})
    assert "cuts" in loaded({**state, "kept": torch.ones_like(state["kept"])})
    tensors = {**state["model"]["tensors"], "head.weight": torch.zeros(5, 3)}
    assert "head.weight is stored with shape (5, 3)" in loaded({**state, "model": {**state["model"], "tensors": tensors}})
