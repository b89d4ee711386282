"""Which arguments of which functions are sizes, and what they become. Methods and functions of one name share a handler.

A handler gets the rewriter and the old node and returns the new node, or None where nothing in it needs to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.tensor_ref import TensorRef

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


def function_name(node: fx.Node) -> str:
    """The name that has a handler: that of the method or function, also where the op itself is called (`aten.view.default`)."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return str(node.target._schema.name.partition("::")[2])
    return getattr(node.target, "__name__", "")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def with_argument(r: Rewriter, node: fx.Node, position: int, name: str, value: Any) -> fx.Node:
    """The node carried over with one argument replaced (it is already in terms of the new graph)."""
    args = [r.argument(a) for a in node.args]
    kwargs = {k: r.argument(v) for k, v in node.kwargs.items()}
    if len(args) > position:
        args[position] = value
    else:
        kwargs[name] = value
    return r.emit(node, args, kwargs)


def resized(r: Rewriter, given: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """Size arguments one by one; -1 stays where it can."""
    return [r.size(g, w) for g, w in zip(given, wanted, strict=True)]


def sizes_after(r: Rewriter, node: fx.Node, start: int, name: str = "size") -> tuple[list[Any], bool]:
    """The sizes among a node's arguments, given one by one or as one sequence, and whether as a sequence."""
    if name in node.kwargs:
        return list(node.kwargs[name]), True  # type: ignore[arg-type]
    rest = node.args[start:]
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        return list(rest[0]), True
    return list(rest), False


def place(r: Rewriter, ref: TensorRef, dim: int) -> Tensor:
    """Where each index of a dimension is among the kept ones; -1 for removed ones, which is an index for who wants any."""
    kept = r.positions(ref, dim)
    table = torch.full((r.before(ref)[dim],), -1)
    table[kept] = torch.arange(len(kept))
    return table


def run_of(positions: Tensor) -> slice | None:
    """The slice that picks these positions, if they are consecutive."""
    start, n = int(positions[0]), len(positions)
    return slice(start, start + n) if torch.equal(positions, torch.arange(start, start + n)) else None


def picked(r: Rewriter, source: TensorRef, target: TensorRef, dim: int, out_dim: int, chosen: Tensor) -> Tensor:
    """Kept positions in the source of the entries `chosen` (original indices) that the result keeps."""
    return place(r, source, dim)[chosen[r.positions(target, out_dim)]]


def groups_left(r: Rewriter, ref: TensorRef, dim: int, groups: int) -> int:
    """How many of the groups of a dimension keep any entry."""
    kept = r.positions(ref, dim)
    return len(torch.unique(kept // (r.before(ref)[dim] // groups)))
