"""Evaluation and training: one capture serves both modes where it can, and agrees with two captures."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GroupViTVisionConfig
from transformers.models.groupvit.modeling_groupvit import GroupViTAssignAttention

import fxprune
from fxprune.passes.capture import programs as capture_programs
from fxprune.passes.capture import train_eval
from fxprune.passes.capture.evaluation import Evaluator

X = torch.randn(3, 5, dtype=torch.float64)


@pytest.fixture
def captures(monkeypatch):
    """How often the model is captured."""
    made = []
    plain = capture_programs.capture_program

    def counted(*args, **kwargs):
        made.append(plain(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(capture_programs, "capture_program", counted)
    return made


class Net(nn.Module):
    """Two layers with something between; what that does by mode is up to the subclass."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Dropped(Net):
    def between(self, x):
        return F.dropout(x.relu(), 1.0, training=self.training)


class DroppedInPlace(Net):
    def between(self, x):
        return F.dropout(x.relu(), 1.0, self.training, True)


class Scaled(Net):
    def between(self, x):
        return x * self.training + 0.5


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def between(self, x):
        n = self.norm
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training)


def by_mode(x, training):
    return x.abs() if training else x.sin()


class HandedToPython(Net):
    def between(self, x):
        return by_mode(x, self.training)


class Compared(Net):
    def between(self, x):
        return x.abs() if self.training is True else x.sin()


class Counted(Net):
    def between(self, x):
        return x * (1 - int(self.training)) + 2 * self.training + (not self.training)


class Kept(Net):
    def between(self, x):
        self.mode = self.training
        return x.abs() if self.mode else x.sin()


class Inner(nn.Module):
    def forward(self, x, training):
        x = F.dropout(x, 1.0, training)
        return x.abs() if training or self.training else x.sin()


class HandedDown(Net):
    """The flag of one module is looked at in another."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def between(self, x):
        return self.inner(x, self.training)


class Nested(Net):
    """A module that hands its mode on, in one that asks."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Block(), Block())

    def between(self, x):
        return self.inner(x)


class Block(nn.Module):
    def forward(self, x):
        x = F.dropout(x, 1.0, training=self.training)
        return x + 1 if self.training else x.sin()


class Drop(nn.Module):
    def forward(self, x):
        return F.dropout(x, 1.0, self.training) + x


class Plain(Net):
    """A module of no more than that stays a node."""

    def __init__(self):
        super().__init__()
        self.drop = Drop()

    def between(self, x):
        return self.drop(self.drop(x).relu())


class Output(OrderedDict):
    """Fields that are keys too, as transformers' outputs have."""

    def __init__(self, **fields):
        super().__init__(**fields)
        vars(self).update(fields)


class Decoder(nn.Module):
    """Asks, hands its mode on inside of what it does by it, and returns a dict of a class of its own."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        x = F.dropout(x, 0.0 if not self.training else 1.0, self.training) + x
        if self.training:
            x = x * 2
        return Output(hidden=self.block(x), name="decoder")


class Late(nn.Module):
    """Asks when what is inside of it has been looked at in both modes, and then for more."""

    def __init__(self):
        super().__init__()
        self.block, self.drop = Block(), Drop()

    def forward(self, x):
        x = self.block(self.drop(x))
        if self.training:
            x = x - 1
        return Output(hidden=self.block(F.dropout(self.drop(x), 1.0, self.training) + x))


class Inside(Net):
    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def between(self, x):
        made = self.decoder(x)
        return made.hidden + made["hidden"]


class Learns(nn.Module):
    """Hands its mode to what takes a bool and nothing like one."""

    def forward(self, x):
        return self.scale(x) * torch.zeros(8, dtype=x.dtype, requires_grad=self.training).add(2)

    def scale(self, x):
        return x.sin() if self.training else x.abs()


class InsideLearns(Inside):
    def __init__(self):
        super().__init__()
        self.decoder = Learns()

    def between(self, x):
        return self.decoder(x)


class Caught(nn.Module):
    """Does in training what it does in evaluation up to the last step, and catches all that is raised there."""

    def forward(self, x):
        x = F.dropout(x, 1.0, self.training) + x
        try:
            return x.abs() if self.training else x.sin()
        except BaseException:
            return x


class InsideCaught(InsideLearns):
    def __init__(self):
        super().__init__()
        self.decoder = Caught()


class InsideLate(Inside):
    def __init__(self):
        super().__init__()
        self.decoder, self.drop = Late(), Drop()

    def between(self, x):
        return self.drop(super().between(x))


class OwnTrain(Nested):
    """A `train` of its own, which keeps a block in evaluation."""

    def __init__(self):
        super().__init__()
        self.always = Block()

    def between(self, x):
        return self.inner(self.always(x))

    def train(self, mode=True):
        super().train(mode)
        self.always.eval()
        return self


class OwnTrainInside(Net):
    """That of a part of the model is called by that of the whole."""

    def __init__(self):
        super().__init__()
        self.part = OwnTrain()

    def forward(self, x):
        return self.part(x)


class Keeps(Nested):
    """A `train` that does more than to set modes."""

    scale = 1.0

    def train(self, mode=True):
        self.scale = 2.0 if mode else 1.0
        return super().train(mode)

    def between(self, x):
        return self.inner(x) * self.scale


class Refuses(Nested):
    """A model that is not to be trained."""

    def train(self, mode=True):
        if mode:
            raise RuntimeError("not to be trained")
        return super().train(mode)


class Attends(Net):
    """Layers of torch's own that ask for their mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.TransformerEncoderLayer(8, 2, 16, dropout=1.0, batch_first=True)

    def between(self, x):
        return self.norm(self.layer(x[:, None])).squeeze(1) + x


