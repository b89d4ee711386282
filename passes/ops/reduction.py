"""Reductions and scans: a reduced dimension goes, or stays with its statistics taken over what is kept.

A joint factor can be reduced row by row. Reducing its major dimension mixes rows that are packed one by one, so their
columns must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxprune.passes.ir.labels import NONE, Factor, Labels, factor
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.masking import kept_mean, kept_variance, squeezed, subject, with_value
from fxprune.passes.ops.registry import masked, rule

if TYPE_CHECKING:
    from fxprune.passes.verification.masked_model import MaskedRun


REDUCTIONS = [
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "prod",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "all",
    "any",
    "nansum",
    "std_mean",
    "var_mean",
    "count_nonzero",
    "median",
    "nanmean",
    "aminmax",
]


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
        return (call.constraints.row_labels(f, rest),)
    return call.collapse(f, touched)


def spreads(call: RuleContext) -> bool:
    """Whether an op divides by one less than the number of entries: of a single one there is no such spread."""
    named = call.op.func._schema.name.removeprefix("aten::") in ("var", "std", "var_mean", "std_mean")
    return named and call.get("correction", int(call.get("unbiased", True))) != 0


@rule(*(f"aten::{name}" for name in REDUCTIONS))
def reduce(call: RuleContext) -> list[Labels]:
    x = call.first
    ndim = len(call.shape(x))
    dims = call.dims(call.get("dim"), ndim)
    out = call.outputs[0]
    keepdim = bool(call.get("keepdim", False)) and len(call.shape(out)) == ndim
    if spreads(call):
        for f in call.labels(x):
            if f.major_to_minor[-1] in dims and f.dims <= {f.major_to_minor[-1], *(d for d in range(ndim) if d not in dims)}:
                call.constraints.keep_two(f.rows())
    result = tuple(drop(g, dims, keepdim) for f in call.labels(x) for g in row_by_row(call, f, dims))
    return [result] * len(call.outputs)


@rule("aten::max", "aten::min", "aten::mode", "aten::argmax", "aten::argmin", "aten::kthvalue", "aten::cummax")
def reduce_with_index(call: RuleContext) -> list[Labels]:
    """The values reduce like any other; positions count removed entries too, so they must not be used."""
    if len(call.inputs) > 1:
        from fxprune.passes.ops.pointwise import pointwise

        return pointwise(call)
    name = call.op.func._schema.name
    if name in ("aten::mode", "aten::kthvalue"):
        dims = call.dims(call.get("dim"), len(call.shape(call.first)))
        call.freeze_dims(call.labels(call.first), dims, "is ranked by value")
    values = reduce(call)[0]
    outs = call.outputs
    indices = outs[1:] if len(outs) > 1 else (outs if name.startswith("aten::arg") else [])
    for ref in indices:
        if call.used(ref):
            dims = call.dims(call.get("dim"), len(call.shape(call.first)))
            call.freeze_dims(call.labels(call.first), dims, "has its positions taken by an argmax")
    return [values] * len(outs)


@rule(
    "aten::_softmax",
    "aten::softmax",
    "aten::_log_softmax",
    "aten::log_softmax",
    "aten::cumsum",
    "aten::logcumsumexp",
)
@rule("aten::cumprod", "aten::_safe_softmax", "aten::renorm", "aten::_masked_softmax")
def normalise(call: RuleContext) -> Labels:
    """Every entry depends on the others along `dim`: over several rows they must be packed alike."""
    x = call.first
    dims = call.dims(call.get("dim", -1), len(call.shape(x)))
    for f in call.labels(x):
        if f.dims & set(dims) and f.major_to_minor[-1] not in dims and len(f.major_to_minor) > 1:
            call.constraints.same_columns(f)
    return call.labels(x)


@rule("aten::topk", "aten::sort", "aten::argsort", "aten::msort")
def ranked(call: RuleContext) -> list[Labels]:
    dims = call.dims(call.get("dim", -1), len(call.shape(call.first)))
    passed = call.freeze_dims(call.labels(call.first), dims, "is ranked by value")
    return [passed] * len(call.outputs)


@rule("aten::glu")
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
            call.constraints.same_columns(f)
        a, b = f.labels.narrow(dim, 0, half), f.labels.narrow(dim, half, half)
        call.constraints.tie(a, b)
        result += call.settle(factor(a, f.major_to_minor))
    return tuple(result)


@rule("aten::_fft_r2c", "aten::_fft_c2c", "aten::_fft_c2r")
def fft(call: RuleContext) -> Labels:
    dims = call.dims(call["dim"], len(call.shape(call.first)))
    return call.freeze_dims(call.labels(call.first), dims, "is mixed by a Fourier transform")


@rule("aten::_cdist_forward", "aten::_pdist_forward")
def distance(call: RuleContext) -> Labels:
    """Distances between rows: a sum over the last dimension of both, so its labels are tied."""
    from fxprune.passes.ops.matmul import contract

    a, b = call.inputs[:2]
    n = len(call.shape(a)) - 2
    batch = list(range(n))
    out = contract(
        call,
        call.labels(a),
        call.shape(a),
        [*batch, n, n + 2],
        call.labels(b),
        call.shape(b),
        [*batch, n + 1, n + 2],
        n + 3,
        [n + 2],
    )
    return tuple(Factor(f.labels.squeeze(-1), f.major_to_minor) for f in out)


@masked("amax", "max", "logsumexp", "argmax", "logcumsumexp", "cummax")
@masked("_softmax", "_log_softmax", "_safe_softmax", "_masked_softmax", "softmax", "log_softmax")
def with_least(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    """A removed element is never the greatest and weighs nothing."""
    args, kwargs = with_value(masker, args, kwargs, -math.inf)
    return call.op.func(*args, **kwargs)


@masked("amin", "min", "argmin", "cummin")
def with_greatest(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    args, kwargs = with_value(masker, args, kwargs, math.inf)
    return call.op.func(*args, **kwargs)


@masked("aminmax")
def least_and_greatest(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    above, below = (with_value(masker, args, kwargs, value) for value in (math.inf, -math.inf))
    return call.op.func(*above[0], **above[1])[0], call.op.func(*below[0], **below[1])[1]


@masked("median")
def median(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    args, kwargs = with_value(masker, args, kwargs, math.nan)
    return getattr(torch.ops.aten.nanmedian, call.op.func._overloadname)(*args, **kwargs)


@masked("prod", "cumprod", "all")
def with_ones(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    args, kwargs = with_value(masker, args, kwargs, 1.0)
    return call.op.func(*args, **kwargs)


@masked("mean", "nanmean")
def masked_mean(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    dims = call.dims(call.get("dim"), x.dim())
    return squeezed(kept_mean(x, mask, dims)[0], dims, bool(call.get("keepdim", False)))


@masked("var", "std", "var_mean", "std_mean")
def masked_variance(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    name = call.op.func._schema.name
    dims = call.dims(call.get("dim"), x.dim())
    correction = call.get("correction")
    correction = (1 if call.get("unbiased", True) else 0) if correction is None else correction
    var, average = kept_variance(x, mask, dims, correction)
    first = var.sqrt() if "std" in name else var
    keepdim = bool(call.get("keepdim", False))
    out = squeezed(first, dims, keepdim)
    return (out, squeezed(average, dims, keepdim)) if name.endswith("_mean") else out
