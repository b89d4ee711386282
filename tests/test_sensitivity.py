"""Sensitivity: every value against pruning that family alone, the table, the drawing, and what it refuses."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from refusals import IMAGES, net, refuses, untouched
from torch import nn

import fxprune
from fxprune import PruneError

EVALUATE = "a function of a module that returns a number, such as its accuracy"


@torch.no_grad()
def size(model):
    """Something every choice of units changes, and no rounding does."""
    return float(sum(p.abs().double().sum() for p in model.parameters()))


def test_each_value_is_that_of_one_family_pruned_alone():
    model = net()
    with untouched(model):
        found = fxprune.sensitivity(model, IMAGES, size, ratios=(0.5, 0.25))
    assert found.ratios == (0.25, 0.5) and found.whole == size(model)
    assert [(c.family, c.units, c.removed) for c in found.curves] == [
        ("stem", 8, (2, 4)),
        ("body", 6, (1, 3)),
    ]
    assert found.curves[0].layers == ("stem", "norm", "body")
    for curve in found.curves:
        for ratio, value in zip(found.ratios, curve.values):
            alone = fxprune.prune(model, {curve.family.partition(".")[0]: ratio}, example_inputs=IMAGES)
            assert value == size(alone)
    assert len({*found.curves[0].values, *found.curves[1].values, found.whole}) == 5


def test_the_criterion_and_its_data_decide_who_goes():
    model = net()
    options = {"criterion": "wanda", "data": [IMAGES], "round_to": 2}
    found = fxprune.sensitivity(model, IMAGES, size, ratios=(0.4,), **options)
    assert [c.removed for c in found.curves] == [(2,), (2,)]
    alone = fxprune.prune(model, {"body": 0.4}, example_inputs=IMAGES, **options)
    assert found.curves[1].values == (size(alone),)


def test_modules_are_evaluated_in_evaluation_mode_and_without_gradients():
    seen = []
    fxprune.sensitivity(net().train(), IMAGES, lambda m: seen.append((m.training, torch.is_grad_enabled())) or 1, ratios=(0.5,))
    assert seen == [(False, False)] * 3


def test_a_ratio_that_takes_nothing_is_the_whole_model():
    calls = []
    found = fxprune.sensitivity(net(), IMAGES, lambda m: calls.append(m) or len(calls), ratios=(0.01, 0.5))
    assert [c.removed for c in found.curves] == [(0, 4), (0, 3)]
    assert [c.values for c in found.curves] == [(1.0, 2.0), (1.0, 3.0)]


def test_families_that_go_together_share_a_curve():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    found = fxprune.sensitivity(layer, x, size, ratios=(0.5,), attention="dims")
    names = [c.family for c in found.curves]
    assert "linear1" in names and sum(" & " in name for name in names) == 1
    together = next(c for c in found.curves if " & " in c.family)
    assert together.units == 32 and together.removed == (16,)


def test_the_table_and_its_data():
    found = fxprune.sensitivity(net(), IMAGES, lambda m: m.stem.weight.shape[0], ratios=(0.25, 0.5))
    lines = [line.split() for line in str(found).splitlines()]
    assert str(found).splitlines()[0] == "Net: 8 unpruned; below, with one family at a time pruned by a ratio"
    assert lines[2] == ["family", "units", "0.25", "0.5", "layers"]
    assert lines[4] == ["stem", "8", "6", "4", "stem,", "norm,", "body"]
    assert lines[5] == ["body", "6", "8", "8", "body,", "head"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["curves"][0]["values"] == [6.0, 4.0] and data["whole"] == 8.0


def test_the_drawing(tmp_path):
    path = tmp_path / "curves.svg"
    values = iter([1.0, 0.5, 0.0, float("nan"), 0.25])
    found = fxprune.sensitivity(net(), IMAGES, lambda m: next(values), ratios=(0.25, 0.5))
    found.plot(path)
    root = ET.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{space}polyline")
    assert [line.find(f"{space}title").text for line in lines] == [c.family for c in found.curves]
    points = [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]
    assert points[0] == [(64, 40), (344, 220), (624, 400)], "1 at the top, 0 at the bottom, the last ratio at the right"
    assert points[1] == [(64, 40), (624, 310)], "a value that is no number has no point"


@pytest.mark.parametrize("ratios", [(0.5, 1.0), (0,), ("a",), (True,), 1.5])
def test_ratios_out_of_range(ratios):
    wrong = next(r for r in (ratios if isinstance(ratios, tuple) else [ratios]) if r != 0.5)
    what = f"ratios must lie between 0 and 1, and {wrong!r} does not"
    model = net()
    refuses(lambda: fxprune.sensitivity(model, IMAGES, size, ratios=ratios), model, what=what, fix="ratios=(0.25, 0.5, 0.75)")


def test_bad_input():
    model = net()
    refuses(
        lambda: fxprune.sensitivity(model, IMAGES, size, ratios=()),
        model,
        what="ratios holds none",
        fix="ratios=(0.25, 0.5, 0.75)",
    )
    refuses(lambda: fxprune.sensitivity(model, IMAGES), model, what="evaluate must be a function, not None", fix=EVALUATE)
    refuses(
        lambda: fxprune.sensitivity(model, IMAGES, lambda m: "high"),
        model,
        what="evaluate must return a number, not str",
        fix=EVALUATE,
    )
    with pytest.raises(PruneError, match="example inputs are missing"):
        fxprune.sensitivity(model, None, size)
    with pytest.raises(KeyError, match="mine"):
        fxprune.sensitivity(model, IMAGES, lambda m: {}["mine"])
