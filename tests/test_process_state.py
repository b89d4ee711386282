"""A capture leaves the process as it was, functions, caches and other threads, and C++ is handed nothing it may not read."""

import builtins
import contextlib
import dataclasses
import functools
import gc
import math
import operator
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
import torch._dynamo  # the first import of it replaces functions of torch, whoever does it
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.passes.capture.proxy import PROXIES
from fxprune.passes.capture.tracer import ValueTracer
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.propagation_state import PropagationState
from fxprune.passes.rewrite.nesting import Nesting

X = torch.randn(3, 8, dtype=torch.float64)


class Net(nn.Module):
    """Two layers with something between."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.between = nn.Linear(8, 16), nn.Linear(16, 4), between
        self.double().eval()

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


with warnings.catch_warnings():  # it is deprecated, and there are models that have it
    warnings.simplefilter("ignore", FutureWarning)
    swish = torch.jit.CompilationUnit("def swish(x):\n    return x.mul(x.sigmoid())\n").swish
    scripted = torch.jit.script(nn.ReLU())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient  # so that it can be told from that of x * x


square = Square.apply  # what looks the attribute up later does not see this one


@functools.lru_cache
def ramp(n):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def helpers():
    """A module of functions that remember, one import away from the model's."""
    module = types.ModuleType("helpers_of_a_test")
    exec(
        "import functools, torch\nkept = {}\n"
        "@functools.lru_cache\ndef ramp(n):\n    return torch.linspace(0, 1, n, dtype=torch.float64)\n"
        "@functools.lru_cache\ndef split(shape):\n    return *shape[:-1], 4, shape[-1] // 4\n"
        "def heads(x):\n    return x.reshape(split(tuple(x.shape)))\n"
        "def table(n):\n    if n not in kept:\n        kept[n] = ramp(n) * 2\n    return kept[n]\n",
        vars(module),
    )
    return module


HELPERS, OTHERS = helpers(), helpers()
split_heads = HELPERS.heads  # its cache is in another file than it is called from


