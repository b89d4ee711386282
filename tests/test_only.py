"""`only=` and `protect=`: what takes part, by the shapes of the tensors that are left."""

import pytest
import torch
import torchvision
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune import PruneError
from fxprune.selection.names import block_chains

IDS = {"input_ids": torch.arange(16).reshape(2, 8)}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, use_cache=False, **sizes)).eval()


def changed(model: nn.Module, pruned: nn.Module) -> set[str]:
    before = {name: p.shape for name, p in model.named_parameters()}
    return {name for name, p in pruned.named_parameters() if p.shape != before[name]}


def test_only_the_hidden_layers_shrink(llama):
    small = fxprune.prune(llama, 0.5, IDS, only="*mlp*")
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(4) for part in ("gate", "up", "down")]
    assert changed(llama, small) == set(names)
    assert small.get_parameter("model.layers.2.mlp.down_proj.weight").shape == (32, 24)


def test_a_ratio_by_the_same_glob_is_wider(llama):
    small = fxprune.prune(llama, {"*mlp*": 0.5}, IDS)
    assert small.get_parameter("model.layers.2.mlp.down_proj.weight").shape == (16, 24)


def test_modules_globs_and_what_is_listed_add_up(llama):
    layers = llama.model.layers
    small = fxprune.prune(llama, 0.5, IDS, only=[layers[1].mlp, "model.layers.2.self_attn"])
    names = {name.removeprefix("model.layers.") for name in changed(llama, small)}
    attention = {f"2.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert names == attention | {f"1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_only_with_ratios_freeze_and_budgets(llama):
    small = fxprune.prune(llama, {"model.layers.1*": 0.5}, IDS, only="*mlp*")
    assert {name.split(".")[2] for name in changed(llama, small)} == {"1"}
    small = fxprune.prune(llama, 0.5, IDS, only="*mlp*", freeze="model.layers.3.mlp")
    assert {name.split(".")[2] for name in changed(llama, small)} == {"0", "1", "2"}
    total = sum(p.numel() for p in llama.parameters())
    small = fxprune.prune(llama, example_inputs=IDS, only="*mlp*", params=0.8)
    assert all("mlp" in name for name in changed(llama, small))
    assert 0.78 * total < sum(p.numel() for p in small.parameters()) <= 0.8 * total


def test_only_reaches_every_entry_point(llama):
    prunable = [f.name for f in fxprune.couple(llama, IDS, only="*mlp*").prunable]
    assert sorted(prunable) == [f"model.layers.{i}.mlp.gate_proj" for i in range(4)]
    pruner = fxprune.Pruner(llama, 0.5, IDS, only="*mlp*")
    assert all("mlp" in name for name in changed(llama, pruner.step()))
    least, _, most = fxprune.feasible(llama, IDS, only="*mlp*", ratio=0.5).params
    assert most - least == 4 * 3 * 32 * (48 - 5)  # a tenth of the 48 stays, rounded up
    found = fxprune.sensitivity(llama, IDS, lambda m: 1.0, ratios=(0.5,), only="model.layers.0.mlp")
    assert [c.family for c in found.curves] == ["model.layers.0.mlp.gate_proj"]


def test_couple_says_why_the_others_stay(llama):
    held = {f.name: f.frozen for f in fxprune.couple(llama, IDS, only="*mlp*").frozen}
    assert held["model.layers.0.self_attn.q_proj"] == "is not all in only='*mlp*'"
    assert held["model.embed_tokens:1"].startswith("is not all in only='*mlp*': it holds model.embed_tokens:1, ")


def test_a_plan_made_with_only_is_saved_and_applied(llama):
    small = fxprune.prune(llama, 0.5, IDS, only="*mlp*", protect=(1, 0))
    plan = fxprune.Plan.from_json(small.meta["plan"].to_json())
    again = plan.apply(llama)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


@pytest.mark.parametrize(
    ("only", "what"),
    [
        ("*nothing*", "matches no module"),
        ("*down_proj", "model.layers.0.mlp.gate_proj also holds model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj"),
        ("*rotary*", "have no parameters"),
        ("model.norm", "model.embed_tokens:1 also holds"),
        (nn.Linear(2, 2), "is not part of the model"),
        (3, "neither a glob nor a module"),
    ],
)
def test_what_is_left_of_nothing_is_an_error(llama, only, what):
    with pytest.raises(PruneError, match="fix: ") as caught:
        fxprune.prune(llama, 0.5, IDS, only=only)
    assert what in str(caught.value)


def test_first_and_last_blocks_are_protected(llama):
    small = fxprune.prune(llama, 0.5, IDS, protect=(2, 1), only="model.layers.*")
    assert {name.split(".")[2] for name in changed(llama, small)} == {"2"}
    small = fxprune.prune(llama, 0.5, IDS, protect=(2, 1))  # the stream through all blocks shrinks still
    shapes = {i: small.get_parameter(f"model.layers.{i}.mlp.down_proj.weight").shape for i in range(4)}
    assert shapes == {0: (16, 48), 1: (16, 48), 2: (16, 24), 3: (16, 48)}


def test_branches_of_protected_blocks_stay(llama):
    small = fxprune.prune(llama, 0.9, IDS, depth="only", protect=(2, 1))
    left = {name.split(".")[2] for name, _ in small.named_parameters() if "down_proj" in name}
    assert left >= {"0", "1", "3"}
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in llama.parameters())


