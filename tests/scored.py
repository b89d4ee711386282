"""A small model whose scores can be computed by hand, and the scores that criteria give it."""

import torch
import torch.nn.functional as F
from torch import nn

from fxprune import criteria
from fxprune.criteria.unit_scores import score_units
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import CouplingOptions

NEED_DATA = ["taylor", "hessian", "obdc", "fisher", "wanda", "flap", "snip", "grasp"]
GRADIENTS = ["taylor", "hessian", "obdc", "fisher", "snip", "grasp"]


class Small(nn.Module):
    """Two families: a convolution whose channels are normalised, and one whose channels a linear layer reads."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.gelu(self.norm(self.one(x)))
        x = F.gelu(self.two(x)).mean((2, 3))
        return self.head(x)


ONE = [("one.weight", 0), ("one.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("two.weight", 1)]
TWO = [("two.weight", 0), ("two.bias", 0), ("head.weight", 1)]
SPANS = {"one": ONE, "two": TWO}


def built():
    torch.manual_seed(0)
    model = Small().double().eval()
    for p in [model.norm.weight, model.norm.bias, model.norm.running_mean]:
        nn.init.normal_(p)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    return model


def batch(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def scores(model, x, criterion, data=None, loss=None):
    """What each family's units score, in the order of their channels."""
    solution = analyse(model, (x,), {}, CouplingOptions())
    found = [f for f in families(solution, {n for n, _ in model.named_parameters()}) if f.frozen is None]
    rule = criteria.Gates(steps=30) if criterion == "gates" else criteria.find(criterion)  # enough to tell orders
    total, _ = score_units(model, solution, found, rule, data, loss)
    return {f.name: torch.from_numpy(total[f.units]) for f in found}


def summed(model, of, spans=SPANS):
    """The sum of `of(name)`, a tensor of the parameter's shape, over everything a unit spans, unit by unit."""
    units = {family: model.get_parameter(places[0][0]).shape[places[0][1]] for family, places in spans.items()}
    return {
        family: torch.stack([sum(of(name).select(dim, i).sum() for name, dim in places) for i in range(units[family])])
        for family, places in spans.items()
    }


def agree(found, wanted):
    assert found.keys() >= wanted.keys()
    for family, values in wanted.items():
        torch.testing.assert_close(found[family], values.detach().double(), rtol=1e-6, atol=1e-12)


def gradients(model, x, y, **options):
    loss = F.cross_entropy(model(x), y)
    names = [n for n, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), **options)
    return dict(zip(names, found))
