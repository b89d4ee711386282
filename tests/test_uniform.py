"""`uniform=True`: families that play the same part keep the same share, so that a configuration describes the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fxprune
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.pytree import collect

IDS = torch.arange(24).reshape(2, 12) + 3
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL = {**WIDTHS, "vocab_size": 60}
DECODER = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0, "eos_token_id": 2}
OWN_HEADS = {**DECODER, "head_dim": 8}
TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, **TOKENS}
OPT = {**SMALL, **TOKENS, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 40}
WHISPER = {
    **TOKENS,
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))},
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens")),
    **dict(d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=56, num_mel_bins=8, decoder_start_token_id=1),  # noqa: C408
    **dict(max_source_positions=20, max_target_positions=30),  # noqa: C408
}
PATCHES = {**WIDTHS, "image_size": 16, "patch_size": 8}
TEXT, TWO = {"input_ids": IDS}, {"input_ids": IDS, "decoder_input_ids": IDS}
KINDS = {
    "Llama": ("LlamaForCausalLM", DECODER, TEXT),
    "Llama, tied": ("LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True}, TEXT),
    "BERT": ("BertForMaskedLM", {**SMALL, "max_position_embeddings": 40}, TEXT),
    "BERT with a pooler": ("BertForSequenceClassification", {**SMALL, "max_position_embeddings": 40}, TEXT),
    "GPT-2": ("GPT2LMHeadModel", GPT2, TEXT),
    "Qwen3": ("Qwen3ForCausalLM", OWN_HEADS, TEXT),
    "ViT": (
        "ViTForImageClassification",
        PATCHES,
        {"pixel_values": torch.ones(2, 3, 16, 16)},
    ),
    "T5": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": False}, TWO),
    "Whisper": (
        "WhisperForConditionalGeneration",
        WHISPER,
        {"input_features": torch.ones(2, 8, 40), "decoder_input_ids": IDS},
    ),
    "OPT": ("OPTForCausalLM", OPT, TEXT),
}


def built(name, arguments, inputs=None):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_configuration_describes_the_model(kind, tmp_path):
    name, arguments, inputs = KINDS[kind]
    model = built(name, arguments)
    small = fxprune.prune(model, params=0.8, uniform=True, same_class=True, example_inputs=inputs)
    assert size(small) <= 0.8 * size(model)
    assert small.verification.ok
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted, found = (collect(m(**inputs), torch.Tensor) for m in (small, again))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments", "inputs", "release", "width"),
    [
        ("GemmaForCausalLM", OWN_HEADS, TEXT, (), "hidden_size"),  # a scale in a buffer that is not saved
        ("T5ForConditionalGeneration", T5, TWO, "encoder_last_hidden_state", "d_model"),  # one that forward computes
    ],
)
def test_a_width_that_the_class_computes_with_stays(name, arguments, inputs, release, width, tmp_path):
    model = built(name, arguments)
    with pytest.warns(fxprune.PruneWarning, match=f"is {width}, which {name} computes other numbers from"):
        small = fxprune.prune(model, 0.5, inputs, uniform=True, same_class=True, release=release)
    assert getattr(small.config, width) == 32
    assert small.meta["stale"] == ()
    small.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs).logits, small(**inputs).logits)


def test_numbers_that_no_tensor_follows_stay():
    """At half of everything half as many positions would do, for an input as short as the example."""
    model = built("LlamaForCausalLM", DECODER)
    small = fxprune.prune(model, 0.5, IDS, uniform=True, same_class=True)
    assert (small.config.hidden_size, small.config.num_attention_heads, small.config.intermediate_size) == (16, 2, 24)
    assert small.config.max_position_embeddings == 40


@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
@pytest.mark.parametrize("asked", [{"ratio": 0.3}, {"params": 0.7}, {"macs": 0.7, "scopes": {"early": "0", "late": "3"}}])
def test_layers_of_one_structure_keep_equal_counts(ranking, asked):
    torch.manual_seed(0)
    net = Blocks(16, 24, 4)
    with torch.no_grad():
        for i, block in enumerate(net.blocks):
            block[0].weight *= 1 + i  # what counts by its weights would take all from the first one
    small = fxprune.prune(net, example_inputs=torch.randn(2, 16), uniform=True, ranking=ranking, **{**asked, **scopes(asked)})
    counts = {block[0].out_features for block in small.blocks}
    assert len(counts) == 1 and counts < {*range(24)}


def scopes(asked):
    return {"scopes": {"early": "blocks.0", "late": "blocks.3"}} if "scopes" in asked else {}


class Blocks(nn.Module):
    def __init__(self, width, inner, depth, other=None):
        super().__init__()
        self.first = nn.Linear(16, width)
        sizes = [inner] * (depth - 1) + [other or inner]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, n), nn.ReLU(), nn.Linear(n, width)) for n in sizes)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_a_number_that_goes_in_large_steps_is_left_where_others_meet_the_budget(ranking):
    """The hidden size and the heads that divide it lose a half or nothing; the intermediate size alone is enough here."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=128, num_hidden_layers=2, use_cache=False, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(8).view(1, 8)}
    small = fxprune.prune(model, params=0.7, example_inputs=inputs, uniform=True, ranking=ranking)
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.69 < share <= 0.7
    for layer in small.model.layers:
        assert layer.self_attn.q_proj.weight.shape == (32, 32) and layer.mlp.up_proj.weight.shape[0] < 64


