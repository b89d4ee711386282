"""Contractions: factors are unified along the contracted dimension, the free dimensions of each operand pass.

Batch dimensions of a product of activations are units of their own, heads, above the fine ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.movement import moved
from fxprune.passes.ops.registry import handles, rule
from fxprune.passes.ops.unify import unify

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


def placed(labels: Labels, shape: Sequence[int], places: Sequence[int], ndim: int) -> tuple[Labels, list[int]]:
    """Labels and shape of a tensor moved into a space of `ndim` dimensions; dimension i goes to places[i]."""
    order = sorted(range(len(places)), key=lambda d: places[d])
    sizes = [1] * ndim
    for d, place in enumerate(places):
        sizes[place] = shape[d]
    result = []
    for f in labels:
        if len(f.major_to_minor) == 1:
            result.append(f.at(places[f.major_to_minor[0]], ndim))
            continue
        small = [1] * ndim
        for d, place in enumerate(places):
            small[place] = f.labels.shape[d]
        result.append(Factor(f.labels.permute(order).reshape(small), tuple(places[d] for d in f.major_to_minor)))
    return tuple(result), sizes


def contract(
    call: RuleContext,
    a: Labels,
    a_shape: Sequence[int],
    a_places: Sequence[int],
    b: Labels,
    b_shape: Sequence[int],
    b_places: Sequence[int],
    ndim: int,
    summed: Sequence[int],
    copied: Sequence[int] = (),
) -> Labels:
    """Labels of a product over a common index space of `ndim` dimensions, in which `summed` ones are then of size 1.

    Along the `copied` ones an operand is one weight, expanded: they are no heads.
    """
    left, left_shape = placed(a, a_shape, a_places, ndim)
    right, right_shape = placed(b, b_shape, b_places, ndim)
    batch = [d for d in range(ndim) if d not in (*summed, *copied) and d in a_places and d in b_places]
    heads = as_heads(call, left + right, batch) if call.heads else NONE
    shared = [d for d in range(ndim) if d in a_places and d in b_places and d not in summed]
    left, right = mixed(call, left, right, summed, shared), mixed(call, right, left, summed, shared)
    merged = unify(call, left, left_shape, right, right_shape)
    result = [f for f in merged if not f.dims & set(summed)]
    for f in merged:
        rest = f.dims - set(summed)
        # rows survive a sum over the minor dimensions; a sum over major ones mixes what is packed row by row
        if rest and f.dims & set(summed) and f.major_to_minor[-1] not in summed:
            result += call.collapse(f, [d for d in summed if d in f.dims])
        elif not call.heads and rest and f.dims & set(summed) and rest <= set(batch):
            result.append(call.constraints.row_labels(f, tuple(rest)))
    if heads:
        result += [h for h in heads if not any(h.dims <= f.dims for f in result)][:1]
    return tuple(result)


def copies(call: RuleContext, ref: TensorRef, places: Sequence[int]) -> list[int]:
    """Where a tensor that no input goes into repeats itself: dimension i of it is places[i]."""
    if call.op_trace.values[ref.id].from_input:
        return []
    new = [f for f in call.labels(ref) if len(f.major_to_minor) == 1 and bool((f.labels >= call.constraints.first_fresh).all())]
    return [places[f.major_to_minor[0]] for f in new]


def mixed(call: RuleContext, mine: Labels, theirs: Labels, summed: Sequence[int], shared: Sequence[int]) -> Labels:
    """Factors of one operand, ready to meet those of the other.

    A sum over the rows of a joint factor (streams that were stacked) with one weight for each row ties column to column
    and leaves the rows alone. Were the weight's index of rows to meet the factor, it would tie all columns of a row: so it
    does where rows are no fewer than half the columns, or where both operands have the columns (a batch).
    """
    result: list[Factor] = []
    for f in mine:
        rows = [d for d in f.major_to_minor if d in summed]
        free = f.major_to_minor[-1] not in (*summed, *shared)
        if not rows or not free or any(f.dims <= g.dims for g in theirs):
            result.append(f)
            continue
        count = math.prod(f.labels.shape[d] for d in rows)
        if 2 * count * count < len(f.labels.unique()):
            result += call.collapse(f, rows)
        else:
            result.append(f)
    return tuple(result)


def as_heads(call: RuleContext, labels: Labels, batch: Sequence[int]) -> Labels:
    """Joint factors over batch and other dimensions: each row is a head, to be removed whole."""
    found: list[Factor] = []
    for f in labels:
        rows = [d for d in f.major_to_minor if d in batch]
        rest = [d for d in f.major_to_minor if d not in batch]
        if rows and rest:
            matrix = f.labels.permute([d for d in range(f.labels.dim()) if d not in rest] + rest)
            count = matrix.shape[: matrix.dim() - len(rest)].numel()
            call.constraints.head_rows(matrix.reshape(count, -1))
            head = factor(f.labels.amax(rest, keepdim=True), rows)
            if head.major_to_minor:
                found.append(head)
    return tuple(found)


@rule(
    "aten::mm",
    "aten::bmm",
    "aten::matmul",
    "aten::linear",
    "aten::mv",
    "aten::dot",
    "aten::_addmm_activation",
)
@rule("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::addbmm", "aten::vdot", "aten::inner")
def matmul(call: RuleContext) -> Labels:
    name = call.op.func._schema.name.rpartition("::")[2]
    added = None
    if name in ("addmm", "baddbmm", "addmv", "_addmm_activation"):
        added, a, b = call.inputs
    elif name == "linear":
        a, b = call.inputs[:2]
        added = call.inputs[2] if len(call.inputs) > 2 else None
    else:
        a, b = call.inputs
    a_labels, a_shape, b_labels, b_shape = call.labels(a), call.shape(a), call.labels(b), call.shape(b)
    if name == "linear":
        b_labels, b_shape = moved(b_labels, (1, 0)), b_shape[::-1]
    vector = len(b_shape) == 1
    if vector:
        b_labels, b_shape = tuple(Factor(f.labels.unsqueeze(-1), f.major_to_minor) for f in b_labels), (*b_shape, 1)
    lead = len(a_shape) - 1 if name in ("linear", "dot", "vdot") or len(b_shape) == 2 else len(a_shape) - 2
    a_places = [*range(len(a_shape) - 1), len(a_shape)]
    ndim = len(a_shape) + 1
    b_places = [*range(len(b_shape) - 2), ndim - 1, ndim - 2] if lead < len(a_shape) - 1 else [ndim - 1, ndim - 2]
    copied = [d for ref, places in ((a, a_places), (b, b_places)) if len(places) > 2 for d in copies(call, ref, places)]
    out = contract(call, a_labels, a_shape, a_places, b_labels, b_shape, b_places, ndim, [ndim - 1], copied)
    out = tuple([f.without(-1) for f in out])
    shape = call.shape(call.outputs[0])
    if vector:
        out = tuple([f.without(-1) for f in out if len(shape)])
    if added is not None:
        out = unify(call, out, shape, *align(call.labels(added), call.shape(added), len(shape)))
    return out


@rule("aten::_grouped_mm")
def grouped_product(call: RuleContext) -> Labels:
    """Rows (M, K) in runs, each with a matrix of its own of (G, K, N), -> (M, N); where the runs end is computed.

    So neither rows nor matrices can go. With the runs along another dimension nothing of either operand does.
    """
    a, b = call.inputs[:2]
    a_shape, b_shape = call.shape(a), call.shape(b)
    if len(a_shape) == len(b_shape) == 3:
        return matmul(call)
    why = "is in a product whose runs are told apart by their ends"
    if len(a_shape) != 2 or len(b_shape) != 3:
        call.freeze((*call.labels(a), *call.labels(b)), why)
        return NONE
    left = call.freeze_dims(call.labels(a), [0], why)
    right = tuple([f.without(0) for f in call.freeze_dims(call.labels(b), [0], why)])
    # index space: M, N, K
    out = contract(call, left, a_shape, [0, 2], right, b_shape[1:], [2, 1], 3, [2])
    return tuple([f.without(-1) for f in out])


@rule("aten::_trilinear")
def trilinear(call: RuleContext) -> Labels:
    """The product of three tensors over a common space, then a sum over some dimensions (nn.Bilinear)."""
    refs = [call["i1"], call["i2"], call["i3"]]
    expands = [call["expand1"], call["expand2"], call["expand3"]]
    ndim = len(call.shape(refs[0])) + len(expands[0])
    merged: Labels = NONE
    shape = [1] * ndim
    for ref, expanded in zip(refs, expands, strict=True):
        places = [d for d in range(ndim) if d not in expanded]
        labels, size = placed(call.labels(ref), call.shape(ref), places, ndim)
        merged = unify(call, merged, shape, labels, size)
        shape = [max(a, b) for a, b in zip(shape, size, strict=True)]
    gone = sorted(call["sumdim"], reverse=True)
    result = []
    for f in merged:
        if f.dims & set(gone):
            continue
        for d in gone:
            f = f.without(d)
        result.append(f)
    return tuple(result)


@handles("_grouped_mm", "grouped_mm")
def padded_grouped_product(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The kernel takes rows of multiples of 16 bytes: what is left of others is padded."""
    return r.graph.call_function(in_whole_lines, r.argument(tuple(node.args)), r.argument(dict(node.kwargs)))


LINE = 16  # bytes


def in_whole_lines(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch._grouped_mm` of operands of any width: zeros fill them up where they are cut to another one."""
    step = LINE // a.element_size()
    rows, columns = -b.shape[-2] % step, -b.shape[-1] % step
    if rows or columns:
        a, b, wide = F.pad(a, (0, rows)), F.pad(b, (0, columns, 0, rows)), b.shape[-1]
        return torch._grouped_mm(a, b, *args, **kwargs)[..., :wide]
    return torch._grouped_mm(a, b, *args, **kwargs)
