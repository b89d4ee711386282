"""What rewrites of calls have in common: the rewriter as they see it, arguments that are sizes, and kept positions.

A rewrite gets the rewriter and a node of the original program, and returns the new node, or None where nothing in it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ir.slices import TensorSlice


class RewriteContext(Protocol):
    """What a rewrite may ask of the rewriter.

    Attributes:
        capture: the original program.
        graph: the new one.
        new: the node of the new graph for each one of the original.
        picks: the values that are numbers of chosen entries, with the labels of what is chosen from.
    """

    capture: CapturedProgram
    graph: fx.Graph
    new: dict[fx.Node, fx.Node]
    sliding: dict[int, int]
    picks: Mapping[int, Any]

    def result(self, node: Any) -> Any:
        """What a node returned in the original; other values stand for themselves."""

    def before(self, ref: TensorRef) -> tuple[int, ...]:
        """The shape of a tensor in the original."""

    def after(self, ref: TensorRef) -> tuple[int, ...]:
        """The shape of a tensor in the pruned program."""

    def cuts(self, ref: TensorRef) -> list[TensorSlice]:
        """The slices that leave of a tensor what is kept."""

    def positions(self, ref: TensorRef, dim: int, lines: Mapping[int, Tensor] = {}) -> Tensor:
        """The kept indices along a dimension, in rows that are among `lines`, places along other dimensions."""

    def size(self, given: Any, wanted: int) -> Any:
        """A size argument that must come to `wanted`."""

    def number_of(self, given: Any) -> Any:
        """The original value of a number that may be computed in the graph."""

    def argument(self, x: Any) -> Any:
        """An argument that holds no sizes, in terms of the new graph."""

    def constant(self, data: Tensor) -> fx.Node:
        """A constant tensor of the new program."""

    def gather(self, source: fx.Node, dim: int, positions: Tensor) -> fx.Node:
        """`source` with the given positions of one dimension, in order."""

    def pick(self, made: fx.Node, ref: TensorRef, dim: int, positions: Tensor, size: int, varies: bool = False) -> fx.Node:
        """`made`, which has this size along a dimension of `ref`, at the given positions of it; the size may vary."""

    def permuted(self, source: fx.Node, ref: TensorRef, end: fx.Node, dim: int, order: Tensor) -> fx.Node:
        """The result of the index map `order` (result index -> source index) among what is kept."""

    def emit(self, node: fx.Node, args: Any, kwargs: Any, *, method: str | None = None) -> fx.Node:
        """The node with other arguments, or as the call of a method."""


def function_name(node: fx.Node) -> str:
    """The name of the method or function that a node calls, also where the op itself is called (`aten.view.default`)."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return str(node.target._schema.name.partition("::")[2])
    return getattr(node.target, "__name__", "")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def with_argument(r: RewriteContext, node: fx.Node, position: int, name: str, value: Any) -> fx.Node:
    """The node carried over with one argument replaced (it is already in terms of the new graph)."""
    args = [r.argument(a) for a in node.args]
    kwargs = {k: r.argument(v) for k, v in node.kwargs.items()}
    if len(args) > position:
        args[position] = value
    else:
        kwargs[name] = value
    return r.emit(node, args, kwargs)


@dataclass(frozen=True, slots=True)
class SizeArguments:
    """Arguments of a function that are sizes of its result.

    Attributes:
        at: the position of the first one, or of a sequence of them; counted from the end where it is negative.
        keywords: the names that the sequence may have.
        first: the dimension of the result that the first one belongs to, from the arguments by position and by name, the
            number of dimensions of the result, and how many sizes are given.
    """

    at: int
    keywords: tuple[str, ...] = ("size", "shape")
    first: Callable[[Sequence[Any], Mapping[str, Any], int, int], int] = lambda args, kwargs, ndim, count: 0

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], str]:
        """The sizes, and how they are given: by which keyword, as a `sequence`, or `spread`."""
        for name in self.keywords:
            if name in kwargs:
                return (list(kwargs[name]) if isinstance(kwargs[name], tuple | list) else [kwargs[name]]), name
        if -len(args) <= self.at < len(args) and isinstance(args[self.at], tuple | list):
            return list(args[self.at]), "sequence"
        return list(args[self.at :]), "spread"

    def numbered(self, args: Sequence[Any], kwargs: Mapping[str, Any], ndim: int) -> list[tuple[Any, int]]:
        """Each size with the dimension of the result that it belongs to."""
        sizes, _ = self.given(args, kwargs)
        first = self.first(args, kwargs, ndim, len(sizes))
        return [(size, first + i) for i, size in enumerate(sizes)]


