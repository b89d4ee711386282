"""The pruned model is the original's module tree: its containers can be called, indexed, hooked, copied and saved."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxprune
from fxprune.passes.errors import GuardError
from fxprune.passes.rewrite.pruned_module import RewrittenForward
from fxprune.passes.rewrite.rewrite import check_programs

X = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """A residual block; its own forward does for any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


class Literal(nn.Module):
    """Its forward has its width in the code, so that it must be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x, scale=2.0, *, flag=False):
        batch = x.shape[0]
        y = self.proj(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return y.reshape(batch, 8, x.shape[2], x.shape[3]) * scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 1), Block(8), Literal(), Block(8))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.classes = 4

    def forward(self, x):
        return self.head(self.drop(self.features(x).mean((2, 3))))


@pytest.fixture
def net() -> tuple[Net, fxprune.passes.rewrite.pruned_module.PrunedModule]:
    model = Net().eval()
    return model, fxprune.prune(model, 0.5, example_inputs=X)


def kinds(module: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(m)) for path, m in module.named_modules() if path]


def rewritten(module: nn.Module) -> list[str]:
    return [path for path, m in module.named_modules() if isinstance(vars(m).get("forward"), RewrittenForward)]


def test_modules_keep_their_names_classes_order_and_attributes(net):
    model, small = net
    assert kinds(small) == kinds(model)
    assert list(small.state_dict()) == list(model.state_dict())
    assert small.classes == 4 and len(small.features) == 4 and small.features[0].out_channels == 4


def test_only_modules_with_a_rewritten_line_get_another_forward(net):
    _, small = net
    assert rewritten(small) == ["features", "features.2"], "the block that has its width in its code, and what calls it"


def test_containers_are_called_by_the_graph_and_can_be_called_alone(net):
    _, small = net
    assert [n.target for n in small.graph.nodes if n.op == "call_module"] == ["features", "drop", "head"]
    assert torch.equal(small.head(small.features(X).mean((2, 3))), small(X))
    y = X
    for layer in small.features:
        y = layer(y)
    assert torch.equal(y, small.features(X))


def test_hooks_on_containers_fire(net):
    _, small = net
    seen: list[str] = []
    for path, module in small.named_modules():
        module.register_forward_hook(lambda *_, path=path: seen.append(path))
    small(X)
    assert {"features", "features.1", "features.2", "features.3", "features.2.proj"} <= set(seen)


def test_the_flat_program_is_one_call_away(net):
    _, small = net
    flat = small.flat()
    assert not any(n.target in ("features", "features.2") for n in flat.graph.nodes)
    assert torch.equal(flat(X), small(X)) and flat.head.weight is small.head.weight


def test_a_rewritten_module_refuses_other_plain_arguments(net):
    _, small = net
    y = small.features[1](small.features[0](X))
    assert torch.equal(small.features[2](y, flag=False), small.features[2](y, 2.0))
    for other in ({"flag": True}, {"scale": 3.0}):
        with pytest.raises(GuardError, match=r"features\.2 was captured with other"):
            small.features[2](y, **other)


class Turned(nn.Module):
    """Calls a module with a flag that is not its default."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(4, 8), Optional(), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.inner(self.first(x), turn=True))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, mask=None, turn=False):
        y = self.a(x).reshape(x.shape[0], 8)
        y = y if mask is None else y * mask
        return -y if turn else y


def test_defaults_of_a_rewritten_module_are_those_of_its_forward():
    small = fxprune.prune(Turned().eval(), 0.5, example_inputs=torch.randn(3, 4))
    y = torch.randn(3, 4)
    assert rewritten(small) == ["inner"]
    assert torch.equal(small.inner(y, turn=True), -small.inner.a(y))
    for other in ({}, {"turn": False}, {"turn": True, "mask": y}):
        with pytest.raises(GuardError, match="inner was captured with other arguments"):
            small.inner(y, **other)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_in_both_modes(net, copied):
    _, small = net
    again = copied(small.train()).eval()
    assert torch.equal(again(X), small.eval()(X))
    assert again.plan == small.plan and again.verification == small.verification
    assert rewritten(again) == rewritten(small)
    torch.manual_seed(0)
    first = again.train()(X)
    torch.manual_seed(0)
    assert torch.equal(first, small.train()(X)) and not torch.equal(first, again.eval()(X))


