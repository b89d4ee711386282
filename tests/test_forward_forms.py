"""What forwards of other people's packages do, each in a small model: pruned by half, and exact."""

import copy
import functools
import operator
from typing import NamedTuple

import pytest
import torch
from oracle import plain_masked
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import fxprune
from fxprune.passes.errors import GuardError


def halved(model, *inputs):
    """A model pruned by half, which verification found exact; something is gone of it."""
    model.eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=inputs)
    assert pruned.verification.ok
    assert sum(p.numel() for p in pruned.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    return pruned


# -- inputs ------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a loader hands over."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: float = 2.0

    @property
    def weighted(self):
        return self.x * self.weight

    def times(self, number):
        return self._replace(x=self.x * number)


BATCHES = {
    "_replace": lambda batch: batch._replace(x=batch.x * batch.weight).x,
    "_asdict": lambda batch: batch._asdict()["x"],
    "_fields": lambda batch: dict(zip(batch._fields, batch, strict=True))["x"],
    "property": lambda batch: batch.weighted,
    "method": lambda batch: batch.times(3).x,
    "isinstance": lambda batch: batch.x if isinstance(batch, Batch) else batch[1],
}


@pytest.mark.parametrize("use", BATCHES)
def test_a_named_tuple_that_is_given_is_one(use):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, batch):
            return batch._replace(x=self.down(self.up(BATCHES[use](batch)).relu()))

    torch.manual_seed(0)
    model, batch = Takes(), Batch(torch.randn(4, 6), torch.rand(4, 1))
    pruned = halved(model, batch)
    assert pruned.meta["capture"] == "symbolic"
    out = pruned(Batch(torch.randn(2, 6), torch.rand(2, 1)))
    assert type(out) is Batch and out.x.shape == (2, 3)


# -- hooks -------------------------------------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Takes what a layer inside returns from a hook, which is a method of its own."""

    def __init__(self, when, bound=True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
        self.head = nn.Linear(16, 5)
        self.hidden, self.hooked, self.bound = {}, False, bound
        if when == "before":
            self.register()

    def register(self):
        hook = self.hook if self.bound else functools.partial(Keeps.hook, self)
        self.net[1].register_forward_hook(hook)
        self.hooked = True

    def hook(self, module, args, output):
        self.hidden[args[0].device] = output.flatten(1)

    def forward(self, x):
        if not self.hooked:
            self.register()
        self.hidden.clear()
        out = self.net(x)
        return out, self.head(self.hidden[x.device])


def test_a_hook_that_keeps_what_a_layer_returns_is_a_step_of_the_program():
    for when, bound in (("before", True), ("before", False), ("in forward", True)):
        torch.manual_seed(0)
        model, x = Keeps(when, bound), torch.randn(4, 6)
        before = dict(model.net[1]._forward_hooks)
        pruned = halved(model, x)
        assert pruned.head.weight.shape == (5, 8), "what the hook keeps is pruned where it is used"
        assert pruned.meta["capture"] == "symbolic"
        assert model.net[1]._forward_hooks == before
        assert not pruned.get_submodule("net.1")._forward_hooks, "the program does it already"
        assert fxprune.verify(model, pruned, torch.randn(7, 6)).ok


class Keeper:
    """A hook that is an object, which the model reads later."""

    def __init__(self):
        self.last = None

    def __call__(self, layer, given, out):
        self.last = out


class KeepsByObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.keeper = nn.Linear(8, 16), nn.Linear(16, 3), Keeper()
        self.a.register_forward_hook(self.keeper)

    def forward(self, x):
        return self.b(self.a(x).relu() + self.keeper.last)


@pytest.mark.parametrize("ran", [False, True])
def test_a_hook_that_is_an_object_of_the_models_is_that_of_the_copy(ran):
    """Else the program holds what it kept in the run before."""
    model, x, other = KeepsByObject().eval(), torch.randn(2, 8), torch.randn(2, 8)
    if ran:
        model(x)
    kept = model.keeper.last
    small = fxprune.prune(model, 0.5, x)
    assert model.keeper.last is kept
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
    torch.testing.assert_close(small(other), model(other))


@torch.library.custom_op("fxprune_tests::add_into", mutates_args=("x",))
def add_into(x: torch.Tensor, y: torch.Tensor) -> None:
    x.add_(y.flip(-1))


def test_what_an_op_without_a_rule_writes_to_is_frozen():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            y = self.a(x).clone()
            add_into(y, self.b(x))
            return self.d(self.c(y).relu())

    small = fxprune.prune(Writes().eval(), 0.5, torch.randn(2, 8))
    assert [layer.out_features for layer in (small.a, small.b, small.c)] == [16, 16, 8]


def test_a_hook_that_looks_at_values_stays_part_of_its_layer():
    seen = []
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().numpy().mean()))
    pruned = halved(model, torch.randn(4, 6))
    seen.clear()
    pruned(torch.randn(2, 6))
    assert len(seen) == 1


