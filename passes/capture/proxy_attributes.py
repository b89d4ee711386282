"""What Python may ask of a tensor while a program is captured, and what it may not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxprune.passes.capture.conversions import Conversions, legacy
from fxprune.passes.capture.evaluation import Evaluator, belongs_to_tensors
from fxprune.passes.capture.frames import Frame
from fxprune.passes.capture.opaque import draws, is_fraction, makes, outcome, tensors_behind
from fxprune.passes.capture.proxy import PROXIES, Proxy, TensorProxy, may_have_gradients, unwrap
from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.capture.rollback import run_outside
from fxprune.passes.errors import ConvertsSize, NeedsValues, ReadsMissing, ReadsValue
from fxprune.passes.ir.data_sizes import DataSizes
from fxprune.passes.ir.program import IS_GRAD_ENABLED, Guard, tensors_read
from fxprune.passes.ir.pytree import TensorRef, iterate

# Tensor attributes and methods that are facts of the program rather than values that flow through it.
FACTS = frozenset(
    "ndim requires_grad layout is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_leaf grad_fn names itemsize "
    "is_mkldnn is_xla is_mps is_ipu is_xpu is_vulkan".split()
)
FACT_METHODS = frozenset(
    "dim ndimension is_floating_point is_complex is_contiguous element_size get_device stride storage_offset "
    "is_signed is_inference is_conj is_neg".split()
)
WHERE = frozenset(["is_meta", "is_cuda", "is_cpu", "is_mps", "is_xpu", "get_device", "type", "index"])
MEMORY = frozenset("numpy __array__ data_ptr __dlpack__ untyped_storage storage".split())  # by which code may write to it
VALUE_METHODS = MEMORY | {"item", "tolist"}
# Functions that FX would keep as one node and that hold sizes or head counts of their own: traced through instead.
INLINED = {F.multi_head_attention_forward}
# What takes gradients, and what tells whether there will be any: the trace keeps nothing for them.
BACKWARD = frozenset([torch.autograd.grad, torch.autograd.backward, Tensor.backward, torch._make_dual, torch._unpack_dual])
HAS_GRADIENTS = frozenset(["requires_grad", "grad_fn", "is_leaf"])
ANSWERED = FACTS | FACT_METHODS | WHERE | VALUE_METHODS | HAS_GRADIENTS | {"size", "new"}
NUMBERS = frozenset([int, float, bool, str])


def internal(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method in which it is the compiler that calls torch, and not the model."""

    @functools.wraps(method)
    def wrapper(self: ProxyAttributes, *args: Any, **kwargs: Any) -> Any:
        state = self.pause()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.resume(state)

    return wrapper


