"""A layer is fitted to what its result becomes: the sum with a stream, and what an activation tells apart."""

import pytest
import torch
from torch import nn

import fxprune

DOUBLE = torch.float64


def kept(pruned, name):
    return fxprune.plan_of(pruned).slices[name][0].keep


def fitted(source, target):
    """The closest that a linear layer with a bias comes to a target, by `torch.linalg.lstsq`."""
    columns = torch.cat([source, torch.ones(len(source), 1, dtype=DOUBLE)], 1)
    return columns @ torch.linalg.lstsq(columns, target, driver="gelsd").solution


def repaired(model, x, **options):
    torch.manual_seed(0)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    return fxprune.repair(model, pruned, [x], method="reconstruct", held_out=0, ridge=0, **options)


class Residual(nn.Module):
    """A stream that lost channels of its input, and a branch, added in one of several spellings."""

    def __init__(self, add):
        super().__init__()
        self.first, self.stem = nn.Linear(5, 8), nn.Linear(8, 6)
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.head, self.add = nn.Linear(6, 3), add
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        stream = self.stem(self.first(x).tanh())
        return self.head(self.add(stream, self.norm(self.down(self.up(stream).tanh()))))


SUMS = {
    "+": lambda stream, branch: stream + branch,
    "+=": lambda stream, branch: branch.add_(stream),
    "other way": lambda stream, branch: torch.add(branch, stream),
    "scaled": lambda stream, branch: stream + branch * 0.5,
}


@pytest.mark.parametrize("how", SUMS)
def test_a_branch_makes_up_for_the_errors_of_its_stream(how):
    torch.manual_seed(1)
    model = Residual(SUMS[how]).double().eval()
    x = torch.randn(60, 5, dtype=DOUBLE)
    result = repaired(model, x)
    part = result.get_submodule
    with torch.no_grad():
        stream = model.stem(model.first(x).tanh())
        wanted = SUMS[how](stream, model.norm(model.down(model.up(stream).tanh())))[:, kept(result, "down.weight")]
        stream = part("stem")(part("first")(x).tanh())
        hidden = part("up")(stream).tanh()
        found = SUMS[how](stream, part("norm")(part("down")(hidden)))
        best = fitted(hidden, wanted - stream) if how != "scaled" else None
    alone = model.norm(model.down(model.up(model.stem(model.first(x).tanh())).tanh()))[:, kept(result, "down.weight")]
    if best is None:  # by a number that is no tensor of the model's: the layer is fitted to its own result
        torch.testing.assert_close(part("norm")(part("down")(hidden)), fitted(hidden, alone))
    else:
        torch.testing.assert_close(found - stream, best)


@pytest.mark.parametrize(
    ("make", "low", "high"), [(nn.ReLU, 0.0, 1e9), (nn.ReLU6, 0.0, 6.0), (lambda: nn.ReLU(inplace=True), 0.0, 1e9)]
)
def test_what_an_activation_cuts_off_is_not_fitted(make, low, high):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 12), make(), nn.Linear(12, 3)).double().eval()
    model[2].weight.data *= 4
    x = torch.randn(300, 5, dtype=DOUBLE)
    result = repaired(model, x)
    with torch.no_grad():
        wanted = model[2](model[1](model[0](x)))[:, kept(result, "2.weight")]
        hidden = result.get_submodule("0")(x).tanh()
        found, plain = result.get_submodule("2")(hidden), fitted(hidden, wanted)
        errors = [float((y.clamp(low, high) - wanted.clamp(low, high)).square().sum()) for y in (found, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_two_readers_are_no_activation():
    """The result itself is read, too."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 3)

        def forward(self, x):
            y = self.b(self.a(x).tanh())
            return self.c(y.relu() + y.sin())

    torch.manual_seed(3)
    model, x = Net().double().eval(), torch.randn(80, 5, dtype=DOUBLE)
    result = repaired(model, x)
    with torch.no_grad():
        wanted = model.b(model.a(x).tanh())[:, kept(result, "b.weight")]
        hidden = result.get_submodule("a")(x).tanh()
        torch.testing.assert_close(result.get_submodule("b")(hidden), fitted(hidden, wanted))
