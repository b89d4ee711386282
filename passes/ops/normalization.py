"""Normalisation layers: statistics are taken over kept entries; the affine parameters are tied to what they scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.masking import kept_mean, kept_variance, subject
from fxprune.passes.ops.registry import handles, masked, rule
from fxprune.passes.ops.rewriting import argument, groups_left, resized, with_argument
from fxprune.passes.ops.unify import unify

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter
    from fxprune.passes.verification.masked_model import MaskedRun


@rule("aten::native_batch_norm", "aten::_native_batch_norm_legit*", "aten::cudnn_batch_norm", "aten::batch_norm")
@rule(
    "aten::_batch_norm_with_update*",
    "aten::_batch_norm_no_update",
    "aten::miopen_batch_norm",
    "aten::_batch_norm_impl*",
)
def batch_norm(call: RuleContext) -> list[Labels]:
    """x (N, C, *) with weight, bias and running statistics (C)."""
    x = call["input"]
    shape = call.shape(x)
    ndim = len(shape)
    labels: list[Factor] = []
    for f in call.labels(x):
        if len(f.major_to_minor) == 1 and f.major_to_minor[0] == 1:
            labels.append(f)
            continue
        rest = [d for d in f.major_to_minor if d != 1]
        if len(rest) == len(f.major_to_minor):
            labels.append(f)  # per position: statistics run over it, entries stay where they are
        else:
            labels += call.collapse(f, rest)
    merged = tuple(labels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        ref = call.get(name)
        if isinstance(ref, TensorRef):
            merged = unify(call, merged, shape, per_channel(call, ref, ndim), [1, shape[1]] + [1] * (ndim - 2))
    return [merged] + [NONE] * (len(call.outputs) - 1)


def per_channel(call: RuleContext, ref: TensorRef, ndim: int) -> Labels:
    return tuple([f.at(1, ndim) for f in call.labels(ref)])


@rule("aten::native_layer_norm", "aten::layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(call: RuleContext) -> list[Labels]:
    """Over the last dimensions, with weight and bias of their shape."""
    x = call["input"]
    shape = call.shape(x)
    labels = call.labels(x)
    normalised = range(len(shape) - len(call["normalized_shape"]), len(shape))
    for f in labels:
        if f.dims & set(normalised) and f.major_to_minor[-1] not in normalised:
            call.constraints.same_columns(f)
    for name in ("weight", "bias"):
        ref = call.get(name)
        if isinstance(ref, TensorRef):
            labels = unify(call, labels, shape, *align(call.labels(ref), call.shape(ref), len(shape)))
    return [labels] + [NONE] * (len(call.outputs) - 1)


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(call: RuleContext) -> list[Labels]:
    """x (N, C, *) in runs of C / groups channels: every group that is left keeps equally many."""
    x = call["input"]
    shape = call.shape(x)
    ndim = len(shape)
    groups = call.get("group", call.get("num_groups"))
    labels: list[Factor] = []
    for f in call.labels(x):
        if 1 in f.dims:
            for g in call.collapse(f, [d for d in f.major_to_minor if d != 1]):
                rows = g.labels.reshape(groups, -1)
                call.constraints.keep_rows_equal(factor(rows))
                labels.append(g)
        else:  # per position: statistics run over it, entries stay where they are
            if len(f.major_to_minor) > 1 and f.major_to_minor[-1] < 2:
                call.constraints.same_columns(f)
            labels.append(f)
    merged = tuple(labels)
    for name in ("weight", "bias"):
        ref = call.get(name)
        if isinstance(ref, TensorRef):
            merged = unify(call, merged, shape, per_channel(call, ref, ndim), [1, shape[1]] + [1] * (ndim - 2))
    return [merged] + [NONE] * (len(call.outputs) - 1)


@rule("aten::_weight_norm_interface", "aten::_weight_norm")
def weight_norm(call: RuleContext) -> list[Labels]:
    """v (O, *) normalised over all but one dimension, times g: (w, norms)."""
    from fxprune.passes.ops.unify import unify

    v, g = call.inputs
    labels = unify(call, call.labels(v), call.shape(v), call.labels(g), call.shape(g))
    for f in labels:
        call.constraints.same_columns(f)
    return [labels] + [call.labels(g)] * (len(call.outputs) - 1)


@handles("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def normalized_shape(r: Rewriter, node: fx.Node) -> fx.Node | None:
    given = argument(node, 1, "normalized_shape")
    given = list(given) if isinstance(given, tuple | list) else [given]
    wanted = r.after(r.result(node.args[0]))[-len(given) :]
    return with_argument(r, node, 1, "normalized_shape", tuple(resized(r, given, wanted)))


@handles("group_norm")
def group_norm_groups(r: Rewriter, node: fx.Node) -> fx.Node | None:
    given = argument(node, 1, "num_groups")
    return with_argument(r, node, 1, "num_groups", r.size(given, groups_left(r, r.result(node.args[0]), 1, r.number_of(given))))


@handles("native_group_norm")
def native_group_norm(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """(x, weight, bias, N, C, positions, groups, eps)"""
    source = r.result(node.args[0])
    args = [r.argument(a) for a in node.args]
    args[4] = r.size(node.args[4], r.after(source)[1])
    args[6] = r.size(node.args[6], groups_left(r, source, 1, r.number_of(node.args[6])))
    return r.emit(node, args, r.argument(dict(node.kwargs)))


@masked("native_layer_norm", "_fused_rms_norm")
def masked_layer_norm(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
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
def masked_group_norm(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
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
def masked_batch_norm(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
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


@masked("_weight_norm_interface")
def masked_weight_norm(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    """Zeros add nothing to a norm; a removed row's own norm is zero and must not divide."""
    v, g = args[0], args[1]
    dims = [d for d in range(v.dim()) if d != call.get("dim", 0)]
    mask = masker.mask(masker.ref(v))
    v = v if mask is None else v.masked_fill(~mask.to(v.device), 0.0)
    norm = v.square().sum(list(dims), keepdim=True).sqrt()
    return v * (g / norm.masked_fill(norm == 0, 1.0)), norm
