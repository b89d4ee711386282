"""Reductions and scans: a reduced dimension goes, or stays with its statistics taken over what is kept.

A joint factor can be reduced row by row. Reducing its major dimension mixes rows that are packed one by one, so their
columns must agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.ir.op_trace import signature
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext, frozen
from fxprune.passes.ops.masking import (
    MaskContext,
    filled_with,
    kept_elements,
    kept_mean,
    kept_variance,
    squeezed,
    with_value,
    with_zeros,
)
from fxprune.passes.ops.matmul import contract
from fxprune.passes.ops.pointwise import pointwise
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.rewriting import RewriteContext, SizeArguments, argument


def drop(f: Factor, gone: Sequence[int], keepdim: bool) -> Factor:
    """The factor with dimensions of size 1 taken away."""
    if keepdim:
        return f
    kept = [d for d in range(f.labels.dim()) if d not in gone]
    place = {d: i for i, d in enumerate(kept)}
    return Factor(f.labels.reshape([f.labels.shape[d] for d in kept]), tuple(place[d] for d in f.major_to_minor))


def row_by_row(call: RuleContext, f: Factor, dims: Sequence[int]) -> Labels:
    """What is left of a factor once `dims` no longer tell entries apart."""
    touched = [d for d in f.major_to_minor if d in dims]
    if not touched:
        return (f,)
    rest = [d for d in f.major_to_minor if d not in dims]
    if not rest:
        return NONE
    if f.major_to_minor[-1] not in rest:
        return (call.constraints.new_row_labels(f, rest, whole=bool(call.heads)),)
    return call.collapse(f, touched)


def reduce(call: RuleContext) -> list[Labels]:
    """A dimension goes, or stays with size 1."""
    x = call.first
    ndim = len(call.shape(x))
    dims = call.dims(call.get("dim"), ndim)
    out = call.outputs[0]
    keepdim = bool(call.get("keepdim", False)) and len(call.shape(out)) == ndim
    call.constraints.keep_copies(f for f in call.labels(x) if f.dims & set(dims))
    result = tuple(drop(g, dims, keepdim) for f in call.labels(x) for g in row_by_row(call, f, dims))
    return [result] * len(call.outputs)


def spread(call: RuleContext) -> list[Labels]:
    """A variance: with a correction it divides by one less than the number of entries, so at least two must stay."""
    x = call.first
    ndim = len(call.shape(x))
    dims = call.dims(call.get("dim"), ndim)
    if call.get("correction", int(call.get("unbiased", True))) != 0:
        for f in call.labels(x):
            if f.major_to_minor[-1] in dims and f.dims <= {f.major_to_minor[-1], *(d for d in range(ndim) if d not in dims)}:
                call.constraints.keep_two_per_row(f.rows())
        for d in dims:  # several families along one dimension, as heads and their dimensions: what stays is a product
            crossing = [f for f in call.labels(x) if d in f.dims and f.dims <= set(dims)]
            if len(crossing) > 1:
                call.constraints.keep_two_per_row(max((f.labels.unique() for f in crossing), key=len).reshape(1, -1))
    return reduce(call)


def extreme(call: RuleContext) -> list[Labels]:
    """The greatest or the least of two tensors entry by entry, or of a dimension, with its index there."""
    return pointwise(call) if len(call.inputs) > 1 else with_places(call, call.outputs[1:])


def middle(call: RuleContext) -> list[Labels]:
    return with_places(call, call.outputs[1:])


def place_of_extreme(call: RuleContext) -> list[Labels]:
    return with_places(call, call.outputs)


def with_places(call: RuleContext, places: Sequence[TensorRef]) -> list[Labels]:
    """Values reduce like any others; their places count removed entries too, so nothing may read them."""
    if any(call.used(ref) for ref in places):
        dims = call.dims(call.get("dim"), len(call.shape(call.first)))
        call.freeze_dims(call.labels(call.first), dims, "has its positions taken by an argmax")
    return reduce(call)


def running_extreme(call: RuleContext) -> list[Labels]:
    if call.used(call.outputs[1]):
        dims = call.dims(call.get("dim"), len(call.shape(call.first)))
        call.freeze_dims(call.labels(call.first), dims, "has its positions taken by a running maximum")
    return [normalise(call)] * 2


def by_rank(call: RuleContext) -> list[Labels]:
    """One entry of a dimension, by its rank among the others."""
    dims = call.dims(call.get("dim"), len(call.shape(call.first)))
    call.freeze_dims(call.labels(call.first), dims, "is ranked by value")
    return reduce(call)


def normalise(call: RuleContext, *, shares: bool = False) -> Labels:
    """Every entry depends on the others along `dim`: over several rows they must be packed alike, and each row can go whole.

    Arguments:
        shares: see `ConstraintBuilder.keep_copies`.
    """
    x = call.first
    dims = call.dims(call.get("dim", -1), len(call.shape(x)))
    call.constraints.keep_copies((f for f in call.labels(x) if f.dims & set(dims)), shares=shares)
    for f in call.labels(x):
        rows = [d for d in f.major_to_minor if d not in dims]
        if not rows or len(rows) == len(f.major_to_minor):
            continue
        if f.major_to_minor[-1] not in dims:
            call.constraints.keep_columns_equal(f)
        else:
            call.constraints.new_row_labels(f, rows, whole=bool(call.heads))
    return call.labels(x)


def ranked(call: RuleContext) -> list[Labels]:
    dims = call.dims(call.get("dim", -1), len(call.shape(call.first)))
    passed = call.freeze_dims(call.labels(call.first), dims, "is ranked by value")
    return [passed] * len(call.outputs)


def glu(call: RuleContext) -> Labels:
    """(*, 2n) -> (*, n): the first half times the sigmoid of the second."""
    x = call.first
    shape = call.shape(x)
    dim = call.dim(call["dim"], len(shape))
    half = shape[dim] // 2
    result: list[Factor] = []
    for f in call.labels(x):
        if dim not in f.dims:
            result.append(f)
            continue
        if len(f.major_to_minor) > 1 and dim == f.major_to_minor[-1]:
            call.constraints.keep_columns_equal(f)
        a, b = f.labels.narrow(dim, 0, half), f.labels.narrow(dim, half, half)
        call.constraints.tie(a, b)
        result += call.settle(factor(a, f.major_to_minor))
    return tuple(result)


def fft(call: RuleContext) -> Labels:
    dims = call.dims(call["dim"], len(call.shape(call.first)))
    return call.freeze_dims(call.labels(call.first), dims, "is mixed by a Fourier transform")


def distance(call: RuleContext) -> Labels:
    """Distances between rows: a sum over the last dimension of both, so its labels are tied."""
    n = len(call.shape(call.outputs[0])) - 2
    a, b = [align(call.labels(ref), call.shape(ref), n + 2) for ref in call.inputs[:2]]
    batch = list(range(n))
    out = contract(call, *a, [*batch, n, n + 2], *b, [*batch, n + 1, n + 2], n + 3, [n + 2])
    return tuple(Factor(f.labels.squeeze(-1), f.major_to_minor) for f in out)


def pair_distance(call: RuleContext) -> Labels:
    """(N, D) -> distances of all pairs of rows."""
    call.constraints.keep_copies(f for f in call.labels(call.first) if 1 in f.dims)
    call.freeze_dims(call.labels(call.first), [0], "is one of rows that are compared in pairs")
    return NONE


def renormalise(call: RuleContext) -> Labels:
    """Each index of `dim` is scaled by a norm over all other dimensions."""
    dims = [d for d in range(len(call.shape(call.first))) if d != call.dim(call["dim"], len(call.shape(call.first)))]
    call.constraints.keep_copies(f for f in call.labels(call.first) if f.dims & set(dims))
    for f in call.labels(call.first):
        if len(f.major_to_minor) > 1 and f.major_to_minor[-1] not in dims:
            call.constraints.keep_columns_equal(f)
    return call.labels(call.first)


def differences(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """None taken: what is put before and behind is looked at, and left out."""
    taken = argument(node, 1, "n", 1)
    return r.graph.call_method("clone", (r.new[node.args[0]],)) if taken == 0 else None  # type: ignore[index]


def loss(call: RuleContext) -> Labels:
    """A number for each pair of entries; their sum or their mean, where that is asked for, has no channels."""
    terms = pointwise(call, max(call.inputs, key=lambda ref: len(call.shape(ref))))[0]
    if call["reduction"] == 0:
        return terms
    call.constraints.keep_copies(terms)
    return NONE


def masked_loss(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Tensor:
    """Of kept entries alone, as a term of two zeros may be anything."""
    kept = kept_elements(run, args[0]) & kept_elements(run, args[1])
    args, kwargs = with_value(run, args, kwargs, 0.0)
    names, _ = signature(call.op.func)
    terms: Tensor = call.op.func(**dict(zip(names, args, strict=False)) | kwargs | {"reduction": 0})
    if call["reduction"] == 0:
        return terms
    mean, count = kept_mean(terms, kept, range(terms.dim()))
    return (mean if call["reduction"] == 1 else mean * count).reshape(())


with_least, with_greatest, with_ones = filled_with(-math.inf), filled_with(math.inf), filled_with(1.0)


def masked_topk(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """What is removed is never chosen."""
    return (with_least if call.get("largest", True) else with_greatest)(run, call, args, kwargs)


def histogram(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """As many bins as entries are left that numbers can say, the last of which is then the greatest number."""
    ref = r.result(node)
    if not isinstance(ref, TensorRef) or r.after(ref) == r.before(ref):
        return None
    (left,) = r.after(ref)
    return r.graph.call_function(torch.histc, (r.argument(node.args[0]),), {"bins": left, "min": 0, "max": left - 1})


def masked_norm(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """Of a negative order, the norm sums reciprocal powers, to which infinity adds nothing."""
    order = call.get("p", call.get("ord", 2))
    return (with_greatest if isinstance(order, int | float) and order < 0 else with_zeros)(run, call, args, kwargs)


def least_and_greatest(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    above, below = (with_value(run, args, kwargs, value) for value in (math.inf, -math.inf))
    return call.op.func(*above[0], **above[1])[0], call.op.func(*below[0], **below[1])[1]


def median(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    args, kwargs = with_value(run, args, kwargs, math.nan)
    return getattr(torch.ops.aten.nanmedian, call.op.func._overloadname)(*args, **kwargs)


def masked_mean(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], kept_elements(run, args[0])
    dims = call.dims(call.get("dim"), x.dim())
    return squeezed(kept_mean(x, mask, dims)[0], dims, bool(call.get("keepdim", False)))


def masked_variance(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """The variance and the mean of kept elements."""
    x, mask = args[0], kept_elements(run, args[0])
    dims = call.dims(call.get("dim"), x.dim())
    correction = call.get("correction")
    correction = (1 if call.get("unbiased", True) else 0) if correction is None else correction
    var, average = kept_variance(x, mask, dims, correction)
    keepdim = bool(call.get("keepdim", False))
    return squeezed(var, dims, keepdim), squeezed(average, dims, keepdim)


def masked_var(*given: Any) -> Tensor:
    return masked_variance(*given)[0]


def masked_std(*given: Any) -> Tensor:
    return masked_variance(*given)[0].sqrt()


def masked_std_mean(*given: Any) -> tuple[Tensor, Tensor]:
    var, average = masked_variance(*given)
    return var.sqrt(), average


def checked(call: RuleContext) -> Labels:
    """A check of all values: it holds of those that are kept if it holds of all, and its result has no channels."""
    return NONE


register("norm linalg_vector_norm", OpSpec(reduce, masked=masked_norm))
register("sum nansum count_nonzero any", OpSpec(reduce, masked=with_zeros))
register("sum_to_size", OpSpec(sizes=SizeArguments(1)))
register("prod all", OpSpec(reduce, masked=with_ones))
register("_is_all_true", OpSpec(checked, masked=with_ones))
register("_is_any_true", OpSpec(checked, masked=with_zeros))
register("mean nanmean", OpSpec(reduce, masked=masked_mean))
register("amax logsumexp", OpSpec(reduce, masked=with_least))
register("amin", OpSpec(reduce, masked=with_greatest))
register("aminmax", OpSpec(reduce, masked=least_and_greatest))
register("median", OpSpec(middle, masked=median))
register("var", OpSpec(spread, masked=masked_var))
register("std", OpSpec(spread, masked=masked_std))
register("var_mean", OpSpec(spread, masked=masked_variance))
register("std_mean", OpSpec(spread, masked=masked_std_mean))
register("max", OpSpec(extreme, masked=with_least))
register("min", OpSpec(extreme, masked=with_greatest))
register("cummax", OpSpec(running_extreme, masked=with_least))
register("cummin", OpSpec(running_extreme, masked=with_greatest))
register("argmax", OpSpec(place_of_extreme, masked=with_least))
register("argmin", OpSpec(place_of_extreme, masked=with_greatest))
register("mode kthvalue", OpSpec(by_rank))
register(
    "_softmax _log_softmax _safe_softmax _masked_softmax softmax log_softmax",
    OpSpec(functools.partial(normalise, shares=True), masked=with_least),
)
register("logcumsumexp", OpSpec(normalise, masked=with_least))
register("cumsum", OpSpec(normalise, masked=with_zeros))
register("renorm", OpSpec(renormalise, masked=with_zeros))
register("cumprod", OpSpec(normalise, masked=with_ones))
register("topk", OpSpec(ranked, masked=masked_topk))
register("sort argsort msort", OpSpec(ranked))
register(
    "mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits",
    OpSpec(loss, masked=masked_loss),
)
register("histc", OpSpec(frozen("is counted by value"), histogram))
register("glu", OpSpec(glu))
register("_fft_r2c _fft_c2c _fft_c2r", OpSpec(fft))
register("_cdist_forward _euclidean_dist", OpSpec(distance, masked=with_zeros))
register("_pdist_forward", OpSpec(pair_distance, masked=with_zeros))
register(
    "",
    OpSpec(counts=lambda node: True),
    functions="combinations cov corrcoef multilabel_soft_margin_loss cross_entropy linear_cross_entropy linalg_matrix_rank",
)
register("", OpSpec(counts=lambda node: argument(node, 4, "reduction") == "batchmean"), functions="kl_div")
register("", OpSpec(counts=lambda node: argument(node, 1, "n") in (0, 1)), functions="matrix_power linalg_matrix_power")
register("diff", OpSpec(rewrite=differences))
