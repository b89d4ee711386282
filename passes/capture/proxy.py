"""Proxies that carry the value they stand for, so that Python's questions about it have answers."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.errors import ReadsValue
from fxprune.passes.ir.pytree import ATOMS, iterate


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

    def numel(self) -> Any:
        total: Any = 1
        for size in self:
            total = total * size
        return total

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("node", "value"):
            raise AttributeError(name)
        field = getattr(self.value, name)
        return next(proxy for proxy, value in zip(self, self.value, strict=True) if value is field)


# isinstance() of a proxy answers for these types; containers are handed out as real containers of proxies instead.
ANSWERS_FOR = (Tensor, bool, int, float, complex, str, torch.dtype, torch.device)


class ValueProxy(fx.Proxy):
    """A node of the graph together with what it evaluated to on the example inputs."""

    value: Any
    __array_priority__ = Tensor.__array_priority__  # a number of NumPy's leaves arithmetic with it to it

    def __init__(self, node: fx.Node, tracer: Any, value: Any) -> None:
        self.node, self.tracer, self.value = node, tracer, value

    @property
    def __class__(self) -> type:
        value = self.__dict__.get("value")
        if isinstance(value, Tensor):
            return Tensor
        for kind in ANSWERS_FOR:
            if isinstance(value, kind):
                return kind
        return ValueProxy

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("a proxy's class is that of its value")

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["tracer"].read_attribute(self, name)

    def concrete(self, how: str) -> Any:
        """The value itself, as Python needs it now. A tensor's contents may not be read: its module turns opaque."""
        return self.__dict__["tracer"].concretise(self, how)

    def __bool__(self) -> bool:
        return bool(self.concrete("bool"))

    def __int__(self) -> int:
        return int(self.concrete("int"))

    def __index__(self) -> int:
        return operator.index(self.concrete("index"))

    def __float__(self) -> float:
        return float(self.concrete("float"))

    def __complex__(self) -> complex:
        return complex(self.concrete("complex"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.concrete("round"), digits)

    def __hash__(self) -> int:
        return id(self.value) if isinstance(self.value, Tensor) else hash(self.value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A proxy looks callable whatever it stands for: code that takes a value or a function gets the value."""
        return self if not callable(self.value) else super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a forward leaves on its module while it is traced is no part of the model."""

    def __len__(self) -> int:
        return operator.index(self.shape[0]) if isinstance(self.value, Tensor) else len(self.value)

    def __format__(self, spec: str) -> str:
        return format(repr(self) if isinstance(self.value, Tensor) else self.value, spec)

    def __str__(self) -> str:
        return repr(self) if isinstance(self.value, Tensor) else str(self.value)

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name})"

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        return item in self.concrete("in")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise ReadsValue("numpy")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __eq__(self, other: object) -> Any:
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __ne__(self, other: object) -> Any:
        return self.tracer.create_proxy("call_function", operator.ne, (self, other), {})

    def keys(self) -> Any:
        return self.__dict__["tracer"].read_attribute(self, "keys")()

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Mapping[str, Any] | None = None) -> Any:
        tracer: Any = next(p.tracer for p in iterate(((args or ()), dict(kwargs or {}))) if isinstance(p, fx.Proxy))
        return tracer.torch_function(orig_method, args or (), dict(kwargs or {}))


def unwrap(x: Any) -> Any:
    """Nested proxies replaced by their values."""
    kind = type(x)
    if kind is ValueProxy:
        return x.value
    if kind in ATOMS:
        return x
    if isinstance(x, tuple):
        mapped = [unwrap(v) for v in x]
        return kind(*mapped) if hasattr(x, "_fields") else tuple(mapped)
    if isinstance(x, list):
        return [unwrap(v) for v in x]
    if isinstance(x, dict):
        return {k: unwrap(v) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(unwrap(x.start), unwrap(x.stop), unwrap(x.step))
    return bool(x) if isinstance(x, bool) else x  # a flag, deep in an argument


def _inplace(name: str) -> Any:
    function = getattr(operator, name)

    def method(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
    "imod",
):
    setattr(ValueProxy, f"__{_name}__", _inplace(_name))
