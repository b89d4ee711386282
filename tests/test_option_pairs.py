"""Options of `prune` drawn together, and what users do with the result; each draw is refused in words, or holds in all."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn

import fxprune
from fxprune import PruneError
from fxprune.passes.ir.module_tree import named_tensors


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 16), nn.ModuleList([Block(16) for _ in range(3)])
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        layer = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())  # noqa: E731
        self.stem, self.head = layer(3, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList([nn.Sequential(layer(16, 16), layer(16, 16)) for _ in range(3)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def chain():
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


MODELS = {"tokens": (Tokens, (8, 5, 6)), "residual": (Residual, (8, 3, 12, 12)), "chain": (chain, (8, 6))}
OPTIONS = {
    "how much": ({"ratio": 0.3}, {"ratio": 0.7}, {"macs": 0.7}, {"params": 0.8}, {"memory": 0.9}),
    "criterion": ({"criterion": "wanda"}, {"criterion": "osscar"}, {"criterion": "taylor", "loss": lambda y: y.norm()}),
    "ranking": ({"ranking": "global"}, {"ranking": "isomorphic"}),
    "depth": ({"depth": True}, {"depth": "only"}),
    "attention": ({"attention": "dims"},),
    "basis": ({"basis": "principal"},),
    "width": ({"round_to": 4}, {"uniform": True}, {"floor": 0.5}),
    "place": ({"only": "*blocks*"}, {"freeze": "head"}, {"freeze_outputs": "stem"}, {"protect": (1, 0)}),
    "form": ({"same_class": True}, {"inplace": True}, {"same_class": True, "inplace": True}),
    "repair": ({"repair": "compensate"}, {"repair": "reconstruct"}, {"repair": "merge"}),
    "verify": ({"verify": True}, {"verify": False}),
}
USES = {"criterion", "basis", "depth", "repair"}  # which read data
DRAWS = 6


def drawn(name, number):
    draw = random.Random(f"{name} {number}")
    kinds = draw.sample(sorted(OPTIONS.keys() - {"how much"}), 3)
    asked = {k: v for kind in ("how much", *kinds) for k, v in draw.choice(OPTIONS[kind]).items()}
    torch.manual_seed(number)
    build, shape = MODELS[name]
    model = build().eval()
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.add_(0.1 * torch.randn_like(tensor))
    data = [torch.randn(shape) for _ in range(3)]
    if USES & asked.keys():
        asked["data"] = data
    return draw, model, data, asked


def state(model):
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model)}


def unchanged(model, before):
    now = state(model)
    return now.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in now.items())


def loaded(small, model, file):
    fxprune.save(small, file)
    return fxprune.load(file, model, same_class=type(small) is type(model))


@torch.no_grad()
def same(first, second, x):
    return torch.equal(first(x), second(x))


@pytest.mark.filterwarnings("ignore::fxprune.PruneWarning")
@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("name", MODELS)
def test_what_is_pruned_can_be_used_in_every_way(name, number, tmp_path):
    draw, given, data, asked = drawn(name, number)
    model, before, x = copy.deepcopy(given), state(given), data[1]
    try:
        small = fxprune.prune(given, example_inputs=data[0], **asked)
    except PruneError as error:
        assert "report it" not in str(error) and unchanged(given, before)
        return
    assert asked.get("inplace") or unchanged(given, before)
    assert not small.training
    own = state(small)
    if "repair" not in asked:
        assert fxprune.verify(model, small, data[0]).ok
        assert same(
            small,
            fxprune.Plan.from_json(fxprune.plan_of(small).to_json()).apply(model, same_class=type(small) is type(model)),
            x,
        )
    for again in (
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        loaded(small, model, tmp_path / "small.safetensors"),
    ):
        assert same(small, again, x) and fxprune.plan_of(again) == fxprune.plan_of(small)
    method = draw.choice(("refit", "reconstruct", "compensate", "merge", "fold"))
    repaired = fxprune.repair(model, small, data, method=method)
    assert bool(repaired(x).isfinite().all())
    assert same(repaired, loaded(repaired, model, tmp_path / "repaired.safetensors"), x)
    try:
        twice = fxprune.prune(small, 0.4, data[0])
    except PruneError as error:
        assert "can be pruned" in error.what
    else:
        assert same(twice, loaded(twice, model, tmp_path / "twice.safetensors"), x)
    copy.deepcopy(small).train()(x).sum().backward()
    assert unchanged(small, own) and (asked.get("inplace") or unchanged(given, before)) and unchanged(model, before)