def test_a_copy_shares_nothing(net):
    _, small = net
    again, before = copy.deepcopy(small), small(X)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert torch.equal(small(X), before)
    assert all(vars(m)["forward"].module is m for m in again.modules() if "forward" in vars(m))


def test_edits_of_the_graph_are_saved(net):
    _, small = net
    output = next(n for n in small.graph.nodes if n.op == "output")
    with small.graph.inserting_before(output):
        output.args = (small.graph.call_function(torch.neg, (output.args[0],)),)
    small.recompile()
    wanted = small(X)
    assert torch.equal(pickle.loads(pickle.dumps(small))(X), wanted) and torch.equal(copy.deepcopy(small)(X), wanted)


Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Named:
    first: torch.Tensor
    rest: dict[str, torch.Tensor]


class Returns(nn.Module):
    """Gives back its results in a container, and takes arguments in containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, xs, options):
        x = xs[0] + options["shift"]
        n = x.shape[0]
        a, b = self.a(x).reshape(n, 8), self.b(x).reshape(n, 8)
        return {"tuple": (a, b), "list": [a, b], "pair": Pair(a, b), "dict": {"a": a, "b": b}, "named": Named(a, {"b": b})}[
            self.kind
        ]


class Reads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.out = Returns(kind), nn.Linear(8, 2)

    def forward(self, x):
        got = self.inner([x], {"shift": 1.0})
        if isinstance(got, Named):
            a, b = got.first, got.rest["b"]
        else:
            a, b = got.values() if isinstance(got, dict) else got
        return self.out(a + b)


@pytest.mark.parametrize("kind", ["tuple", "list", "pair", "dict", "named"])
def test_what_goes_in_and_out_keeps_its_structure(kind):
    model, x = Reads(kind).eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    check_programs(small)
    assert "inner" in rewritten(small)
    got, wanted = small.inner([x], {"shift": 1.0}), model.inner([x], {"shift": 1.0})
    assert type(got) is type(wanted)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
    with pytest.raises(GuardError, match="captured with other arguments"):
        small.inner([x], {"shift": 2.0})


class SideEffect(nn.Module):
    """Hands a tensor on by an attribute: its lines cannot be told apart from those around it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)

    def forward(self, x):
        self.kept = self.a(x).reshape(-1, 8)
        return self.kept * 2


class UsesSideEffect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = SideEffect(), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.inner(x) + self.inner.kept)


def test_what_is_handed_on_by_an_attribute_stays_in_the_program_around():
    model, x = UsesSideEffect().eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    assert small.verification.ok and small.inner.a.out_features == 4
    assert "inner" not in [n.target for n in small.graph.nodes]