class Starts(Net):
    """Does something else in its first call in training."""

    def __init__(self):
        super().__init__()
        self.started = False

    def between(self, x):
        first, self.started = not self.started, True
        return x.abs() if first and self.training else x.sin()


class StartsToCount(Net):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def between(self, x):
        self.steps += 1
        return x.abs() if self.steps == 1 and self.training else x.sin()


ONCE = (Nested, Plain, Inside, InsideCaught, InsideLate, InsideLearns, OwnTrain, Dropped, DroppedInPlace, Normed)
TWICE = (Scaled, HandedToPython, Compared, Counted, Kept, HandedDown, Keeps)


@pytest.mark.parametrize("kind", [Starts, StartsToCount])
def test_what_evaluation_leaves_on_a_model_is_not_there_in_training(kind, captures):
    pruned = fxprune.prune(kind(), 0.5, example_inputs=X.float(), verify=False)
    assert len(captures) == 2 and ["abs" in pruned.train(mode).code for mode in (False, True)] == [False, True]


@pytest.mark.parametrize("kind", ONCE + TWICE)
def test_both_modes_are_as_in_the_original(kind, captures):
    """What goes had no effect in the original, so there is nothing to mask."""
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        model.a.weight[4:] *= 1e-3  # these are what goes
        model.b.weight[:, 4:] = 0
    attributes, modes = sorted(vars(model)), [m.training for m in model.modules()]
    pruned = fxprune.prune(model, 0.5, example_inputs=X, verify=False)
    assert len(captures) == (1 if kind in ONCE else 2)
    assert pruned.a.weight.shape == (4, 5) and sorted(vars(model)) == attributes
    assert [m.training for m in model.modules()] == modes
    for mode in (False, True):
        assert torch.allclose(pruned.train(mode)(X), model.train(mode)(X)), mode
    assert not torch.allclose(model.train()(X), model.eval()(X))


@pytest.mark.parametrize("kind", [*ONCE, Attends])
def test_one_capture_of_both_modes_agrees_with_two(kind, captures, monkeypatch):
    torch.manual_seed(0)
    model = kind().double().eval()
    joined = fxprune.couple(model, X).to_dict(), fxprune.prune(model, 0.5, example_inputs=X)
    assert len(captures) == 2
    monkeypatch.setattr(train_eval.Modes, "of", classmethod(lambda cls, root: cls(None)))
    apart = fxprune.couple(model, X).to_dict(), fxprune.prune(model, 0.5, example_inputs=X)
    assert len(captures) == 2 + 4
    assert joined[0] == apart[0]
    assert joined[1].plan.to_json() == apart[1].plan.to_json()
    for mode in (False, True):
        assert torch.allclose(joined[1].train(mode)(X), apart[1].train(mode)(X)), mode


class Frozen(Net):
    """Keeps the statistics of its norm as they are, as backbones of detectors do; nothing asks for its mode."""

    def __init__(self, counts=False):
        super().__init__()
        self.norm, self.drop, self.trainings = nn.BatchNorm1d(8), nn.Dropout(), 0 if counts else None

    def between(self, x):
        return self.drop(self.norm(x))

    def train(self, mode=True):
        if self.trainings is not None:
            self.trainings += mode
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy])
def test_modules_that_do_not_follow_the_mode_of_the_model(counts, copied):
    model = Frozen(counts).double()
    pruned = copied(fxprune.prune(model, 0.5, example_inputs=X))
    again = fxprune.plan_of(pruned).apply(model)
    assert model.trainings in (None, 0)
    for made in (pruned, again):
        for mode in (True, False, True):
            made.train(mode)
            assert (made.training, made.a.training, made.drop.training, made.norm.training) == (mode, mode, mode, False)
        before = made.norm.running_mean.clone()
        made(X + 5)
        assert torch.equal(made.norm.running_mean, before)


def test_a_part_with_a_train_of_its_own(captures):
    model = OwnTrainInside().double()
    with torch.no_grad():
        model.part.a.weight[4:] *= 1e-3  # these are what goes
        model.part.b.weight[:, 4:] = 0
    pruned = fxprune.prune(model, 0.5, example_inputs=X)
    assert len(captures) == 1
    for mode in (False, True):
        assert torch.allclose(pruned.train(mode)(X), model.train(mode)(X)), mode


