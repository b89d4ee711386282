"""prune(basis="principal", attention="dims"): values and outputs of attention in one basis for each KV head."""

from __future__ import annotations

import copy

import pytest
import torch
from test_basis import IDS, X, found_in, output_of, stirred, vit
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune.basis.principal import find_rotatable, rotated_basis
from fxprune.basis.pruning import random_rotation
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.pipeline import Compilation

DIMS = CouplingOptions(heads=False)


def timm_vit():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes), torch.randn(4, 3, 16, 16)


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "use_cache": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)), IDS


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False)), IDS


# how it is made; for each layer the family and the weight that reads it; its dimension; the KV head of each head; their size
ATTENTION = {
    "vit": (
        vit,
        "encoder.layers.encoder_layer_{}.self_attention.in_proj_weight#2",
        "encoder.layers.encoder_layer_{}.self_attention.out_proj.weight",
        1,
        (0, 1),
        6,
    ),
    "timm": (timm_vit, "blocks.{}.attn.qkv#2", "blocks.{}.attn.proj.weight", 1, (0, 1), 6),
    "llama": (llama, "model.layers.{}.self_attn.v_proj", "model.layers.{}.self_attn.o_proj.weight", 1, (0, 0, 1, 1), 8),
    "gpt2": (gpt2, "transformer.h.{}.attn.c_attn:1#2", "transformer.h.{}.attn.c_proj.weight", 0, (0, 1), 8),
}


def within_heads(model, x):
    inputs = ExampleInputs.parse(x, model).check(model)
    return find_rotatable(model, Compilation(model, inputs, DIMS).couple())


def close(made, wanted):
    return (made - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ATTENTION)
def test_rotation_within_heads_changes_nothing(name):
    make, family, reads, _, kv, size = ATTENTION[name]
    model, x = make()
    stirred(model)
    found, _ = within_heads(model, x)
    shapes = {f.name: (f.linear.rows, f.linear.size) for f in found}
    assert all(shapes[family.format(i)] == (len(set(kv)), size) for i in range(2)) and len(found) == 3  # and the stream
    rotated = rotated_basis(found, [random_rotation(f.linear.size, f.linear.rows) for f in found]).apply(model)
    assert close(output_of(rotated, x), output_of(model, x))
    assert not torch.allclose(rotated.get_parameter(reads.format(1)), model.get_parameter(reads.format(1)), atol=0.01)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_result_is_the_original_without_the_removed_axes_of_heads(name, tmp_path):
    make, family, reads, dim, kv, size = ATTENTION[name]
    model, x = make()
    stirred(model)
    options = {"data": [x], "basis": "principal", "attention": "dims"}
    tied = ("#1", "#2") if name in ("vit", "timm") else ("",)  # what is packed with the values keeps as many dimensions
    ratios = {family.format(i).replace(tied[-1], own): 0.5 for i in range(2) for own in tied}
    pruned = fxprune.prune(model, ratios, x, **options)
    kept = {f.name: f.kept for f in pruned.meta["basis"].families}
    rotations = pruned.plan.basis.rotations[1:]  # the first one is the stream's
    original = copy.deepcopy(model)
    heads = len(set(kv))
    for layer in range(2):
        left = kept[family.format(layer)] // heads
        assert kept[family.format(layer)] == left * heads and left == size // 2
        weight = original.get_parameter(reads.format(layer))
        assert pruned.get_parameter(reads.format(layer)).shape[dim] == left * len(kv)
        with torch.no_grad():
            for head, group in enumerate(kv):
                axes = rotations[layer * heads + group][:, :left].float()
                run = weight.narrow(dim, head * size, size)
                run.copy_(run @ axes @ axes.T if dim else axes @ axes.T @ run)
            if tied[1:]:  # queries lose what the plan says
                packed = family.format(layer).replace("#2", "") + (".weight" if name == "timm" else "")
                stay = dict.fromkeys(pruned.plan.to_dict()["keep"][packed][0]["keep"])
                gone = [i for i in range(12) if i not in stay]
                assert len(gone) == 6
                for tensor in (packed, packed.replace("weight", "bias")):
                    original.get_parameter(tensor)[gone] = 0
    assert close(output_of(pruned, x), output_of(original, x))
    assert not close(output_of(pruned, x), output_of(model, x))
    fxprune.save(pruned, tmp_path / "small.safetensors")
    loaded = fxprune.load(tmp_path / "small.safetensors", make()[0]).eval()
    assert torch.equal(output_of(loaded, x), output_of(pruned, x)) and loaded.plan == pruned.plan
    again = fxprune.Plan.from_json(pruned.plan.to_json()).apply(model, x)
    assert torch.equal(output_of(again, x), output_of(pruned, x))


def test_axes_within_heads_are_those_of_what_the_output_layer_reads():
    """With grouped queries the heads of a group have one basis."""
    model, x = llama()
    stirred(model)
    read = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    output_of(model, x)
    hook.remove()
    pruned = fxprune.prune(model, {"model.layers.0.self_attn.v_proj": 0.5}, x, data=[x], basis="principal", attention="dims")
    heads = read[0].double().reshape(-1, 4, 8)
    energies = []
    for group in range(2):
        moment = sum(heads[:, h].T @ heads[:, h] for h in (2 * group, 2 * group + 1))
        values, vectors = torch.linalg.eigh(moment)
        axes = pruned.plan.basis.rotations[1 + group]
        assert ((axes.T @ vectors.flip(1))[:4, :4].abs().diagonal() > 1 - 1e-4).all()
        energies.append(values.flip(0))
    share = sum(float(e[:4].sum()) for e in energies) / sum(float(e.sum()) for e in energies)
    (energy,) = [f.energy for f in pruned.meta["basis"].families if f.name.endswith("layers.0.self_attn.v_proj")]
    assert abs(energy - share) < 1e-5