def test_the_method_of_a_module_outside_of_the_model_stays_its_own():
    class Watch(nn.Module):
        def hook(self, module, args, output):
            return output * 2

    model, watch = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), Watch()
    model[1].register_forward_hook(watch.hook)
    pruned = halved(model, torch.randn(4, 6))
    assert not list(watch.children())
    assert "mul" in pruned.code


# -- constructors of tensors ----------------------------------------------------------------------------------------------


class OldConstructors(nn.Module):
    """Creates tensors by their class, from sizes, from lists of them, and from tensors; in a method of a part, too."""

    class Noise(nn.Module):
        def made(self, x):
            return torch.Tensor(x.shape[0], x.shape[1], x.shape[2], x.shape[3]).to(x).fill_(0.5)

    def __init__(self):
        super().__init__()
        self.up, self.down, self.noise = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 3), OldConstructors.Noise()

    def forward(self, x):
        x = self.up(x).relu()
        x = x + self.noise.made(x)
        gap = torch.Tensor(torch.zeros(x.shape[0], x.shape[1], 3, x.shape[3])).type(torch.FloatTensor).to(x)
        assert isinstance(gap, torch.Tensor)
        x = torch.cat([x, gap], 2)
        scale = torch.FloatTensor(x.shape[:1]).fill_(2)
        rows = torch.LongTensor([x.shape[2], 1]).sum()
        return self.down(x) * scale.to(x).view(-1, 1, 1, 1) + rows.to(x)


def test_tensors_created_by_their_class_follow_the_sizes_of_the_input():
    model = OldConstructors()
    kept = torch.Tensor, torch.LongTensor, dict(vars(torch.Tensor))
    pruned = halved(model, torch.randn(2, 3, 8, 8))
    assert (torch.Tensor, torch.LongTensor, dict(vars(torch.Tensor))) == kept
    assert globals()["torch"] is __import__("torch")
    assert pruned.meta["capture"] == "symbolic"
    assert pruned.down.weight.shape == (4, 6, 3, 3)
    found = fxprune.verify(model, pruned, torch.randn(5, 3, 12, 9))
    assert found.ok
    assert not found.refused


# -- numbers read from tensors -----------------------------------------------------------------------------------------


class ReadsScale(nn.Module):
    """Takes a fraction out of a tensor, and computes with it."""

    def __init__(self, branches=False):
        super().__init__()
        self.up, self.down, self.branches = nn.Linear(6, 16), nn.Linear(16, 3), branches
        self.scale = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x):
        largest = x.abs().max().item() + self.scale.item()
        if self.branches and largest > 2:
            return self.down(self.up(x).relu())
        return self.down((self.up(x) / largest).relu() * largest**2)


def test_a_fraction_read_from_a_tensor_is_read_anew_on_every_call():
    torch.manual_seed(0)
    model, x = ReadsScale(), torch.randn(4, 6)
    pruned = halved(model, x)
    assert pruned.meta["capture"] == "symbolic"
    assert fxprune.verify(model, pruned, 7 * torch.randn(5, 6)).ok


def test_what_is_decided_by_such_a_fraction_is_decided_on_every_call():
    torch.manual_seed(0)
    model, x = ReadsScale(branches=True), torch.randn(4, 6)
    pruned = halved(model, x)
    assert pruned.meta["capture"].startswith("opaque")
    for given in (0.1 * x, 9 * x):
        assert fxprune.verify(model, pruned, given).ok


