"""Frames: one for each module call that is traced through; and the second run of a forward, which is to find the same."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from fxprune.passes.capture.patches import creating
from fxprune.passes.capture.proxy import PROXIES, Items
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.program import UNKNOWN, Built, ModelTensor, TracedCall
from fxprune.passes.ir.pytree import ATOMS, TensorRef, attributes_of, copy_containers, map_tensors

COMPARED = ATOMS | {complex, torch.Size, torch.layout, torch.memory_format}


@dataclass(slots=True, eq=False)
class Frame:
    """One module call that is being traced through.

    Attributes:
        path: of the module; empty for the root.
        module: which is called.
        args, kwargs: what it was called with, containers copied, so that it can be called once more.
        begin: the number of its first node.
        first_op: the number of its first dispatcher call.
        plain: whether it may be that there is nothing to rewrite in it (see `plain_modules.py`).
        asked: whether its forward has asked for the mode.
        given: what it was called with itself, which it may have changed.
        reads: the sizes that its forward has read, and the numbers it has computed.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    begin: int = 0
    first_op: int = 0
    plain: bool = False
    asked: bool = False
    given: tuple[Any, ...] = ()
    reads: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.given = (self.args, self.kwargs)
        self.args, self.kwargs = copy_containers(self.args), copy_containers(self.kwargs)

    def finished(self, out: Any, end: int, names: Mapping[int, str]) -> TracedCall:
        """The call as it was traced; `names` are those of the model's tensors, by identity."""
        args = tuple([structure(a, names) for a in self.args])
        kwargs = {k: structure(v, names) for k, v in self.kwargs.items()}
        return TracedCall(self.path, args, kwargs, structure(out, names), self.begin, end)


@dataclass(slots=True)
class Constant:
    """A tensor that the forward creates outside of the graph, and the proxy for what it was at a version."""

    tensor: Tensor
    version: int
    proxy: Any


class Diverged(BaseException):
    """A forward creates other nodes than the last time; no Exception, since a model's code may catch those."""