def in_place(net, x):
    rows = x.shape[0]
    whole = rows
    rows *= 2
    return x.repeat(2, 1)[: rows // 2] * (whole / rows)


def tries(net, x):
    try:
        return F.relu(x, slope=0.5)
    except TypeError:
        pass
    try:
        return x.matmul(x)
    except RuntimeError:
        return x.relu()


def expands(net, x):
    return x * torch.ones(1, 1, dtype=x.dtype).expand(x.shape)


def in_a_cast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        return x.relu()


BETWEEN = {
    "plain": lambda net, x: x.relu(),
    "math": lambda net, x: x.relu() / math.sqrt(x.shape[-1]),
    "sizes": lambda net, x: x.view(x.shape[0], 4, -1).flatten(1),
    "factories": lambda net, x: x + torch.zeros(x.shape[0], 1, dtype=x.dtype, device=x.device),
    "augmented assignment": in_place,
    "tries": tries,
    "expands a constant": expands,
    "autocast": in_a_cast,
    "cache of the model's module": lambda net, x: x + ramp(x.shape[0])[:, None],
    "cache of another module": lambda net, x: x + HELPERS.ramp(x.shape[0])[:, None],
    "dict of another module": lambda net, x: x + HELPERS.table(x.shape[0])[:, None],
    "dropout": lambda net, x: F.dropout(x, 0.5, net.training),
    "parameter": lambda net, x: x * net.a.weight.sum(1) + next(net.parameters())[:, 0],
    "scripted function": lambda net, x: swish(x),
    "custom function": lambda net, x: Square.apply(x),
    "stored custom function": lambda net, x: square(x),
    "variable": lambda net, x: torch.autograd.Variable(x).relu(),
    "mapped": lambda net, x: torch.vmap(lambda row: row * 2)(x),
    "attention": lambda net, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "by keyword": lambda net, x: F.relu(input=x),
}


def places():
    """What belongs to the process."""
    owners = [builtins, math, operator, torch, F, nn.Module, nn.RNNBase, torch.autograd.Function, type(torch.autograd.Function)]
    found = {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}
    found["globals"] = {name: id(value) for name, value in globals().items()}
    return found | {"fastpath": torch.backends.mha.get_fastpath_enabled(), "mkldnn": torch._C._get_mkldnn_enabled()}


def caches():
    """The functions of loaded modules that remember results."""
    kind = type(ramp)
    modules = list(sys.modules.values())
    return [v for m in modules for v in list(getattr(m, "__dict__", {}).values()) if type(v) is kind]


@pytest.mark.parametrize("between", BETWEEN)
def test_nothing_is_left_of_a_capture(between):
    model, before = Net(BETWEEN[between]), places()
    fxprune.prune(model, 0.5, example_inputs=X, verify=False)
    after = places()
    assert before.keys() <= after.keys()  # modules of torch may have been imported
    assert [name for name in before if before[name] is not after[name] and before[name] != after[name]] == []
    gc.collect()
    assert [o for o in gc.get_objects() if type(o) in PROXIES or type(o) is ValueTracer] == []
    held = [o for cache in [*caches(), HELPERS.ramp] for o in gc.get_referents(cache)]
    assert not any(type(v) in PROXIES for o in held for v in (o if isinstance(o, tuple) else [o]))


def test_what_a_capture_held_goes_without_the_collector():
    heads = nn.Sequential(nn.Linear(12, 12), nn.Unflatten(1, (3, 4)), nn.Flatten())
    model, x = nn.Sequential(heads, nn.Dropout(), nn.Linear(12, 12)), torch.randn(2, 12)

    def held():
        return sum(type(o) in (OpTrace, CapturedProgram, PropagationState, Nesting) for o in gc.get_objects())

    gc.collect()
    before = held()
    gc.disable()
    try:
        fxprune.prune(model, 0.5, example_inputs=x, verify=False)
        assert held() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("between", BETWEEN)
def test_what_goes_on_in_a_forward_is_pruned_exactly(between):
    model = Net(BETWEEN[between])
    small = fxprune.prune(model, 0.5, example_inputs=X)
    assert small.verification.ok and small.verification.error < 1e-10
    assert type(model(X)) is torch.Tensor, "the original works as before"


@pytest.mark.parametrize("between", ["custom function", "stored custom function"])
def test_a_custom_function_keeps_its_backward(between):
    small = fxprune.prune(Net(BETWEEN[between]), 0.5, example_inputs=X)
    with torch.no_grad():
        hidden = small.get_submodule("a")(X)
    x = hidden.clone().requires_grad_()
    next(n.target for n in small.graph.nodes if "apply" in n.name)(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


class Heads(Net):
    """Two layers of one width, each split into heads; one of them looks into what it computes."""

    def __init__(self, reads):
        super().__init__(None)
        self.b, self.c, self.reads = nn.Linear(16, 16).double(), nn.Linear(16, 4).double(), reads

    def forward(self, x):
        x = split_heads(self.a(x)).softmax(1).flatten(1)
        x = split_heads(self.b(x)).softmax(1).flatten(1)
        return self.c(-x if self.reads and x.sum() < 0 else x)


@pytest.mark.parametrize("reads", [False, True])
def test_sizes_that_a_function_remembers_are_not_those_of_another_layer(reads):
    HELPERS.split.cache_clear()
    model = Heads(reads).eval()
    small = fxprune.prune(model, 0.5, example_inputs=X, freeze=["a"])
    assert small.verification.ok
    if not reads:  # else it is captured as one module
        assert small.a.out_features == 16 and small.b.out_features == 8


def test_what_fails_inside_a_try_leaves_no_node():
    small = fxprune.prune(Net(tries), 0.5, example_inputs=X)
    assert [n.name for n in small.graph.nodes if n.op.startswith("call")] == ["a", "relu", "b"]


def test_sizes_are_values():
    """A constant that is expanded to them depends on no batch, and is no guard."""
    for between in (expands, in_place):
        model = Net(between)
        small = fxprune.prune(model, 0.5, example_inputs=X)
        assert small(torch.randn(7, 8, dtype=torch.float64)).shape == (7, 4), between


def test_memory_is_not_read():
    """A tensor of the capture's has none; the module that asks for it runs as it is."""
    model = Net(lambda net, x: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)))
    with contextlib.suppress(fxprune.PruneError):
        fxprune.prune(model, 0.5, example_inputs=X)
    assert model(X).shape == (3, 4)


