"""What ops compute of kept elements only, where that is not what they compute anyway.

`MASKED` is the definition of exact: removed elements add nothing to a contraction, and statistics over channels (mean, softmax,
layer norm, ...) see kept elements only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.passes.labels import filled
from fxprune.passes.rules import Call
from fxprune.passes.tape import map_tensors

if TYPE_CHECKING:
    from fxprune.passes.verify import Masker

Masked = Callable[["Masker", Call, Any, Any], Any]
MASKED: dict[str, Masked] = {}


def masked(*names: str) -> Callable[[Masked], Masked]:
    def file(function: Masked) -> Masked:
        for name in names:
            MASKED[f"aten::{name}"] = function
        return function

    return file


def masked_form(name: str) -> Masked | None:
    """What an op computes of kept elements, where that is not what it computes anyway."""
    begins = (m for k, m in MASKED.items() if k.endswith("*") and name.startswith(k[:-1]))
    return MASKED.get(name) or next(begins, None)


def with_value(masker: Masker, args: Any, kwargs: Any, value: float) -> tuple[Any, Any]:
    """The arguments with removed elements of every floating tensor set to one value."""

    def fill(tensor: Tensor) -> Tensor:
        ref = masker.ref(tensor)
        fractions = tensor.is_floating_point() or tensor.is_complex()
        if not fractions or (value == 0.0 and masker.is_zeroed(ref)):
            return tensor
        return filled(tensor, masker.labels.get(ref.id, ()), masker.kept, value)

    return map_tensors(args, fill), map_tensors(kwargs, fill)


@masked(
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "dot",
    "linear",
    "matmul",
    "convolution",
    "_convolution",
    "_trilinear",
)
@masked("sum", "norm", "linalg_vector_norm", "cumsum", "nansum", "addmv", "count_nonzero", "renorm")
@masked("_cdist_forward", "any", "col2im")
def with_zeros(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """A removed element adds nothing."""
    args, kwargs = with_value(masker, args, kwargs, 0.0)
    return call.op.func(*args, **kwargs)


@masked("_scaled_dot_product_*", "scaled_dot_product_attention")
def attention(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """Removed widths add nothing to a score, removed keys get no weight."""
    keys = masker.mask(call["key"])
    args, kwargs = with_value(masker, args, kwargs, 0.0)
    if keys is None or keys.shape[-2] == 1:
        return call.op.func(*args, **kwargs)
    named = dict(zip((a.name for a in call.op.func._schema.arguments), args, strict=False)) | kwargs
    q, k, v = named["query"], named["key"], named["value"]
    bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~keys.any(-1).unsqueeze(-2).to(q.device), -math.inf)
    given = named.get("attn_mask", named.get("attn_bias"))
    bias = bias if given is None else bias + given
    causal = bool(named.get("is_causal", False))
    if causal:
        bias = bias.masked_fill(~torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), -math.inf)
    scale = named.get("scale") or q.shape[-1] ** -0.5
    out = (q @ k.transpose(-1, -2) * scale + bias).softmax(-1) @ v
    rest = len(call.op.func._schema.returns) - 1
    return (out, *[out.new_empty(0)] * rest) if rest else out


@masked("amax", "max", "logsumexp", "argmax", "logcumsumexp", "cummax")
@masked("_softmax", "_log_softmax", "_safe_softmax", "_masked_softmax", "softmax", "log_softmax")
def with_least(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """A removed element is never the greatest and weighs nothing."""
    args, kwargs = with_value(masker, args, kwargs, -math.inf)
    return call.op.func(*args, **kwargs)


@masked("amin", "min", "argmin", "cummin")
def with_greatest(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    args, kwargs = with_value(masker, args, kwargs, math.inf)
    return call.op.func(*args, **kwargs)


@masked("aminmax")
def least_and_greatest(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    above, below = (with_value(masker, args, kwargs, value) for value in (math.inf, -math.inf))
    return call.op.func(*above[0], **above[1])[0], call.op.func(*below[0], **below[1])[1]


@masked("median")
def median(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    args, kwargs = with_value(masker, args, kwargs, math.nan)
    return getattr(torch.ops.aten.nanmedian, call.op.func._overloadname)(*args, **kwargs)


@masked("prod", "cumprod", "all")
def with_ones(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    args, kwargs = with_value(masker, args, kwargs, 1.0)
    return call.op.func(*args, **kwargs)


def kept_mean(x: Tensor, mask: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean over kept elements, and their number."""
    count = mask.expand(x.shape).sum(list(dims), keepdim=True)
    total = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(list(dims), keepdim=True)
    return total / count.clamp(min=1), count


