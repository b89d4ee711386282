"""Functions that have the model, or what it holds, in a variable of theirs: those of a copied tree have the copy's."""

import copy
import functools
import weakref

import pytest
import torch
from torch import nn

import fxprune
from fxprune.passes.ir.closures import Rebound
from fxprune.passes.ir.module_tree import private_copy


class Two(nn.Module):
    """Two layers and what a hook, or a function, of the first one is told to do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.kept = {}

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return y + self.c(self.kept["a"]) if self.a._forward_hooks else y


def hook_on_the_model():
    model = Two()
    model.a.register_forward_hook(lambda layer, given, out: model.kept.__setitem__("a", out))
    return model


def hook_on_what_it_holds():
    def keeping(kept, name):
        def hook(layer, given, out):
            kept[name] = out

        return hook

    model = Two()
    model.a.register_forward_hook(keeping(model.kept, "a"))
    return model


def forward_of_its_own():
    model = Two()
    model.forward = lambda x: model.b(model.a(x).relu())
    return model


def forward_around_a_layers():
    model = Two()
    plain = model.a.forward
    model.a.forward = lambda x: plain(x).tanh() * 2
    return model


def defaults_of_arguments():
    def keeping(layer, given, out, kept=None, name="a"):
        kept[name] = out

    model = Two()
    keeping.__defaults__ = (model.kept, "a")
    model.a.register_forward_hook(keeping)
    model.forward = lambda x, model=model: Two.forward(model, x)
    return model


def function_with_a_parameter():
    model = Two()
    model.scale = nn.Parameter(torch.rand(12) + 0.5)
    model.act = lambda y: y.relu() * model.scale
    model.forward = functools.partial(lambda model, x: model.b(model.act(model.a(x))), model)
    return model


def hook_by_keyword():
    model = Two()
    model.c.register_forward_pre_hook(lambda layer, args, named: (args, {"input": named["input"] * 2}), with_kwargs=True)
    model.forward = lambda x: model.b(model.a(x).relu()) + model.c(input=model.a(x))
    return model


KINDS = [
    hook_on_the_model,
    hook_on_what_it_holds,
    forward_of_its_own,
    forward_around_a_layers,
    function_with_a_parameter,
    defaults_of_arguments,
    hook_by_keyword,
]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_such_functions_do_is_part_of_the_program(make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(4, 6)
    kept = dict(model.kept)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    assert small.meta["capture"] == "symbolic" and small.a.out_features == 6
    assert model.kept == kept, "the original keeps nothing of the capture"
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
        for given in (x, torch.randn(7, 6)):
            torch.testing.assert_close(small(given), model(given))
    copy.deepcopy(small)(x).sum().backward()


def test_variables_are_changed_for_the_time_of_a_call():
    model = forward_of_its_own()
    before = model.forward.__closure__[0].cell_contents
    copied = private_copy(model)
    assert type(copied.forward) is Rebound and copied.forward.__globals__ is globals()
    copied.a, x = nn.Linear(6, 12), torch.randn(2, 6)
    assert torch.equal(copied(x), copied.b(copied.a(x).relu()))
    assert model.forward.__closure__[0].cell_contents is before
    again = private_copy(copied)
    assert again.forward.held[0] is again


def test_a_variable_that_a_function_assigns_to_is_the_copys():
    def counting(model):
        calls = None

        def hook(layer, given, out):
            nonlocal calls
            calls = (model, 1 if calls is None else calls[1] + 1)
            return calls

        return hook

    model = Two()
    hook = counting(model)
    model.a.register_forward_hook(hook)
    copied = private_copy(model)
    mine = next(iter(copied.a._forward_hooks.values()))
    assert [mine(None, None, 1) for _ in range(2)] == [(copied, 1), (copied, 2)]


class Child(nn.Module):
    """A layer that knows its parent weakly, and with `reads` is kept as one node."""

    def __init__(self, parent, reads):
        super().__init__()
        self.a, self.reads, self.parent, self.proxy = nn.Linear(8, 8), reads, weakref.ref(parent), [weakref.proxy(parent)]

    def forward(self, x):
        if self.reads and float(x.detach().sum()) > 1e9:
            return x
        return self.a(x) * self.parent().gain + self.proxy[0].first.bias


class Parent(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.first, self.gain, self.last = nn.Linear(4, 8), nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 2)
        self.child = Child(self, reads)

    def forward(self, x):
        return self.last(self.child(self.first(x)).relu())


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("reads", [False, True])
def test_what_a_module_knows_weakly_is_the_copys(reads, same_class):
    """It was the original, whose parameters were constants of the pruned model that shrank beside those that were trained."""
    model, x = Parent(reads).eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x, same_class=same_class)
    assert small.gain.shape == (4,) and dict(small.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert not [name for name, _ in small.named_buffers()]
    small.train()(x).sum().backward()
    assert small.gain.grad is not None and small.first.bias.grad is not None