class ProxyAttributes(fx.Tracer):
    """The part of the tracer that answers for proxies.

    Attributes:
        guards: values that Python took out of the graph.
        index: the numbers of nodes, in the order in which they were created.
        depends: whether a node's value depends on the inputs.
        frames: the module calls that are being traced through.
        evaluator: of the nodes.
        recorder: of the dispatcher calls.
        names: the names of the model's tensors, by identity.
        grad_modes: whether gradients are on after each node that says so, by its number; the run itself has none.
        conversions: the files whose conversions of sizes are nodes.
        inlining: whether the next check for overridden arguments in `torch.nn.functional` is to find none.
    """

    guards: list[Guard]
    index: dict[fx.Node, int]
    depends: dict[fx.Node, bool]
    frames: list[Frame]
    evaluator: Evaluator
    recorder: Recorder
    names: dict[int, str]
    results: dict[fx.Node, Any]
    grad_modes: list[tuple[int, bool]]
    conversions: Conversions
    inlining = reads_numbers = False  # the latter: whether any number of the graph is read from a tensor
    held: dict[int, Tensor] | None = None  # tensors of objects that the model holds, by their memory, where it was asked
    takes_memory = casts = writes_constants = False  # takes: whether code takes the memory of a tensor of the model's
    facts = written = frozenset[str]()  # names of tensors that Python has read, and of those that are written to, too: no facts
    watch_parameters: Callable[[], None]
    constants: dict[int, Any]  # this and the next ones: of `GraphBuilder`
    bind: Callable[[fx.Node, Any], Any]
    made: Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]
    attribute: Callable[[str], Any]
    constant: Callable[[Tensor], Any]
    fix_strides: Callable[[Any], None]

    @functools.cached_property
    def interception(self) -> TorchFunctionMode:
        return Interception(self)

    @functools.cached_property
    def data_sizes(self) -> DataSizes:
        return DataSizes(self.recorder.op_trace)

    @internal
    def read_attribute(self, proxy: Any, name: str) -> Any:
        value = proxy.value
        if name.startswith("__") or not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        asked = name == "device" or (name in WHERE and name != "type")
        if asked and isinstance(value, Tensor) and value.is_meta and self.evaluator.home is not None:
            if name == "device":
                return self.bind(self.create_node("call_function", getattr, (proxy.node, name), {}), self.evaluator.home)
            return getattr(torch.empty(0, device=self.evaluator.home), name)
        if name == "type" and isinstance(value, Tensor):
            return functools.partial(self.read_type, proxy)
        elsewhere = name in WHERE or (name == "dtype" and self.casts)
        if elsewhere and (value.is_meta if isinstance(value, Tensor) else getattr(value, "type", "") == "meta"):
            raise NeedsValues  # a run without values is on another device than the model, where no autocast casts
        if isinstance(value, Tensor):
            if name in HAS_GRADIENTS and may_have_gradients(proxy, turned_on=bool(self.grad_modes) and self.grad_modes[-1][1]):
                raise ReadsValue("gradients")
            if name == "stride":
                self.fix_strides(proxy)
            if name in FACTS or name in FACT_METHODS:
                return getattr(value, name)
            if name == "dtype" and self.conversions.compare_dtypes:
                return self.concretise(self.once("call_function", getattr, (proxy, name)), "is")
            if name in ("item", "tolist") and self.is_number(proxy, name):
                return lambda: self.read_numbers(proxy, name)
            if name in VALUE_METHODS:
                return functools.partial(self.read_contents, proxy, name)
            if name == "shape":
                return self.once("call_function", getattr, (proxy, name))
            if name == "size":
                return lambda *args, dim=None: self.once("call_method", name, (proxy, *args, *(() if dim is None else (dim,))))
            if name == "new":
                return functools.partial(self.create_new, proxy)
        if callable(getattr(value, name)):
            return lambda *args, **kwargs: self.create_proxy("call_method", name, (proxy, *args), kwargs)
        return self.create_proxy("call_function", getattr, (proxy, name), {})

    def read_type(self, proxy: Any, *given: Any, **named: Any) -> Any:
        """`type()` says where a tensor is, as which `type(kind)` may put it somewhere else; `type(dtype)` converts it."""
        if proxy.value.is_meta and not isinstance(unwrap(next(iter((*given, *named.values())), None)), torch.dtype):
            raise NeedsValues
        return self.create_proxy("call_method", "type", (proxy, *given), named)

    def create_new(self, proxy: Any, *args: Any, **kwargs: Any) -> Any:
        """`x.new(...)`, which takes what a call of a tensor's class takes, of the dtype and on the device of `x`."""
        op, target, given, _ = legacy(torch.Tensor, args, {})
        if op == "call_method":  # of the tensor that is given
            return self.create_proxy(op, target, given, {})
        return self.create_proxy("call_method", f"new_{target.__name__}", (proxy, *given), kwargs)

    @internal
    def write_attribute(self, proxy: Any, name: str, value: Any) -> None:
        """Assign to `data` in place; with values it would be the original's own that is written to."""
        given = value.value if type(value) is TensorProxy else value
        if name != "data" or not proxy.value.is_meta or not isinstance(given, Tensor) or given.shape != proxy.value.shape:
            raise ReadsValue(f"a tensor's {name}, to which it assigns")
        self.create_proxy("call_method", "copy_", (self.create_proxy("call_method", "detach", (proxy,), {}), value), {})

    @internal
    def once(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """A size, or a number computed from sizes: one node, however often a forward asks."""
        key: Any = (target, *[a.node if type(a) in PROXIES else (type(a), a) for a in args])
        if kwargs or not all(type(a) in NUMBERS or type(a) in PROXIES for a in args):
            return self.made(kind, target, args, kwargs or {})
        reads = self.frames[-1].reads
        if key not in reads:
            reads[key] = self.made(kind, target, args, {})
        return reads[key]

    def forget_reads(self, begin: int) -> None:
        """Forget the nodes numbered `begin` or later for sizes and numbers: they are to be read anew."""
        for frame in self.frames:
            for key in [k for k, found in frame.reads.items() if self.index.get(found.node, begin) >= begin]:
                del frame.reads[key]

    def read_contents(self, proxy: Any, how: str, *args: Any, **kwargs: Any) -> Any:
        with self.paused():
            if how in MEMORY:
                self.note_memory(proxy)
            read = getattr(self.known_tensor(proxy, how), how)
        return read(*args, **kwargs)

    def note_memory(self, proxy: Any) -> None:
        """Code takes the memory of a tensor, and may write to it unseen: if that may be the model's own, it is watched."""
        if not self.depends[proxy.node]:
            self.takes_memory = True
            self.watch_parameters()

    def known_tensor(self, proxy: Any, how: str) -> Any:
        """The tensor's contents, if they are a fixed fact of the model; else the module must be opaque."""
        value = proxy.value
        learned = isinstance(value, nn.Parameter) or value.requires_grad or value.is_floating_point()
        if self.depends[proxy.node] or learned or value.is_meta:
            raise (ReadsMissing if value.is_meta else ReadsValue)(f"{how}() of %{proxy.node.name}")
        names = tensors_behind(proxy.node, how)
        if not names.isdisjoint(self.written):
            raise ReadsValue(f"{how}() of %{proxy.node.name}, to which the forward writes")
        self.facts |= names
        return value

    def is_number(self, proxy: Any, how: str) -> bool:
        """Whether a number read from a tensor can stay in the graph: a fraction, which makes no shape, or one made of sizes."""
        return self.is_made_of_sizes(proxy.node) or (how == "item" and is_fraction(proxy.value))

    def is_made_of_sizes(self, node: fx.Node) -> bool:
        """Whether a tensor's contents are whole numbers computed from sizes of the inputs alone."""
        ref = self.results[node]
        return self.depends[node] and isinstance(ref, TensorRef) and self.recorder.op_trace.values[ref.id].data is not None

    @internal
    def read_numbers(self, proxy: Any, how: str) -> Any:
        """The numbers in a tensor, as nodes; how many there are is decided here."""
        for size in self.read_attribute(proxy, "shape") if how == "tolist" else ():
            self.concretise(size, "int")
        self.reads_numbers = True
        return self.create_proxy("call_method", how, (proxy,), {})

    @internal
    def concretise(self, proxy: Any, how: str) -> Any:
        known = proxy.value if proxy.node.target is IS_GRAD_ENABLED else outcome(proxy.node) if how == "bool" else None
        if known is not None:
            return known
        if isinstance(proxy.value, Tensor):
            if self.is_made_of_sizes(proxy.node) and proxy.value.numel() == 1:
                return self.concretise(self.read_numbers(proxy, "item"), how)
            return self.known_tensor(proxy, how).item()
        self.check_size(proxy, how)
        self.guards.append(Guard(proxy.node, how, proxy.value))
        return proxy.value

    def write_out(self, proxy: Any) -> bool:
        """Whether the model's code writes a value out; of a size, what it looks up by the text is decided here."""
        if (recorder := vars(self).get("recorder")) is None or not recorder.tracing:
            return False
        if type(proxy.value) in (int, float, bool, torch.Size):
            with self.paused(), contextlib.suppress(ReadsValue):  # data make it: there is nothing to compare with
                self.concretise(proxy, "text")
        return True

    def check_size(self, proxy: Any, how: str) -> None:
        """Raises ReadsValue for a number that does not come of sizes alone."""
        if self.data_sizes.decide(proxy.node, self.results):
            raise ReadsValue(f"{how}() of %{proxy.node.name}, a size that data make")
        read = tensors_read(proxy.node, self.results) if self.reads_numbers else ()
        if not all(map(self.is_made_of_sizes, read)):
            raise ReadsValue(f"{how}() of %{proxy.node.name}, which is read from a tensor")

    def convert(self, proxy: Any, how: str) -> Any:
        """The plain number that Python makes of a size or a tensor; capture may start again to have a node (`Conversions`)."""
        known, fraction = len(self.guards), how == "float" and is_fraction(proxy.value)
        value = None if fraction and self.conversions.expected else self.concretise(proxy, how)
        if self.conversions.expected and (fraction or len(self.guards) > known):
            raise ConvertsSize
        return value

    # -- functions of torch -----------------------------------------------------------------------------------------

    def torch_function(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function of torch returns that the model's code calls: a proxy, if its arguments have to do with the graph."""
        if not self.recorder.tracing:
            return method(*args, **kwargs)
        if method in BACKWARD:
            raise ReadsValue("gradients")
        if not any(self.in_graph(v) for v in iterate((args, kwargs))):
            anew = draws(method) or (self.writes_constants and makes(method, args, kwargs))
            return self.made_anew(method, args, kwargs) if anew else run_outside(self, method, args, kwargs)
        if method in INLINED:  # its check for overridden arguments, which led here, does not find them the next time
            self.inlining = True
            with self.interception:
                return method(*args, **kwargs)
        name = getattr(method, "__name__", "")
        if name == "__get__":
            return self.read_attribute(self.as_proxy(args[0]), method.__self__.__name__)  # type: ignore[attr-defined]
        if name == "__set__":
            return self.write_attribute(self.as_proxy(args[0]), method.__self__.__name__, args[1])  # type: ignore[attr-defined]
        if name in MEMORY:
            self.note_memory(self.as_proxy(args[0]))
        if name in FACT_METHODS:
            if name == "stride":
                self.fix_strides(self.as_proxy(args[0]))
            return method(*unwrap(args), **unwrap(kwargs))
        if not belongs_to_tensors(method):
            return self.create_proxy("call_function", method, args, kwargs)
        if type(args[0]) is not TensorProxy and name.startswith("__") and any(name in vars(k) for k in (TensorProxy, Proxy)):
            return getattr(TensorProxy, name)(self.as_proxy(args[0]), *args[1:], **kwargs)
        return self.create_proxy("call_method", name, args, kwargs)

    def made_anew(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What no tensor of the graph goes into, and is random or may be written to, is made anew in each call: a node."""
        name = getattr(method, "__name__", "")
        if name.endswith("_") or any(isinstance(v, torch.Generator) for v in iterate((args, kwargs))):
            raise ReadsValue(f"random numbers by {name}()")  # what it writes to, or draws from, is outside of the graph
        own = bool(args) and isinstance(args[0], Tensor) and belongs_to_tensors(method)
        return self.create_proxy("call_method" if own else "call_function", name if own else method, args, kwargs)

    def in_graph(self, x: Any) -> bool:
        """Whether an argument stands for a node, or is a tensor of the model."""
        held = id(x) in self.names or (self.writes_constants and id(x) in self.constants)
        return type(x) in PROXIES or (held and isinstance(x, Tensor))

    def as_proxy(self, tensor: Tensor) -> Any:
        if type(tensor) is TensorProxy:
            return tensor
        name = self.names.get(id(tensor))
        return self.constant(tensor) if name is None else self.attribute(name)

    # -- the compiler's own steps -----------------------------------------------------------------------------------

    def pause(self) -> tuple[bool, bool]:
        """From here on it is the compiler that calls torch, not the model; `resume` takes what this returns."""
        if not self.recorder.tracing:
            return False, False
        self.recorder.tracing = False
        modes = torch._C._len_torch_function_stack()
        ours = modes > 0 and torch._C._get_function_stack_at(modes - 1) is self.interception
        if ours:
            torch._C._pop_torch_function_stack()
        return True, ours

    def resume(self, state: tuple[bool, bool]) -> None:
        self.recorder.tracing, ours = state
        if ours:
            torch._C._push_on_torch_function_stack(self.interception)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        state = self.pause()
        try:
            yield
        finally:
            self.resume(state)


class Interception(TorchFunctionMode):
    """Brings every function of torch that the model's code calls to the tracer; it is in force in one thread."""

    def __init__(self, tracer: ProxyAttributes) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.tracer.torch_function(func, args, kwargs or {})