class CountsRows(nn.Module):
    """Puts sizes into a tensor of whole numbers, and takes them out again."""

    def __init__(self, listed=False):
        super().__init__()
        self.up, self.down, self.listed = nn.Linear(6, 16), nn.Linear(16, 3), listed

    def forward(self, xs):
        rows = torch.tensor([x.shape[0] for x in xs])
        longest = rows.tolist()[1] if self.listed else rows.amax().item()
        if rows.min() == 0:
            return None
        padded = torch.stack([nn.functional.pad(self.up(x), (0, 0, 0, longest - x.shape[0])) for x in xs])
        return self.down((padded * (torch.arange(longest) < rows[:, None])[..., None]).relu())


def test_sizes_that_went_through_a_tensor_stay_sizes():
    for listed in (False, True):
        torch.manual_seed(0)
        model = CountsRows(listed)
        pruned = halved(model, [torch.randn(3, 6), torch.randn(5, 6)])
        assert pruned.meta["capture"] == "symbolic"
        other = ([torch.randn(2, 6), torch.randn(7, 6)],)
        assert fxprune.verify(model, pruned, other).ok
        assert pruned(*other).shape == (2, 7, 3)


def test_a_list_that_is_repeated_by_a_size_is_as_long_as_it_was():
    class Repeats(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            ones = [1.0] * x.shape[0]
            return self.down(self.up(x).relu()) * torch.tensor(ones)[:, None]

    pruned = halved(Repeats(), torch.randn(4, 6))
    assert pruned.verification.refused, "at another batch it says so"


# -- custom autograd functions -----------------------------------------------------------------------------------------


class ByWidth(torch.autograd.Function):
    """Divides by the number of channels, which the Python of it asks for."""

    @staticmethod
    def forward(ctx, x):
        return x / x.shape[1]

    @staticmethod
    def backward(ctx, grad):
        return grad


class InGroups(torch.autograd.Function):
    """Is told how many groups of how many channels there are."""

    @staticmethod
    def forward(ctx, x, groups, each):
        return x.reshape(x.shape[0], groups, each).flip(2).reshape(x.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


class Signs(torch.autograd.Function):
    """Knows no width."""

    @staticmethod
    def forward(ctx, x):
        return x.sign() * x.abs().sqrt()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_custom_function_whose_python_has_widths_is_tried_and_kept_whole():
    for apply, why in (
        (ByWidth.apply, "computes something else"),
        (lambda x: InGroups.apply(x, 6, 3), "fails"),
        (Signs.apply, ""),
    ):

        class Net(nn.Module):
            def __init__(self, apply=apply):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(6, 20), nn.Linear(20, 18), nn.Linear(18, 3)
                self.apply_to = apply

            def forward(self, x):
                return self.c(self.apply_to(self.b(self.a(x).relu())))

        torch.manual_seed(0)
        pruned = halved(Net(), torch.randn(4, 6))
        assert pruned.b.weight.shape == ((18, 10) if why else (9, 10))
        reasons = pruned.meta["frozen_modules"].values()
        assert all(f"belongs to a custom autograd function that {why}" in reason for reason in reasons)
        assert bool(reasons) == bool(why)


# -- reshapes ------------------------------------------------------------------------------------------------------------


class HeadsInTheBatch(nn.Module):
    """Attention whose heads lie in the batch, the sizes of which are computed once more from the result."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, 4, 4).transpose(1, 2).reshape(b * 4, n, 4) for t in self.qkv(x).chunk(3, -1))
        rows, tokens, width = q.shape
        q = torch.stack([-q[..., 1::2], q[..., ::2]], -1).reshape(1 * rows, 1 * tokens, 2 * (width // 2))
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        return self.out(mixed.reshape(b, 4, n, 4).transpose(1, 2).reshape(b, n, 16))


def test_a_batch_of_one_that_heads_were_merged_with_is_no_number_of_heads():
    torch.manual_seed(0)
    model = HeadsInTheBatch()
    pruned = halved(model, torch.randn(1, 5, 12))
    found = fxprune.verify(model, pruned, torch.randn(3, 7, 12))
    assert found.ok
    assert not found.refused


class MapOfChannels(nn.Module):
    """Reads `(B, h*w, C)` as `(B, C, h, w)` without moving the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.side, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.last = nn.Conv2d(4, 80, 1)
        self.head = nn.Conv2d(80, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        b, _, h, w = x.shape
        x = x + self.side(x).flatten(2).transpose(1, 2).reshape(b, 16, h, w)
        return self.head(self.last(self.out(x)).relu())


def test_channels_that_are_laid_out_among_positions_stay():
    torch.manual_seed(0)
    model = MapOfChannels()
    pruned = halved(model, torch.randn(1, 3, 4, 6))
    assert pruned.stem.weight.shape[0] == 16
    assert pruned.last.weight.shape[0] < 80
    for size in (5, 6, 8):
        found = fxprune.verify(model, pruned, torch.randn(2, 3, size, size + 1))
        assert found.ok
        assert not found.refused


# -- what else forwards do -----------------------------------------------------------------------------------------------


class Renormed(nn.Module):
    """Assigns to the data of a parameter on every call."""

    def __init__(self):
        super().__init__()
        self.up, self.proto = nn.Linear(6, 16), nn.Parameter(3 * torch.randn(3, 16))

    def forward(self, x):
        self.proto.data = torch.renorm(self.proto.data, p=2, dim=0, maxnorm=1.0)
        return self.up(x).relu() @ self.proto.t()


def test_assignment_to_a_parameters_data_is_a_step_of_the_program():
    torch.manual_seed(0)
    model, x = Renormed(), torch.randn(4, 6)
    before = model.proto.detach().clone()
    pruned = fxprune.prune(model.eval(), 0.5, example_inputs=x)
    assert torch.equal(model.proto, before), "the original is not written to"
    assert pruned.meta["capture"] == "symbolic"
    assert pruned.proto.shape == (3, 8)
    with torch.no_grad():
        pruned.proto.mul_(100)
        pruned(x)
    assert pruned.proto.detach().norm(dim=1).max() <= 1.001


class Vectorised(nn.Module):
    """Calls a function that `torch.vmap` vectorises, of tensors alone or of a parameter too."""

    def __init__(self, owns=False):
        super().__init__()
        self.up, self.down, self.owns = nn.Linear(6, 16), nn.Linear(16, 3), owns
        self.shift = nn.Parameter(torch.randn(16))

    def forward(self, x):
        shift = self.shift if self.owns else torch.zeros(())
        scaled = torch.vmap(lambda row, size: row.relu() * size + shift)(self.up(x), x.norm(dim=1))
        return self.down(scaled)


def test_a_function_that_is_vectorised_is_one_node():
    torch.manual_seed(0)
    pruned = halved(Vectorised(), torch.randn(4, 6))
    assert pruned.meta["capture"] == "symbolic"
    assert "vmap_lambda" in pruned.code
    assert pruned.down.weight.shape == (3, 8)


def test_a_vectorised_function_that_reads_a_parameter_is_not():
    torch.manual_seed(0)
    model = Vectorised(owns=True).eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.randn(4, 6))
    assert pruned.meta["capture"].startswith("opaque")
    assert pruned.verification.ok


class GivenAModule(nn.Module):
    """Hands one part to another, which reads values."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)

        def forward(self, x, act):
            hidden = act(self.up(x))
            if hidden.max() > 1e9:
                raise ValueError("the input has exploded")
            return self.down(hidden)

    def __init__(self):
        super().__init__()
        self.part, self.act, self.head = GivenAModule.Part(), nn.GELU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.part(x, self.act))


def test_an_opaque_module_may_be_given_another_module():
    torch.manual_seed(0)
    pruned = halved(GivenAModule(), torch.randn(4, 6))
    assert list(pruned.meta["capture"].split())[:2] == ["opaque:", "part"]
    assert pruned.part.up.weight.shape == (8, 6)


class ByKeyword(nn.Module):
    """Calls a part that is one node, and convolves, by keyword alone."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 12, 3, padding=1)

        def forward(self, *, x):
            return self.conv(x) if x.max() < 1e9 else x

    def __init__(self):
        super().__init__()
        self.stem, self.part, self.head = nn.Conv2d(3, 12, 3), ByKeyword.Part(), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.head(self.part(x=self.stem(x)))


def test_an_opaque_module_may_be_called_by_keyword():
    torch.manual_seed(0)
    halved(ByKeyword(), torch.randn(1, 3, 8, 8))


class Listed(nn.Module):
    """A part that reads values returns a list, as long as the batch."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Linear(6, 16)

        def forward(self, x):
            return "rows", [self.conv(row) for row in x if row.max() < 1e9]

    def __init__(self):
        super().__init__()
        self.part, self.head = Listed.Part(), nn.Linear(16, 3)

    def forward(self, x):
        return [self.head(row.relu()) for row in self.part(x)[1]]


def test_a_list_of_an_opaque_module_is_as_long_as_it_was():
    torch.manual_seed(0)
    pruned = halved(Listed(), torch.randn(2, 6))
    assert pruned.meta["capture"].startswith("opaque: part")
    assert "is 2, and here it is 3" in pruned.verification.refused[0]


class OverGraph(nn.Module):
    """Adds up what the neighbours of a node have, by a sparse matrix; what it copies is a value like any other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, graph):
        y = torch.sparse.mm(graph, self.a(x)).relu()
        return self.b(torch.sparse.addmm(copy.deepcopy(y.detach()), graph, y))


def test_a_sparse_input_and_a_copy_made_in_the_forward():
    torch.manual_seed(0)
    model, graph = OverGraph(), (torch.rand(6, 6) > 0.5).float().to_sparse()
    pruned = halved(model, torch.randn(6, 8), graph)
    assert pruned.a.out_features == 8
    masks = fxprune.plan_of(pruned).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
        x, other = torch.randn(4, 8), (torch.rand(4, 4) > 0.5).float().to_sparse()
        torch.testing.assert_close(pruned(x, other), model(x, other))


# -- pieces ------------------------------------------------------------------------------------------------------------


class Steps(nn.Module):
    """Cuts a sequence into pieces and counts them, in one of the ways Python has."""

    def __init__(self, pieces):
        super().__init__()
        self.a, self.cell, self.b, self.pieces = nn.Linear(6, 12), nn.GRUCell(12, 10), nn.Linear(10, 3), pieces

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 10)
        for step in self.pieces(self.a(x).relu()):
            state = self.cell(step if step.dim() == 2 else step.sum(1), state)
        return self.b(state)


