"""Objects of a model's own classes that hold tensors: handed from module to module, given to and returned by the model."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import fxprune
from fxprune.passes.ir.pytree import collect, map_tensors


class Box:
    def __init__(self, value, sizes):
        assert value.dim() == 2
        self.value, self.sizes = value, sizes

    def doubled(self):
        return self.value * 2


class Slotted:
    __slots__ = ("sizes", "value")

    def __init__(self, value, sizes):
        self.value, self.sizes = value, sizes

    def doubled(self):
        return self.value * 2


@dataclass(frozen=True)
class Frozen:
    value: torch.Tensor
    sizes: list

    def doubled(self):
        return self.value * 2


class Reader(nn.Module):
    """Reads the contents of what it is given, and so is one node of the program; it returns what it was given, changed."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, box):
        value = self.inner(box.doubled()).relu()
        if float(value.detach().sum()) > 1e9:
            value = -value
        return type(box)(value, box.sizes)


class Handing(nn.Module):
    def __init__(self, kind, reads):
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.middle = Reader() if reads else nn.Identity()

    def forward(self, x):
        box = self.middle(self.kind(self.first(x), [len(x)]))
        return self.kind(self.last(box.doubled()), box.sizes)


@pytest.mark.parametrize("reads", [False, True], ids=["traced", "opaque"])
@pytest.mark.parametrize("kind", [Box, Slotted, Frozen])
def test_are_handed_on_and_compared(kind, reads):
    torch.manual_seed(0)
    model, x = Handing(kind, reads).eval(), torch.randn(3, 4)
    pruned = fxprune.prune(model, 0.5, x)
    assert pruned.first.weight.shape == (4, 4)
    assert ("middle" in pruned.meta["capture"]) == reads
    assert pruned.verification.ok and not pruned.verification.blank
    out = pruned(x)
    assert type(out) is kind and out.value.shape == (3, 2) and out.sizes == [3]
    with torch.no_grad():
        pruned.last.weight.mul_(1.1)
    assert not fxprune.verify(model, pruned, x).ok


def test_branches_of_both_modes_return_them():
    class Noisy(nn.Module):
        def forward(self, x):
            return Box(x * 2 if self.training else x, [1])

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.noisy, self.last = nn.Linear(4, 8), Noisy(), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.noisy(self.first(x)).value)

    x = torch.randn(3, 4)
    pruned = fxprune.prune(Network().eval(), 0.5, x)
    h = pruned.first(x)
    torch.testing.assert_close(pruned(x), pruned.last(h))
    torch.testing.assert_close(pruned.train()(x), pruned.last(2 * h))


class Typed(nn.Module):
    """Returns an object that has a class among its attributes, as caches of transformers have that of their layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        made = Box(self.second(self.first(x).relu()), [1])
        made.kind = Slotted
        return made


def test_one_that_holds_a_class(tmp_path):
    model, x = Typed().eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, 0.5, x)
    assert pruned.meta["capture"] == "symbolic" and pruned.first.out_features == 4
    torch.save(pruned, tmp_path / "whole.pt")
    for made in (pruned, torch.load(tmp_path / "whole.pt", weights_only=False)):
        found = made(x)
        assert type(found) is Box and found.kind is Slotted and found.value.shape == (2, 3)


def test_one_that_holds_itself_is_looked_into_once():
    box = Box(torch.ones(2, 2), [torch.zeros(1)])
    box.me = [box]
    assert [t.shape for t in collect({"box": box}, torch.Tensor)] == [(2, 2), (1,)]
    assert map_tensors([box], torch.neg)[0].value.sum() == -4


def test_one_that_is_given_to_the_model():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, box):
            return self.last(self.first(box.doubled()).relu())

    model, box = Network().eval(), Box(torch.randn(3, 4), [3])
    pruned = fxprune.prune(model, 0.5, (box,))
    assert pruned.first.weight.shape == (4, 4)
    assert fxprune.verify(model, pruned, (Box(torch.randn(5, 4), [5]),)).ok


def backbone():
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 4, 1), nn.BatchNorm2d(24), nn.ReLU()
    )
    made.out_channels = 24
    return made


def faster_rcnn():
    return detection.FasterRCNN(
        backbone(),
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(24 * 9, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 3),
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=10,
    )


def retinanet():
    return detection.RetinaNet(
        backbone(), num_classes=3, anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)), min_size=64, max_size=96
    )


@pytest.mark.parametrize("make", [faster_rcnn, retinanet])
def test_detectors(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # scores that tell boxes apart, some of them high
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1))
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    assert all(len(found["boxes"]) for found in model(images))
    pruned = fxprune.prune(model, 0.5, (images,))
    assert pruned.verification.ok and not pruned.verification.blank
    left = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    assert left < 0.5
    with torch.no_grad():
        next(p for name, p in pruned.named_parameters() if "head" in name).mul_(1.1)
    assert not fxprune.verify(model, pruned, (images,)).ok
