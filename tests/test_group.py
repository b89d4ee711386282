"""What goes with given channels: every link, its cause, and agreement with what is then cut."""

import functools

import pytest
import timm
import torch
from test_remove import IMAGE, TOKENS, Attention, Residual
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune import PruneError
from fxprune.reports.formatting import as_text

TABLE = """\
conv1 [2, 6, 9]: 3 asked for, 6 dimensions of tensors

goes      indices      with   by
─────────────────────────────────────────────
conv1:0   2, 6, 9             as asked
bn1:0     2, 6, 9   conv1:0   BatchNorm2d bn1
conv2:1   2, 6, 9   conv1:0   Conv2d conv2"""


@functools.cache
def coupling(kind):
    net, x = {"residual": (Residual, IMAGE), "attention": (Attention, TOKENS)}[kind]
    return fxprune.couple(net().eval(), x)


def test_prints_the_chain():
    assert str(coupling("residual").group("conv1", [2, 6, 9])) == TABLE


def test_records_say_the_cause_of_each_link():
    group = coupling("residual").group("stem", [3])
    ops = {(link.tensor, link.dim): (link.source, link.op) for link in group}
    assert ops["stem.weight", 0] == (None, "as asked")
    assert ops["conv1.weight", 1] == (("stem.weight", 0), "Conv2d conv1")
    assert ops["conv2.weight", 0] == (("stem.weight", 0), "add")
    assert ops["conv2.bias", 0] == (("conv2.weight", 0), "Conv2d conv2")
    assert len(group) == len(ops) and all(link.indices == (3,) for link in group)


def test_heads_are_a_cause():
    group = coupling("attention").group("qkv", [7])
    assert group.remove["qkv.weight:0"] == [6, 7, 8, 18, 19, 20, 30, 31, 32]
    assert group.remove["proj.weight:1"] == [6, 7, 8]
    assert all("scaled_dot_product_attention" in link.op or "Linear" in link.op for link in group if link.source)


def test_frozen_channels_have_a_chain_too():
    group = coupling("residual").group("head", [2])
    assert group.frozen.startswith("is an output of the model") and "None of it can go: it is an output" in str(group)
    with pytest.raises(PruneError, match="cannot go: it is an output of the model"):
        group.apply()


def test_what_cannot_go_alone_is_said():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))
    group = fxprune.couple(net, IMAGE).group("1", [1])
    assert group.rows == "1 of 1:0 cannot go alone: each of 4 rows loses equally many; name 1 more of 3-5 of 1:0, and so on"
    assert "Not alone: 1 of 1:0" in str(group)
    with pytest.raises(PruneError, match="loses equally many"):
        group.apply()


def test_apply_removes_just_that():
    net = Residual().eval()
    group = fxprune.couple(net, IMAGE).group(net.conv1, [2, 6, 9])
    small = group.apply(same_class=True)
    assert type(small) is Residual and small.conv1.out_channels == 9 and net.conv1.out_channels == 12
    assert small.verification.ok


@pytest.mark.parametrize(
    "layer, indices, what",
    [
        ("conv7", [1], "'conv7' in group names no layer"),
        ("conv1", [12], "channel 12 of conv1 is none"),
        ("conv1", [1, 1], "indices names 1 twice"),
        ("conv1", [-2], "indices holds the index -2"),
    ],
)
def test_refused(layer, indices, what):
    with pytest.raises(PruneError, match=what):
        coupling("residual").group(layer, indices)


def llama():
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config), {"input_ids": torch.arange(6)[None], "use_cache": False}


def image_model(name, size=64, **options):
    return timm.create_model(name, num_classes=5, **options), torch.randn(1, 3, size, size)


MODELS = {
    "resnet": lambda: image_model("resnet18"),
    "depthwise": lambda: image_model("mobilenetv3_small_050"),
    "densenet": lambda: image_model("densenet121", block_config=(2, 2), growth_rate=8),
    "vit": lambda: image_model("test_vit", 160),
    "swin": lambda: image_model("swin_tiny_patch4_window7_224", 56, img_size=56, depths=(1, 2), embed_dim=24, num_heads=(2, 4)),
    "llama": llama,
}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_coupling_and_with_what_is_cut(name):
    """Every layer is asked; one channel of a few families is then removed, and the plan cuts just what the group says."""
    net, x = MODELS[name]()
    found = fxprune.couple(net.eval(), x)
    families = {member: [] for f in found.families for member in f.members}
    for family in found.families:
        for member in family.members:
            families[member].append(family)
    for layer, module in net.named_modules():
        if getattr(module, "weight", None) is None or (f"{layer}.weight", 0) not in families:
            continue
        group = found.group(layer, [0])
        reached = {(link.tensor, link.dim) for link in group}
        mine = [f for f in families[group.links[0].tensor, group.links[0].dim] if set(f.members) == reached]
        assert mine and group.frozen in {f.frozen for f in mine}
    tried = 0
    for family in found.prunable[:: max(1, len(found.prunable) // 3)]:
        group = found.group(family, [family.units // 2])
        if group.rows is not None:
            continue
        plan = group.apply(verify=False).plan
        cut = {}
        for tensor, slices in plan.slices.items():
            for one in slices:
                if len(one.dims) == 1:
                    size = plan.shapes[tensor][one.dims[0]]
                    cut[f"{tensor}:{one.dims[0]}"] = sorted(set(range(size)) - set(one.keep.tolist()))
        assert cut == group.remove
        tried += 1
    assert tried


class Packed(nn.Module):
    """Layers whose weights have names of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm, self.deep = nn.LSTM(8, 6, batch_first=True), nn.LSTM(6, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.deep(self.lstm(self.attention(x, x, x)[0])[0])[0])


def test_a_layer_without_a_weight_stands_for_the_parameters_that_hold_its_channels():
    found = fxprune.couple(Packed().eval(), torch.randn(2, 5, 8))
    for layer, first in {"attention": "in_proj_weight", "lstm": "weight_ih_l0"}.items():
        group, named = found.group(layer), found.group(f"{layer}.{first}:0")
        assert (group.remove, group.links) == (named.remove, named.links) and len(group) >= 3
    with pytest.raises(PruneError, match="'deep' in group is a LSTM, which has no weight of its own"):
        found.group("deep")  # of two layers, with channels of their own


def test_long_names_share_the_width():
    """No column is folded to a few letters so that another one keeps its names in one line."""
    net = nn.Sequential()
    net.add_module("a_layer_with_quite_a_long_name", nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    net.add_module("another_layer_with_a_long_name", nn.Sequential(nn.Conv2d(8, 2, 1)))
    lines = as_text(fxprune.couple(net.eval(), IMAGE).group("a_layer_with_quite_a_long_name.0", [1]), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    title = next(line for line in lines if line.startswith("goes"))
    assert title.index("indices") > 18