COUNTED = {
    "a loop over unbind": lambda y: y.unbind(1),
    "torch.unbind by keyword": lambda y: torch.unbind(y, dim=1),
    "zip": lambda y: [p + q for p, q in zip(y.unbind(1), y.unbind(1), strict=True)],
    "reversed": lambda y: reversed(y.unbind(1)),
    "starred": lambda y: [*y.unbind(1)][-2:],
    "a slice from the end": lambda y: y.unbind(1)[-2:],
    "joined": lambda y: operator.add((y[:, 0],), y.unbind(1)),
    "stacked": lambda y: torch.stack(y.unbind(1)).sum(0, keepdim=True),
    "pieces of two": lambda y: y.split(2, 1),
    "chunks": lambda y: y.chunk(4, 1),
}


@pytest.mark.parametrize("pieces", COUNTED.values(), ids=COUNTED)
def test_how_many_pieces_there_are_is_decided_by_the_example(pieces):
    torch.manual_seed(0)
    model, x = Steps(pieces), torch.randn(2, 5, 6)
    pruned = halved(model, x)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in fxprune.plan_of(pruned).masks(model).items():
            zeroed.get_parameter(name).mul_(mask)
        torch.testing.assert_close(pruned(x), zeroed(x))
        torch.testing.assert_close(pruned(x[:1]), zeroed(x[:1]))
        with pytest.raises(GuardError, match="the pruned program was captured where"):
            pruned(torch.randn(2, 8, 6))


