"""Residual branches go as units: exact against the original in which a hook multiplies the branch's result by zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn

import fxprune

X = torch.randn(2, 3, 32, 32)
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def first(out: Any) -> torch.Tensor:
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def silenced(model: nn.Module, modules: Iterable[str]) -> nn.Module:
    """The original, in which what some modules return (the first of several) is multiplied by zero."""
    made = copy.deepcopy(model)
    for path in modules:
        zero = lambda m, a, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0  # noqa: E731
        made.get_submodule(path).register_forward_hook(zero)
    return made


def call(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return first(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def randomised(model: nn.Module) -> nn.Module:
    """With weights that let every branch matter, and statistics that are not those of a fresh norm."""
    generator = torch.Generator().manual_seed(1)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and "inv_freq" not in name:
            with torch.no_grad():
                t.copy_(torch.rand(t.shape, generator=generator) * 0.4 + (0.2 if "var" in name else -0.1))
    return model.eval()


def swin() -> nn.Module:
    return tv.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.5, num_classes=5)


def convnext() -> nn.Module:
    return tv.ConvNeXt([tv.convnext.CNBlockConfig(8, 16, 2), tv.convnext.CNBlockConfig(16, None, 2)], 0.5, num_classes=5)


def vit() -> nn.Module:
    return tv.VisionTransformer(32, 8, 3, 4, 16, 32, num_classes=5)


def resnet() -> nn.Module:
    return tv.ResNet(tv.resnet.Bottleneck, [2, 1, 1, 2], num_classes=5)


def llama() -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2))


def bert() -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60}
    return hf.BertModel(hf.BertConfig(**sizes))


def t5() -> nn.Module:
    import transformers as hf

    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "num_layers": 2, "d_ff": 24, "vocab_size": 60}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


ENCODER = "encoder.layers.encoder_layer_"
VIT = ((0, "self_attention", "ln_1"), (1, "mlp", "ln_2"))
LLAMA = (
    (0, "self_attn", "input_layernorm"),
    (1, "mlp", "post_attention_layernorm"),
    (2, "self_attn", "input_layernorm"),
    (2, "mlp", "post_attention_layernorm"),
)
DECODER = {"input_ids": IDS, "use_cache": False}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7].contiguous(), "use_cache": False}
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, int, dict[str, list[str]]]] = {
    # the number of branches, and of some of them the module whose result it is with all that goes
    "resnet": (resnet, X, 2, {"layer4.1.bn3": [f"layer4.1.{m}{i}" for m in ("conv", "bn") for i in (1, 2, 3)]}),
    "mobilenet": (
        lambda: tv.mobilenet_v2(width_mult=0.25),
        X,
        10,
        {f"features.{i}.conv": [f"features.{i}.conv"] for i in (3, 12)},
    ),
    "vit": (vit, X, 6, {f"{ENCODER}{i}.{m}": [f"{ENCODER}{i}.{m}", f"{ENCODER}{i}.{n}"] for i, m, n in VIT}),
    "swin": (
        swin,
        X,
        8,
        {
            "features.1.0.attn": ["features.1.0.attn", "features.1.0.norm1"],
            "features.1.1.attn": ["features.1.1.attn", "features.1.1.norm1"],  # shifted windows
            "features.3.0.mlp": ["features.3.0.mlp", "features.3.0.norm2"],
        },
    ),
    "convnext": (
        convnext,
        X,
        4,
        {f"features.{i}.block": [f"features.{i}.block", f"features.{i}.layer_scale"] for i in ("1.1", "3.0")},
    ),
    "llama": (
        llama,
        DECODER,
        6,
        {f"model.layers.{i}.{m}": [f"model.layers.{i}.{m}", f"model.layers.{i}.{n}"] for i, m, n in LLAMA},
    ),
    "bert": (
        bert,
        {"input_ids": IDS},
        6,
        {
            "encoder.layer.0.attention.output.dense": [
                "encoder.layer.0.attention.self",
                "encoder.layer.0.attention.output.dense",
            ],
            "encoder.layer.1.output.dense": ["encoder.layer.1.intermediate", "encoder.layer.1.output.dense"],
        },
    ),
    "t5": (
        t5,
        BOTH,
        10,
        {  # the first layer computes the positions that the others read, from the sizes of its queries and keys: these stay
            "encoder.block.0.layer.0.SelfAttention": [f"encoder.block.0.layer.0.SelfAttention.{m}" for m in "vo"],
            "encoder.block.1.layer.1.DenseReluDense": [
                "encoder.block.1.layer.1.DenseReluDense",
                "encoder.block.1.layer.1.layer_norm",
            ],
            "decoder.block.1.layer.1.EncDecAttention": [
                "decoder.block.1.layer.1.EncDecAttention",
                "decoder.block.1.layer.1.layer_norm",
            ],
        },
    ),
}


def least(model: nn.Module, modules: Iterable[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A criterion by which the branches that end in some modules matter least."""
    light = {p.data_ptr() for path in modules for p in model.get_submodule(path).parameters()}
    return lambda weight: torch.full_like(weight, 0.0 if weight.data_ptr() in light else 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_branch_goes_whole_and_adds_nothing(name):
    make, inputs, total, gone = MODELS[name]
    torch.manual_seed(0)
    model = randomised(make())
    wanted = call(silenced(model, gone), inputs)
    assert not torch.allclose(wanted, call(model, inputs))  # they matter
    ratio = (len(gone) + 0.5) / total
    pruned = fxprune.prune(model, ratio, inputs, depth="only", criterion=least(model, gone), verify=True)
    assert pruned.verification.ok and not pruned.verification.refused
    torch.testing.assert_close(call(pruned, inputs), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call(pruned.flat(), inputs), wanted, rtol=1e-5, atol=1e-6)
    prefixes = tuple(f"{path}." for paths in gone.values() for path in paths)
    removed = {key for key in model.state_dict() if f"{key}.".startswith(prefixes)}
    assert pruned.state_dict().keys() == model.state_dict().keys() - removed
    assert count(pruned) == count(model) - sum(p.numel() for key, p in model.named_parameters() if key in removed)
    for path in {path for paths in gone.values() for path in paths}:
        with pytest.raises(AttributeError):
            getattr(pruned.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
    pruned.train()
    first(pruned(**inputs) if isinstance(inputs, dict) else pruned(inputs)).sum().backward()
    assert any(p.grad is not None for p in pruned.parameters())
