"""Movement ops that nothing is known of but that they move: rule and handler are found by running the op itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, expand_along, factor
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import RuleContext

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


def movement(call: RuleContext) -> Labels | list[Labels]:
    """The op is run on each factor, laid out in full."""
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        for ref in call.inputs:
            call.freeze(call.labels(ref), "is moved by an op of several tensors")
        return [NONE] * len(call.outputs)
    result: list[Factor] = []
    for f in call.labels(call.first):
        if len(f.major_to_minor) > 1:
            call.constraints.same_columns(f)
        full = expand_along(f, call.shape(call.first), range(f.labels.dim())).contiguous()
        moved = factor(on_numbers(lambda t: call.op.func(t, *call.op.args[1:], **call.op.kwargs), full))
        call.constraints.keep_rows_equal(moved)
        result += call.settle(moved)
    return tuple(result)


def on_numbers(run: Callable[[Tensor], Tensor], whole: Tensor) -> Tensor:
    """A movement of integers; as floating numbers, where the op takes no others."""
    try:
        return run(whole)
    except Exception:
        return run(whole.double()).long()


def moved_call(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """A call of such an op among what is kept.

    (1) It stays where it commutes with cutting. (2) Where one dimension is reordered it is one gather. (3) Else what is gone
    is filled up with zeros, moved, and cut out again.
    """
    source, target = r.result(node.args[0]), r.result(node)
    if not isinstance(source, TensorRef) or not isinstance(target, TensorRef):
        return None
    args, kwargs = fx.node.map_arg((node.args[1:], dict(node.kwargs)), lambda n: r.capture.results[n])

    def run(tensor: Tensor) -> Tensor:
        return on_numbers(lambda t: node.target(t, *args, **kwargs), tensor)  # type: ignore[operator]

    shape = r.before(source)
    places = torch.arange(math.prod(shape)).reshape(shape)
    whole = run(places)
    if commutes(run, taken(r, source, places), taken(r, target, whole)):  # (1)
        return None
    dims = {d for cut in r.cuts(source) for d in cut.dims}
    if len(dims) == 1 and places.dim() == whole.dim():  # (2)
        dim = dims.pop()
        stride = math.prod(shape[dim + 1 :])
        first = whole[tuple(slice(None) if d == dim else 0 for d in range(whole.dim()))]
        order = first // stride % shape[dim]
        if torch.equal(places.index_select(dim, order), whole):
            made = r.permuted(node.args[0], source, node, dim, order)  # type: ignore[arg-type]
            return r.graph.call_method("clone", (made,)) if made is r.new[node.args[0]] else made  # type: ignore[index]
    made = filled_up(r, r.new[node.args[0]], source)  # type: ignore[index]
    made = r.emit(node, (made, *r.argument(tuple(node.args[1:]))), r.argument(dict(node.kwargs)))
    for dim in sorted({d for cut in r.cuts(target) for d in cut.dims}):
        made = r.graph.call_method("index_select", (made, dim, r.constant(r.positions(target, dim))))
    return made


def commutes(run: Callable[[Tensor], Tensor], few: Tensor, wanted: Tensor) -> bool:
    try:
        return torch.equal(run(few), wanted)
    except Exception:  # its arguments only suit the whole
        return False


def taken(r: Rewriter, ref: TensorRef, tensor: Tensor) -> Tensor:
    for cut in r.cuts(ref):
        tensor = cut.take(tensor)
    return tensor.contiguous()


def filled_up(r: Rewriter, made: fx.Node, ref: TensorRef) -> fx.Node:
    """A pruned tensor in its original shape, with zeros where something was removed."""
    ndim = len(r.before(ref))
    for dim in sorted({d for cut in r.cuts(ref) for d in cut.dims}):
        kept, size = r.positions(ref, dim), r.before(ref)[dim]
        place = torch.full((size,), len(kept))
        place[kept] = torch.arange(len(kept))
        padding = [0, 0] * (ndim - 1 - dim) + [0, 1]
        made = r.graph.call_function(torch.nn.functional.pad, (made, padding))
        made = r.graph.call_method("index_select", (made, dim, r.constant(place)))
    return made
