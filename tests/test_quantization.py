"""A pruned model is quantized to 8 bits as the original is, eagerly and by FX's passes."""

import pytest
import torch
import torch.ao.quantization as tq
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import fxprune

pytestmark = [  # what torch says of its own functions and of what they call
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
]
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Stubs(nn.Module):
    """Marks where numbers become 8-bit integers by modules that return what they are given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
        self.second, self.head = nn.Conv2d(16, 16, 3), nn.Linear(16, 5)

    def forward(self, x):
        x = self.second(self.relu(self.norm(self.conv(self.quant(x)))))
        return self.dequant(self.head(x.mean((2, 3))))


@pytest.fixture(params=[False, True], ids=["graph", "same_class"])
def small(request):
    return fxprune.prune(Stubs().eval(), 0.5, example_inputs=X, same_class=request.param)


def close(quantized, model):
    """Two layers and their inputs are rounded to 8 bits: within eight of the 256 steps of the output's range."""
    with torch.no_grad():
        wanted, found = model(X), quantized(X)
    assert 0 < float((found - wanted).abs().max()) <= 8 / 256 * float(wanted.max() - wanted.min())


def test_eagerly(small):
    model = tq.fuse_modules(small, [["conv", "norm", "relu"]])
    model.qconfig = tq.get_default_qconfig("x86")
    tq.prepare(model, inplace=True)
    model(X)
    tq.convert(model, inplace=True)
    layers = [model.get_submodule(name) for name in ("quant", "conv", "second", "head")]
    assert all(".quantized." in type(layer).__module__ for layer in layers)
    assert model.get_submodule("second").weight().dtype == torch.qint8 and model.get_submodule("second").weight().shape == (
        8,
        8,
        3,
        3,
    )
    close(model, small)


def test_by_passes_of_fx(small):
    prepared = prepare_fx(small, tq.get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    model = convert_fx(prepared)
    assert model.get_submodule("second").weight().dtype == torch.qint8
    close(model, small)


def test_dynamically():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(6, 8)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    quantized = tq.quantize_dynamic(small, {nn.Linear})
    with torch.no_grad():
        wanted, found = small(x), quantized(x)
    assert quantized.get_submodule("0").weight().shape == (16, 8)
    assert 0 < float((found - wanted).abs().max()) <= 8 / 256 * float(wanted.max() - wanted.min())
