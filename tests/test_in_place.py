"""Pruning in place: the result of pruning a copy, in the memory of the weights and one layer."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fxprune
from fxprune import PruneError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}


def llama(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **more)
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(3, 15).view(2, 6)}


def convs(**more):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(5))
    net(torch.randn(2, 3, 8, 8))
    return net.eval(), torch.randn(2, 3, 8, 8)


class Residual(nn.Module):
    """Two branches of a stream that goes to the output; each normalisation counts in a tensor without dimensions."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2)
        )

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def residual():
    torch.manual_seed(0)
    return Residual().eval(), torch.randn(4, 8)


def called(model, inputs):
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, torch.Tensor) else found["logits"]


@pytest.mark.parametrize("verify", ["auto", False])
@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("build", [convs, llama, lambda: llama(tie_word_embeddings=True)], ids=["convs", "llama", "tied"])
def test_as_pruning_a_copy(build, same_class, verify):
    model, inputs = build()
    wanted = fxprune.prune(copy.deepcopy(model), 0.5, inputs, same_class=same_class, verify=verify)
    parameters = dict(model.named_parameters())
    small = fxprune.prune(model, 0.5, inputs, same_class=same_class, verify=verify, inplace=True)
    assert (small is model) == same_class and (small.verification is None) == (verify is False)
    assert fxprune.plan_of(small) == fxprune.plan_of(wanted)
    mine, theirs = small.state_dict(), wanted.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(called(small, inputs), called(wanted, inputs))
    for name, parameter in small.named_parameters():
        assert parameters[name].data_ptr() == parameter.data_ptr()
    assert any(p.shape != wanted.get_parameter(n).shape for n, p in build()[0].named_parameters())


@pytest.mark.parametrize("verify", ["auto", False])
@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("build", [residual, llama])
def test_residual_branches_go_in_place(build, same_class, verify):
    model, inputs = build()
    asked = {"depth": "only", "same_class": same_class, "verify": verify}
    inputs = inputs | {"use_cache": False} if isinstance(inputs, dict) else inputs
    wanted = fxprune.prune(copy.deepcopy(model), 0.5, inputs, **asked)
    before = sum(p.numel() for p in model.parameters())
    small = fxprune.prune(model, 0.5, inputs, inplace=True, **asked)
    mine, theirs = small.state_dict(), wanted.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(called(small, inputs), called(wanted, inputs))
    assert [(n, m._get_name()) for n, m in small.named_modules()] == [(n, m._get_name()) for n, m in wanted.named_modules()]
    left = sum(p.numel() for p in wanted.parameters())
    assert left == sum(p.numel() for p in model.parameters()) < before  # nothing is held for what is gone


def test_a_saved_in_place_result_without_a_configuration_is_that_model(tmp_path):
    model, inputs = llama()
    fxprune.prune(model, {"*layers.0.mlp*": 0.5}, inputs, same_class=True, verify=False, inplace=True)
    assert "config" in model.meta["stale"]
    model.lm_head.weight.data += 1  # as training does
    model.save_pretrained(tmp_path)
    assert torch.equal(called(fxprune.load(tmp_path, same_class=True).eval(), inputs), called(model, inputs))


def test_the_model_keeps_its_parameters_hooks_and_ties():
    model, inputs = llama(tie_word_embeddings=True)
    ids, calls = {name: id(p) for name, p in model.named_parameters()}, []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    called(model, inputs)
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    fxprune.prune(model, 0.5, inputs, same_class=True, verify=False, inplace=True)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.grad is None
    del calls[:]
    called(model, inputs)
    assert calls == [1]


def test_an_in_place_result_is_saved_and_pruned_again(tmp_path):
    model, inputs = llama()
    fxprune.prune(model, 0.5, inputs, same_class=True, inplace=True)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(called(again, inputs), called(model, inputs))
    assert fxprune.prune(again, {"*mlp*": 0.5}, inputs, same_class=True, inplace=True) is again


@pytest.mark.parametrize("asked", [{"params": 1e-6}, {"ratio": {"nothing": 0.5}}, {"ratio": 0.5, "freeze": ["*"]}])
@pytest.mark.parametrize("verify", ["auto", False])
def test_what_is_refused_leaves_the_model_alone(asked, verify):
    model, inputs = llama()
    before, held = copy.deepcopy(model.state_dict()), {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    with pytest.raises(PruneError):
        fxprune.prune(model, example_inputs=inputs, verify=verify, inplace=True, same_class=True, **asked)
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == held
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_name_of_a_member_is_refused_before_anything_is_cut():
    model = nn.Sequential()
    model.meta = nn.Linear(6, 8)
    model.last = nn.Linear(8, 2)
    with pytest.raises(PruneError, match="rename"):
        fxprune.prune(model, 0.5, torch.randn(1, 6), verify=False, inplace=True)
    assert model.meta.weight.shape == (8, 6)


def test_a_width_that_the_class_computes_with_stays():
    """The scale of Gemma's embeddings comes from the hidden size, so that no configuration describes a smaller one."""
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)
    model, inputs = transformers.GemmaForCausalLM(config).eval(), {"input_ids": torch.arange(3, 9).view(1, 6)}
    with pytest.warns(fxprune.PruneWarning, match="stay whole"):
        wanted = fxprune.prune(copy.deepcopy(model), 0.5, inputs, same_class=True)
    with pytest.warns(fxprune.PruneWarning, match="stay whole"):
        fxprune.prune(model, 0.5, inputs, same_class=True, verify=False, inplace=True)
    assert model.config.to_dict() == wanted.config.to_dict() and model.config.hidden_size == 32
    assert torch.equal(called(model, inputs), called(wanted, inputs))


def peak_resident(reset=False):
    """The largest resident memory of this process since it was reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    said = Path("/proc/self/status").read_text()
    return int(said.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux has it")
@pytest.mark.parametrize("same_class", [False, True])
def test_the_peak_is_the_weights_and_a_layer(same_class):
    """Nine tenths of the weights stay, so that a copy takes as much again. The system gets such large blocks back at once."""
    sizes = {"hidden_size": 2048, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, head_dim=128, vocab_size=2048, num_hidden_layers=4, use_cache=False)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.to_empty(device="cpu").model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    weights, before = sum(p.nbytes for p in model.parameters()), peak_resident(reset=True)
    inputs = {"input_ids": torch.arange(4).view(1, 4)}
    fxprune.prune(model, 0.1, inputs, verify=False, same_class=same_class, inplace=True)
    assert weights > 4e8 and peak_resident() - before < weights / 2