class Repeated(nn.Module):
    """Calls one module twice: with inputs of one form, or with different flags."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.same = same
        self.first, self.inner, self.out = nn.Linear(4, 8), Flagged(), nn.Linear(8, 2)

    def forward(self, x):
        y = self.inner(self.first(x), True)
        return self.out(self.inner(y, self.same))


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, relu):
        y = self.a(x).reshape(x.shape[0], 8)
        return F.relu(y) if relu else y.tanh()


@pytest.mark.parametrize("same", [True, False])
def test_a_module_that_is_called_twice(same):
    model, x = Repeated(same).eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    called = [n.target for n in small.graph.nodes if n.op == "call_module"]
    assert called.count("inner") == (2 if same else 0), "two programs cannot be one forward"
    assert small.verification.ok


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Literal(), nn.Conv2d(8, 2, 1)
        self.first = nn.Conv2d(3, 8, 1)
        self.inner.register_forward_hook(lambda module, args, out: out * 3)

    def forward(self, x):
        return self.out(self.inner(self.first(x)))


def test_what_a_hook_computes_is_computed_once():
    model = Hooked().eval()
    small = fxprune.prune(model, 0.5, example_inputs=X)
    assert small.verification.ok and "inner" not in rewritten(small)


def test_torch_compile_goes_through_rewritten_modules(net):
    _, small = net
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), small(X), atol=1e-6)


def test_code_of_a_rewritten_module_is_generated_when_it_is_first_called():
    small = fxprune.prune(Net().eval(), 0.5, example_inputs=X, verify=False)
    forward = vars(small.features[2])["forward"]
    assert not any(forward.functions.values())
    once = small(X)
    assert forward.functions[False] and not forward.functions[True]
    copied = copy.deepcopy(small)
    assert not any(vars(copied.features[2])["forward"].functions.values())
    assert torch.equal(copied(X), once)


@pytest.mark.parametrize("train", [False, True])
def test_code_may_first_be_asked_for_by_a_compiler(train):
    small = fxprune.prune(Net().eval(), 0.5, example_inputs=X, verify=False).train(train)
    small.drop.p = 0.0
    forward = vars(small.features[2])["forward"]
    compiled = torch.compile(copy.deepcopy(small), backend="eager", fullgraph=True)
    first = compiled(X)
    assert not any(forward.functions.values())  # of what the compiler has not seen
    assert torch.allclose(first, small(X), atol=1e-6)
    exported = torch.export.export(fxprune.prune(Net().eval(), 0.5, example_inputs=X, verify=False), (X,), strict=train)
    assert exported.module()(X).shape == (2, 4)


def test_pruned_twice(net):
    _, small = net
    again = fxprune.prune(small, 0.5, example_inputs=X)
    assert again.verification.ok and kinds(again) == kinds(small) and again.features[0].out_channels == 2


class ReadsValues(nn.Module):
    """Decides by contents, so that the whole model is one node."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("shift", torch.rand(8))

    def forward(self, x):
        y = self.norm(self.a(x)) * self.scale + self.shift
        return self.b(y * 2 if y.sum().item() > 1e9 else y)


def test_a_model_that_is_one_node_keeps_its_names():
    model, x = ReadsValues().eval(), torch.randn(5, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    assert small.own_model is not None and list(small.state_dict()) == list(model.state_dict())
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(again(x), small(x)) and again.own_model.scale is again.scale
        assert torch.allclose(again.double()(x.double()).float(), small(x), atol=1e-5), "buffers are shared too"
    before = small.train().norm.running_mean.clone()
    small(x)
    assert not torch.equal(small.norm.running_mean, before)
    assert torch.equal(small.eval().flat()(x), small(x))
    seen: list[str] = []
    small.register_forward_hook(lambda *_: seen.append("root"))
    small(x)
    assert seen == ["root"], "once"


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, *, scale=None, **more):
        y = self.a(x).reshape(x.shape[0], 8)
        return y if more["flag"] is None else y * 2


class CallsByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(4, 8), Keywords(), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.inner(x=self.first(x), flag=None, other=None))


def test_plain_keywords_may_be_left_out_where_a_rewritten_module_is_called():
    model, x = CallsByKeyword().eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    assert "inner" in rewritten(small)
    assert torch.equal(small.out(small.inner(small.first(x))), small(x))
    with pytest.raises(GuardError, match="captured with other arguments"):
        small.inner(small.first(x), flag=True)


class Kept(dict):
    """A dictionary of a kind of its own."""


class ReturnsKept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return Kept(y=self.b(self.a(x)), n=3)


def test_a_result_keeps_its_class():
    model, x = ReturnsKept().eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    got = small(x)
    assert type(got) is Kept and got["n"] == 3 and got["y"].shape == (3, 2)


def test_the_class_stays_in_every_step_and_of_a_plan():
    model, x = Net().eval(), X
    pruner = fxprune.Pruner(model, 0.5, x, steps=2, same_class=True)
    while not pruner.done:
        small = pruner.step()
        assert type(small) is Net and small.verification.ok
    again = pruner.plan.apply(model, same_class=True)
    assert type(again) is Net and torch.allclose(again(x), small(x), atol=1e-6)
    held = fxprune.Pruner(model, 0.5, x, mask="hold", same_class=True)
    masked = held.step()
    assert type(held.shrink()) is Net and torch.allclose(held.shrink()(x), masked(x), atol=1e-5)


