"""Counts by module: parameters, multiply-accumulates and bytes, against torch's own counter and by hand."""

import pytest
import timm
import torch
import torchvision
from refusals import IMAGES, net, untouched
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import PruneError

SMALL = {"num_classes": 10, "weights": None}


def by_counter(model, inputs):
    """Multiply-accumulates by torch's counter, module by module; it counts both operations of each."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return {path: sum(ops.values()) // 2 for path, ops in counter.get_flop_counts().items()}


def swin():
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=10), torch.randn(1, 3, 32, 32)


def encoder():
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)


def transposed():
    layers = nn.ConvTranspose2d(4, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 3, 1)
    return nn.Sequential(*layers), torch.randn(1, 4, 7, 7)


def recurrent():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 12)
            self.head = nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.out(self.rnn(x)[0]).relu())

    return Reader(), torch.randn(2, 5, 6)


def experts():
    """A router that chooses two of six; those that no token is for do not run."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate = nn.Linear(8, 8), nn.Linear(8, 6)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(6))

        def forward(self, x):
            weight, index = self.gate(x := self.first(x)).softmax(-1).topk(2, -1)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                token, slot = torch.where(index == i)
                if len(token):
                    out = out.index_add(0, token, weight[token, slot, None] * expert(x[token]))
            return out

    return Mixture(), torch.randn(1, 8)


def deciding():
    """A loop and a branch that values decide: how they fall for other inputs is computed, too, while the model is captured."""

    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.more, self.last = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            y = self.first(x)
            for _ in range(int(x.argmax()) % 3 + 1):
                y = self.more(y).tanh()
            return self.last(y + self.more(y) if y.sum() > 1000 else y)

    return Deciding(), torch.randn(2, 8)


MODELS = {
    "experts": experts,
    "deciding": deciding,
    "resnet18": lambda: (torchvision.models.resnet18(**SMALL), torch.randn(2, 3, 32, 32)),
    "shufflenet": lambda: (torchvision.models.shufflenet_v2_x0_5(**SMALL), torch.randn(1, 3, 32, 32)),
    "swin": swin,
    "vit": lambda: (timm.create_model("test_vit"), torch.randn(1, 3, 160, 160)),
    "encoder": encoder,
    "transposed": transposed,
    "recurrent": recurrent,
}


@pytest.fixture
def no_fast_path():
    """Torch's encoder layers may run as one call, of which the counter knows nothing."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("name", MODELS)
def test_multiply_accumulates_are_those_of_torchs_counter(name):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    for module in (model, fxprune.prune(model, 0.5, x, verify=False)):
        found = fxprune.count(module, x)
        assert found.macs == by_counter(module, x)["Global"] > 0
        assert found.parameters == sum(p.numel() for p in module.parameters())
        assert found.bytes == sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def test_every_module_has_its_own():
    """Of modules that torch's counter tells apart: by their names below the class of the root."""
    model, x = MODELS["resnet18"]()
    model.eval()
    found = fxprune.count(model, x)
    expected = {path.removeprefix("ResNet").removeprefix("."): n for path, n in by_counter(model, x).items()}
    assert {m.path: m.macs for m in found.modules if m.macs} == {p: n for p, n in expected.items() if n and p != "Global"}
    for module in found.modules:
        inside = model.get_submodule(module.path)
        assert module.kind == type(inside).__name__
        assert module.parameters == sum(p.numel() for p in inside.parameters())
    assert found["layer1"].macs == found["layer1.0"].macs + found["layer1.1"].macs


def test_a_budget_means_the_same():
    model, x = MODELS["resnet18"]()
    limit = fxprune.count(model.eval(), x).macs
    small = fxprune.prune(model, example_inputs=x, macs=0.4)
    assert 0.39 * limit <= fxprune.count(small, x).macs <= 0.4 * limit


def test_without_inputs_or_weights():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(3, 4)
    found = fxprune.count(model, x)
    assert (found.parameters, found.macs, found.bytes) == (30 + 12, 72, 4 * (42 + 12) + 8)
    assert "multiply" not in str(fxprune.count(model)) and fxprune.count(model).macs is None


def test_what_is_shared_counts_once_and_what_is_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5, bias=False)
            self.second = nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(self.first(x)))

    found = fxprune.count(Twice(), torch.randn(2, 5))
    assert found.parameters == 25 and found.macs == 3 * 2 * 25
    assert (found["first"].macs, found["second"].macs) == (100, 50)
    assert (found["first"].parameters, found["second"].parameters) == (25, 0)


def test_it_prints_and_is_data():
    model = net()
    with untouched(model):
        found = fxprune.count(model, IMAGES)
    assert repr(found).startswith("Count(Net: 706 parameters, 83.0 k multiply-accumulates")
    assert [line.split()[0] for line in str(found).splitlines()[4:]] == ["stem", "norm", "body", "head"]
    assert found.to_dict()["modules"][0]["parameters"] == 706


def test_a_model_that_does_not_run():
    with pytest.raises(PruneError, match="the model's own forward raises"):
        fxprune.count(nn.Linear(3, 4), torch.randn(2, 5))