class Repetition:
    """A second run of a forward: as long as it does the same as the first, it is handed the nodes of that one.

    Attributes:
        left: the nodes that are to come.
        told: the arguments of nodes that are given other flags or fractions now.
    """

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.left: Iterator[Any] = iter(nodes)
        self.told: dict[fx.Node, tuple[Any, Any]] = {}

    def take(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """The next node, if it is the one that would be created."""
        node = next(self.left, ...)
        if node is ... or node.op != op or node.target != target:
            self.diverge()
        known, alone = node.args, not kwargs and not node.kwargs
        identical = alone and len(known) == len(args) and all(map(operator.is_, known, args))
        same = identical or is_same((known, node.kwargs), (args, kwargs))
        if same is None:
            self.diverge()
        elif not same:
            self.told[node] = args, kwargs
        return node

    def diverge(self) -> NoReturn:
        self.left = itertools.repeat(...)  # also where code catches everything there is
        raise Diverged


def is_same(a: Any, b: Any) -> bool | None:
    """Whether arguments are the same; None where they are not for more than flags and fractions."""
    if a is b:
        return True
    if isinstance(a, slice) and isinstance(b, slice):
        return is_same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return is_same(list(a.values()), [b[k] for k in a])
    if isinstance(a, tuple | list) and isinstance(b, tuple if isinstance(a, tuple) else list) and len(a) == len(b):
        found = [is_same(v, w) for v, w in zip(a, b, strict=True)]
        return None if None in found else False not in found
    if type(a) in (bool, float) and type(b) in (bool, float):
        return type(a) is type(b) and str(a) == str(b)
    return (type(a) is type(b) and type(a) in COMPARED and bool(a == b)) or None


def structure(x: Any, names: Mapping[int, str]) -> Any:
    """A value of a forward without proxies (see `TracedCall`)."""
    kind = type(x)
    if kind in PROXIES:
        return x.node
    if kind in ATOMS:
        return x
    if isinstance(x, Tensor):
        return ModelTensor(names[id(x)]) if id(x) in names else UNKNOWN
    if isinstance(x, tuple):
        items = [structure(v, names) for v in x]
        own = type(x.value) if isinstance(x, Items) else kind
        if hasattr(own, "_fields"):
            return Built(own, dict(enumerate(items)), by_position=True)
        return tuple(items) if own in (tuple, torch.Size) or own.__module__.startswith("torch.return_types") else UNKNOWN
    if kind is list:
        return [structure(v, names) for v in x]
    if isinstance(x, dict):
        parts = {k: structure(v, names) for k, v in x.items()}
        if kind is dict or not all(isinstance(k, str) for k in parts):
            return parts if kind is dict else UNKNOWN
        return Built(kind, parts)
    with attributes_of(x) as held:
        if held is None:
            return UNKNOWN
        return Built(creating(kind), {k: structure(v, names) for k, v in held.items()}, by_attribute=True)


def leaves(x: Any) -> list[Any]:
    """What a forward returned, flat: proxies and plain values, with the keys and kinds of containers."""
    if isinstance(x, Items):
        return [type(x.value), *(v for item in x for v in leaves(item))]
    if type(x) in (tuple, list):
        return [type(x), *(v for item in x for v in leaves(item))]
    if isinstance(x, dict):  # also one of a class of its own, which transformers' outputs are
        return [type(x), *(v for k, item in x.items() for v in (k, *leaves(item)))]
    with attributes_of(x) as held:
        return [x] if held is None else [type(x), *leaves(held)]


def inner_ops(node: fx.Node, results: Mapping[fx.Node, Any], trace: OpTrace, number: int) -> list[str]:
    """The dispatcher calls in an opaque module, which has this number: tensors that it is given and makes by their order."""
    places: dict[int, int] = {}
    place = lambda ref: trace.values[ref.id].name or f"%{places.setdefault(ref.id, len(places))}"  # noqa: E731
    map_tensors([results[n] for n in node.all_input_nodes], place, TensorRef)
    mine = [op for op in trace.ops if op.node == number]
    return [f"{op.func}{map_tensors((op.args, op.kwargs, op.outs), place, TensorRef)}" for op in mine]


def branch(builder: Any, first: int, end: int) -> list[fx.Node]:
    """The nodes numbered from `first` to `end`, but for reads of tensors, which either branch may be the first to do."""
    mine = []
    node = builder.graph._root.prev
    while node.op != "root" and builder.index[node] >= first:
        if builder.index[node] < end and node.op != "get_attr":
            mine.append(node)
        node = node.prev
    return mine[::-1]


def code(builder: Any, first: int, end: int, out: Any, *, loosely: bool = False) -> list[Any]:
    """What the nodes numbered from `first` to `end` do, with names that do not depend on their position.

    `loosely`: without flags and fractions, and without what is done to single numbers.
    """
    names: dict[fx.Node, str] = {}

    def name(n: fx.Node) -> Any:
        return str(n.target) if n.op == "get_attr" else names.get(n, n)

    def masked(x: Any) -> Any:
        return name(x) if isinstance(x, fx.Node) else "?" if isinstance(x, bool | float) else x

    lines: list[Any] = []
    for node in branch(builder, first, end):
        if loosely and is_number(builder, node):
            continue
        names[node] = f"%{len(lines)}"
        given = (node.args, dict(node.kwargs))
        said = fx.node.map_aggregate(given, masked) if loosely else fx.node.map_arg(given, name)
        asks = node.op == "call_module" and node.target in builder.evaluator.asking
        inner = inner_ops(node, builder.results, builder.recorder.op_trace, builder.index[node]) if asks else []
        lines.append((node.op, node.target, str(said), *inner))
    return [*lines, [name(v.node) if type(v) in PROXIES else str(v) for v in leaves(out)]]


def is_number(builder: Any, node: fx.Node) -> bool:
    """Whether a node makes a tensor without dimensions from such tensors."""
    refs = [builder.results[n] for n in (node, *node.all_input_nodes)]
    return all(type(r) is TensorRef and not builder.recorder.op_trace.values[r.id].shape for r in refs)