class Layered(nn.Module):
    """A module whose first layer has the given name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.last = name, nn.Linear(8, 2)
        self.add_module(name, nn.Linear(4, 8))

    def forward(self, x):
        return self.last(self._modules[self.name](x))


@pytest.mark.parametrize("name", ["flat", "plan", "graph", "code", "to_folder"])
def test_a_layer_may_be_called_as_something_that_a_graph_module_has(name):
    model, x = Layered(name).eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    for module in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), fxprune.plan_of(small).apply(model)):
        assert getattr(module, name).out_features == 4 and torch.equal(module(x), small(x))
        assert torch.equal(module.train().eval()(x), small(x)) and fxprune.plan_of(module) == fxprune.plan_of(small)


def test_a_layer_may_not_be_called_as_what_a_graph_module_keeps():
    with pytest.raises(fxprune.PruneError, match="'meta', as is what a GraphModule keeps"):
        fxprune.prune(Layered("meta").eval(), 0.5, example_inputs=torch.randn(3, 4))


class Ignores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, other, size):
        return self.a(x).reshape(x.shape[0], 8)


class Hands(nn.Module):
    """Hands a module a part of a result, and a size, that neither uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.out = nn.Linear(4, 8), Ignores(), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.inner(self.first(x), x.chunk(2, -1)[1], x.shape[1] * 2))


@pytest.mark.parametrize("name", ["size", "dim", "numel"])
def test_an_argument_may_be_called_as_what_reads_a_size(name):
    parts: dict = {}
    exec(f"def forward(self, x, {name}=None): return self.b(self.a(x).relu())", parts)
    model, x = type("Sized", (nn.Module,), parts)(), torch.randn(3, 4)
    model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 2)
    small = fxprune.prune(model.eval(), 0.5, example_inputs=(x, torch.ones(3)))
    assert torch.equal(small(x, torch.ones(3)), small.b(small.a(x).relu()))


def test_a_module_is_given_what_it_does_not_use():
    model, x = Hands().eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    assert small.verification.ok and rewritten(small) == ["inner"]
    seen = []
    small.inner.register_forward_pre_hook(lambda module, args: seen.extend(args))
    small(x)
    assert torch.equal(seen[1], x[:, 2:]) and seen[2] == 8
    assert not any(n.target == "chunk" and n.users for n in small.flat().graph.nodes), "nor does the flat program read it"


