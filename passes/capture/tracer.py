"""The tracer: an FX tracer that evaluates every node as it is made, and decides which modules are nodes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.passes.capture.index_contents import version_of
from fxprune.passes.capture.meta_kernels import RESHAPING
from fxprune.passes.capture.modules import is_standard
from fxprune.passes.capture.opaque import watched
from fxprune.passes.capture.patches import FACTORIES, plain_rnn
from fxprune.passes.capture.plain_modules import PlainModules, is_plain
from fxprune.passes.capture.proxy import Items, ValueProxy, unwrap
from fxprune.passes.capture.proxy_attributes import NUMBERS, ProxyAttributes
from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.capture.rollback import ModuleState
from fxprune.passes.capture.train_eval import Branch, by_flag, in_both_modes
from fxprune.passes.capture.training_flag import ModeReading, TrainingFlag
from fxprune.passes.errors import NeedsValues, PruneError, ReadsValue, WritesConstants, surface
from fxprune.passes.ir.meta_tensors import META
from fxprune.passes.ir.module_tree import Apart, every_path, fetch, modes_in_training, named_tensors
from fxprune.passes.ir.program import ModuleCall, SizeUse, select_by_mode
from fxprune.passes.ir.pytree import ATOMS, collect, copied, has_tensor, iterate, like_dict, map_tensors, tensors
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.registry import find_node

plain_call = nn.Module._call_impl  # as it is outside of a trace
PLAIN_MODULES = ("_operator", "builtins", "math")  # their functions make no tensors of their own
UNWATCHED: contextlib.nullcontext[dict[str, int]] = contextlib.nullcontext({})
STANDING = ATOMS | {ValueProxy, TrainingFlag}
PLAIN = ATOMS | {complex, torch.layout, torch.memory_format}
RESHAPES = frozenset(name.removeprefix("aten::") for name in RESHAPING)  # methods
RESHAPES |= {getattr(torch, name) for name in RESHAPES if hasattr(torch, name)}
ARITHMETIC = frozenset([getattr(operator, f) for f in "add sub mul floordiv truediv mod pow neg eq ne lt le gt ge".split()])


@dataclass(slots=True)
class Constant:
    """A tensor of the forward's own, and the proxy for what it was at a version."""

    tensor: Tensor
    version: int
    proxy: Any