def test_a_model_that_is_not_to_be_trained():
    model = Refuses().double().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=X)
    assert pruned.a.weight.shape == (4, 5)
    assert fxprune.verify(model, pruned, X).error < 1e-12


def test_what_a_function_does_in_training_couples_too():
    """A custom function may do something else by its flag: both are looked at."""

    class Mixes(Net):
        def between(self, x):
            return mixing(x, self.training)

    model = Mixes().double()
    pruned = fxprune.prune(model, 0.5, example_inputs=X)
    assert fxprune.verify(model.train(), pruned.train(), X).error < 1e-12
    left = [i for i in range(8) if any(torch.equal(model.a.weight[i], row) for row in pruned.a.weight)]
    assert [7 - i for i in left[::-1]] == left  # channels and their mirror images stay together


@torch.fx.wrap
def mixing(x, training):
    return x + x.flip(1) if training else x.relu()


class Attention(nn.Module):
    """What a flag is handed to lies between what does the same in both modes."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        weights = F.dropout(F.linear(x, self.query).softmax(-1), 1.0, self.training).view(x.shape)
        return F.linear(weights, self.query) * x


def test_branches_that_differ_in_a_flag_alone_are_one_program_with_two_flags(captures):
    model = nn.Sequential(nn.Linear(5, 8), Attention(), nn.Linear(8, 4)).eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.randn(3, 5))
    assert len(captures) == 1
    flags = []
    for mode in (False, True):
        pruned.train(mode)
        calls = [n for n in pruned.flat().graph.nodes if n.op == "call_function"]
        assert [n.target for n in calls].count(F.linear) == 2
        flags.append(next(n.kwargs["training"] for n in calls if n.target is F.dropout))
    assert flags == [False, True]
    assert not torch.equal(pruned.eval()(torch.ones(3, 5)), pruned.train()(torch.ones(3, 5)))


class Decides(Attention):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else x


def test_what_training_does_again_is_not_evaluated_again(captures, monkeypatch):
    evaluated, plain = [], Evaluator.evaluate
    monkeypatch.setattr(
        Evaluator, "evaluate", lambda self, node, *given: evaluated.append(node.target) or plain(self, node, *given)
    )
    model = nn.Sequential(nn.Linear(5, 8), Decides(), nn.Linear(8, 4)).eval()
    fxprune.prune(model, 0.5, example_inputs=torch.randn(3, 5), verify=False)
    assert evaluated.count(F.linear) == 2 and evaluated.count(F.dropout) == 1
    assert len(captures) == 1 and [guard.value for guard in captures[0].guards] == [True]


class Assigns(nn.Module):
    """Tokens assigned to groups; in training by numbers that are drawn, whose program has a size in it that changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 3)
        self.assign = GroupViTAssignAttention(GroupViTVisionConfig(hidden_size=12, num_attention_heads=2))

    def forward(self, x):
        return self.head(self.assign(self.query(x), self.key(x))[0])


def test_what_is_rewritten_for_training_alone_does_not_run_in_evaluation(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # which `torch.compile` turns off
    torch.manual_seed(0)
    model, x = Assigns().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    own = fxprune.prune(model, 0.5, example_inputs=x, same_class=True)
    assert pruned.meta["capture"] == "symbolic" and pruned.assign.q_proj.weight.shape[0] < 12
    assert torch.equal(pruned(x), pruned(x)) and torch.allclose(pruned(x), own(x))
    assert pruned.verification.ok and pruned.verification.error < 1e-12
    assert not torch.equal(pruned.train()(x), pruned(x))


class Counts(Net):
    """Warms up in its first calls, which a number of Python's counts."""

    def __init__(self, counts):
        super().__init__()
        self.calls, self.counts = 0, counts

    def between(self, x):
        if self.counts == "always" or (self.counts == "in training" and self.training):
            self.calls += 1
        return x.relu() * (1.0 if self.calls < 3 else 5.0)


@pytest.mark.parametrize("counts", ["always", "in training", "never"])
def test_a_number_that_the_forward_counts_with_is_said_to_stay(counts):
    pruned = fxprune.prune(Counts(counts).double().eval(), 0.5, example_inputs=X)
    said = "symbolic; numbers that the forward changes on modules are those of the capture, in every call: calls"
    assert pruned.meta["capture"] == ("symbolic" if counts == "never" else said)


class ReadsInEvaluation(nn.Module):
    """Returns maps in training, and in evaluation one of them, which it finds by a value."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.b(self.norm(self.a(x)))
        if self.training:
            return [y, y.abs()]
        return y if float(y.detach().mean()) > 0 else y.abs()


@pytest.mark.parametrize("same_class", [False, True])
def test_a_model_that_reads_values_in_evaluation_trains_as_the_original(same_class):
    torch.manual_seed(0)
    model = ReadsInEvaluation().double().eval()
    small = fxprune.prune(model, 0.5, example_inputs=X, same_class=same_class)
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.mul_(masks[name])
    for mode in (False, True, False):
        torch.testing.assert_close(small.train(mode)(X), model.train(mode)(X))
    assert same_class or small.meta["capture"] == "opaque: whole (reads float() of %mean)"
