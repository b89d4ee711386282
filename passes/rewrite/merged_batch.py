"""Dimensions in which a batch of one may be hidden.

`(b h)` of one example is as large as `h`, and its labels are those of the heads: nothing tells that its size is not the number
of heads alone. Where a reshape merges a dimension of size 1 into another, the size of the result counts as one of the inputs.
"""

from __future__ import annotations

from fxprune.passes.ir.op_trace import OpCall, OpTrace, name_of
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.view import segments

RESHAPES = frozenset(f"aten::{name}" for name in ("view", "_unsafe_view", "reshape", "flatten", "_reshape_alias"))


def merged_dims(op_trace: OpTrace) -> dict[int, frozenset[int]]:
    """For each value made of the inputs, by number, the dimensions that one of size 1 was merged into."""
    found: dict[int, frozenset[int]] = {}
    for op in op_trace.ops:
        if op.inputs and (name_of(op.func) in RESHAPES or any(ref.id in found for ref in op.inputs)):
            for out in op.outputs:
                dims = passed(op, out, op_trace, found)
                if dims:
                    found[out.id] = dims
    return found


def passed(op: OpCall, out: TensorRef, op_trace: OpTrace, found: dict[int, frozenset[int]]) -> frozenset[int]:
    """Those of a result: of a reshape run by run, else at the same place, where the size there is the same."""
    shape = op_trace.shape(out)
    if name_of(op.func) not in RESHAPES:
        inputs = [(op_trace.shape(ref), found.get(ref.id, frozenset())) for ref in op.inputs]
        return frozenset(d for before, dims in inputs for d in dims if before[d : d + 1] == shape[d : d + 1])
    source = op.inputs[0]
    before, known = op_trace.shape(source), found.get(source.id, frozenset())
    if 0 in before or not op_trace.values[source.id].from_input:
        return frozenset()
    dims: set[int] = set()
    for left, right in segments(before, shape):
        merges = len(left) > len(right) and any(before[d] == 1 for d in left)
        if merges or not known.isdisjoint(left):
            dims.update([d for d in right if shape[d] > 1][:1])
    return frozenset(dims)
