"""Graph building: every node is evaluated as it is created, and handed out as a proxy that carries the value."""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.passes.capture.conversions import Conversions
from fxprune.passes.capture.evaluation import INDEXING, Evaluator, as_lists, plain_key
from fxprune.passes.capture.frames import Constant, Frame, Repetition
from fxprune.passes.capture.leftovers import pending
from fxprune.passes.capture.modules import is_layer
from fxprune.passes.capture.patches import creating, itself
from fxprune.passes.capture.pieces import CUTTING, Pieces, number_of_pieces
from fxprune.passes.capture.proxy import PROXIES, Items, TensorProxy, proxy_for, unwrap
from fxprune.passes.capture.proxy_attributes import ANSWERED, NUMBERS, ProxyAttributes, internal
from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.capture.rollback import ModuleState
from fxprune.passes.errors import NeedsValues, ReadsValue
from fxprune.passes.ir.index_contents import version_of
from fxprune.passes.ir.meta_kernels import RESHAPING
from fxprune.passes.ir.module_tree import every_path, named_tensors
from fxprune.passes.ir.program import Guard, TracedCall
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.pytree import ATOMS, attributes_of, is_record, like_dict, map_tensors, record, tensors

HAS_NODES = ATOMS | PROXIES
PLAIN = ATOMS | {complex, torch.layout, torch.memory_format}
DTYPES = {int: torch.int64, float: torch.float64, bool: torch.bool, complex: torch.complex128}  # what torch takes them for
RESHAPES = frozenset(name.removeprefix("aten::") for name in RESHAPING)  # methods
RESHAPES |= {getattr(torch, name) for name in RESHAPES if hasattr(torch, name)}
BY_STRIDES = frozenset(["as_strided", torch.as_strided])
ARITHMETIC = frozenset([getattr(operator, f) for f in "add sub mul floordiv truediv mod pow neg eq ne lt le gt ge".split()])