def test_a_pruner_keeps_equal_counts_at_every_step():
    torch.manual_seed(0)
    pruner = fxprune.Pruner(
        Blocks(16, 24, 3), params=0.5, example_inputs=torch.randn(2, 16), uniform=True, steps=3, ranking="global"
    )
    seen = []
    for _ in range(3):
        pruner.step()
        seen.append({block[0].out_features for block in pruner.model.blocks})
    assert [len(counts) for counts in seen] == [1, 1, 1]
    assert max(seen[2]) < max(seen[0])


def test_a_pruned_model_with_a_configuration_is_pruned_again():
    small = fxprune.prune(built("LlamaForCausalLM", DECODER), 0.5, TEXT, uniform=True)
    smaller = fxprune.prune(small, 0.3, TEXT, uniform=True)
    widths = [layer.mlp.up_proj.out_features for layer in smaller.model.layers]
    assert smaller.verification.ok and widths[0] == widths[1] < small.model.layers[0].mlp.up_proj.out_features


def test_layers_of_another_size_are_another_part():
    torch.manual_seed(0)
    small = fxprune.prune(Blocks(16, 24, 3, other=20), 0.25, torch.randn(2, 16), uniform=True)
    assert [block[0].out_features for block in small.blocks] == [18, 18, 15]


def test_where_one_stays_all_do_and_the_reason_is_said():
    net, x = Blocks(16, 24, 3), torch.randn(2, 16)
    held = {f.name: f.frozen for f in fxprune.couple(net, x, freeze="blocks.1.0", uniform=True).families}
    for name in ("blocks.0.0", "blocks.2.0"):
        assert held[name] == "must stay whole for uniform=True, as blocks.1.0 does, which is frozen by freeze='blocks.1.0'"
    apart = {f.name: f.frozen for f in fxprune.couple(net, x, freeze="blocks.1.0").families}
    assert apart["blocks.0.0"] is None


def test_what_no_number_counts_stays():
    """The width inside the blocks is a literal of the class, so that no configuration says another one."""
    found = {f.name: f.frozen for f in fxprune.couple(Literal(LiteralConfig()), torch.randn(2, 16), uniform=True).families}
    assert found["first"] is None
    assert found["inner"] == "must stay whole for uniform=True, since no number of the configuration counts it"


class LiteralConfig:
    def __init__(self, width=12):
        self.width = width


class Literal(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first, self.inner, self.last = nn.Linear(16, config.width), nn.Linear(config.width, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.last(self.inner(self.first(x).relu()).relu())


def test_uniform_is_a_flag():
    with pytest.raises(PruneError, match="uniform must be True or False, not 'yes'"):
        fxprune.prune(Blocks(16, 24, 2), 0.5, torch.randn(2, 16), uniform="yes")


RELOAD = """
import sys, torch, transformers, fxprune
folder, ids = sys.argv[1], torch.arange(24).reshape(2, 12) + 3
wanted = torch.load(folder + "/wanted")
uniform, any_widths = folder + "/uniform", folder + "/any"
models = transformers.LlamaForCausalLM.from_pretrained(uniform), fxprune.load(any_widths, same_class=True)
for model, (logits, words) in zip(models, wanted, strict=True):
    assert torch.equal(model.eval()(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), words)
"""


def test_a_budget_with_data_comes_back_in_a_fresh_process(tmp_path):
    """By its configuration with `uniform=True`, else by `fxprune.load`; and words come out of both."""
    model = built("LlamaForCausalLM", DECODER)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (4, 4, 12))]
    wanted = []
    for name in ("uniform", "any"):
        small = fxprune.prune(
            model, params=0.8, example_inputs=data[0], data=data, same_class=True, uniform=name == "uniform"
        ).eval()
        assert size(small) <= 0.8 * size(model)
        widths = {layer.mlp.gate_proj.out_features for layer in small.model.layers}
        assert (widths == {small.config.intermediate_size}) == (name == "uniform")
        with torch.no_grad():
            wanted.append((small(IDS).logits, small.generate(IDS, max_new_tokens=4, do_sample=False)))
        small.save_pretrained(tmp_path / name)
    torch.save(wanted, tmp_path / "wanted")
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert not done.returncode, done.stderr


def test_no_class_of_transformers_has_layers_of_several_widths_by_configuration():
    """`per_layer_config` is read back, and refused by classes: what describes such layers is a plan."""
    given = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
    config = transformers.LlamaConfig(**given, per_layer_config={1: {"intermediate_size": 12}})
    again = transformers.LlamaConfig.from_dict(config.to_dict())
    assert [layer.intermediate_size for layer in again.per_layer_config] == [24, 12]
    with pytest.raises(RuntimeError, match="'intermediate_size' is a per-layer attribute"):
        transformers.LlamaForCausalLM(again)