def test_a_piece_counted_from_either_end_is_right_for_any_number_of_them():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            steps = self.a(x).relu().unbind(1)
            return self.b(steps[0] - steps[-1] + steps[:2][1])

    model = Ends()
    pruned = halved(model, torch.randn(2, 5, 6))
    for length in (5, 3, 8):
        assert fxprune.verify(model, pruned, torch.randn(2, length, 6)).ok
    pruned = halved(nn.Sequential(nn.Linear(4, 16), nn.GELU(), Packed(), nn.Linear(8, 2)), torch.randn(3, 4))
    assert "holds" not in pruned.code, "channels are counted by the model alone"


class Packed(nn.Module):
    """Products of pieces of the channels, and of a size that is written down."""

    def forward(self, x):
        a, b = x.split(8, -1)
        c, d = x.chunk(2, -1)
        e, f = x.reshape(-1, 2, 8).permute(1, 0, 2).unbind(0)
        return a * b + c * d + e * f


@pytest.mark.parametrize(
    "part",
    [
        lambda y: y[:, -12:],
        lambda y: y[:, -24:-12],
        lambda y: y[:, :60].reshape(len(y), 5, 12).sum(1),
        lambda y: y[:, 48:60],
        lambda y: y[:, 12:99].reshape(len(y), -1, 12).sum(1),
    ],
)
def test_bounds_in_channels_beside_positions_count_from_where_they_did(part):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(part(self.a(x).relu().flatten(1)))

    model = Parts()
    pruned = halved(model, torch.randn(2, 5, 6))
    for length in (5, 7):
        assert fxprune.verify(model, pruned, torch.randn(2, length, 6)).ok