def kept_variance(x: Tensor, mask: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor]:
    """The variance and mean over kept elements."""
    mean, count = kept_mean(x, mask, dims)
    squares = torch.where(mask, (x - mean).square(), torch.zeros((), dtype=x.dtype, device=x.device))
    return squares.sum(list(dims), keepdim=True) / (count - correction).clamp(min=0), mean


def squeezed(out: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return out if keepdim else out.squeeze(tuple(dims))


@masked("mean", "nanmean")
def mean(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    dims = call.dims(call.get("dim"), x.dim())
    return squeezed(kept_mean(x, mask, dims)[0], dims, bool(call.get("keepdim", False)))


@masked("var", "std", "var_mean", "std_mean")
def variance(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
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


@masked("native_layer_norm", "_fused_rms_norm")
def layer_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    dims = list(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    if "rms" in call.op.func._schema.name:
        eps = call["eps"] if call["eps"] is not None else torch.finfo(x.dtype).eps
        rstd = (kept_mean(x.square(), mask, dims)[0] + eps).rsqrt()
        out = x * rstd
        return (out if args[2] is None else out * args[2]), rstd
    var, average = kept_variance(x, mask, dims, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = (x - average) * rstd
    weight, bias = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else None)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), average, rstd


@masked("native_group_norm")
def group_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    groups = call["group"]
    shape = (x.shape[0], groups, -1, *x.shape[2:])
    grouped, kept = x.reshape(shape), mask.expand(x.shape).reshape(shape)
    dims = list(range(2, grouped.dim()))
    var, average = kept_variance(grouped, kept, dims, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = ((grouped - average) * rstd).reshape(x.shape)
    affine = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = args[1], args[2]
    out = out if weight is None else out * weight.reshape(affine)
    out = out if bias is None else out + bias.reshape(affine)
    return out, average.flatten(1), rstd.flatten(1)


@masked("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit.no_stats")
def batch_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """Statistics of the batch are taken over kept positions; running ones are given."""
    x = args[0]
    mask = masker.mask(masker.ref(x))
    positions = [d for d in range(x.dim()) if d != 1]
    training = call.get("training", True)
    if not training or mask is None or all(mask.shape[d] == 1 for d in positions):
        return call.op.func(*args, **kwargs)
    var, average = kept_variance(x, mask.to(x.device), positions, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = (x - average) * rstd
    affine = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = call.get("weight"), call.get("bias")
    out = out if weight is None else out * args[1].reshape(affine)
    out = out if bias is None else out + args[2].reshape(affine)
    return out, average.flatten(), rstd.flatten()


def subject(masker: Masker, x: Tensor) -> Tensor:
    mask = masker.mask(masker.ref(x))
    return (torch.ones((1,) * x.dim(), dtype=torch.bool) if mask is None else mask).to(x.device)


@masked("_weight_norm_interface")
def weight_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """Zeros add nothing to a norm; a removed row's own norm is zero and must not divide."""
    v, g = args[0], args[1]
    dims = [d for d in range(v.dim()) if d != call.get("dim", 0)]
    mask = masker.mask(masker.ref(v))
    v = v if mask is None else v.masked_fill(~mask.to(v.device), 0.0)
    norm = v.square().sum(list(dims), keepdim=True).sqrt()
    return v * (g / norm.masked_fill(norm == 0, 1.0)), norm
