"""Selection: what is removed does not depend on how the model was captured."""

import pytest
import torch
from torchvision.models.swin_transformer import SwinTransformer

import fxprune
from fxprune.passes.coupling.families import families


@pytest.fixture
def swin():
    torch.manual_seed(0)
    return SwinTransformer([4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[7, 7], num_classes=5).eval()


def test_one_capture_of_both_modes_and_two_captures_select_the_same(swin, monkeypatch):
    images = torch.randn(1, 3, 64, 64)
    joined = fxprune.prune(swin, 0.5, example_inputs=images, verify=False)
    monkeypatch.setattr("fxprune.passes.capture.train_eval.modes_in_training", lambda *_, **__: None)
    captured = []
    monkeypatch.setattr(
        "fxprune.selection.select.families", lambda solution, names: captured.append(solution) or families(solution, names)
    )
    apart = fxprune.prune(swin, 0.5, example_inputs=images, verify=False)
    assert [len(solution.captures) for solution in captured] == [2]
    assert apart.plan == joined.plan
    assert len(joined.plan.keep) > 30
