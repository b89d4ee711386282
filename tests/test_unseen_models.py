"""What models of others do that no graph of this suite does: state in objects, random numbers, what Python reads."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune import PruneError
from fxprune.passes.capture import leftovers

X = torch.linspace(-1, 1, 40).view(4, 10)


class Net(nn.Module):
    """Two linear layers, with what a subclass does in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 16), nn.Linear(16, 3)
        self.prepare()

    def prepare(self) -> None: ...


def pruned(kind):
    model = kind().eval()
    return model, fxprune.prune(model, 0.5, example_inputs=X)


def zeroed(model, result):
    """The original whose removed parameters are zero."""
    with torch.no_grad():
        for name, mask in fxprune.plan_of(result).masks(model).items():
            model.get_parameter(name).mul_(mask)
    return model


# -- state in objects of the model's own classes ---------------------------------------------------------------------


class Notes:
    def __init__(self) -> None:
        self.calls, self.seen, self.table, self.sum = 0, [], {"last": None}, torch.zeros(3)


class Noting(Net):
    """Reads a value, so that it is one opaque node, and notes things in an object."""

    def prepare(self) -> None:
        self.notes = Notes()

    def forward(self, x):
        x = self.a(x).relu()
        notes = self.notes
        notes.calls += 1
        notes.seen.append(float(x.detach().mean()))
        notes.table["last"] = notes.calls
        notes.sum.add_(1)
        return self.b(x) + notes.sum


class Symbolic(Noting):
    def forward(self, x):
        self.notes.calls += 1
        self.notes.seen.append(1.0)
        self.notes.table["last"] = self.notes.calls
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("kind", [Noting, Symbolic])
def test_what_a_forward_notes_in_an_object_is_not_there_before_the_first_call(kind):
    model, result = pruned(kind)
    for notes in (model.notes, result.notes):
        assert (notes.calls, notes.seen, notes.table, notes.sum.tolist()) == (0, [], {"last": None}, [0.0] * 3)
    assert result.notes is not model.notes
    expected = [zeroed(model, result)(X) for _ in range(2)]
    for wanted in expected:
        torch.testing.assert_close(result(X), wanted)
    assert kind is Symbolic or result.notes.calls == 2


class Linked:
    """An object that holds itself."""

    def __init__(self, value) -> None:
        self.value, self.me, self.all = value, self, [self]


class Relinks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, linked):
        return Linked(self.lin(linked.me.value).relu()) if float(linked.value.detach().sum()) < 1e9 else linked


class HandsOn(Net):
    def prepare(self) -> None:
        self.inner = Relinks()

    def forward(self, x):
        return self.b(self.inner(Linked(self.a(x).relu())).me.value)


def test_an_object_that_holds_itself_is_handed_to_a_module_that_reads_values():
    model, result = pruned(HandsOn)
    torch.testing.assert_close(result(X), zeroed(model, result)(X))
    assert result.inner.lin.weight.numel() < 256


# -- random numbers --------------------------------------------------------------------------------------------------


class Seeded(Net):
    def prepare(self) -> None:
        self.torch, self.python, self.numpy = torch.Generator().manual_seed(3), random.Random(3), np.random.default_rng(3)

    def forward(self, x):
        x = self.b(self.a(x).relu()) + torch.rand(3, generator=self.torch)
        return x * self.python.random() + self.numpy.random()


def test_generators_of_a_model_draw_in_the_result_as_in_the_model():
    model, result = pruned(Seeded)
    first, second = (zeroed(model, result)(X) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(result(X), first)
    torch.testing.assert_close(result(X), second)


DRAWS = {
    "rand": lambda x: torch.rand(3),
    "bernoulli": lambda x: torch.bernoulli(torch.full((3,), 0.5)),
    "normal": lambda x: torch.distributions.Normal(0.0, 1.0).sample((3,)),
    "in place": lambda x: torch.empty(3).normal_(),
    "dropout": lambda x: nn.functional.dropout(torch.ones(3), 0.5, True),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_numbers_of_a_fixed_shape_are_drawn_in_every_call(draw):
    class Noisy(Net):
        def forward(self, x):
            return self.b(self.a(x).relu()) + draw(x)

    model, result = pruned(Noisy)
    model = zeroed(model, result)
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = model(X)
        torch.manual_seed(seed)
        torch.testing.assert_close(result(X), wanted)


# -- modules that cannot be followed, in part ------------------------------------------------------------------------


class Functional(Net):
    def prepare(self) -> None:
        self.net, self.scale = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3)), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        weights = {name: p * self.scale for name, p in self.net.named_parameters()}
        return torch.func.functional_call(self.net, weights, (x,))