def test_what_lies_within_a_module_is_frozen_by_its_name_with_a_slash(llama):
    small = fxprune.prune(llama, 0.5, IDS, freeze="model.layers.1/")
    shapes = {i: small.get_parameter(f"model.layers.{i}.mlp.down_proj.weight").shape for i in range(4)}
    assert shapes == {0: (16, 24), 1: (16, 48), 2: (16, 24), 3: (16, 24)}


def test_stages_are_one_chain_of_blocks():
    model = torchvision.models.resnet18(num_classes=4).eval()
    small = fxprune.prune(model, 0.5, torch.randn(1, 3, 32, 32), protect=(1, 1), only="layer*")
    inner = {i: small.get_submodule(f"{i}.conv1").out_channels for i in ("layer1.0", "layer1.1", "layer4.0", "layer4.1")}
    assert inner == {"layer1.0": 64, "layer1.1": 32, "layer4.0": 256, "layer4.1": 512}


def test_blocks_with_names_of_their_own():
    """The blocks of torchvision's transformers are in a `Sequential` that names them."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 8, 4, 2, 16, 24, num_classes=3).eval()
    small = fxprune.prune(model, 0.5, torch.randn(1, 3, 16, 16), protect=(1, 2), only="*mlp*")
    assert [small.get_submodule(f"encoder.layers.encoder_layer_{i}.mlp.0").out_features for i in range(4)] == [24, 12, 24, 24]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


class Listed(nn.Module):
    """Blocks without a class of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("model, prefix", [(Listed(), "blocks."), (nn.Sequential(*(mlp() for _ in range(4))), "")])
def test_blocks_may_be_plain_sequentials(model, prefix):
    small = fxprune.prune(model, 0.5, torch.randn(2, 8), protect=(1, 1))
    assert [small.get_submodule(f"{prefix}{i}.0").out_features for i in range(4)] == [16, 8, 8, 16]


def test_plain_sequentials_within_blocks_are_none():
    blocks = [nn.ModuleDict({"parts": nn.Sequential(mlp(), mlp())}) for _ in range(3)]
    assert list(block_chains(nn.ModuleDict({"blocks": nn.ModuleList(blocks)}))) == [["blocks.0", "blocks.1", "blocks.2"]]
    downsample = nn.Sequential(nn.Conv2d(4, 8, 2), nn.BatchNorm2d(8))
    assert list(block_chains(nn.Sequential(downsample, nn.Sequential(*blocks), downsample))) == [["1.0", "1.1", "1.2"]]


@pytest.mark.parametrize("protect", [1, (1,), (1, -1), (1.0, 1), "first", (3, 1)])
def test_what_cannot_be_protected(llama, protect):
    with pytest.raises(PruneError, match="fix: "):
        fxprune.prune(llama, 0.5, IDS, protect=protect)


def test_a_model_without_blocks():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(PruneError, match="no list of blocks"):
        fxprune.prune(net, 0.5, torch.randn(1, 4), protect=(1, 0))