class ValueTracer(ProxyAttributes):
    """An FX tracer that evaluates every node as it is made."""

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.root = root
        self.example_args, self.example_kwargs = args, kwargs
        self.forward: Callable[..., Any] = root.forward  # whose signature the program gets
        self.names = {id(t): name for name, t in named_tensors(root)}
        self.modules = dict(every_path(root))
        # what a layer of torch.nn stores while it runs is no proxy: there is nothing to take back
        self.stored = ModuleState(m for path, m in self.modules.items() if not self.is_leaf_module(m, path))
        self.recorder = Recorder(self.names)
        self.results: dict[fx.Node, Any] = {}
        self.guards = []
        self.opaque: dict[str, str] = {}
        self.plain = PlainModules()
        self.calls: dict[str, list[ModuleCall]] = {}
        self.sizes: dict[str, list[SizeUse]] = {}
        self.given: dict[fx.Node, tuple[Any, Any]] = {}
        self.leaks: dict[str, set[str]] = {}
        self.untracked: set[fx.Node] = set()
        self.attributes: dict[str, Any] = {}
        self.constants: dict[int, Constant] = {}  # by the identity of the forward's own tensors
        self.kept: list[Tensor] = []  # what the program has of them
        self.writes_constants = False  # whether the program is to start from copies of them
        self.stack: list[str] = [""]
        self.reads = [{}]
        self.running: str | None = None
        self.reads_training = False
        self.trains_on_values = False  # whether a forward reads values in training that there are none of
        self.flagless: set[str] = set()  # modules whose flags went where only a bool is taken
        self.readings = [ModeReading()]  # what each module on the stack wanted to know of its mode
        self.branches: list[Branch] | None = []  # None while a branch is being captured
        self.same: set[Any] = set()  # by likeness: layers that do the same in both modes
        # the mode of each module in training; None where a second capture has to tell
        self.trained = None if root.training else modes_in_training(root)
        self.retry = True
        self.find_home = lambda: None
        self.inputs: list[TensorRef] = []
        self.index = {}
        self.short: dict[Any, str] = {}  # by target: names of nodes
        self.depends = {}

    # -- nodes and values ---------------------------------------------------------------------------------------------

    def create_node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        if name is None:
            name = self.name_of(op, target)
        node = self.graph.create_node(op, target, (), None, name, type_expr)
        if args:  # set apart: create_node looks through its arguments for what a trace without symbols never holds
            node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta["module"] = self.stack[-1]
        self.index[node] = len(self.index)
        return node

    def name_of(self, op: str, target: Any) -> str | None:
        """The name that FX would make, with less ado; None where it is better left to FX."""
        if op in ("call_module", "get_attr"):
            return target.replace(".", "_") if target.islower() else None
        found = self.short.get(target)
        if found is None:
            found = self.short[target] = self.graph._target_to_str(target)
        return found

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        if TrainingFlag in map(type, args) or (kwargs and TrainingFlag in map(type, kwargs.values())):
            return by_flag(self, kind, target, args, kwargs)
        if target in ARITHMETIC and all(type(a) in NUMBERS or type(getattr(a, "value", None)) in NUMBERS for a in args):
            return self.once(kind, target, args)
        return self.made(kind, target, args, kwargs)

    def made(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A new node, evaluated, as a proxy."""
        if not STANDING.issuperset(map(type, args)):
            args = tuple([self.standing(a) for a in args])
        if kwargs and not STANDING.issuperset(map(type, kwargs.values())):
            kwargs = {k: self.standing(v) for k, v in kwargs.items()}
        made = tuple([a.node if type(a) is ValueProxy else self.create_arg(a) for a in args])
        node = self.create_node(kind, target, made, self.create_arg(kwargs) if kwargs else {})
        ins = tuple([a.value if type(a) is ValueProxy else unwrap(a) for a in args])
        value = self.evaluate(node, ins, unwrap(kwargs) if kwargs else kwargs)
        if target in RESHAPES or (kind == "call_module" and target in self.opaque):  # it may have another shape now
            self.forget_reads(0)
        return self.bind(node, value)

    def standing(self, x: Any) -> Any:
        """An argument in which proxies stand for tensors of the forward's own."""
        if type(x) in STANDING:
            return x
        if isinstance(x, Tensor):
            return self.constant(x) if id(x) not in self.names else x
        if type(x) in (tuple, list):
            return type(x)([self.standing(v) for v in x])
        if type(x) is dict:
            return {k: self.standing(v) for k, v in x.items()}
        return slice(*map(self.standing, (x.start, x.stop, x.step))) if type(x) is slice else x

    def bind(self, node: fx.Node, value: Any) -> Any:
        """Record a node's value and hand out proxies for it: containers become real containers of proxies."""
        self.depends[node] = node.op == "placeholder" or True in [self.depends[n] for n in node.all_input_nodes]
        if isinstance(value, Tensor):
            self.results[node] = self.recorder.ref(value)
            return ValueProxy(node, self, value)
        value = value.item() if isinstance(value, np.generic) else value
        self.results[node] = map_tensors(value, self.recorder.ref)
        if value is None:
            return None
        if isinstance(value, tuple | list):
            return Items.of(node, value, [self.item(node, i, v) for i, v in enumerate(value)])
        if isinstance(value, dict):
            return like_dict(value, {k: self.item(node, k, v) for k, v in value.items()})
        return ValueProxy(node, self, value)

    def item(self, node: fx.Node, key: Any, value: Any) -> Any:
        return self.bind(self.create_node("call_function", operator.getitem, (node, key), {}), value)

    def evaluate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        recorder.node = self.index[node]
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
            self.running = outer
            recorder.active = False
        if given and self.made_outside(node, value, first):
            self.untracked.add(node)
        return value

    def at_hand(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments in which the model's device is that of its stand-ins, where there are some among them."""
        if not any(t.is_meta for t in tensors((args, kwargs))):
            return args, kwargs
        there = lambda device: META if device == self.home else device  # noqa: E731
        return map_tensors((args, kwargs), there, torch.device)

    def made_at(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of what makes a tensor: one of fractions, which may be written to, has no contents either."""
        if kwargs.get("device") == self.home and getattr(target, "__name__", "") in FACTORIES:
            here = kwargs | {"device": META}
            if target(*args, **here).is_floating_point():
                return args, here
        return args, kwargs

    def run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_function":
            if node.target is select_by_mode:
                return self.recorder.tied(*args)
            whole = find_node(node).recorded_as
            if whole is not None and all(t.is_meta for t in tensors(args[:3])):
                return self.recorder.as_one(whole, args, kwargs)
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
        with plain_rnn(module), self.watching(module, path):
            return module(*args, **kwargs)

    @functools.cached_property
    def room(self) -> int:
        """Bytes of `given` that are still to be had."""
        return sum(t.nbytes for _, t in named_tensors(self.root))

    def hold(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        """Keep what an opaque module is given, for `trial`: as much as the model itself takes, and none without values."""
        found = tensors((args, kwargs))
        size = sum(t.nbytes for t in found)
        if size <= self.room and not any(t.is_meta for t in found):
            self.room -= size
            self.given[node] = map_tensors((args, kwargs), lambda t: t.detach().clone())

    def watching(self, module: nn.Module, path: str) -> Any:
        """Follow the integer attributes of an opaque module into sizes."""
        if path not in self.opaque:
            return contextlib.nullcontext()
        found, leaks = self.sizes.setdefault(path, []), self.leaks.setdefault(path, set())
        return watched(module, path, self.recorder.ref, found, leaks)

    def made_outside(self, node: fx.Node, value: Any, first: int) -> bool:
        """Whether a result did not come out of the dispatcher (NumPy, another library), or only by way of a new constant.

        `first` is the number of the first value that the node made.
        """
        recorder, values = self.recorder, self.recorder.op_trace.values
        if node.op == "call_module" and str(node.target) in self.opaque:
            return bool(self.leaks[str(node.target)])
        held = recorder.held.get(id(value))
        if held is not None and values[held[1].id].from_input:  # as nearly all
            return False
        if getattr(node.target, "__name__", node.target) in ("tensor", "as_tensor", "new_tensor"):
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

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy:
            return a.node
        if type(a) in PLAIN:
            return a
        if type(a) is Items:
            return a.pack(self)
        if type(a) is TrainingFlag:  # deep in an argument
            return bool(a)
        if isinstance(a, np.generic):  # which generated code cannot write down
            return a.item()
        if isinstance(a, nn.Module):  # a function calls it, behind the graph's back
            raise ReadsValue(f"{type(a).__name__} that is handed to a function")
        if isinstance(a, Tensor):
            name = self.names.get(id(a))
            return (self.constant(a) if name is None else self.attribute(name, a)).node
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            node = self.create_node("call_function", type(a), tuple(self.create_arg(v) for v in a), {})
            self.results[node] = map_tensors(unwrap(tuple(a)), self.recorder.ref)
            self.depends[node] = any(self.depends[n] for n in node.all_input_nodes)
            return node
        if type(a) is tuple or isinstance(a, torch.Size):
            return tuple(self.create_arg(v) for v in a)
        if type(a) is list:
            return [self.create_arg(v) for v in a]
        if type(a) is dict:
            return {k: self.create_arg(v) for k, v in a.items()}
        return super().create_arg(a)

    def attribute(self, name: str, tensor: Tensor) -> Any:
        if name not in self.attributes:
            self.attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self.attributes[name]

    def constant(self, tensor: Tensor) -> Any:
        """A tensor made on the way, outside of the program, as it is now: the forward may write to it afterwards."""
        version = version_of(tensor)
        found = self.constants.get(id(tensor))
        if found is None or found.version != version:
            if tensor.is_meta:
                raise NeedsValues  # it has no contents
            name, kept = self.get_fresh_qualname("_tensor_constant"), tensor.detach().clone()
            setattr(self.root, name, kept)
            self.names[id(kept)] = name
            self.kept.append(kept)
            proxy = self.attribute(name, kept)
            proxy = self.create_proxy("call_method", "clone", (proxy,), {}) if self.writes_constants else proxy
            found = self.constants[id(tensor)] = Constant(tensor, version, proxy)
        return found.proxy

    def check_constants(self) -> None:
        """Raises WritesConstants where the program would find what it wrote to a constant in the last call."""
        if not self.writes_constants and any(version_of(kept) for kept in self.kept):
            raise WritesConstants

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What a forward gets when it reads a tensor of a module."""
        name = self.names.get(id(attr_val))
        return attr_val if name is None else self.attribute(name, attr_val)

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore[override]
        """The graph of one run; `patched` must be in force. (FX's own looks through all attributes for scripted objects.)"""
        self.submodule_paths = {}
        for path, module in self.modules.items():
            self.submodule_paths.setdefault(module, path)
        self.graph = fx.Graph()
        call, args = self.create_args_for_root(None, True)
        self.create_node("output", "output", (self.create_arg(call(*args)),), {})
        self.submodule_paths = None
        return self.graph

    # -- modules ------------------------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        alone = not m._modules or all(name == "parametrizations" for name, child in m._modules.items() if child is not None)
        return alone and is_standard(type(m))  # type: ignore[arg-type]  # a class is hashable, whatever mypy says

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = (self.submodule_paths or {}).get(m)
        if self.running is not None:
            out = forward(*args, **kwargs)
            if path is not None and self.running in self.opaque:
                refs = map_tensors((args, kwargs, out), self.recorder.ref)
                self.calls.setdefault(self.running, []).append(ModuleCall(path, refs[:2], refs[2]))
            return out
        if path is None:  # made inside forward: it has no name in the tree
            return forward(*args, **kwargs)
        if path in self.opaque or self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        like = self.plain.kind(m, args, kwargs)
        if like is not None and like in self.plain.kinds:
            return self.create_proxy("call_module", path, args, kwargs)
        mark, ops = len(self.index), len(self.recorder.op_trace.ops)
        again = (copied(args), copied(kwargs))  # what a second run starts from
        stored, plain, refused = dict(vars(m)) if like is not None else {}, False, False
        self.stack.append(path)
        self.reads.append({})
        self.readings.append(reading := ModeReading())
        try:
            with self.plain.watching(m) if like is not None else UNWATCHED as unread:
                out = forward(*args, **kwargs)
                if reading.asked:
                    out = in_both_modes(self, m, forward, again, out, mark)
            plain = like is not None and (reading.asked or reading.flag) and is_plain(self, m, stored, mark)
            if not plain:
                return out
        except PruneError:
            raise
        except Exception as error:
            refused = reading.flag and path not in self.flagless
            if hasattr(error, "fxprune_plain") or not (self.retry or refused):
                raise
            surface(error)
            if not refused and TrainingFlag in map(type, iterate((args, kwargs))):
                raise  # it is another module's
            where = getattr(error, "fxprune_where", None)
            reason = f"reads {error}" if isinstance(error, ReadsValue) else f"{type(error).__name__}: {error}"
        finally:
            self.stack.pop()
            self.reads.pop()
            self.readings.pop()
        self.roll_back(mark, ops)
        if refused:
            self.flagless.add(path)
            return self.call_module(m, forward, *again)
        if plain:
            self.plain.add(m, args, unread)
        else:
            self.opaque[path] = reason
        try:
            return self.create_proxy("call_module", path, args, kwargs)
        except Exception as error:
            error.fxprune_plain = True  # type: ignore[attr-defined]
            error.fxprune_where = where or getattr(error, "fxprune_where", path)  # type: ignore[attr-defined]
            raise

    def roll_back(self, mark: int, ops: int) -> None:
        """Forget every node and call made since the mark."""
        self.forget_reads(mark)
        for node in list(itertools.takewhile(lambda n: self.index[n] >= mark, reversed(self.graph.nodes))):
            self.graph.erase_node(node)
            self.results.pop(node, None)
            self.given.pop(node, None)
            self.untracked.discard(node)
        self.recorder.truncate(ops)
        self.guards = [g for g in self.guards if self.index[g.node] < mark]
        if self.branches is not None:
            self.branches = [b for b in self.branches if b.end <= mark]
        self.stored.take_back(self.index, mark)
        gone = [k for k, p in self.attributes.items() if isinstance(p, ValueProxy) and self.index[p.node] >= mark]
        for key in gone:
            del self.attributes[key]
        self.constants = {i: c for i, c in self.constants.items() if self.index[c.proxy.node] < mark}

    def apart(self) -> Apart | None:
        """The modules that do not follow the root's mode."""
        if self.trained is None:
            return None
        trained = self.trained
        evaluating = frozenset(path for path, m in self.modules.items() if not trained[m])
        return {False: frozenset(path for path, m in self.modules.items() if m.training), True: evaluating}

    # -- the root -----------------------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders for exactly the arguments that were given, by the names that forward gives them."""
        signature = inspect.signature(self.forward)
        bound = signature.bind(*self.example_args, **self.example_kwargs)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        order, complete = list(signature.parameters), True
        for i, (name, value) in enumerate(bound.arguments.items()):
            complete = complete and order[i] == name  # no argument before it was left out
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(self.placeholder("*" + name, value))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(self.placeholder("**" + name, value))
            elif complete and kind is not inspect.Parameter.KEYWORD_ONLY:
                args.append(self.placeholder(name, value))
            else:
                kwargs[name] = self.placeholder(name, value)

        def call(root: nn.Module) -> Any:
            return root.forward(*args, **kwargs)

        return call, [self.root]

    def placeholder(self, name: str, value: Any) -> Any:
        node = self.create_node("placeholder", name, (), {}, name.lstrip("*"))
        for tensor in tensors(value):
            self.inputs.append(self.recorder.add(tensor, from_input=True))
        return self.bind(node, value)
