"""Modules that stay nodes without being layers of torch.nn: nothing in their forward needs to be rewritten."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune.passes.capture import programs


class NormAct(nn.BatchNorm2d):
    """As libraries write it: the mode is asked for, a counter is kept, an activation follows."""

    def __init__(self, width, act=nn.ReLU, slope=0):
        super().__init__(width)
        self.act = act()
        self.slope = slope

    def forward(self, x):
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        batch = self.training or self.running_mean is None
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, batch, self.momentum, self.eps)
        return self.act(x)


class Sloped(NormAct):
    """Decides by a number."""

    def forward(self, x):
        x = super().forward(x)
        return x * 0.5 if self.slope > 1 else x


class Sized(NormAct):
    """Writes its width out."""

    def forward(self, x):
        return super().forward(x).view(x.shape[0], self.num_features, -1).unflatten(2, x.shape[2:])


class Remembers(NormAct):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Hidden(NormAct):
    """Answers for its attributes itself."""

    def __getattr__(self, name):
        return 1 if name == "slope" else super().__getattr__(name)

    def forward(self, x):
        x = super().forward(x)
        return x * 0.5 if self.slope > 1 else x


class OtherInTraining(NormAct):
    """In training its channels meet those of a second parameter."""

    def __init__(self, width):
        super().__init__(width)
        self.gain = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x):
        x = super().forward(x)
        return x * self.gain if self.training else x


def network(*norms):
    torch.manual_seed(0)
    layers, width = [], 3
    for norm in norms:
        layers += [nn.Conv2d(width, norm.num_features, 3), norm]
        width = norm.num_features
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model.double().eval()


def nodes(pruned):
    return {type(pruned.get_submodule(n.target)) for n in pruned.flat().graph.nodes if n.op == "call_module"}


def exact(model, x):
    """Prune by half, hold against the masked original in either mode; the result."""
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    for mode in (False, True):
        found = fxprune.verify(model.train(mode), pruned.train(mode), x)
        assert found.error < 1e-10
    model.eval()
    return pruned.eval()


X = torch.randn(2, 3, 12, 12, dtype=torch.float64)


def test_a_norm_with_an_activation_stays_a_module():
    model = network(NormAct(8), NormAct(16, nn.SiLU), NormAct(8))
    pruned = exact(model, X)
    assert NormAct in nodes(pruned)
    norms = [m for m in pruned.modules() if isinstance(m, NormAct)]
    assert [m.num_features for m in norms] == [4, 8, 4] == [len(m.weight) for m in norms]
    pruned.train()(X)
    assert [int(m.num_batches_tracked) for m in norms] == [1, 1, 1]
    assert all(int(m.num_batches_tracked) == 0 for m in model.modules() if isinstance(m, NormAct))


def test_a_number_that_decides_is_looked_at_for_each():
    model = network(Sloped(8, slope=1), Sloped(8, slope=2), Sloped(8, slope=1), Sloped(8, slope=2))
    pruned = exact(model, X)
    assert [m.slope for m in pruned.modules() if isinstance(m, Sloped)] == [1, 2, 1, 2]
    assert [list(vars(m)) for m in model.modules()] == [list(vars(m)) for m in network(*norms_of(model)).modules()]


def norms_of(model):
    return [type(m)(m.num_features, slope=m.slope) for m in model.modules() if isinstance(m, Sloped)]


def test_a_module_that_answers_for_its_attributes_is_not_asked_through_them():
    exact(network(Hidden(8, slope=2), Hidden(8, slope=2)), X)


@pytest.mark.parametrize("kind", [Sized, Remembers, OtherInTraining])
def test_what_is_not_plain_is_captured_op_by_op(kind):
    model = network(kind(8), kind(16), kind(8))
    attributes = [sorted(vars(m)) for m in model.modules()]
    pruned = exact(model, X)
    assert kind not in nodes(pruned)
    assert [sorted(vars(m)) for m in model.modules()] == attributes


def test_channels_that_only_training_couples_go_together():
    pruned = exact(network(OtherInTraining(8), NormAct(8)), X)
    left = dict(pruned.named_parameters())
    assert left["1.gain"].shape[0] == left["1.weight"].shape[0] == 4


def test_a_model_that_asks_for_its_mode_and_holds_such_a_norm_is_captured_once(monkeypatch):
    """Its forward is run again in training mode, where the norm is the node that it is in evaluation."""

    class Dropped(nn.Sequential):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.2, self.training)

    runs = []
    capture = programs.capture_program
    monkeypatch.setattr(programs, "capture_program", lambda *given, **asked: runs.append(1) or capture(*given, **asked))
    model = Dropped(network(NormAct(8), NormAct(16, nn.SiLU)))
    fxprune.prune(model, 0.5, X, verify=False)
    assert len(runs) == 1
    assert NormAct in nodes(pruned := exact(model, X))
    assert not torch.equal(pruned.train()(X), pruned(X)) and torch.equal(pruned.eval()(X), pruned(X))