@dataclasses.dataclass
class Found:
    logits: torch.Tensor
    hidden: torch.Tensor
    name: str = "found"


class Finds(Net):
    def forward(self, x):
        hidden = self.a(input=x).relu()
        return Found(self.b(input=hidden), hidden)


def test_a_dataclass_is_returned_and_layers_are_called_by_keyword():
    model = Finds(None)
    found = fxprune.prune(nn.Sequential(nn.Linear(8, 8).double(), model), 0.5, example_inputs=X)(X)
    assert type(found) is Found and found.logits.shape == (3, 4) and found.hidden.shape == (3, 16) and found.name == "found"


def test_what_cannot_be_copied_is_shared():
    model = Net(BETWEEN["plain"])
    model.lock, model.handles = threading.Lock(), [model.register_forward_hook(lambda *_: None)]
    model.handles[0].remove()
    assert fxprune.prune(model, 0.5, example_inputs=X).a.out_features == 8


HELD = {
    "variable": lambda f: f,
    "list": lambda f: [f, 1],
    "set": lambda f: {f, 1},
    "frozenset": lambda f: frozenset([f, 1]),
    "tuple": lambda f: (f, 1),
    "tuples in a set": lambda f: {(f, (f, 1))},
    "value of a dict": lambda f: {1: f},
    "key of a dict": lambda f: {0: 1, f: 2, 3: 4},
}


@pytest.mark.parametrize("held", HELD)
def test_a_module_first_imported_by_a_forward_holds_the_functions_of_torch(held, monkeypatch):
    late = types.ModuleType("imported_late")

    def between(net, x):
        if "imported_late" not in sys.modules:
            late.held = HELD[held](torch.finfo)
            monkeypatch.setitem(sys.modules, "imported_late", late)
        return x.relu()

    fxprune.prune(Net(between), 0.5, example_inputs=X)
    assert late.held == HELD[held](torch.finfo)
    assert not isinstance(late.held, dict) or list(late.held) == list(HELD[held](torch.finfo))


