"""What Python prints of a PruneError: the lines of the user's, and none of the compiler's unless asked."""

import traceback
from pathlib import Path

import pytest
import torch
from refusals import IMAGES, Net

import fxprune

OWN = str(Path(fxprune.__file__).parent)
SMALL = fxprune.prune(Net().eval(), 0.5, IMAGES)
REFUSED = {
    "an argument": lambda model: fxprune.prune(model, 2, IMAGES),
    "a family": lambda model: fxprune.couple(model, IMAGES).group("stm", [1]),
    "a plan": lambda model: SMALL.plan.apply(torch.nn.Linear(2, 2)),
    "the model's forward": lambda model: fxprune.prune(model, 0.5, IMAGES[:, :2]),
    "its forward, counted": lambda model: fxprune.count(model, IMAGES[:, :2]),
    "a batch of data": lambda model: fxprune.prune(model, 0.5, IMAGES, criterion="wanda", data=[IMAGES[:, :2]]),
    "a batch to repair": lambda model: fxprune.repair(model, SMALL, [IMAGES[:, :2]]),
    "no steps": lambda model: fxprune.Pruner(model, 0.5, IMAGES, steps=0),
}


def printed(refused):
    with pytest.raises(fxprune.PruneError) as caught:
        refused(Net().eval())
    assert len(str(caught.value).splitlines()) <= 3  # what, where, fix
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_no_lines_of_the_compiler(refused, monkeypatch):
    monkeypatch.delenv("FXPRUNE_TRACEBACK")
    said = printed(refused)
    own = [line for line in said.splitlines() if OWN in line]
    assert [line.rpartition(" in ")[2] for line in own] == ["call"]  # the one that raises
    assert len(said.splitlines()) < 30


def test_the_line_of_the_models_forward_is_shown(monkeypatch):
    monkeypatch.delenv("FXPRUNE_TRACEBACK")
    said = printed(REFUSED["the model's forward"])
    assert "self.drop(F.relu(self.norm(self.stem(x))))" in said and "direct cause" in said


def test_all_lines_where_asked():
    assert "passes/capture/programs.py" in printed(REFUSED["the model's forward"])
