"""Scores that families compete by do not depend on how the weights of a function are scaled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune


@pytest.mark.parametrize("criterion", ["taylor", "hessian", "obdc", "fisher", "snip", "token_taylor", "osscar"])
@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
def test_the_scale_of_a_family_changes_no_choice(criterion, ranking):
    """Weights times a number before a ReLU and divided by it behind are the same function, and lose the same units."""
    torch.manual_seed(0)
    sizes = [(6, 16), (16, 24), (24, 10), (10, 3)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
    model = nn.Sequential(*layers[:-1]).double()
    x, labels = torch.randn(64, 6).double(), torch.arange(64) % 3
    other = copy.deepcopy(model)
    with torch.no_grad():
        for at, by in ((0, 64.0), (2, 1 / 1024), (4, 8.0)):  # powers of two, which are not rounded
            other[at].weight.mul_(by)
            other[at].bias.mul_(by)
            other[at + 2].weight.div_(by)
    assert torch.equal(model(x), other(x))
    how = {
        "data": list(zip(x.split(16), labels.split(16))),
        "loss": F.cross_entropy,
        "criterion": criterion,
        "ranking": ranking,
    }
    small, its = (fxprune.prune(net, example_inputs=x[:1], macs=0.5, **how) for net in (model, other))
    assert small.meta["plan"] == its.meta["plan"]
    left = [small.get_submodule(str(at)).out_features / model[at].out_features for at in (0, 2, 4)]
    assert max(left) - min(left) > 0.05  # they did compete
