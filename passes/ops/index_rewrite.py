"""Which arguments of which functions are sizes, and what they become. Methods and functions of one name share a handler.

A handler gets the rewriter and the old node and returns the new node, or None where nothing in it needs to change.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.registry import handles
from fxprune.passes.ops.rewriting import argument, function_name, place, run_of

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


@handles("getitem", "setitem")
def getitem(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """x[index]: along dimensions that shrank, numbers, slices and index tensors are mapped to kept positions."""
    return indexed(r, node, node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))


@handles("slice", "index")
def called_index(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The ops that an index comes down to, called by name."""
    if function_name(node) == "index":
        return indexed(r, node, tuple(slice(None) if i is None else i for i in argument(node, 1, "indices")))
    dim = argument(node, 1, "dim", 0) % len(r.before(r.result(node.args[0])))
    bounds = slice(*(argument(node, 2 + i, name) for i, name in enumerate(("start", "end", "step"))))
    return indexed(r, node, (*[slice(None)] * dim, bounds))


def indexed(r: Rewriter, node: fx.Node, index: tuple[Any, ...]) -> fx.Node | None:
    source = r.result(node.args[0])
    if not isinstance(source, TensorRef):
        return None
    shape = r.before(source)
    spans = [span(r, i) for i in index]
    at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    fill = (slice(None),) * (len(shape) - sum(spans))
    full = (*index[:at], *fill, *index[at + 1 :]) if at < len(index) else (*index, *fill)
    target = r.result(node) if node.target is not operator.setitem else None
    if target is not None and not isinstance(target, TensorRef):
        return None
    left = r.after(source)
    new: list[Any] = []
    dim = out = 0
    for i in full:
        ref = r.result(i) if isinstance(i, fx.Node) else None
        shrunk = dim < len(shape) and left[dim] < shape[dim]
        if i is None or isinstance(i, bool):
            new.append(i)
            out += 1
            continue
        if not shrunk:
            new.append(r.argument(i) if not isinstance(i, slice) else bounds(r, i))
        else:
            new.append(mapped(r, source, target, dim, out, i))
        if isinstance(i, slice):
            out += 1
        elif isinstance(ref, TensorRef) and len(r.before(ref)) and out <= dim:
            out += len(r.before(ref)) if r.capture.op_trace.values[ref.id].dtype != torch.bool else 1
        elif isinstance(i, list):
            out += 1
        dim += span(r, i)
    while new and at == len(index) and isinstance(new[-1], slice) and new[-1] == slice(None) and len(new) > len(index):
        new.pop()
    args = [r.new[node.args[0]], tuple(new) if len(new) != 1 else new[0]]  # type: ignore[index]
    if node.target not in (operator.getitem, operator.setitem):
        return r.graph.call_function(operator.getitem, tuple(args))
    return r.emit(node, args + [r.argument(a) for a in node.args[2:]], {})


def span(r: Rewriter, i: Any) -> int:
    """How many dimensions one entry of an index takes up."""
    if i is None or i is Ellipsis or isinstance(i, bool):
        return 0
    ref = r.result(i) if isinstance(i, fx.Node) else None
    if isinstance(ref, TensorRef) and r.capture.op_trace.values[ref.id].dtype in (torch.bool, torch.uint8):
        return len(r.before(ref))
    return 1


def bounds(r: Rewriter, i: slice) -> slice:
    """A slice over a dimension that did not shrink: its bounds keep their values."""
    return slice(*(r.argument(b) for b in (i.start, i.stop, i.step)))


def known(r: Rewriter, bound: Any) -> Any:
    """A bound of a slice in the original: a number, that of a node, or that in a constant tensor."""
    value = r.result(bound)
    data = r.capture.op_trace.values[value.id].data if isinstance(value, TensorRef) else None
    return value if data is None else int(data)


def mapped(r: Rewriter, source: TensorRef, target: TensorRef | None, dim: int, out: int, i: Any) -> Any:
    """One entry of an index along a dimension that shrank."""
    size = r.before(source)[dim]
    table = place(r, source, dim)
    if isinstance(i, slice):
        original = slice(*(known(r, b) for b in (i.start, i.stop, i.step)))
        if original == slice(None):
            return original
        chosen = table[torch.arange(size)[original]]
        chosen = chosen[chosen >= 0]
        run = run_of(chosen)
        if run is None:
            return r.constant(chosen)
        at_start, at_end = run.start == 0, run.stop == len(r.positions(source, dim))
        return slice(None if at_start else run.start, None if at_end else run.stop)
    if isinstance(i, int) or isinstance(r.result(i), int):
        value = i if isinstance(i, int) else r.capture.results[i]
        return int(table[value % size])
    data = torch.as_tensor(i) if isinstance(i, list) else r.capture.op_trace.values[r.result(i).id].data
    assert data is not None, "a computed index along a labelled dimension is frozen by its rule"
    data = data.cpu()
    if data.dtype in (torch.bool, torch.uint8):
        data = data.nonzero().flatten()
    if target is not None and data.dim() == 1:
        data = data[r.positions(target, out)]
    places = table[data % size]
    return r.constant(places if target is not None else places[places >= 0])