def resize_result(sizes: SizeArguments) -> Callable[[RewriteContext, fx.Node], fx.Node | None]:
    """The rewrite of a function some arguments of which are sizes of its result."""

    def rewrite(r: RewriteContext, node: fx.Node) -> fx.Node | None:
        given, how = sizes.given(node.args, node.kwargs)
        if any(isinstance(r.result(size), torch.dtype | tuple) for size in given):
            return None  # `view(dtype)`, or the whole shape of another tensor
        after = r.after(collect(r.result(node), TensorRef)[0])
        numbered = sizes.numbered(node.args, node.kwargs, len(after))
        new = [r.size(size, after[dim]) for size, dim in numbered]
        args = [r.argument(a) for a in (node.args[: sizes.at] if how in ("spread", "sequence") else node.args)]
        kwargs = {k: r.argument(v) for k, v in node.kwargs.items() if k != how}
        if how == "spread":
            args += new
        elif how == "sequence":
            args += [tuple(new), *[r.argument(a) for a in node.args[len(args) + 1 :]]]
        else:
            kwargs[how] = tuple(new) if isinstance(node.kwargs[how], tuple | list) else new[0]
        return r.emit(node, args, kwargs)

    return rewrite


def sizes_written_out(r: RewriteContext, target: TensorRef, other: Any) -> list[Any]:
    """The sizes of a result that the original takes from another tensor, the node `other`.

    Where that tensor no longer has them, they are numbers.
    """
    after, theirs = r.after(target), r.after(r.result(other))
    extra = len(after) - len(theirs)
    node = r.new[other]
    found: list[Any] = list(after)
    for d, n in enumerate(theirs):
        if n == after[d + extra] and n == r.before(r.result(other))[d]:
            found[d + extra] = r.graph.call_method("size", (node, d))
    return found


def resized(r: RewriteContext, given: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """Size arguments one by one; -1 stays where it can."""
    return [r.size(g, w) for g, w in zip(given, wanted, strict=True)]


def known(r: RewriteContext, bound: Any) -> Any:
    """A bound of a slice in the original: a number, that of a node, or that in a constant tensor."""
    value = r.result(bound)
    data = r.capture.op_trace.values[value.id].data if isinstance(value, TensorRef) else None
    return value if data is None else int(data)


def is_shrunk(r: RewriteContext, ref: TensorRef, dim: int) -> bool:
    return any(dim in cut.dims for cut in r.cuts(ref))


def place(r: RewriteContext, ref: TensorRef, dim: int) -> Tensor:
    """Where each index of a dimension is among the kept ones; -1 for removed ones, which is an index for who wants any."""
    return places_of(r.positions(ref, dim), r.before(ref)[dim])


def places_of(kept: Tensor, size: int) -> Tensor:
    """Where each of `size` indices is among the kept ones."""
    table = torch.full((size,), -1)
    table[kept] = torch.arange(len(kept))
    return table


def taken(r: RewriteContext, i: Any, size: int) -> Tensor | None:
    """The places along a dimension that an entry of an index takes, if it is a slice or a number."""
    if isinstance(i, slice):
        return torch.arange(size)[slice(*(known(r, b) for b in (i.start, i.stop, i.step)))]
    value = i if isinstance(i, int) else r.result(i) if isinstance(i, fx.Node) else None
    return torch.tensor([value % size]) if isinstance(value, int) and not isinstance(value, bool) else None


def run_of(positions: Tensor) -> slice | None:
    """The slice that picks these positions, if they are consecutive."""
    start, n = int(positions[0]) if len(positions) else 0, len(positions)
    return slice(start, start + n) if torch.equal(positions, torch.arange(start, start + n)) else None


def picked(r: RewriteContext, source: TensorRef, target: TensorRef, dim: int, out_dim: int, chosen: Tensor) -> Tensor:
    """Kept positions in the source of the entries `chosen` (original indices) that the result keeps."""
    return place(r, source, dim)[chosen[r.positions(target, out_dim)]]


def groups_left(r: RewriteContext, ref: TensorRef, dim: int, groups: int) -> int:
    """How many of the groups of a dimension keep any entry."""
    kept = r.positions(ref, dim)
    return len(torch.unique(kept // (r.before(ref)[dim] // groups)))


def spread_out(r: RewriteContext, narrow: fx.Node, ref: TensorRef, dim: int) -> fx.Node:
    """A pruned tensor at its original width along a dimension, with zeros where entries were removed."""
    kept = r.positions(ref, dim)
    behind = len(r.before(ref)) - 1 - dim
    with_zero = r.graph.call_function(torch.nn.functional.pad, (narrow, [0, 0] * behind + [0, 1]))
    order = torch.full((r.before(ref)[dim],), len(kept))
    order[kept] = torch.arange(len(kept))
    return r.graph.call_method("index_select", (with_zero, dim, r.constant(order)))
