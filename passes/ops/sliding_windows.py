"""Windows over channels: a convolution that slides along a dimension some of whose entries go.

What stays has other neighbours than before. So the tensor is laid out at its original width, with zeros for what is removed,
as the masked original has them; it is convolved there, and the result is cut (ECA's gate over channels).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import fx

from fxprune.passes.ir.op_trace import OpTrace, name_of
from fxprune.passes.ir.tensor_ref import TensorRef

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


def sliding(op_trace: OpTrace) -> dict[int, int]:
    """The nodes that convolve with a kernel of more than one entry, and over how many dimensions they slide."""
    found = {}
    for op in op_trace.ops:
        if name_of(op.func) == "aten::convolution":
            kernel = op_trace.shape(op.args[1])[2:]
            if set(kernel) != {1}:
                found[op.node] = len(kernel)
    return found


def slid(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The node at the original width of the dimensions it slides along, and its result cut; None where they are whole."""
    spatial = r.sliding.get(r.capture.index[node])
    if spatial is None or not isinstance(node.args[0], fx.Node) or str(node.target) in r.capture.opaque:
        return None
    source, target = r.result(node.args[0]), r.result(node)
    ndim = len(r.before(source))
    dims = [d for d in range(ndim - spatial, ndim) if any(d in cut.dims for cut in r.cuts(source))]
    if not dims:
        return None
    wide = r.new[node.args[0]]
    for d in dims:
        wide = spread(r, wide, source, d)
    made = r.emit(node, (wide, *(r.argument(a) for a in node.args[1:])), r.argument(dict(node.kwargs)))
    for d in dims:
        made = r.graph.call_method("index_select", (made, d, r.constant(r.positions(target, d))))
    return made


def spread(r: Rewriter, narrow: fx.Node, ref: TensorRef, dim: int) -> fx.Node:
    """A tensor at its original width along a dimension, zeros where entries were removed."""
    kept = r.positions(ref, dim)
    behind = len(r.before(ref)) - 1 - dim
    with_zero = r.graph.call_function(F.pad, (narrow, [0, 0] * behind + [0, 1]))
    order = torch.full((r.before(ref)[dim],), len(kept))
    order[kept] = torch.arange(len(kept))
    return r.graph.call_method("index_select", (with_zero, dim, r.constant(order)))