class GraphBuilder(ProxyAttributes):
    """Creates nodes, evaluates them, and undoes both.

    Arguments:
        root: the module tree to capture.
        retry: whether a module whose forward raises becomes one opaque node.

    Attributes:
        names: the names of the model's tensors, by identity.
        results: for every node, its value with tensors replaced by references.
        guards: values that Python took out of the graph.
        attributes: proxies for the model's tensors, by name.
        writes_constants: whether the program is to start from copies of its constants.
        read_as_copies: the names of tensors of which each read is a copy, since the forward assigns them anew.
        assigned: the names of tensors that the forward has assigned anew, with what for.
        values: of nodes, but for tensors with contents.
        bound: the proxies of nodes.
        repetition: the second run of a forward, where it is handed the nodes of the first one.
        frames: the module calls that are being traced through.
        module_calls: those that were, in order of their ends.
    """

    def __init__(self, root: nn.Module, *, retry: bool = True) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]
        self.root, self.retry = root, retry
        self.graph = fx.Graph()
        self.names = {id(t): name for name, t in named_tensors(root)}
        self.modules = dict(every_path(root))
        # what a layer of torch.nn stores while it runs is no proxy: there is nothing to restore
        self.stored = ModuleState(m for path, m in self.modules.items() if not is_layer(m))
        self.recorder = Recorder(self.names)
        self.evaluator = Evaluator(root, self.modules, self.recorder)
        self.results: dict[fx.Node, Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self.bound: dict[fx.Node, Any] = {}
        self.repetition: Repetition | None = None
        self.guards: list[Guard] = []
        self.attributes: dict[str, Any] = {}
        self.constants: dict[int, Constant] = {}  # by the identity of the tensor
        self.kept: list[Tensor] = []  # their copies in the program
        self.writes_constants = self.calls_opaque = False
        self.read_as_copies: frozenset[str] = frozenset()
        self.assigned: dict[str, Any] = {}
        self.frames = [Frame("", root)]
        self.module_calls: list[TracedCall] = []
        self.proxies: list[weakref.ref[Any]] = []
        self.index, self.depends, self.grad_modes, self.conversions = {}, {}, [], Conversions()
        self.bar = progress_bar(None, "tracing", "op")
        self.short: dict[Any, str] = {}  # names of nodes, by target

    # -- nodes ------------------------------------------------------------------------------------------------------

    def create_node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        if self.repetition is not None:
            return self.repetition.take(op, target, args, kwargs)
        if name is None:
            name = self.name_of(op, target)
        node = self.graph.create_node(op, target, (), None, name, type_expr)
        if args:  # set apart: create_node searches its arguments for symbols, of which there are none
            node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta["module"] = self.frames[-1].path
        self.index[node] = len(self.index)
        self.bar.update()
        return node

    def name_of(self, op: str, target: Any) -> str | None:
        """The name that FX would give a node, remembered by target; None where FX is to find it."""
        if op in ("call_module", "get_attr"):
            return target.replace(".", "_") if target.islower() else None
        if target not in self.short:
            self.short[target] = self.graph._target_to_str(target)
        return self.short[target]

    @internal
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
        if target in BY_STRIDES and type(args[0]) is TensorProxy:
            self.fix_strides(args[0])
        if target in INDEXING:
            args = (args[0], as_lists(args[1]), *args[2:])
        if target in ARITHMETIC and all(type(a.value if type(a) in PROXIES else a) in NUMBERS for a in args):
            return self.once(kind, target, args)
        number = number_of_pieces(target, args, kwargs) if getattr(target, "__name__", target) in CUTTING else None
        out = self.made(kind, target, args, kwargs)
        if type(out) is not Items or type(number) not in PROXIES:
            return out
        return Pieces.among(out, lambda: self.concretise(number, "len"), lambda i: self.item(out.node, i, out.value[i]))

    def fix_strides(self, proxy: Any) -> None:
        """Strides are facts of the run: what is written down with them holds for tensors of these sizes alone."""
        outermost = max(range(proxy.value.dim()), key=proxy.value.stride, default=0)
        for d, size in enumerate(self.read_attribute(proxy, "shape")):
            if d != outermost:
                self.concretise(size, "int")

    def made(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A new node, evaluated, as a proxy; none is left behind where that raises."""
        if not HAS_NODES.issuperset(map(type, args)):
            args = tuple([self.with_constants(a) for a in args])
        if kwargs and not HAS_NODES.issuperset(map(type, kwargs.values())):
            kwargs = {k: self.with_constants(v) for k, v in kwargs.items()}
        made = tuple([a.node if type(a) in PROXIES else self.create_arg(a) for a in args])
        node = self.create_node(kind, target, made, self.create_arg(kwargs) if kwargs else {})
        if self.repetition is not None:
            return self.bind(node, self.values[node])
        ins = tuple([a.value if type(a) in PROXIES else unwrap(a) for a in args])
        ops = len(self.recorder.op_trace.ops)
        try:
            value = self.evaluator.evaluate(node, self.index[node], ins, unwrap(kwargs) if kwargs else kwargs)
        except Exception:
            self.forget(node)
            self.recorder.truncate(ops)
            raise
        if target in RESHAPES or (kind == "call_module" and target in self.evaluator.opaque):  # its shape may be another now
            self.forget_reads(0)
        return self.bind(node, value)

    def with_constants(self, x: Any) -> Any:
        """An argument in which proxies stand for tensors that the forward created outside of the graph."""
        if type(x) in HAS_NODES:
            return x
        return map_tensors(x, lambda t: t if type(t) is TensorProxy or id(t) in self.names else self.constant(t))

    def bind(self, node: fx.Node, value: Any) -> Any:
        """Record a node's value and hand out proxies for it: containers become real containers of proxies."""
        if self.repetition is not None and (known := self.bound.get(node)) is not None and len(vars(known)) == 3:
            return known  # on which code has left nothing of its own
        self.depends[node] = node.op == "placeholder" or True in [self.depends[n] for n in node.all_input_nodes]
        if isinstance(value, Tensor):
            if value.is_meta:
                self.values[node] = value
            self.results[node] = self.recorder.ref(value)
            return self.proxy(node, value)
        if type(value) in ATOMS:
            self.values[node] = self.results[node] = value
            return None if value is None else self.proxy(node, value)
        if all(t.is_meta for t in tensors(value)):
            self.values[node] = value
        value = value.item() if isinstance(value, np.generic) else value
        self.results[node] = map_tensors(value, self.recorder.ref)
        if isinstance(value, tuple | list):
            if isinstance(value, list):
                self.keep_length(node, value)
            return Items.of(node, value, [self.item(node, i, v) for i, v in enumerate(value)])
        if isinstance(value, dict):
            return like_dict(value, {k: self.item(node, k, v) for k, v in value.items()})
        with attributes_of(value) as held:
            if held is None:
                return self.proxy(node, value)
            return record(type(value), {k: self.item(node, k, v, getattr) for k, v in held.items()})

    def keep_length(self, node: fx.Node, value: list[Any]) -> None:
        """How many values code that is not captured has put into a list is decided here."""
        source: Any = node
        while source.target is operator.getitem:
            source = source.args[0]
        if source.op != "call_module" and source.target not in self.evaluator.functions:
            return
        length = self.create_node("call_function", len, (node,), {})
        self.results[length], self.depends[length] = len(value), self.depends[node]
        self.guards.append(Guard(length, "len", len(value)))

    def proxy(self, node: fx.Node, value: Any) -> Any:  # type: ignore[override]
        made = proxy_for(node, self, value)
        self.proxies.append(weakref.ref(made))
        self.bound[node] = made
        return made

    def item(self, node: fx.Node, key: Any, value: Any, read: Any = operator.getitem) -> Any:
        return self.bind(self.create_node("call_function", read, (node, key), {}), value)

    # -- arguments --------------------------------------------------------------------------------------------------

    def create_arg(self, a: Any) -> Any:
        if type(a) in PROXIES:
            return a.node
        if type(a) in PLAIN:
            return a
        if isinstance(a, Items):
            return a.pack(self)
        if isinstance(a, np.generic) or (type(a) is type and a in DTYPES):  # which generated code cannot write down
            return DTYPES[a] if isinstance(a, type) else a.item()
        if isinstance(a, nn.Module | type):
            return self.module_argument(a) if isinstance(a, nn.Module) else self.create_object(itself(a), {})
        if isinstance(a, Tensor):
            name = self.names.get(id(a))
            return (self.constant(a) if name is None else self.attribute(name)).node
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            node = self.create_node("call_function", type(a), tuple(self.create_arg(v) for v in a), {})
            self.results[node] = map_tensors(unwrap(tuple(a)), self.recorder.ref)
            self.depends[node] = any(self.depends[n] for n in node.all_input_nodes)
            return node
        if isinstance(a, dict) and type(a) is not dict and all(isinstance(k, str) for k in a):
            return self.create_object(type(a), dict(a))
        if type(a) in (tuple, list) or isinstance(a, torch.Size):
            return (list if type(a) is list else tuple)([self.create_arg(v) for v in a])
        if type(a) is dict:
            return {plain_key(k): self.create_arg(v) for k, v in a.items()}
        with attributes_of(a) as held:
            if held is None and is_record(a) and hasattr(a, "__dict__"):
                raise ReadsValue(f"a {type(a).__name__} that holds itself")  # no expression makes one
            return super().create_arg(a) if held is None else self.create_object(creating(type(a)), held)

    def module_argument(self, module: nn.Module) -> fx.Node:
        """A module that another one is given, which is opaque; a function would call it unseen by the graph."""
        path = next((path for path, m in self.modules.items() if m is module and path), None)
        if path is None or not self.calls_opaque:
            raise ReadsValue(f"{type(module).__name__} that is handed to a function")
        node = self.create_node("get_attr", path, (), {})
        self.results[node], self.depends[node] = None, False
        return node

    def create_object(self, create: Any, given: dict[str, Any]) -> fx.Node:
        """A node that creates an object of a class of its own from its parts."""
        node = self.create_node("call_function", create, (), {k: self.create_arg(v) for k, v in given.items()})
        self.results[node] = map_tensors(unwrap(given), self.recorder.ref)
        self.depends[node] = any(self.depends[n] for n in node.all_input_nodes)
        return node

    def attribute(self, name: str) -> Any:
        """The proxy for a tensor of the model."""
        if name not in self.attributes:
            self.attributes[name] = self.create_proxy("get_attr", name, (), {})
        found = self.attributes[name]
        return self.create_proxy("call_method", "clone", (found,), {}) if name in self.read_as_copies else found

    def constant(self, tensor: Tensor) -> Any:
        """The proxy for a tensor created outside of the graph, as it is now: the forward may write to it afterwards."""
        version = version_of(tensor)
        found = self.constants.get(id(tensor))
        if found is None or found.version != version:
            if self.repetition is not None:
                self.repetition.diverge()
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                raise ReadsValue("a tensor inside of a vectorised function")
            if tensor.is_meta:
                raise NeedsValues  # it has no contents
            name, kept = self.get_fresh_qualname("_tensor_constant"), tensor.detach().clone()
            setattr(self.root, name, kept)
            self.names[id(kept)] = name
            self.kept.append(kept)
            proxy = self.attribute(name)
            proxy = self.create_proxy("call_method", "clone", (proxy,), {}) if self.writes_constants else proxy
            found = self.constants[id(tensor)] = Constant(tensor, version, proxy)
        return found.proxy

    def read_tensor(self, tensor: Tensor) -> Any:
        """What a forward gets when it reads a tensor of a module."""
        name = self.names.get(id(tensor))
        return tensor if name is None else self.attribute(name)

    # -- undoing ----------------------------------------------------------------------------------------------------

    def roll_back(self, begin: int, first_op: int) -> None:
        """Forget every node from the one with the number `begin` on, and every dispatcher call from `first_op` on."""
        self.forget_reads(begin)
        for node in list(itertools.takewhile(lambda n: self.index[n] >= begin, reversed(self.graph.nodes))):
            self.forget(node)
        self.recorder.truncate(first_op)
        while self.module_calls and self.module_calls[-1].end > begin:
            self.module_calls.pop()
        self.guards = [g for g in self.guards if self.index[g.node] < begin]
        self.grad_modes = [(number, mode) for number, mode in self.grad_modes if number < begin]
        self.stored.restore(self.index, begin)
        for key in [k for k, p in self.attributes.items() if self.index[p.node] >= begin]:
            del self.attributes[key]
        self.constants = {i: c for i, c in self.constants.items() if self.index[c.proxy.node] < begin}
        self.assigned = {name: v for name, v in self.assigned.items() if self.index.get(v.node, begin) < begin}

    def discard(self) -> None:
        """Hold nothing more: proxies refer to the tracer, and go now if there is no cycle, not when the collector comes."""
        pending.extend(self.proxies)
        vars(self).clear()

    def forget(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        self.results.pop(node, None)
        self.bound.pop(node, None)
        self.evaluator.forget(node)


def method(name: str) -> Any:
    """What a proxy has as a method of tensors that is a node, whatever it is called with."""
    call = lambda proxy, *args, **kwargs: proxy.tracer.create_proxy("call_method", name, (proxy, *args), kwargs)  # noqa: E731
    return property(lambda proxy: functools.partial(call, proxy), vars(TensorProxy)[name].fset)


for _name in dir(Tensor):
    if not _name.startswith("_") and _name not in ANSWERED and callable(getattr(Tensor, _name)):
        setattr(TensorProxy, _name, method(_name))