# -- tensors without entries -------------------------------------------------------------------------------------------

NOTHING_YET = {
    "empty": lambda y: torch.empty(len(y), 0, 12),
    "zeros": lambda y: torch.zeros((y.shape[0], 0, 12), dtype=y.dtype),
    "like the layer's": lambda y: y.new_empty(len(y), 0, 12),
    "a slice": lambda y: y[:, :0],
}


class Grows(nn.Module):
    """Starts with a tensor that has a width and no rows, and adds rows to it."""

    def __init__(self, start):
        super().__init__()
        self.start, self.inner, self.extra, self.head = start, nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = self.inner(x)
        rows = NOTHING_YET[self.start](y)
        for i in range(2):
            rows = torch.cat([rows, y[:, i : i + 1]], dim=1)
        return self.head(torch.cat([rows, self.extra(x)], dim=1))


@pytest.mark.parametrize("start", NOTHING_YET)
def test_rows_are_added_to_a_tensor_that_has_a_width_and_no_rows(start):
    torch.manual_seed(0)
    model, x = Grows(start), torch.randn(2, 4, 6)
    pruned = halved(model, x)
    assert pruned.head.weight.shape == (3, 6)
    torch.testing.assert_close(pruned(x), plain_masked(model, fxprune.plan_of(pruned))(x))


# -- functions of torch that run functions -----------------------------------------------------------------------------


SCORES = {
    "a number": lambda score, b, h, q, k: score * 2,
    "slopes": lambda score, b, h, q, k: score + torch.exp2(-(h + 1) * 2.0) * (k - q),
    "capped": lambda score, b, h, q, k: 20 * torch.tanh(score / 20),
}


class Scored(nn.Module):
    """Attention whose scores a function changes, before two layers."""

    def __init__(self, change):
        super().__init__()
        self.q, self.k, self.v, self.change = nn.Linear(6, 32), nn.Linear(6, 32), nn.Linear(6, 32), change
        self.out, self.up, self.down = nn.Linear(32, 6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(flex_attention(q, k, v, score_mod=self.change).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", SCORES)
def test_attention_with_scores_that_a_function_changes_is_kept(name):
    torch.manual_seed(0)
    model, x = Scored(SCORES[name]).eval(), torch.randn(2, 5, 6)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.up.weight.shape == (12, 6) and pruned.q.weight.shape == (32, 6)
    assert "q" in str(fxprune.couple(model, x)).partition("kept whole")[2]