def test_functional_call_with_computed_weights():
    model, result = pruned(Functional)
    assert result.net[0].weight.shape == (8, 10)
    torch.testing.assert_close(result(X), zeroed(model, result)(X))


class ByNumPy(Net):
    """What Python reads of the first layer stays whole; the second one does not."""

    def prepare(self) -> None:
        self.c = nn.Linear(16, 12)
        self.d = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.from_numpy(self.a(x).detach().numpy() * 2)
        return self.d(self.c(x).relu())


def test_what_python_reads_stays_whole_and_nothing_else():
    model, result = pruned(ByNumPy)
    assert (tuple(result.a.weight.shape), tuple(result.c.weight.shape)) == ((16, 10), (6, 16))
    torch.testing.assert_close(result(X), zeroed(model, result)(X))


class Nested(Net):
    def forward(self, x):
        parts = torch.nested.nested_tensor([x[:1], x[1:]])
        return torch.nested.to_padded_tensor(self.b(self.a(parts).relu()), 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_as_such():
    with torch.no_grad():
        Nested()(X)
    with pytest.raises(PruneError, match="works on a nested tensor"):
        pruned(Nested)


class ReadsValues(nn.Module):
    """It becomes one node, in a run with values, after one without them has failed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 8), nn.Linear(8, 2)

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y * 2 if float(y.sum()) > 0 else y)


def test_a_run_that_fails_without_values_costs_no_search_through_all_objects(monkeypatch):
    """Proxies that the error holds are gone before the next run looks for what is left."""
    searches = []
    monkeypatch.setattr(gc, "get_referrers", lambda *of: searches.append(of) or [])
    small = fxprune.prune(ReadsValues(), 0.5, X, verify=False)
    assert small.meta["capture"].startswith("opaque: whole (reads") and not searches


# -- what stood in the place of functions ----------------------------------------------------------------------------


class Holder:
    pass


def test_functions_are_put_back_wherever_they_are_held(monkeypatch):
    functions = [lambda i=i: i for i in range(40)]
    stand_ins = [lambda i=i: -i for i in range(40)]
    holder, table, keys = Holder(), {"a": stand_ins[1]}, {stand_ins[2]: 1}
    holder.attribute = stand_ins[0]
    rest = [stand_ins[3], [(1, (stand_ins[4], 2))], {stand_ins[5]}, [frozenset([stand_ins[6]])]]
    searches = []
    search = gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *of: searches.append(len(of)) or search(*of))
    replaced = list(zip(functions, stand_ins, strict=True))
    stand_ins.clear()
    leftovers.restore_functions(replaced)
    assert (holder.attribute, table["a"], list(keys)) == (functions[0], functions[1], [functions[2]])
    assert rest == [functions[3], [(1, (functions[4], 2))], {functions[5]}, [frozenset([functions[6]])]]
    assert not replaced
    assert len(searches) < 12  # and not one for each function


# -- what values decide ----------------------------------------------------------------------------------------------


class Decides(nn.Module):
    """Takes one way or another by the values of its input."""

    def __init__(self, decide) -> None:
        super().__init__()
        self.a, self.m, self.p, self.q, self.b = (nn.Linear(*n) for n in ((6, 12), (12, 12), (12, 12), (12, 12), (12, 3)))
        self.decide, self.seen = decide, []

    def forward(self, x):
        return self.b(self.decide(self, x, self.a(x).relu()))


def repeated(model, x, y):
    while y.abs().amax() > 1:
        y = model.m(y).tanh() * 0.9
    return y


def one_of_two(model, x, y):
    return model.p(y) if x.mean() > 0 else model.q(y).tanh()


def one_by_a_number(model, x, y):
    return model.p(y) if x.mean().item() > 0.2 else model.q(y).tanh()


def one_by_index(model, x, y):
    return [model.p, model.q][int(x.mean() > 0)](y)


def by_a_count(model, x, y):
    number = int((x > 2).sum())
    return model.p(y) if number == 0 else model.q(y) if number == 1 else y


def by_a_list(model, x, y):
    numbers = (x.mean(1) > 0).long().tolist()
    return torch.stack([(model.p, model.q)[n](row) for n, row in zip(numbers, y, strict=True)])


def checked(model, x, y):
    if y.isnan().any():
        raise ValueError("not a number")
    model.seen.append(len(model.seen))
    return model.p(y) if x.mean() > 0 else y


@pytest.mark.parametrize("decide", [repeated, one_of_two, one_by_a_number, one_by_index, by_a_count, by_a_list, checked])
def test_a_branch_that_the_example_does_not_take_is_pruned_with_the_other_one(decide):
    torch.manual_seed(0)
    model, x = Decides(decide).eval(), torch.rand(4, 6) * 0.5
    with torch.no_grad():
        model.a.weight.mul_(2)
    result = fxprune.prune(model, 0.5, example_inputs=x, criterion="random")
    assert result.verification.ok and result.get_submodule("a").out_features == 6
    assert model.seen == result.seen == [], "what other branches store is put back"
    zeroed(model, result)
    for given in (x, -x, torch.randn(3, 6) * 9, torch.randn(5, 6) * 0.01):
        torch.testing.assert_close(result(given), model(given))


class Chooses(nn.Module):
    """An operator of torch's that takes functions decides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p, self.q, self.b = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(torch.cond(x.sum() > 0, lambda t: self.p(t).relu(), lambda t: self.q(t).tanh(), (y,)))


class Scans(nn.Module):
    """One that goes over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        from torch._higher_order_ops.scan import scan

        y = self.a(x).relu()
        last, steps = scan(lambda c, t: (c * 0.5 + t, (c - t).clone()), torch.zeros_like(y[:, 0]), y.transpose(0, 1))
        return self.b(steps.transpose(0, 1) + last.unsqueeze(1))


class Loops(Scans):
    """One that repeats a step."""

    def forward(self, x):
        from torch._higher_order_ops.while_loop import while_loop

        start = torch.tensor(0), self.a(x).relu()
        return self.b(while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, (t * 0.5).relu()), start)[1])


@pytest.mark.parametrize("kind", [Chooses, Scans, Loops])
def test_operators_that_take_functions_and_steps(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.rand(2, 5, 6)
    result = fxprune.prune(model, 0.5, example_inputs=x)
    assert result.verification.ok and result.get_submodule("a").out_features == 6
    zeroed(model, result)
    with torch.no_grad():  # of gradients torch's own compiler warns
        for given in (x, -torch.rand(3, 5, 6)):
            torch.testing.assert_close(result(given), model(given))


@pytest.mark.parametrize("bounds", [(8, None), (3, 3), (8, 20), (-1, 2)])
def test_a_slice_of_channels_that_holds_none(bounds):
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = self.a(x).tanh()
            y[:, slice(*bounds)] += 1.0
            return self.b(torch.cat([y, y[:, slice(*bounds)].exp()], 1))

    torch.manual_seed(0)
    model, x = Empty().double().eval(), torch.randn(4, 6, dtype=torch.double)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    found = fxprune.verify(model, small, x)
    assert small.a.out_features == 4 and found.ok and found.error < 1e-12


@pytest.mark.parametrize("bounds", [(1, None, 3), (None, None, 3), (1, 99, 3), (-8, None, 3), (None, -1, 4), (2, 11, 4)])
def test_a_slice_by_steps_without_an_end_takes_no_more_than_it_did(bounds):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(len(range(12)[slice(*bounds)]), 3)

        def forward(self, x):
            return self.b(self.a(x)[..., slice(*bounds)].tanh())

    for seed in range(3):
        torch.manual_seed(seed)
        model, x = Steps().eval(), torch.randn(2, 5, 6)
        small = fxprune.prune(model, 0.5, example_inputs=x, criterion="random")
        zeroed(model, small)
        torch.testing.assert_close(small(x), model(x))


class ShufflesMaps(nn.Module):
    """Channels of a map that a linear layer makes are shuffled: each is four features, in groups that keep equally many."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(10, 24, bias=False), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x):
        x = self.linear(x).view(-1, 6, 2, 2)
        return self.conv(x.unflatten(1, (3, x.shape[1] // 3)).transpose(1, 2).flatten(1, 2))


@pytest.mark.parametrize("seed", range(6))
def test_groups_that_are_interleaved_keep_the_same_channels(seed):
    torch.manual_seed(seed)
    fxprune.prune(ShufflesMaps().double().eval(), 0.5, torch.randn(2, 10, dtype=torch.double))


# -- modules that are moved to where they are --------------------------------------------------------------------------

MOVES = {
    "to a device": lambda model, x: model.b.to(x.device),
    "to a tensor": lambda model, x: model.to(x),
    "to a dtype": lambda model, x: model.b.to(x.dtype),
    "in place": lambda model, x: model.float().cpu().b,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_modules_that_are_moved_to_where_they_are(move):
    class Moves(Net):
        def forward(self, x):
            move(self, x)
            return self.b(self.a(x).relu())

    model, result = pruned(Moves)
    assert result.meta["capture"] == "symbolic" and "copy_" not in result.code
    torch.testing.assert_close(result(X), zeroed(model, result)(X))


class Counting(Net):
    """Writes to a tensor of an object, and reads nothing: what the next call finds is what this one has left."""

    def prepare(self) -> None:
        self.notes = Notes()

    def forward(self, x):
        torch.relu_(input=torch.zeros(3))
        self.notes.sum.add_(1)
        self.notes.sum[0] = self.notes.sum[0] * 2
        return self.b(self.a(x).relu()) + self.notes.sum


def test_a_tensor_of_an_object_is_written_to_in_each_call():
    model, result = pruned(Counting)
    assert model.notes.sum.tolist() == result.notes.sum.tolist() == [0.0] * 3
    for wanted in [zeroed(model, result)(X) for _ in range(3)]:
        torch.testing.assert_close(result(X), wanted)


# -- tensors with a class of their own -------------------------------------------------------------------------------


class Image(torch.Tensor):
    """Carries what is known of an image from tensor to tensor, as those of MONAI and fastai do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, Image):
            out.source = next((a.source for a in args if isinstance(a, Image) and hasattr(a, "source")), None)
        return out


class Converts(Net):
    def forward(self, x):
        return self.b(self.a(x.as_subclass(Image)).as_subclass(torch.Tensor).relu())


class Labels(Net):
    def forward(self, x):
        return self.b(self.a(x).as_subclass(Image).relu())


class Holds(Net):
    def prepare(self):
        self.scale = nn.Parameter(torch.rand(16).as_subclass(Image))

    def forward(self, x):
        return self.b(self.a(x) * self.scale)


@pytest.mark.parametrize("kind", [Net, Converts, Labels, Holds])
def test_what_torch_tells_nobody_of_is_the_same_tensor(kind):
    if kind is Net:
        kind, x = type("Plain", (Net,), {"forward": lambda self, x: self.b(self.a(x).relu())}), X.clone().as_subclass(Image)
        x.source = "a file"
    else:
        x = X
    model = kind().eval()
    result = fxprune.prune(model, 0.5, example_inputs=x)
    assert result.a.out_features == 8 and fxprune.verify(model, result, x).ok
    out, wanted = result(x), zeroed(model, result)(x)
    assert type(out) is type(wanted) and getattr(out, "source", None) == getattr(wanted, "source", None)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), wanted.as_subclass(torch.Tensor))


# -- weights that a forward leaves on a layer ------------------------------------------------------------------------


class SpectralNorm(nn.Module):
    """Takes the weight from a layer, and gives it a scaled one in each call."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight = layer, nn.Parameter(layer.weight.data)
        self.u = nn.Parameter(torch.randn(len(self.weight)), requires_grad=False)
        del layer._parameters["weight"]

    def forward(self, x):
        v = F.normalize(self.weight.t() @ self.u, dim=0)
        self.layer.weight = self.weight / (self.u @ self.weight @ v)
        return self.layer(x)


def test_a_layer_that_is_given_its_weight_in_each_call():
    torch.manual_seed(0)
    model = nn.Sequential(SpectralNorm(nn.Linear(10, 16)), nn.ReLU(), nn.Linear(16, 3)).eval()
    result = fxprune.prune(model, 0.5, example_inputs=X)
    assert result[0].weight.shape == (8, 10)
    assert fxprune.verify(model, result, X).ok
