"""Evaluation of graph nodes on the example inputs, under the recorder."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxprune.passes.capture.modules import is_standard, plain_call
from fxprune.passes.capture.opaque import Decisions, some_turns, watched
from fxprune.passes.capture.patches import FACTORIES, functions_as_they_are, plain_rnn
from fxprune.passes.capture.proxy import Proxy, TensorProxy
from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.capture.rollback import ModuleState, written_in_place
from fxprune.passes.errors import ReadsValue
from fxprune.passes.ir.module_tree import META, fetch, named_modules, named_tensors, walk
from fxprune.passes.ir.program import ModuleCall, SizeUse, select_by_mode
from fxprune.passes.ir.pytree import ATOMS, TensorRef, collect, has_tensor, hidden_tensors, iterate, map_tensors, tensors
from fxprune.passes.ir.quiet import extreme_draws, own_random_state, plain_random_state
from fxprune.passes.ops.registry import find_node

PLAIN_MODULES = ("_operator", "builtins", "math")  # their functions create no tensors of their own
INDEXING = (operator.getitem, operator.setitem)
CREATING = ("tensor", "as_tensor", "new_tensor")


class Evaluator:
    """Runs nodes of a graph under the recorder.

    Arguments:
        root: the module tree that is captured.
        modules: every module of `root` by all of its paths.
        recorder: of the dispatcher calls.

    Attributes:
        running: the path of the module that is being evaluated, empty for a function; None while nothing is.
        opaque: modules that are one node each, with the reason.
        functions: functions of the model's that are one node for each call.
        calls: calls made inside opaque modules, by path.
        sizes: attributes of opaque modules that were used as sizes, by path.
        given: what opaque modules were given, by node.
        leaks: tensors in opaque modules whose contents Python took, by path.
        asking: the paths of opaque modules in which Python asks for the mode.
        untracked: nodes whose results did not come out of the dispatcher.
        listed: of lists of modules what the first one to run was given and returned, and the names of all that ran, while an
            opaque module runs.
        find_home: for a run without values, finds the device that all tensors of the model and its inputs are on.
    """

    def __init__(self, root: nn.Module, modules: dict[str, nn.Module], recorder: Recorder) -> None:
        self.root, self.modules, self.recorder = root, modules, recorder
        self.running: str | None = None
        self.opaque: dict[str, str] = {}
        self.functions: set[Any] = set()
        self.calls: dict[str, list[ModuleCall]] = {}
        self.sizes: dict[str, list[SizeUse]] = {}
        self.given: dict[fx.Node, tuple[Any, Any]] = {}
        self.leaks: dict[str, list[TensorRef]] = {}
        self.asking: set[str] = set()
        self.untracked: set[fx.Node] = set()
        self.listed: dict[str, tuple[tuple[str, Any, Any, Any], set[str]]] = {}
        self.find_home: Callable[[], torch.device | None] = lambda: None

    @functools.cached_property
    def home(self) -> torch.device | None:
        """The device that a model which is on `meta` for the run is said to be on; None where there is none such."""
        return self.find_home()

    @functools.cached_property
    def room(self) -> int:
        """How many more bytes `given` may hold: as many as the model has, without what its forward has left on it by now."""
        return sum(t.nbytes for _, t in named_tensors(self.root) if type(t) is not TensorProxy)

    def evaluate(self, node: fx.Node, number: int, args: Any, kwargs: Any) -> Any:
        """The value of a node with this number; an error that it raises says where it arose."""
        recorder = self.recorder
        recorder.node = number
        first = len(recorder.op_trace.values)
        given = has_tensor(args) or has_tensor(kwargs)
        if ("device" in kwargs or torch.device in map(type, args)) and self.home is not None:
            args, kwargs = self.at_hand(args, kwargs) if given else self.made_at(node.target, args, kwargs)
        plain = getattr(node.target, "__module__", None) in PLAIN_MODULES
        outer, self.running = self.running, str(node.target) if node.op == "call_module" else ""
        recorder.active = given or not plain
        try:
            value = self.run(node, args, kwargs)
        except Exception as error:
            if not hasattr(error, "fxprune_where"):
                inside = str(node.target) if node.op == "call_module" else node.meta["module"]
                module_path = inside or type(self.root).__name__
                error.fxprune_where = f"%{node.name} ({module_path})"  # type: ignore[attr-defined]
            raise
        finally:
            recorder.leaks, self.running = [], outer
            recorder.active = False
        if given and self.made_outside(node, value, first):
            self.untracked.add(node)
        return value

    def run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            if node.target is select_by_mode:
                return self.recorder.tied(*args)
            whole = find_node(node).recorded_as
            if whole is not None and all(t.is_meta for t in tensors(args[:3])):
                return self.recorder.as_one(whole, args, kwargs)
            if node.target in INDEXING and isinstance(args[0], torch.Tensor) and args[0].is_meta:
                args = (args[0], with_contents(args[1]), *args[2:])
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return fetch(self.root, str(node.target))
        path = str(node.target)
        module = self.modules[path]
        if path not in self.opaque and not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return plain_call(module, *args, **kwargs)
        if path in self.opaque:
            self.hold(node, args, kwargs)
        with plain_rnn(module), functions_as_they_are(), self.watching(module, path), own_random_state():
            self.listed.clear()
            numbers, counters = plain_random_state(), numbers_on(module)
            with Decisions(self.may_differ) as decisions:
                out = module(*args, **kwargs)
            drawn = plain_random_state() != numbers
            self.recorder.leaks += [self.recorder.ref(t) for t in hidden_tensors(out)]  # which nobody can follow from here on
            done = len(self.recorder.op_trace.ops)
            self.run_others()
            if path in self.opaque:
                ways: list[Any] = [Decisions(self.may_differ, turn) for turn in some_turns(decisions.turns)]
                ways += [extreme_draws(high=high) for high in (False, True)] if drawn else []
                moved = {place: v for place, v in numbers_on(module).items() if counters.get(place, v) != v}
                self.decide_otherwise(module, args, kwargs, out, [*ways, *([far_on(moved)] if moved else [])])
            for op in self.recorder.op_trace.ops[done:]:
                op.trial = True
        return out

    def may_differ(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor may hold something else in another call: it is drawn, or made of inputs or of what is written to."""
        trace = self.recorder.op_trace
        behind = {self.recorder.ref(tensor).id}
        if trace.values[min(behind)].from_input:
            return True
        for op in itertools.takewhile(lambda op: op.node == self.recorder.node, reversed(trace.ops)):
            if not behind.isdisjoint([out.id for out in op.outputs]):
                if torch.Tag.nondeterministic_seeded in getattr(op.func, "tags", ()):
                    return True
                behind.update(source.id for source in op.inputs)
        names = {trace.values[i].name for i in behind} - {None}
        return bool(names) and not names.isdisjoint(written_in_place(trace, ()))

    def decide_otherwise(self, module: nn.Module, args: Any, kwargs: Any, out: Any, ways: Sequence[Any]) -> None:
        """Run an opaque module again in each of some contexts, in which its decisions fall as they may in another call.

        One reading of a tensor is turned round; Python's and NumPy's generators, where they are drawn from, give their least
        numbers, or their greatest; numbers that the forward changes on modules have changed often.
        A branch that was not taken reads what this one reads, a loop may run once more, and both return what is used then.
        An error ends the branch: many a decision leads to one. What a branch stores is put back.
        """
        state = ModuleState(walk(module)) if ways else None
        for way in ways:
            given = map_tensors((args, kwargs), torch.clone)
            with contextlib.suppress(Exception, SystemExit), way:
                tie_results(out, module(*given[0], **given[1]))
            self.listed.clear()
            if state is not None:
                state.put_back()

    def note_mode_read(self, module: nn.Module) -> None:
        """A module asks for its mode while a node runs; a layer of torch's own couples the same in either."""
        if self.running in self.opaque and not is_standard(type(module)):  # type: ignore[arg-type]  # as in `is_layer`
            self.asking.add(str(self.running))

    def inner_call(self, path: str | None, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module inside of a node that is being evaluated."""
        out = forward(*args, **kwargs)
        if path is not None and self.running in self.opaque:
            refs = map_tensors((args, kwargs, out), self.recorder.ref)
            self.calls.setdefault(self.running, []).append(ModuleCall(path, refs[:2], refs[2]))
            holder, _, name = path.rpartition(".")
            if isinstance(self.modules.get(holder), nn.ModuleList | nn.ModuleDict):
                self.listed.setdefault(holder, ((name, args, kwargs, out), set()))[1].add(name)
        return out

    def run_others(self) -> None:
        """Run the modules of a list that an opaque module has passed over, on what one of their like in the list was given.

        Which of them run, as experts do, its Python may decide by values. With other inputs those that did not run read what
        the others read and return what they return; a sum of both results says so to the coupling.
        """
        while self.listed:  # also of lists inside
            holder, ((first, args, kwargs, out), ran) = self.listed.popitem()
            members = dict(self.modules[holder].named_children())
            for other in [m for name, m in members.items() if name not in ran and structure(m) == structure(members[first])]:
                with contextlib.suppress(Exception):  # it asks for something else
                    tie_results(out, other(*args, **kwargs))
                self.listed.pop(holder, None)

    def at_hand(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments in which the model's device is that of its stand-ins, where there are some among them."""
        if not any(t.is_meta for t in tensors((args, kwargs))):
            return args, kwargs
        there = lambda device: META if device == self.home else device  # noqa: E731
        return map_tensors((args, kwargs), there, torch.device)

    def made_at(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of a factory: a floating tensor, which may be written to, has no contents in a run without values."""
        if kwargs.get("device") == self.home and getattr(target, "__name__", "") in FACTORIES:
            here = kwargs | {"device": META}
            if target(*args, **here).is_floating_point():
                return args, here
        return args, kwargs

    def hold(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        """Keep the arguments of an opaque module for `opaque_check`, unless they are without values or take too much room."""
        found = tensors((args, kwargs))
        size = sum(t.nbytes for t in found)
        if size <= self.room and not any(t.is_meta for t in found):
            self.room -= size
            self.given[node] = map_tensors((args, kwargs), lambda t: t.detach().clone())

    def watching(self, module: nn.Module, path: str) -> Any:
        """Follow the integer attributes of an opaque module into sizes."""
        if path not in self.opaque:
            return contextlib.nullcontext()
        found, self.recorder.leaks = self.sizes.setdefault(path, []), self.leaks.setdefault(path, [])
        return watched(module, path, self.recorder.ref, found, self.recorder.leaks)

    def made_outside(self, node: fx.Node, value: Any, first: int) -> bool:
        """Whether a result did not come out of the dispatcher (NumPy, another library), or only by way of a new constant.

        `first` is the number of the first tensor that the node created.
        """
        recorder, values = self.recorder, self.recorder.op_trace.values
        if node.op == "call_module" and str(node.target) in self.opaque:
            return False
        held = recorder.held.get(id(value))
        if held is not None and values[held[1].id].from_input:  # the common case
            return False
        if getattr(node.target, "__name__", node.target) in CREATING:
            return False
        found = [recorder.find(t) for t in tensors(value)]
        if None in found:
            return True
        if all(values[ref.id].from_input for ref in found if ref):
            return False
        mine = list(itertools.takewhile(lambda op: op.node == recorder.node, reversed(recorder.op_trace.ops)))
        used = {r.id for op in mine for r in collect((op.args, op.kwargs), TensorRef)}
        made = {r.id for op in mine for r in collect(op.outs, TensorRef) if r not in collect(op.args, TensorRef)}
        return any(i >= first and i not in made and values[i].name is None for i in used)

    def forget(self, node: fx.Node) -> None:
        """A node is gone from the graph."""
        self.given.pop(node, None)
        self.untracked.discard(node)


def numbers_on(module: nn.Module) -> dict[tuple[nn.Module, str], int | float]:
    """The numbers on a module and those inside."""
    parts = walk(module)
    return {
        (m, name): v for m in parts for name, v in vars(m).items() if isinstance(v, int | float) and not isinstance(v, bool)
    }


@contextlib.contextmanager
def far_on(moved: Mapping[tuple[nn.Module, str], int | float]) -> Iterator[None]:
    """Have numbers on modules, which stay changed, be what they come to after a million more calls."""
    for (module, name), value in moved.items():
        vars(module)[name] = value + 10**6
    yield


def as_lists(key: Any, *, inside: bool = False) -> Any:
    """A key in which all that torch makes tensors of is a list: ranges, arrays, and tuples within the key, which may be one."""
    if type(key) is tuple and not inside:
        return tuple([as_lists(entry, inside=True) for entry in key])
    if isinstance(key, np.ndarray):
        return key.tolist()
    return [as_lists(entry, inside=True) for entry in key] if type(key) in (list, tuple, range) else key


def with_contents(key: Any) -> Any:
    """A key in which lists of numbers are tensors: torch would make them on the meta device, where they have no contents."""
    if isinstance(key, tuple):
        return tuple(map(with_contents, key))
    numbers = list(iterate(key)) if type(key) is list else [None]
    return torch.tensor(key, dtype=None if numbers else torch.int64) if {int, bool}.issuperset(map(type, numbers)) else key


def tie_results(one: Any, other: Any) -> None:
    """Let the coupling know that either may be used in the place of the other."""
    for a, b in zip(tensors(one), tensors(other), strict=False):
        _ = a + b if a.shape == b.shape else None


def structure(module: nn.Module) -> list[Any]:
    """The classes of a module and of those inside, and the shapes of its tensors."""
    kinds = [(path, type(inner)) for path, inner in named_modules(module)]
    return [*kinds, *((name, tuple(tensor.shape)) for name, tensor in named_tensors(module))]


@functools.lru_cache(maxsize=4096)
def belongs_to_tensors(method: Callable[..., Any]) -> bool:
    """Whether torch knows a function as a method of tensors (its own answer takes longer than making a node does)."""
    return bool(torch.overrides.is_tensor_method_or_property(method))


def plain_key(key: Any) -> Any:
    """A key of a dict as generated code can write it down."""
    if isinstance(key, Proxy):
        return key.concrete("key")
    if type(key) is tuple:
        return tuple(map(plain_key, key))
    if type(key) not in ATOMS:
        raise ReadsValue(f"a dict with a key of type {type(key).__name__}")
    return key