class Counts(nn.Module):
    """Counts its calls and remembers the size of the last input."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.size = 0, None
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        self.calls, self.size = self.calls + 1, x.shape[0]
        return self.b(self.a(x))


def test_what_a_forward_counted_at_capture_is_not_in_the_result():
    model = nn.Sequential(Counts(), nn.ReLU()).eval()
    small = fxprune.prune(model, 0.5, torch.randn(3, 4), verify=False)
    assert (small.get_submodule("0").calls, small.get_submodule("0").size) == (0, None)
    assert model[0].calls == 0


def test_a_sequential_has_a_length_and_its_layers_by_index():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, x)
    for again in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert len(again) == 3 and again[0].out_features == 4 and again[-1].in_features == 4
        assert torch.equal(again[1:](again[0](x)), small(x)) and [type(m) for m in again] == [type(m) for m in model]
    twice = fxprune.prune(small, 0.5, x)
    assert len(twice) == 3 and twice[0].out_features == 2
    with pytest.raises(TypeError):
        len(fxprune.prune(Net().eval(), 0.5, X))


class OfLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, xs, more):
        return [self.b(self.a(x).relu()) for x in [*xs, more["first"][0]]]


def test_a_list_of_another_length_is_refused():
    x = torch.randn(3, 4)
    small = fxprune.prune(OfLists().eval(), 0.5, ([x, x], {"first": (x,)}))
    assert len(small([x, x], {"first": (x,)})) == 3
    for xs, more in (([x, x, x], {"first": (x,)}), ([x], {"first": (x,)}), ([x, x], {"first": (x, x)})):
        with pytest.raises(GuardError, match="parts, and here it has"):
            small(xs, more)
    small.graph.eliminate_dead_code()
    small.recompile()
    for program in (small, fx.symbolic_trace(small)):
        assert torch.equal(program([x, x], {"first": (x,)})[0], small([x, x], {"first": (x,)})[0])
        with pytest.raises(GuardError, match="parts, and here it has"):
            program([x, x, x], {"first": (x,)})


class ReadsWeights(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.read, self.b = nn.Linear(4, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(F.linear(self.a(x), self.read.weight))


def test_a_layer_that_others_read_says_its_sizes():
    small = fxprune.prune(ReadsWeights().eval(), 0.5, torch.randn(3, 4))
    assert (small.read.in_features, small.read.out_features) == (4, 3) == tuple(small.read.weight.shape)[::-1]
    attention = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    small = fxprune.prune(nn.Sequential(attention, nn.Linear(16, 2)).eval(), 0.5, torch.randn(2, 5, 16))
    projection = small[0].self_attn.out_proj
    assert (projection.out_features, projection.in_features) == tuple(projection.weight.shape)


MASK = torch.tensor([True, False] * 8)  # of a file's own, outside of any module


class Masks(nn.Module):
    """Nothing of its code has a width in it but the mask that it makes or finds."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.proj, self.mask = nn.Linear(6, 16), mask

    def forward(self, x):
        return self.proj(x).masked_fill(self.mask(), 0.5)


@pytest.mark.parametrize("mask", [lambda: torch.arange(16) % 2 == 0, lambda: MASK], ids=["made", "found"])
def test_a_module_whose_forward_makes_a_mask_of_channels_has_a_program(mask) -> None:
    """Its own forward would make all of the mask, and not what is left of it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Masks(mask), nn.Linear(16, 3)).double().eval(), torch.randn(2, 6).double()
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned[0](x).shape == (2, 8)
    assert fxprune.verify(model, pruned, x).error < 1e-10


@pytest.mark.parametrize("same_class", [False, True])
def test_what_hooks_of_a_layer_compute_is_not_lost_where_nothing_else_around_it_is_rewritten(same_class):
    """The layer has no hooks any more, so that the own forward of what calls it would leave them out."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.0))
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(inner), nn.Linear(8, 2)).eval()
    inner[0].register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    inner[1].register_forward_hook(lambda module, given, out: out * 3)
    x = torch.randn(5, 4)
    small = fxprune.prune(model, 0.5, x, same_class=same_class)
    hidden = small[0](x)
    for again in (small, copy.deepcopy(small), small.train()):
        torch.testing.assert_close(again(x), small[2](F.linear(hidden * 2, *small[1][0][0].parameters()).relu() * 3))


def test_members_whose_names_python_reserves_are_read():
    """Keys of a `ModuleDict` may be any text; torch writes `self.in` for them, which is no Python."""

    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleDict(
                {"in": nn.Linear(4, 8), "class": nn.Sequential(nn.Linear(8, 8), nn.ReLU()), 'a"b': nn.Tanh()}
            )
            self.scales = nn.ParameterDict({"is": nn.Parameter(torch.ones(8))})
            self.register_buffer("lambda", torch.arange(8.0))
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            for way in self.ways.values():
                x = way(x)
            return self.out(x * self.scales["is"] + getattr(self, "lambda"))

    model, x = Keyed().eval(), torch.randn(3, 4)
    small = fxprune.prune(model, 0.5, x)
    same_class = fxprune.prune(model, 0.5, x, same_class=True)
    assert small.ways["in"].out_features == 4
    small.recompile()
    for again in (small.flat(), copy.deepcopy(small), pickle.loads(pickle.dumps(small)), same_class):
        assert torch.equal(again(x), small(x))
