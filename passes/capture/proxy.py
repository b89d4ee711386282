"""Proxies: values of a capture that know the node they come from.

A proxy for a tensor is a tensor, without memory: what C++ is handed is one, and fails with an error where it would read. A
proxy for a number is one of torch's symbolic numbers, which C++ takes where it takes numbers. To Python they are a tensor, an
int, a float or a bool, and questions that Python asks of them are answered by the tracer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.graph import magic_methods, reflectable_magic_methods

from fxprune.passes.errors import ReadsValue
from fxprune.passes.ir.pytree import map_tensors


class Items(tuple[Any, ...]):
    """A tuple or list that a node returned, as a real tuple of proxies; it remembers the node and the fields' names."""

    node: fx.Node
    value: Any

    @classmethod
    def of(cls, node: fx.Node, value: Any, proxies: list[Any]) -> Any:
        if isinstance(value, list):
            return proxies
        items = cls(proxies)
        items.node, items.value = node, value
        return items

    def pack(self, tracer: Any) -> tuple[Any, ...]:
        return tuple(tracer.create_arg(v) for v in self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind = type(vars(self).get("value"))
        return kind if kind is torch.Size or hasattr(kind, "_fields") else Items

    def __repr__(self) -> str:
        items = super().__repr__()  # which writes out each of them
        return repr(self.value) if isinstance(self.value, torch.Size) else items

    __str__ = __repr__

    def numel(self) -> Any:
        total: Any = 1
        for size in self:
            total = total * size
        return total

    def __getattr__(self, name: str) -> Any:
        named = hasattr(type(vars(self).get("value")), "_fields")
        if name in ("node", "value") or (name.startswith("_") and not (named and name[1:2] != "_")):
            raise AttributeError(name)
        if named:
            return getattr(tuple.__new__(type(self.value), self), name)
        field = getattr(self.value, name)
        return next(proxy for proxy, value in zip(self, self.value, strict=True) if value is field)


class Proxy:
    """A node of the graph together with what it evaluated to on the example inputs."""

    node: fx.Node
    tracer: Any
    value: Any
    __array_priority__ = 1000  # as that of a tensor: a number of NumPy's leaves arithmetic with it to it

    def concrete(self, how: str) -> Any:
        """The value itself, as Python needs it now. A tensor's contents may not be read: its module turns opaque."""
        return self.tracer.concretise(self, how)

    def __bool__(self) -> bool:
        return bool(self.concrete("bool"))

    def __int__(self) -> int:
        return int(self.tracer.convert(self, "int"))

    def __index__(self) -> int:
        return operator.index(self.concrete("index"))

    def __float__(self) -> float:
        return float(self.tracer.convert(self, "float"))

    def __complex__(self) -> complex:
        return complex(self.concrete("complex"))

    def __round__(self, digits: int | None = None) -> Any:
        if isinstance(self.value, Tensor):
            return round(self.concrete("round"), digits)
        self.tracer.check_size(self, "round")
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __trunc__(self) -> int:
        return int(self)

    def __abs__(self) -> Any:
        return self.tracer.create_proxy("call_function", abs, (self,), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __hash__(self) -> int:
        return hash(self.value)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that the forward makes; what it leaves on its module while it is traced is no part of the model."""
        recorder = vars(self.tracer).get("recorder")
        if recorder is None or not recorder.tracing:
            return None
        return self.tracer.create_proxy("call_method", "clone", (self,), {}) if isinstance(self.value, Tensor) else self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ReadsValue("pickle")

    def __len__(self) -> int:
        return len(self.concrete("len"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.node.name})"

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        return item in self.concrete("in")


def _operation(name: str, *, swapped: bool = False) -> Any:
    function = getattr(operator, name)

    def method(self: Proxy, *others: Any) -> Any:
        args = (*others, self) if swapped else (self, *others)
        if not all(vars(v.tracer) for v in args if type(v) in PROXIES):  # of a capture that has failed, in a table: no key
            return name == "ne" if name in ("eq", "ne") else function(*unwrap(args))
        return self.tracer.create_proxy("call_function", function, args, {})

    return method


for _name in magic_methods:
    if hasattr(operator, _name):
        setattr(Proxy, f"__{_name.strip('_')}__", _operation(_name))
for _name in reflectable_magic_methods:
    if hasattr(operator, _name):
        setattr(Proxy, f"__r{_name.strip('_')}__", _operation(_name, swapped=True))


class TensorProxy(Proxy, Tensor, fx.Proxy):  # type: ignore[misc]
    """Stands for a tensor. It has no memory; what reads it in C++ fails. Libraries ask whether a tensor is a proxy of FX's."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        kind = type(vars(self).get("value"))
        return NAMED.get(kind, kind) if issubclass(kind, Tensor) else TensorProxy

    def __hash__(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        if name in ("node", "tracer", "value"):  # which are not set yet
            raise AttributeError(name)
        return self.tracer.read_attribute(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A proxy of FX's looks callable: code that takes a value or a function gets the value."""
        return self

    def __len__(self) -> int:
        return operator.index(self.shape[0])

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __str__(self) -> str:
        return repr(self)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        self.tracer.note_memory(self)
        raise ReadsValue("numpy")

    def as_subclass(self, cls: type) -> Any:
        """Which torch tells nobody of."""
        return self.tracer.create_proxy("call_method", "as_subclass", (self, cls), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer = tracer_of((args, kwargs))
        if not tracer.recorder.tracing:
            raise ReadsValue("a tensor that a function has of its own")
        return tracer.torch_function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise ReadsValue(f"a tensor in compiled code ({func})")


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "imatmul", "imod"):
    setattr(TensorProxy, f"__{_name}__", _operation(_name))


def _attribute(name: str) -> property:
    def read(self: TensorProxy) -> Any:
        return self.tracer.read_attribute(self, name)

    def write(self: TensorProxy, value: Any) -> None:
        self.tracer.write_attribute(self, name, value)

    return property(read, write)


for _name in dir(Tensor):
    if not _name.startswith("__"):
        setattr(TensorProxy, _name, _attribute(_name))


class PlainProxy(Proxy):
    """Stands for a value that is no tensor; C++ takes a number for one of torch's symbolic ones."""

    def __init__(self, node: fx.Node, tracer: Any, value: Any) -> None:
        self.node, self.tracer, self.value = node, tracer, value

    def __getattr__(self, name: str) -> Any:
        return self.tracer.read_attribute(self, name)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.array(self.concrete("numpy"), *args)

    def __format__(self, spec: str) -> str:
        self.tracer.write_out(self)
        return format(self.value, spec)

    def __str__(self) -> str:
        self.tracer.write_out(self)
        return str(self.value)

    def __repr__(self) -> str:
        return repr(self.value) if self.tracer.write_out(self) else Proxy.__repr__(self)


class IntProxy(PlainProxy, torch.SymInt):  # type: ignore[misc]
    __class__ = property(lambda self: int)
    __hash__ = Proxy.__hash__

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, list | tuple | str):
            return other * self.concrete("index")
        return self.tracer.create_proxy("call_function", operator.mul, (self, other), {})

    def __rmul__(self, other: Any) -> Any:
        return self * other if isinstance(other, list | tuple | str) else Proxy.__dict__["__rmul__"](self, other)


class FloatProxy(PlainProxy, torch.SymFloat):  # type: ignore[misc]
    __class__ = property(lambda self: float)
    __hash__ = Proxy.__hash__


class BoolProxy(PlainProxy, torch.SymBool):  # type: ignore[misc]
    __class__ = property(lambda self: bool)
    __hash__ = Proxy.__hash__


for _kind in (int, float):
    for _name in dir(_kind):
        if not _name.startswith("_"):
            setattr({int: IntProxy, float: FloatProxy}[_kind], _name, _attribute(_name))


class DeviceProxy(PlainProxy, str):
    """Stands for a device, which C++ takes by its name, too."""

    __class__ = property(lambda self: torch.device)
    __hash__ = Proxy.__hash__
    type, index = _attribute("type"), _attribute("index")

    def __new__(cls, node: fx.Node, tracer: Any, value: torch.device) -> Any:
        return str.__new__(cls, str(value))


class ValueProxy(PlainProxy):
    """Stands for anything else that is no container: a dtype, a text. Functions of torch that are given one ask the tracer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tracer_of((args, kwargs)).torch_function(func, args, kwargs or {})

    @property
    def __class__(self) -> type:
        return type(self.__dict__["value"]) if "value" in self.__dict__ else ValueProxy

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("a proxy's class is that of its value")


NAMED: dict[type, type] = {}  # classes that have other ones in their places in files of the model's
PROXIES = frozenset([TensorProxy, IntProxy, FloatProxy, BoolProxy, DeviceProxy, ValueProxy])
KINDS: dict[type, Any] = {int: IntProxy, float: FloatProxy, bool: BoolProxy, torch.device: DeviceProxy}
wrapper = torch.Tensor._make_wrapper_subclass
without_memory = torch._C._set_throw_on_mutable_data_ptr


def proxy_for(node: fx.Node, tracer: Any, value: Any) -> Any:
    """The proxy for a node's value."""
    if not isinstance(value, Tensor):
        return KINDS.get(type(value), ValueProxy)(node, tracer, value)
    plain = value.layout is torch.strided and not value.is_nested
    made: Any = wrapper(TensorProxy, value.shape if plain else (), dtype=value.dtype, device=value.device)
    without_memory(made)
    made.node, made.tracer, made.value = node, tracer, value
    return made


def may_have_gradients(proxy: TensorProxy, *, turned_on: bool) -> bool:
    """Whether a tensor, which has no gradients in a capture, has some where its program runs with them, or turns them on."""
    given = proxy.node.op in ("get_attr", "placeholder") and not turned_on
    numbers = proxy.value.is_floating_point() or proxy.value.is_complex()
    return numbers and not given and not isinstance(proxy.value, torch.nn.Parameter)


def tracer_of(x: Any) -> Any:
    """The tracer of the first proxy in a nested structure."""
    found: list[Any] = []
    for kind in (TensorProxy, PlainProxy):
        map_tensors(x, found.append, kind)
        if found:
            return found[0].tracer
    raise AssertionError("no proxy was given")


def unwrap(x: Any) -> Any:
    """Nested proxies replaced by their values."""
    return map_tensors(x, lambda p: p.value, Proxy)
