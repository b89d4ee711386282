"""Structural roles of families: found from the program, whatever layers are called."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune


def roles(model, inputs, **options):
    return {f.name: f.role for f in fxprune.couple(model.eval(), inputs, **options).families}


class Attention(nn.Module):
    """Attention over 4 query heads of 3 dimensions, with 4 or fewer key heads, from one packed layer or from several."""

    def __init__(self, keys: int, packed: bool, fused: bool) -> None:
        super().__init__()
        self.keys, self.fused = keys, fused
        width = 3 * (4 + 2 * keys)
        self.zebra = nn.ModuleList([nn.Linear(12, width)] if packed else [nn.Linear(12, n * 3) for n in (4, keys, keys)])
        self.yak = nn.Linear(12, 12)

    def forward(self, x):
        made = torch.cat([layer(x) for layer in self.zebra], -1) if len(self.zebra) > 1 else self.zebra[0](x)
        q, k, v = made.split([12, 3 * self.keys, 3 * self.keys], -1)
        q, k, v = (t.unflatten(-1, (-1, 3)).transpose(1, 2) for t in (q, k, v))
        if self.keys < 4:
            k, v = (t.repeat_interleave(4 // self.keys, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.yak(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("keys", "role"), [(4, "head"), (2, "KV group")])
def test_heads_and_key_groups(keys, role, packed, fused):
    found = roles(Attention(keys, packed, fused), torch.randn(2, 5, 12))
    assert found["zebra.0"] == role


def test_dimensions_of_heads():
    found = roles(Attention(4, False, True), torch.randn(2, 5, 12), attention="dims")
    assert {role for name, role in found.items() if name.startswith("zebra") and ":1" not in name} == {"head dimension"}


def test_hidden_layers_and_ends():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    assert roles(net, torch.randn(1, 4)) == {"0": "hidden layer", "0:1": "", "2": "hidden layer", "4": ""}


class Sums(nn.Module):
    """`a(x) + b(x)`, a sum of two layers, or `h + b(h)`, a residual branch."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.residual = residual

    def forward(self, x):
        h = self.a(x)
        return self.out(h + self.b(h.relu()) if self.residual else h + self.b(x))


def test_a_sum_is_a_stream_only_where_one_side_is_computed_from_the_other():
    assert roles(Sums(True), torch.randn(1, 6))["a"] == "residual stream"
    assert roles(Sums(False), torch.randn(1, 6))["a"] == "hidden layer"


def test_a_resnet_has_a_stream_in_every_stage():
    found = roles(torchvision.models.resnet18(num_classes=4), torch.randn(1, 3, 32, 32))
    streams = {name for name, role in found.items() if role == "residual stream"}
    assert streams == {"conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"}
    assert all(role == "hidden layer" for name, role in found.items() if name.endswith(".conv1"))


def test_a_language_model_prints_its_roles():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, use_cache=False, **sizes)).eval()
    ids = {"input_ids": torch.arange(16).reshape(2, 8)}
    found = fxprune.couple(model, ids)
    assert [(f.role, f.units) for f in found.prunable] == [
        ("residual stream", 32),
        ("hidden layer", 48),
        ("hidden layer", 48),
        ("KV group", 2),
        ("KV group", 2),
    ]
    assert "residual stream" in str(found)
    assert {f["name"]: f["role"] for f in found.to_dict()["families"]}["model.embed_tokens:1"] == "residual stream"
    assert "KV group" in str(fxprune.report(model, fxprune.prune(model, 0.5, ids)))
