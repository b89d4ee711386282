"""Contractions: factors are unified along the contracted dimension, the free dimensions of each operand pass.

Batch dimensions of a product of activations are units of their own, heads, above the fine ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext, frozen
from fxprune.passes.ops.masking import MaskContext, products_with_zeros, with_value, with_zeros
from fxprune.passes.ops.registry import OpSpec, Product, register
from fxprune.passes.ops.rewriting import RewriteContext
from fxprune.passes.ops.unify import unify
from fxprune.passes.ops.view import moved


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
    call.constraints.keep_copies(f for f in merged if f.dims & set(summed))
    result = [f for f in merged if not f.dims & set(summed)]
    for f in merged:
        rest = f.dims - set(summed)
        # rows survive a sum over the minor dimensions; a sum over major ones mixes what is packed row by row
        if rest and f.dims & set(summed) and f.major_to_minor[-1] not in summed:
            result += call.collapse(f, [d for d in summed if d in f.dims])
        elif rest and f.dims & set(summed) and (not call.heads if rest <= set(batch) else call.state.seeking_heads):
            result.append(call.constraints.new_row_labels(f, tuple(rest), whole=False))
            if call.state.seeking_heads:  # this is all that is seen of heads behind the product
                made = call.constraints.collected.row_labels[-1]
                call.state.summed.update(zip(made.labels.tolist(), made.entries, strict=True))
    if heads:
        result += [h for h in heads if not any(h.dims <= f.dims for f in result)][:1]
    return tuple(result)


def keep_own_heads(call: RuleContext, labels: Labels, behind: int) -> None:
    """Freeze heads of keys or values that no others share, where query heads alone may go: one would leave a group of none."""
    own = [f for f in labels if f.major_to_minor[0] < behind and call.constraints.undetermined(f) is None]
    call.freeze(tuple(own), "has keys and values of its own, and attention='queries' removes those that share them")


def copies(call: RuleContext, ref: TensorRef, places: Sequence[int]) -> list[int]:
    """Where a tensor that no input goes into repeats itself: dimension i of it is places[i]."""
    if call.op_trace.values[ref.id].from_input:
        return []
    new = [f for f in call.labels(ref) if len(f.major_to_minor) == 1 and bool((f.labels >= call.constraints.first_new).all())]
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
        apart = rows and free and not any(f.dims <= g.dims for g in theirs)
        count = math.prod(f.labels.shape[d] for d in rows)
        few = apart and 2 * count * count < f.labels.numel() and 2 * count * count < f.count
        result += call.collapse(f, rows) if few else (f,)
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
            call.constraints.add_head_rows(matrix.reshape(count, -1))
            head = factor(f.labels.amax(rest, keepdim=True), rows)
            if head.major_to_minor:
                found.append(head)
        elif rows and call.state.summed.keys() >= set(f.flat.tolist()):
            entries = [call.state.summed[x] for x in f.flat.tolist()]
            if len(set(map(len, entries))) == 1:
                call.constraints.add_head_rows(torch.stack(entries))
    return tuple(found)


def matmul(call: RuleContext) -> Labels:
    """a (*, n, k) with b (*, k, m), to which another tensor may be added."""
    *added, a, b = call.inputs
    return multiplied(call, a, b, call.labels(b), call.shape(b), added)


def linear(call: RuleContext) -> Labels:
    """x (*, k) with a weight (m, k), plus a bias (m)."""
    x, weight, *bias = call.inputs
    return multiplied(call, x, weight, moved(call.labels(weight), (1, 0)), call.shape(weight)[::-1], bias)


def multiplied(
    call: RuleContext, a: TensorRef, b: TensorRef, b_labels: Labels, b_shape: tuple[int, ...], added: Sequence[TensorRef]
) -> Labels:
    """Labels of a product, whose second operand has labels and shape as given, and of what is added to it."""
    vector = len(b_shape) == 1
    if call.heads == "queries" and call.op_trace.values[a.id].from_input and call.op_trace.values[b.id].from_input:
        keep_own_heads(call, b_labels, len(b_shape) - 2)
    if vector:
        b_labels, b_shape = tuple(Factor(f.labels.unsqueeze(-1), f.major_to_minor) for f in b_labels), (*b_shape, 1)
    a_shape = call.shape(a)
    ndim = len(a_shape) + 1
    a_places, b_places = [*range(ndim - 2), ndim - 1], [*range(len(b_shape) - 2), ndim - 1, ndim - 2]
    copied = [d for ref, places in ((a, a_places), (b, b_places)) if len(places) > 2 for d in copies(call, ref, places)]
    out = contract(call, call.labels(a), a_shape, a_places, b_labels, b_shape, b_places, ndim, [ndim - 1], copied)
    out = tuple([f.without(-1) for f in out])
    shape = call.shape(call.outputs[0])
    if vector:
        out = tuple([f.without(-1) for f in out if len(shape)])
    for ref in added:
        out = unify(call, out, shape, *align(call.labels(ref), call.shape(ref), len(shape)))
    return out


def matmul_products(call: OpView) -> Iterator[Product]:
    """Either operand may be the weight of the other."""
    *rest, a, b = call.inputs
    added = rest[0] if rest else None
    n, m = len(call.shape(a)), len(call.shape(b))
    if m == 1 < n:
        yield Product(a, b, n - 1, n - 2, 0, 0, 1, added)
    elif n == m > 1:
        yield Product(b, a, m - 2, m - 1, n - 1, n - 1, 1, added)
        yield Product(a, b, n - 1, n - 2, m - 2, n - 2, 1, added)


def linear_products(call: OpView) -> Iterator[Product]:
    x, weight, *bias = call.inputs
    last = len(call.shape(x)) - 1
    yield Product(weight, x, 1, 0, last, last, 1, bias[0] if bias else None)


def grouped_products(call: OpView) -> Iterator[Product]:
    """Each row is multiplied by the matrix of its run."""
    a, b = call.inputs[:2]
    if (len(call.shape(a)), len(call.shape(b))) == (2, 3):
        yield Product(b, a, 1, 2, 1, 1)


def matmul_macs(call: OpView) -> int:
    """One for each entry of the result and each entry of the contracted dimension."""
    return math.prod(call.shape(call.outputs[0])) * call.shape(call.inputs[-2])[-1]


def linear_macs(call: OpView) -> int:
    return math.prod(call.shape(call.outputs[0])) * call.shape(call.inputs[1])[-1]


def grouped_macs(call: OpView) -> int:
    return math.prod(call.shape(call.outputs[0])) * call.shape(call.inputs[0])[-1]


def addbmm(call: RuleContext) -> Labels:
    """The sum over a batch of a (b, n, k) with b (b, k, m), and what is added to it (n, m)."""
    added, a, b = call.inputs
    # index space: n, m, batch, k
    places = [2, 0, 3], [2, 3, 1]
    out = contract(call, call.labels(a), call.shape(a), places[0], call.labels(b), call.shape(b), places[1], 4, [2, 3])
    out = tuple([f.without(-1).without(-1) for f in out])
    shape = call.shape(call.outputs[0])
    return unify(call, out, shape, *align(call.labels(added), call.shape(added), 2))


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


def emitted_grouped_product(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """A call that takes rows of any width, and that can be compiled and exported in any precision."""
    return r.graph.call_function(grouped_mm, r.argument(tuple(node.args)), r.argument(dict(node.kwargs)))


def masked_grouped_product(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """The ends of runs are no values: those of what is removed stay, so that its runs are empty."""
    operands, _ = with_value(run, args[:2], {}, 0.0)
    return call.op.func(*operands, *args[2:], **kwargs)


LINE = 16  # bytes


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """`torch.nn.functional.grouped_mm`; what compilers know of it is for bfloat16 alone, so of others they see one op."""
    plain = offs is not None and bias is None and out_dtype is None
    if plain and a.dtype != torch.bfloat16 and torch.compiler.is_compiling():
        return torch.ops.fxprune.grouped_mm(a, b, offs)
    return in_whole_lines(a, b, offs=offs, bias=bias, out_dtype=out_dtype)


def in_whole_lines(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
    """`torch._grouped_mm`, whose kernel takes rows of multiples of 16 bytes: zeros fill up those of other widths.

    Of two matrices, as in its backward pass, the first is stored by columns.
    """
    step, by_columns = LINE // a.element_size(), a.dim() == b.dim() == 2
    (high, summed), wide = a.shape[-2:], b.shape[-1]
    rows, columns = -(high if by_columns else summed) % step, -wide % step
    if not (rows or columns):
        return torch._grouped_mm(a, b, **kwargs)
    if by_columns:
        return torch._grouped_mm(F.pad(a.mT, (0, rows)).mT, F.pad(b, (0, columns)), **kwargs)[..., :high, :wide]
    return torch._grouped_mm(F.pad(a, (0, rows)), F.pad(b, (0, columns, 0, rows)), **kwargs)[..., :wide]


@torch.library.custom_op("fxprune::grouped_mm", mutates_args=())
def compiled_grouped_mm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return in_whole_lines(a, b, offs=offs).contiguous()


@compiled_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty([*([len(offs)] if a.dim() == b.dim() == 2 else []), *a.shape[:-1], b.shape[-1]])


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b, offs = ctx.saved_tensors
    by_runs = torch.ops.fxprune.grouped_mm
    return by_runs(gradient, b.transpose(-2, -1), offs), by_runs(a.transpose(-2, -1), gradient, offs), None


compiled_grouped_mm.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


MATMUL = OpSpec(matmul, masked=products_with_zeros, products=matmul_products, macs=matmul_macs)
register("mm addmm _addmm_activation _sparse_addmm", MATMUL)
register("bmm baddbmm matmul", dataclasses.replace(MATMUL, heads=True))
register("mv addmv dot vdot inner", dataclasses.replace(MATMUL, macs=None))  # which torch does not count
register("linear", OpSpec(linear, masked=products_with_zeros, products=linear_products, macs=linear_macs))
GROUPED = OpSpec(
    grouped_product,
    emitted_grouped_product,
    masked=masked_grouped_product,
    products=grouped_products,
    macs=grouped_macs,
    always=True,
)
register("_grouped_mm fxprune::grouped_mm", GROUPED, functions="_grouped_mm grouped_mm")
register("addbmm", OpSpec(addbmm, masked=with_zeros))
register("_trilinear", OpSpec(trilinear, masked=with_zeros))
register("cholesky_inverse", OpSpec(frozen("is inverted, which zeros in place of what is removed are not")))
