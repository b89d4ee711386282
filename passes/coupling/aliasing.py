"""Aliasing: constants that several calls read, and views that are written to.

An initial state of zeros for several recurrent layers is one tensor, cut into pieces, and ties no layers to one another. Which
of its entries are left does not matter, only how many: every reader but the first gets labels of its own, that keep equally
many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxprune.passes.ir.labels import Factor, Labels
from fxprune.passes.ir.op_trace import OpCall, OpTrace, name_of, writes
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import spec_of


def read_apart(call: RuleContext) -> dict[int, Labels]:
    """Give constants that an earlier call has read other labels for this call; returns the labels they had, to be put back."""
    if spec_of(call.op).views:
        return {}
    shared: dict[int, Labels] = {}
    written = {call.state.uniform.get(r.id) for r in writes(call.op)}
    for ref in call.inputs:
        base = call.state.uniform.get(ref.id)
        if base is None or base in written or ref.id in shared:
            continue
        if base in call.state.read_before and all(len(f.major_to_minor) == 1 for f in call.labels(ref)):
            shared[ref.id] = call.labels(ref)
            call.known[ref.id] = tuple(apart(call, f) for f in call.labels(ref))
        call.state.read_before.add(base)
    return shared


def apart(call: RuleContext, f: Factor) -> Factor:
    """New labels that keep as many entries as those of a factor."""
    made = Factor(call.constraints.fresh(f.labels.numel()).reshape(f.labels.shape), f.major_to_minor)
    call.constraints.keep_rows_equal(Factor(torch.stack([f.labels.flatten(), made.labels.flatten()]), (0, 1)))
    return made


def follow(call: RuleContext) -> None:
    """Views of a constant are constants; one that is written to is none any more."""
    alike = call.state.uniform
    written = {alike[r.id] for r in writes(call.op) if r.id in alike}
    if written:
        for i in [i for i, base in alike.items() if base in written]:
            del alike[i]
    if spec_of(call.op).views and call.inputs and call.first.id in alike:
        alike.update({r.id: alike[call.first.id] for r in call.outputs})


def written_through(op_trace: OpTrace) -> set[int]:
    """Strided slices that cannot become copies of what is left: a later node writes into them, or into what they show.

    Where Python puts what was written back at once (`x[::2] *= 2`), they can.
    """
    if not any(strided(op) for op in op_trace.ops):
        return set()
    maker = {ref.id: op for op in op_trace.ops for ref in collect(op.outs, TensorRef) if spec_of(op).views}

    def chain(value: int) -> list[int]:
        found = [value]
        while found[-1] in maker:
            found.append(collect(maker[found[-1]].args, TensorRef)[0].id)
        return found

    slices = {op.outs.id: chain(op.outs.id)[-1] for op in op_trace.ops if strided(op)}
    read: dict[int, int] = {}
    for i, op in enumerate(op_trace.ops):
        read.update({at: i for ref in collect(op.args, TensorRef) for at in chain(ref.id) if at in slices})
    found: set[int] = set()
    for i, op in enumerate(op_trace.ops):
        for ref in writes(op):
            mine = chain(ref.id)
            for at, root in slices.items():
                source = maker[at]
                if root != mine[-1] or source.node >= op.node or at in found:
                    continue
                through = at in mine and not put_back(op_trace.ops[i + 1 : i + 3], at, source)
                if through or (at not in mine and read.get(at, -1) > i):
                    found.add(at)
    return found


def strided(op: OpCall) -> bool:
    return len(op.args) > 4 and op.args[4] != 1 and name_of(op.func) == "aten::slice"


def put_back(following: Sequence[OpCall], view: int, source: OpCall) -> bool:
    """Whether the next two calls take the same slice again and copy the view into it."""
    if len(following) < 2 or following[0].func != source.func or name_of(following[1].func) != "aten::copy_":
        return False
    again, copied = following
    same = again.args[0] is source.args[0] and tuple(again.args[1:]) == tuple(source.args[1:])
    written = copied.args[1]
    return same and copied.args[0] is again.outs and isinstance(written, TensorRef) and written.id == view
