"""`prune(..., repair=...)`: the cut is verified, then the values are put right, by the data that chose."""

import re

import pytest
import torch
import torch.nn.functional as F
from refusals import untouched
from torch import nn

import fxprune


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)).eval()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).eval()


DATA = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 4, (256,), generator=torch.Generator().manual_seed(2))
BATCHES = [(x, y) for x, y in zip(DATA.split(64), LABELS.split(64))]


@torch.no_grad()
def distance(model, other, x=DATA):
    return float((model(x) - other(x)).norm() / model(x).norm())


@pytest.mark.parametrize("how", [{"macs": 0.5, "attention": "heads"}, {"ratio": 0.5}, {"macs": 0.5, "same_class": True}])
def test_one_call_is_prune_then_repair(how):
    model = perceptron()
    whole = fxprune.prune(model, example_inputs=DATA[:1], data=DATA.split(64), repair=True, **how)
    cut = fxprune.prune(model, example_inputs=DATA[:1], data=DATA.split(64), **how)
    after = fxprune.repair(model, cut, DATA.split(64))
    assert whole.meta["plan"] == cut.meta["plan"]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), after.parameters(), strict=True))
    assert isinstance(whole, nn.Sequential) == ("same_class" in how)
    assert distance(model, whole) < distance(model, cut)


def test_the_cut_is_verified_and_the_report_says_what_was_chosen():
    model = perceptron()
    how = {"macs": 0.5, "attention": "heads"}
    small = fxprune.prune(model, example_inputs=DATA[:1], data=DATA.split(64), repair=True, **how)
    assert small.meta["verification"].ok
    before, after = small.meta["repair"].error
    assert after < before
    said = repr(fxprune.report(model, small, DATA[:1]))
    assert "chosen: criterion='flap', since there are data and no loss" in said
    assert "chosen: repair by reconstruct and recalibrate, since the inputs are no tokens" in said
    assert f"the error of the output on 64 samples held out was {before:.1%}, is {after:.1%}" in said


def test_batches_with_labels_do_for_criteria_and_repair():
    model = perceptron()
    small = fxprune.prune(model, 0.5, DATA[:1], data=BATCHES, loss=F.cross_entropy, repair=True)
    cut = fxprune.prune(model, 0.5, DATA[:1], data=BATCHES, loss=F.cross_entropy)
    assert small.meta["plan"] == cut.meta["plan"]
    assert "criterion='token_taylor', since there are data and a loss" in small.meta["chosen"]
    assert small.meta["repair"].samples == (192, 64)


@pytest.mark.parametrize("how", [{"macs": 0.5}, {"ratio": 0.5, "criterion": "wanda"}, {"macs": 0.5, "same_class": True}])
def test_an_iterator_is_read_once(how):
    read = []

    def batches():
        for x in DATA.split(64):
            read.append(len(x))
            yield x

    model = perceptron()
    small = fxprune.prune(model, example_inputs=DATA[:1], data=batches(), repair=True, **how)
    assert read == [64] * 4
    again = fxprune.prune(model, example_inputs=DATA[:1], data=DATA.split(64), repair=True, **how)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_given_indices_are_repaired():
    model = perceptron()
    small = fxprune.prune(model, example_inputs=DATA[:1], remove={"0": [0, 1, 5]}, data=DATA.split(64), repair=True)
    cut = fxprune.prune(model, example_inputs=DATA[:1], remove={"0": [0, 1, 5]})
    assert small.meta["plan"] == cut.meta["plan"]
    assert distance(model, small) < distance(model, cut)


@pytest.mark.parametrize("asked", ["compensate", ["compensate"], {"method": "compensate"}])
def test_a_method_may_be_named(asked):
    small = fxprune.prune(perceptron(), 0.5, DATA[:1], data=DATA.split(64), repair=asked)
    assert small.meta["repair"].methods == ("compensate",)
    assert not any("repair by" in text for text in small.meta["chosen"])


def test_arguments_of_repair_go_through():
    small = fxprune.prune(perceptron(), 0.5, DATA[:1], data=DATA.split(64), repair={"held_out": 0.5, "ridge": 0.1})
    assert small.meta["repair"].samples == (128, 128)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, ids, mask=None):
        return self.down(self.up(self.table(ids)).relu()).mean(1)


def test_the_default_method_is_chosen_by_the_inputs():
    torch.manual_seed(0)
    words, ids = Words().eval(), torch.randint(0, 11, (32, 6))
    batch = {"ids": ids, "mask": torch.ones(32, 6, dtype=torch.bool)}
    small = fxprune.prune(words, 0.5, batch, data=[batch], repair=True)
    assert small.meta["repair"].methods == ("refit",)
    assert small.meta["chosen"][-1] == "repair by refit, since the inputs are tokens"
    model, images = network(), torch.randn(32, 3, 8, 8)
    small = fxprune.prune(model, 0.5, images[:1], data=[images], repair=True)
    assert small.meta["repair"].methods == ("reconstruct", "recalibrate")
    again = fxprune.repair(words, fxprune.prune(words, 0.5, batch), [batch])
    assert again.meta["repair"].methods == ("refit",)


def test_refit_changes_nothing_where_none_can_be_held_out():
    words, ids = Words().eval(), torch.randint(0, 11, (3, 6))
    cut = fxprune.prune(words, 0.5, ids)
    better = fxprune.repair(words, cut, [ids])
    assert all(torch.equal(a, b) for a, b in zip(better.parameters(), cut.parameters(), strict=True))
    assert {s.note for s in better.meta["repair"].skipped} == {
        "3 samples: too few to hold some out; four are needed, or held_out=0"
    }
    assert any(s.done for s in fxprune.repair(words, cut, [ids], held_out=0).meta["repair"].steps)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"repair": True}, "repair looks at data, and there are none"),
        ({"repair": 1, "data": [DATA]}, "repair must be True or False, or say how, not 1"),
        ({"repair": "mend", "data": [DATA]}, "there is no method 'mend'"),
        ({"repair": {"methods": "refit"}, "data": [DATA]}, "repair has no argument 'methods'"),
        ({"repair": {"held_out": 2}, "data": [DATA]}, "held_out must be a share from 0 to 0.5, not 2"),
        ({"repair": True, "data": [DATA], "inplace": True}, "repair compares the result with the original"),
        ({"repair": True, "data": 3}, "data"),
        ({"repair": True, "data": []}, "data holds no batches"),
    ],
)
def test_what_is_refused(asked, what):
    model = perceptron()
    with untouched(model), pytest.raises(fxprune.PruneError, match=re.escape(what)):
        fxprune.prune(model, 0.5, DATA[:1], **asked)