def test_axes_beat_dimensions_where_heads_have_few_directions():
    model, x = llama()
    stirred(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for head in range(2):
                run = layer.self_attn.v_proj.weight[8 * head : 8 * head + 8]
                few = torch.linalg.qr(torch.randn(8, 2))[0]
                run.copy_(few @ (few.T @ run))
    wanted = output_of(model, x)
    ratios = {f"model.layers.{i}.self_attn.v_proj": 0.75 for i in range(2)}
    by_axes = fxprune.prune(model, ratios, x, data=[x], basis="principal", attention="dims")
    by_dims = fxprune.prune(model, ratios, x, data=[x], attention="dims")
    assert by_axes.model.layers[0].self_attn.v_proj.weight.shape == by_dims.model.layers[0].self_attn.v_proj.weight.shape
    errors = [float((output_of(m, x) - wanted).abs().max() / wanted.abs().max()) for m in (by_axes, by_dims)]
    assert errors[0] < 1e-5 < 1e-3 < errors[1]


class Attention(nn.Module):
    """Attention with two heads of 6, with `change` done to the values of shape (batch, heads, tokens, 6)."""

    def __init__(self, change=lambda v: v) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.gain, self.change = nn.Parameter(torch.rand(6)), change

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        v = self.change(self, v)
        weights = (q @ k.transpose(-1, -2) / 6**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda self, v: v.relu(), "relu"),
        (lambda self, v: v * self.gain, "scaled"),
        (lambda self, v: F.rms_norm(v, (6,)), "rms_norm"),
        (lambda self, v: v + v.sum(-1, keepdim=True), "sum"),
        (lambda self, v: v.softmax(-1), "softmax"),
        (lambda self, v: v.cumsum(-1), None),
    ],
)
def test_values_that_meet_more_than_linear_maps_are_not_rotated(change, said):
    model = stirred(nn.Sequential(nn.Linear(6, 12), Attention(change)))
    found, reasons = within_heads(model, X)
    assert "1.v" not in [f.name for f in found]
    if said is not None:  # else the coupling froze it
        assert said in reasons["1.v"]


def test_queries_with_keys_are_not_rotated():
    model = stirred(nn.Sequential(nn.Linear(6, 12), Attention(lambda self, v: v)))
    found, reasons = within_heads(model, X)
    assert [f.name for f in found] == ["0", "1.v"]
    assert "only layers" in reasons["1.q"]


def test_heads_that_go_whole_are_not_rotated():
    model = stirred(nn.Sequential(nn.Linear(6, 12), Attention(lambda self, v: v)))
    found, reasons = found_in(model, X)
    assert [f.name for f in found] == ["0"] and "1.q" in reasons


class Beside(nn.Module):
    """Two families in one dimension of the layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(15, 5)

    def forward(self, x):
        return self.out(torch.cat([self.a(x), x[..., :3], self.b(x)], -1))


def test_families_beside_others():
    model = stirred(Beside())
    found, _ = found_in(model, X)
    assert {f.name: f.linear.size for f in found} == {"a": 8, "b": 4}
    rotated = rotated_basis(found, [random_rotation(f.linear.size) for f in found]).apply(model)
    assert close(output_of(rotated, X), output_of(model, X))
    pruned = fxprune.prune(model, {"a": 0.5, "b": 0.5}, X, data=[X], basis="principal")
    original = copy.deepcopy(model)
    with torch.no_grad():
        for layer, rotation in zip((original.a, original.b), pruned.plan.basis.rotations, strict=True):
            axes = rotation[:, : len(rotation) // 2].float()
            layer.weight.copy_(axes @ axes.T @ layer.weight)
            layer.bias.copy_(axes @ axes.T @ layer.bias)
    assert pruned.out.weight.shape == (5, 4 + 3 + 2)
    assert close(output_of(pruned, X), output_of(original, X))


def test_what_a_weight_holds_in_several_dimensions_is_not_rotated():
    """As a convolution in groups does."""
    model = stirred(nn.Sequential(nn.Conv1d(3, 12, 1), nn.Conv1d(12, 6, 3, groups=3)))
    found, reasons = found_in(model, X)
    assert not found and "several dimensions of 1.weight" in reasons["0"]


def test_complex_products_are_tried_with_numbers():
    """Zeros would commute with everything."""

    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 12), nn.Parameter(torch.randn(4, 12, 2))

        def forward(self, x):
            return torch.view_as_real((self.first(x).to(torch.complex64) ** 2) @ torch.view_as_complex(self.second).T)

    found, reasons = found_in(stirred(Complex()), X)
    assert not found and "pow" in reasons["first"]


def test_dropout_that_drops_is_not_rotated():
    """Attention with a dropout of zero is, whose op has the tag of those that draw numbers."""

    class Dropping(Attention):
        def forward(self, x):
            return self.out(F.dropout(self.v(x), 0.5, training=True))

    found, reasons = within_heads(stirred(nn.Sequential(nn.Linear(6, 12), Dropping())), X)
    assert [f.name for f in found] == ["0"]
    assert "dropout" in reasons["1.v"]


def test_repair_and_same_class():
    model, x = gpt2()
    stirred(model)
    options = {"data": [x], "basis": "principal", "attention": "dims"}
    pruned = fxprune.prune(model, 0.5, x, **options)
    wanted = output_of(model, x)
    repaired = fxprune.repair(model, pruned, [x], held_out=0)
    assert (output_of(repaired, x) - wanted).square().mean() < 0.5 * (output_of(pruned, x) - wanted).square().mean()
    made = fxprune.prune(model, 0.5, x, **options, same_class=True)
    assert type(made) is type(model) and torch.equal(output_of(made, x), output_of(pruned, x))
