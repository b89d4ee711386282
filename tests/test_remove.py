"""Exact channels by index: what goes is what was named, with all that is coupled to it, or an error says what else must go."""

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune import PruneError


class Residual(nn.Module):
    """A stem and a block around which its input is added, and a part that reads nothing."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.conv2(self.bn1(self.conv1(x)).relu())
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with 4 heads of 3 dimensions, packed."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 36), nn.Linear(12, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 3)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
GROUPED = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 2, 1))


def rest(size, *gone):
    """The indices that stay."""
    return torch.tensor([i for i in range(size) if i not in gone])


def test_exactly_these_channels_go():
    net = Residual().eval()
    nn.init.normal_(net.bn1.running_mean)
    small = fxprune.prune(net, example_inputs=IMAGE, remove={"conv1": [2, 6, 9]})
    kept = rest(12, 2, 6, 9)
    assert torch.equal(small.conv1.weight, net.conv1.weight[kept])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(small.bn1, name), getattr(net.bn1, name)[kept])
    assert torch.equal(small.conv2.weight, net.conv2.weight[:, kept])
    assert small.stem.weight.shape == net.stem.weight.shape and small.verification.ok
    assert (small.conv1.out_channels, small.bn1.num_features, small.conv2.in_channels) == (9, 9, 9)


@pytest.mark.parametrize(
    "remove",
    [
        lambda net: {"conv2": [1, 5]},
        lambda net: {net.conv2: (5, 1)},
        lambda net: {"conv2.weight": torch.tensor([1, 5])},
        lambda net: {"conv2.bias": np.array([1, 5])},
        lambda net: {"conv1:1": {1, 5}},
        lambda net: {"stem": [1, 5], "head.weight:1": [1, 5]},
        lambda net: {next(f for f in fxprune.couple(net, IMAGE).prunable if f.name == "stem"): [np.int64(1), 5]},
    ],
    ids="layer module tensor bias input several family".split(),
)
def test_what_names_the_same_channels(remove):
    net = Residual().eval()
    small = fxprune.prune(net, example_inputs=IMAGE, remove=remove(net))
    kept = rest(8, 1, 5)
    assert torch.equal(small.stem.weight, net.stem.weight[kept])
    assert torch.equal(small.conv2.bias, net.conv2.bias[kept])
    assert torch.equal(small.head.weight, net.head.weight[:, kept])


def test_several_families_in_one_call():
    net = Residual().eval()
    small = fxprune.prune(net, example_inputs=IMAGE, remove={"conv1": [0], "stem": [7]}, same_class=True)
    assert type(small) is Residual
    assert torch.equal(small.conv1.weight, net.conv1.weight[1:, :7])


def test_transposed_convolutions_and_embeddings_have_outputs_in_the_second_dimension():
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2))
    small = fxprune.prune(net, example_inputs=torch.arange(4), remove={"0": [2]})
    assert torch.equal(small[0].weight, net[0].weight[:, rest(6, 2)])
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    small = fxprune.prune(net, example_inputs=IMAGE, remove={"1": [1, 5]})
    kept = rest(6, 1, 5)  # of groups 0-2 and 3-5
    assert torch.equal(small[1].bias, net[1].bias[kept]) and torch.equal(small[3].weight, net[3].weight[:, kept])
    assert torch.equal(small[1].weight, torch.cat([net[1].weight[:2, [0, 2]], net[1].weight[2:, [0, 1]]]))


def test_a_head_goes_whole_or_not_at_all():
    net = Attention().eval()
    head = [6, 7, 8, 18, 19, 20, 30, 31, 32]
    with pytest.raises(PruneError) as caught:
        fxprune.prune(net, example_inputs=TOKENS, remove={"qkv": [7]})
    assert caught.value.what == "channel 7 of qkv cannot go without 6, 8, 18-20, 30-32 of it: they are one unit"
    assert "remove={'qkv': [*range(6, 9), *range(18, 21), *range(30, 33)]}" in caught.value.fix
    small = fxprune.prune(net, example_inputs=TOKENS, remove={"qkv": head})
    assert torch.equal(small.qkv.weight, net.qkv.weight[rest(36, *head)])
    family = next(f for f in fxprune.couple(net, TOKENS).prunable if f.name == "qkv")
    assert family.units == 4
    assert torch.equal(fxprune.prune(net, example_inputs=TOKENS, remove={family: [2]}).qkv.weight, small.qkv.weight)


def test_groups_lose_equally_many():
    with pytest.raises(PruneError, match=r"1 of 1:0 cannot go alone: each of 4 rows loses equally many") as caught:
        fxprune.prune(GROUPED, example_inputs=IMAGE, remove={"1": [1]})
    assert caught.value.fix == "name 1 more of 3-5 of 1:0, and so on"
    gone = [1, 3, 8, 10]
    small = fxprune.prune(GROUPED, example_inputs=IMAGE, remove={"1": gone})
    assert torch.equal(small[1].weight, GROUPED[1].weight[rest(12, *gone)])


@pytest.mark.parametrize(
    "asked, what, hint",
    [
        ({"remove": {"conv1": [2, 2, 6]}}, "remove names 2 twice", "each index once"),
        ({"remove": {"conv1": [12]}}, "channel 12 of conv1 is none: it has 12", "indices from 0 to 11"),
        ({"remove": {"conv1": [-1]}}, "remove holds the index -1, and indices count from 0", "remove={"),
        ({"remove": {"conv1": [1.5]}}, "remove holds 1.5, which is no index", "remove={"),
        ({"remove": {"conv1": torch.ones(12, dtype=torch.bool)}}, "remove holds True, which is no index", "mask.nonzero()"),
        ({"remove": {"conv1": 3}}, "remove needs a list of indices, not 3", "remove={"),
        ({"remove": {"conv1": "3"}}, "remove needs a list of indices, not '3'", "remove={"),
        ({"remove": {"conv1": []}}, "remove names no index", "leave 'conv1' out"),
        ({"remove": {}}, "remove is an empty mapping, which removes nothing", "remove={"),
        ({"remove": ["conv1"]}, "remove must be a mapping from layers to indices, not list", "remove={"),
        ({"remove": {3: [1]}}, "remove names 3, which is no layer", "remove={"),
        ({"remove": {"conv3": [1]}}, "'conv3' in remove names no layer and no tensor of the model", "did you mean 'conv"),
        ({"remove": {"conv1#4": [1]}}, "'conv1#4' in remove names no family of the model", "conv1"),
        ({"remove": {"conv1:4": [1]}}, "conv1.weight has 4 dimensions, and none with number 4", "conv1.weight:3"),
        ({"remove": {"": [1]}}, "'' in remove is a Residual, which has no weight of its own", "stem.weight:0"),
        ({"remove": {"unused": [1]}}, "unused.weight is not used in the model's forward", "another layer"),
        ({"remove": {nn.Linear(2, 2): [1]}}, "remove names a Linear that is not part of the model", "model.layer1"),
        ({"remove": {"head": [1]}}, "channel 1 of head cannot go: it is an output of the model", "another layer"),
        ({"remove": {"stem:1": [1]}}, "channel 1 of stem:1 cannot go: it is tied to an input", "another layer"),
        ({"remove": {"conv1:2": [1]}}, "channel 1 of conv1:2 cannot go: it is a kernel's spatial dimension", "another"),
        ({"remove": {"conv1": range(12)}}, "remove names all of conv1: 0-11", "leave one"),
        ({"remove": {"conv1": [1]}, "freeze": "bn1"}, "channel 1 of conv1 cannot go: it is frozen by freeze='bn1'", "another"),
        ({"remove": {"stem": [1], "conv2": [2]}}, "channel 2 of stem would go too", "remove={'stem': [1, 2], ...}"),
        ({"remove": {"conv1": [1]}, "ratio": 0.5}, "ratio is given with remove", "leave ratio out"),
        ({"remove": {"conv1": [1]}, "macs": 0.5}, "macs is given with remove", "leave macs out"),
        ({"remove": {"conv1": [1]}, "round_to": 8}, "round_to is given with remove", "leave round_to out"),
        ({"remove": {"conv1": [1]}, "criterion": "taylor"}, "criterion is given with remove", "leave criterion out"),
    ],
)
def test_refused(asked, what, hint):
    net = Residual().eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(PruneError) as caught:
        fxprune.prune(net, example_inputs=IMAGE, **asked)
    assert caught.value.what.startswith(what)
    assert hint in caught.value.fix
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_pruner_has_no_indices():
    with pytest.raises(PruneError, match="Pruner has no argument 'remove'"):
        fxprune.Pruner(Residual(), example_inputs=IMAGE, remove={"conv1": [1]})


def test_meta_device():
    with torch.device("meta"):
        net = Residual().eval()
    small = fxprune.prune(net, example_inputs=torch.empty(2, 3, 8, 8, device="meta"), remove={"conv1": [2]}, verify=False)
    assert small.conv1.weight.shape == (11, 8, 3, 3)