def test_torch_compile_works_where_the_first_import_of_it_was_within_prune():
    code = """
import sys, torch, fxprune
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
    def forward(self, x):
        return self.b(-self.a(x))
x = torch.randn(3, 4)
small = fxprune.prune(Net().eval(), 0.5, example_inputs=x)
assert torch.equal(torch.compile(small, backend="eager", fullgraph=True)(x), small(x))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torchscript_inside_a_model_is_refused():
    model = nn.Sequential(nn.Linear(8, 16), scripted, nn.Linear(16, 4)).eval()
    with pytest.raises(fxprune.PruneError, match="TorchScript"):
        fxprune.prune(model, 0.5, example_inputs=X.float())


CONTEXTS = {
    "inference": torch.inference_mode,
    "meta device": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_modes_that_a_caller_is_in_do_not_matter(context):
    model = Net(lambda net, x: x.relu() + torch.ones(16, dtype=torch.float64))
    wanted = fxprune.prune(model, 0.5, example_inputs=X)
    with CONTEXTS[context]():
        small = fxprune.prune(model, 0.5, example_inputs=X)
        coupling = fxprune.couple(model, X)
    assert coupling.to_dict() == fxprune.couple(model, X).to_dict()
    assert small.verification.ok and torch.equal(small(X), wanted(X))
    small.train()(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_threads_prune_while_another_infers():
    model, wanted, failed, done = Net(BETWEEN["math"]), None, [], threading.Event()
    with torch.no_grad():
        wanted = model(X)

    def prune():
        try:
            for between in ("math", "sizes", "custom function"):
                small = fxprune.prune(Net(BETWEEN[between]), 0.5, example_inputs=X)
                assert small.verification.ok and small.a.out_features == 8
        except BaseException as error:
            failed.append(error)

    def infer():
        while not done.is_set():
            with torch.no_grad():
                if not torch.equal(model(X), wanted) or type(math.sqrt(4)) is not float:
                    failed.append("another result")

    fifth = threading.Thread(target=infer)
    fifth.start()
    threads = [threading.Thread(target=prune) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    done.set()
    fifth.join()
    assert failed == []


def test_the_cache_of_a_module_that_a_file_imports_whole_is_not_asked():
    """A function that has run at one size would else tie the program to it."""

    def between(net, x):
        return OTHERS.heads(x).flatten(-2)

    net = Net(between)
    net(X)
    small = fxprune.prune(net, 0.5, X)
    assert small(torch.randn(5, 8, dtype=torch.float64)).shape == (5, 4)
    assert OTHERS.split.cache_info().currsize
    with torch.no_grad():
        assert net(X).shape == (3, 4)


class Refuses:
    """Settings that differ by layer, and that are not to be asked for one of them."""

    def __init__(self):
        self.width, self.calls = 8, 0

    def __getattribute__(self, name):
        if name == "width":
            raise RuntimeError("ask the layers for their width")
        return super().__getattribute__(name)


class WithSettings(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.settings, self.a, self.b = Refuses(), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x):
        self.settings.calls += 1
        y = self.b(self.a(x).relu())
        return -y if float(y.sum()) > 1e6 else y  # which makes it one node, in a second run


def test_an_object_that_refuses_to_be_asked_is_put_back():
    model = WithSettings().double().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=X)
    assert pruned.a.weight.shape[0] == 6 and pruned.verification.error < 1e-12
    assert vars(model.settings) == {"width": 8, "calls": 0}


def test_the_first_prune_of_a_process_draws_no_numbers_and_leaves_no_thread():
    code = """
import random, threading, torch, fxprune
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)).eval()
state, threads = random.getstate(), threading.enumerate()
fxprune.prune(model, 0.5, example_inputs=torch.randn(3, 4))
assert random.getstate() == state
assert threading.enumerate() == threads, threading.enumerate()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("same_class", [False, True])
def test_a_result_that_was_computed_before_still_goes_backward(same_class):
    """Buffers that are as they were are not written to, which counts as a change."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4)
    result = model(x)
    fxprune.prune(model, 0.5, x, same_class=same_class)
    result.sum().backward()
    assert model[0].weight.grad is not None


def in_steps(model, **asked):
    pruner = fxprune.Pruner(model, 0.5, example_inputs=X, **asked)
    pruner.step()
    return pruner


MADE = {
    "masked": fxprune.masks.masked,
    "zeroed": lambda model, plan: fxprune.masks.zeroed(model, {}),
    "zeros": lambda model, plan: fxprune.masks.prune_zeros(fxprune.masks.masked(model, plan), X),
    "a step": lambda model, plan: in_steps(model).model,
    "a step with masks": lambda model, plan: in_steps(model, mask="hold").model,
    "the end of masks": lambda model, plan: in_steps(model, mask="soft").shrink(),
    "an average": lambda model, plan: in_steps(model).remap_average(model),
}


@pytest.mark.parametrize("way", MADE)
def test_what_is_made_in_inference_mode_can_be_trained(way):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(X)
    plan = fxprune.prune(model, 0.5, example_inputs=X).plan
    with torch.inference_mode():
        made = MADE[way](model, plan)
    made(X).sum().backward()
    assert not any(p.is_inference() for p in made.parameters())
