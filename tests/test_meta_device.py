"""A model without weights, on the meta device, is coupled and planned as the same model with weights."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.passes.capture.programs import programs
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import on_meta


def llama(device, layers=2, width=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    with torch.device(device):
        return LlamaForCausalLM(config).eval()


def resnet(device):
    from torchvision.models import resnet18

    with torch.device(device):
        return resnet18(num_classes=10).eval()


CASES = {
    "llama": (llama, {"input_ids": torch.arange(12).view(1, 12)}),
    "resnet": (resnet, torch.randn(1, 3, 64, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_coupling_needs_no_weights(name):
    build, inputs = CASES[name]
    assert fxprune.couple(build("meta"), inputs).to_dict() == fxprune.couple(build("cpu"), inputs).to_dict()


@pytest.mark.parametrize("name", CASES)
def test_a_plan_made_without_weights_applies_to_the_model_with_them(name):
    build, inputs = CASES[name]
    empty, real = build("meta"), build("cpu")
    made = fxprune.prune(empty, 0.5, example_inputs=inputs, criterion="random")
    assert all(p.is_meta for p in made.parameters()) and made.verification is None
    plan = fxprune.Plan.from_json(fxprune.plan_of(made).to_json())
    alike = fxprune.prune(real, 0.5, example_inputs=inputs, criterion="random", verify=False)  # which empty models are not
    assert plan.to_json() == alike.plan.to_json()
    small = plan.apply(real)
    assert fxprune.verify(real, small, inputs).ok
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


def test_inputs_may_be_on_the_meta_device_too():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to("meta")
    before = copy.deepcopy(net)
    coupled = [fxprune.couple(net, x).to_dict() for x in (torch.randn(1, 3, 8, 8), torch.empty(1, 3, 8, 8, device="meta"))]
    assert coupled[0] == coupled[1]
    assert all(p.is_meta and p.shape == q.shape for p, q in zip(net.parameters(), before.parameters()))


PLANNING = """
import resource, torch, fxprune
from transformers import LlamaConfig, LlamaForCausalLM

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.device("meta"):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, use_cache=False, **sizes)).eval()
before, count = peak(), sum(p.numel() for p in model.parameters())
made = fxprune.prune(model, 0.5, example_inputs={"input_ids": torch.arange(8).view(1, 8)}, criterion="random")
print(count, sum(p.numel() for p in made.parameters()), peak() - before)
"""


def test_seven_billion_parameters_are_planned_in_little_memory():
    """Nothing of the size of a weight is made: all of them would take 14 GB. In a process whose peak is its own."""
    told = subprocess.run([sys.executable, "-c", PLANNING], capture_output=True, text=True, check=True).stdout
    count, left, memory = map(int, told.split())
    assert count > 6.5e9 and left < 0.4 * count and memory < 1 << 30


class Converts(nn.Module):
    def __init__(self, convert):
        super().__init__()
        self.up, self.down, self.convert = nn.Linear(4, 8), nn.Linear(8, 2), convert

    def forward(self, x):
        return self.down(self.convert(self.up(x)).relu())


def test_a_conversion_by_type_needs_no_values():
    for convert in (lambda y: y.type(torch.float64).type(torch.float32), lambda y: y.type(dtype=torch.float32)):
        model, x = Converts(convert).eval(), torch.randn(3, 4)
        [capture] = programs(model, (x,), {}, on_meta)
        assert any(node.target == "type" for node in capture.graph.nodes)
        pruned = fxprune.prune(model, 0.5, example_inputs=x)
        assert pruned.verification.ok and pruned.up.out_features == 4


@pytest.mark.parametrize("convert", [lambda y: y if "cuda" not in y.type() else -y, lambda y: y.type("torch.FloatTensor")])
def test_types_that_name_a_device_need_values(convert):
    model, x = Converts(convert).eval(), torch.randn(3, 4)
    with pytest.raises(PruneError):
        programs(model, (x,), {}, on_meta)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.up.out_features == 4


@pytest.mark.parametrize(
    "convert",
    [
        lambda y: y + torch.zeros(y.shape[0], 1, dtype=int),
        lambda y: y.to(float).to(torch.float32) * torch.ones(y.shape[-1], dtype=bool),
        lambda y: y + y.sum(-1, keepdim=True, dtype=float).float(),
    ],
)
def test_pythons_types_are_dtypes(convert):
    model, x = Converts(convert).eval(), torch.randn(3, 4)
    programs(model, (x,), {}, on_meta)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.up.out_features == 4 and pruned.meta["capture"] == "symbolic"


@pytest.mark.parametrize("length", [1, 5])
def test_attention_takes_a_flag_that_is_made_of_sizes(length):
    def attend(y):
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=y.shape[1] > 1 and True).transpose(1, 2).flatten(2)

    model, x = Converts(attend).eval(), torch.randn(3, length, 4)
    programs(model, (x,), {}, on_meta)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.up.out_features == 4 and pruned.meta["capture"] == "symbolic"


def test_tokens_on_the_meta_device():
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    small = fxprune.prune(llama("meta"), 0.5, {"input_ids": ids}, criterion="random", verify=False)
    assert small.plan.slices
    again = small.plan.apply(llama("cpu"))
    assert again(input_ids=torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, 256)


def test_a_pruned_model_without_values_cannot_be_verified():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    small = fxprune.prune(model, 0.5, x)
    with pytest.raises(PruneError, match="on the meta device: it has no values"):
        fxprune.verify(model, small.to("meta"), x)
