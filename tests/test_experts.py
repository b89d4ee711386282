"""Whole experts go, with their rows of the router: exact against the original whose router never picks them."""

import copy

import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fxprune

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "vocab_size": 30,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, **SMALL}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS = {
    "Mixtral": ({"num_local_experts": 6, **GROUPED}, "num_local_experts"),
    "Qwen3Moe": ({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, **GROUPED}, "num_experts"),
    "GptOss": ({"num_local_experts": 6, "num_experts_per_tok": 2, **GROUPED}, "num_local_experts"),
    "DeepseekV3": (
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4, **LATENT, **SMALL},
        "n_routed_experts",
    ),
}
TOKENS = torch.arange(14).reshape(2, 7) + 3


def made(name, kernel="eager"):
    """A small model, all of whose values matter, and one call of it."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**MODELS[name][0])
    config._experts_implementation = kernel
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for layer in model.model.layers:
            if hasattr(getattr(layer.mlp, "gate", None), "e_score_correction_bias"):
                layer.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    single = kernel != "eager" or name == "DeepseekV3"  # whose router computes in single precision by itself
    return model if single else model.double(), {"input_ids": TOKENS, "use_cache": False}


def routers(model):
    return {n: m for n, m in model.named_modules() if n.endswith(("mlp.gate", "mlp.router")) and hasattr(m, "top_k")}


class NeverPicked(TorchFunctionMode):
    """The scores that a router computes are minus infinity for some experts."""

    def __init__(self, gone):
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            out[..., self.gone] = -torch.inf
        return out


def without(model, small, call):
    """What the original computes if its routers never pick the experts that are gone, and how many are."""
    model, slices, count = copy.deepcopy(model), fxprune.plan_of(small).slices, 0
    for name, router in routers(model).items():
        kept = next(cut.keep for cut in slices[f"{name}.weight"] if cut.dims == (0,))
        gone = [i for i in range(len(router.weight)) if i not in kept.tolist()]
        count += len(gone)
        forward = router.forward

        def routed(*args, forward=forward, gone=gone, **kwargs):
            with NeverPicked(gone):
                return forward(*args, **kwargs)

        router.forward = routed
        if hasattr(router, "e_score_correction_bias"):  # what is compared is a sigmoid, which is 0 there, and this
            router.e_score_correction_bias[gone] = -torch.inf
    with torch.no_grad():
        return model(**call).logits, count


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_exact(name, same_class):
    model, call = made(name)
    small = fxprune.prune(model, 0.5, call, experts="only", same_class=same_class)
    with torch.no_grad():
        logits = small(**call).logits
        assert (logits - model(**call).logits).abs().max() > 1e-3  # the experts were used
    wanted, gone = without(model, small, call)
    assert gone == (4 if name == "DeepseekV3" else 6)
    torch.testing.assert_close(logits, wanted)  # to rounding, by its precision
    if same_class:
        number = MODELS[name][1]
        assert getattr(small.config, number) == getattr(model.config, number) // 2


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "DeepseekV3"])
def test_kernels(name, kernel):
    model, call = made(name, kernel)
    small = fxprune.prune(model, 0.5, call, experts="only")
    wanted, gone = without(model, small, call)
    assert gone >= 4
    with torch.no_grad():
        torch.testing.assert_close(small(**call).logits, wanted, atol=1e-4, rtol=1e-4)
