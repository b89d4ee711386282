"""Normalisation layers: statistics are taken over kept entries; the affine parameters are tied to what they scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.masking import MaskContext, as_returned, kept_elements, kept_mean, kept_variance
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.rewriting import RewriteContext, SizeArguments, argument, groups_left, with_argument
from fxprune.passes.ops.unify import unify


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
        ref = call.tensor(name)
        if ref is not None:
            merged = unify(call, merged, shape, per_channel(call, ref, ndim), [1, shape[1]] + [1] * (ndim - 2))
    trains = call.get("training", not call.op.func._schema.name.endswith("no_training"))
    alone = math.prod(n for d, n in enumerate(shape) if d != 1 and not any(d in f.dims for f in merged)) == 1
    for f in merged if trains and alone else ():  # torch refuses channels of one value
        if 1 not in f.dims:
            call.constraints.keep_two_per_row(f.rows())
    if not trains:  # there are no statistics, whatever shape they have on the meta device
        return [merged] + [NONE] * (len(call.outputs) - 1)
    channels = tuple([f.at(0, 1) for f in merged if f.major_to_minor == (1,)])
    return [merged] + [channels if call.shape(ref) == (shape[1],) else NONE for ref in call.outputs[1:]]


def per_channel(call: RuleContext, ref: TensorRef, ndim: int) -> Labels:
    return tuple([f.at(1, ndim) for f in call.labels(ref)])


def layer_norm(call: RuleContext) -> list[Labels]:
    """Over the last dimensions, with weight and bias of their shape."""
    x = call["input"]
    shape = call.shape(x)
    labels = call.labels(x)
    normalised = range(len(shape) - len(call["normalized_shape"]), len(shape))
    call.constraints.keep_copies(f for f in labels if f.dims & set(normalised))
    for f in labels:
        if f.dims & set(normalised) and f.major_to_minor[-1] not in normalised:
            call.constraints.keep_columns_equal(f)
    for name in ("weight", "bias"):
        ref = call.tensor(name)
        if ref is not None:
            labels = unify(call, labels, shape, *align(call.labels(ref), call.shape(ref), len(shape)))
    statistics = tuple([f for f in labels if not f.dims & set(normalised)])
    return [labels] + [statistics] * (len(call.outputs) - 1)


def group_norm(call: RuleContext) -> list[Labels]:
    """x (N, C, *) in runs of C / groups channels: every group that is left keeps equally many."""
    x = call["input"]
    shape = call.shape(x)
    ndim = len(shape)
    groups = call.get("group", call.get("num_groups"))
    labels: list[Factor] = []
    call.constraints.keep_copies(f for f in call.labels(x) if f.dims - {0})
    for f in call.labels(x):
        if 1 in f.dims:
            for g in call.collapse(f, [d for d in f.major_to_minor if d != 1]):
                rows = g.labels.reshape(groups, -1)
                call.constraints.keep_rows_equal(factor(rows))
                given = {d for h in call.labels(x) for d in h.dims}
                if math.prod(n for d, n in enumerate(shape) if d not in given) == 1:  # torch refuses groups of one value
                    call.constraints.keep_two_per_row(rows)
                labels.append(g)
        else:  # per position: statistics run over it, entries stay where they are
            if len(f.major_to_minor) > 1 and f.major_to_minor[-1] < 2:
                call.constraints.keep_columns_equal(f)
            labels.append(f)
    merged = tuple(labels)
    for name in ("weight", "bias"):
        ref = call.tensor(name)
        if ref is not None:
            merged = unify(call, merged, shape, per_channel(call, ref, ndim), [1, shape[1]] + [1] * (ndim - 2))
    statistics = call.outputs[1:]
    if any(call.used(ref) for ref in statistics):  # of images and groups
        merged = call.freeze_dims(merged, [0, 1], "has the statistics of its groups read")
    return [merged] + [NONE] * len(statistics)


def weight_norm(call: RuleContext) -> list[Labels]:
    """v (O, *) normalised over all but one dimension, times g: (w, norms)."""
    v, g = call.inputs
    labels = unify(call, call.labels(v), call.shape(v), call.labels(g), call.shape(g))
    call.constraints.keep_copies(labels)
    for f in labels:
        call.constraints.keep_columns_equal(f)
    return [labels] + [call.labels(g)] * (len(call.outputs) - 1)


def group_norm_groups(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    given = argument(node, 1, "num_groups")
    return with_argument(r, node, 1, "num_groups", r.size(given, groups_left(r, r.result(node.args[0]), 1, r.number_of(given))))


def native_group_norm(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """(x, weight, bias, N, C, positions, groups, eps)"""
    source = r.result(node.args[0])
    args = [r.argument(a) for a in node.args]
    left = r.after(source)
    for at, wanted in ((3, left[0]), (4, left[1]), (5, math.prod(left[2:]))):
        args[at] = r.size(node.args[at], wanted)
    args[6] = r.size(node.args[6], groups_left(r, source, 1, r.number_of(node.args[6])))
    return r.emit(node, args, r.argument(dict(node.kwargs)))


def masked_layer_norm(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], kept_elements(run, args[0])
    dims = list(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    var, average = kept_variance(x, mask, dims, 0)
    rstd = (var + call["eps"]).rsqrt()
    return as_returned(call, affine((x - average) * rstd, *args[2:4]), average, rstd)


def masked_rms_norm(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], kept_elements(run, args[0])
    dims = list(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    eps = call["eps"] if call["eps"] is not None else torch.finfo(x.dtype).eps
    rstd = (kept_mean(x.square(), mask, dims)[0] + eps).rsqrt()
    return as_returned(call, affine(x * rstd, *args[2:3]), rstd)


def affine(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """A normalised value, scaled and shifted."""
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def per_channel_affine(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The same with a weight and a bias for each channel, dimension 1."""
    shape = (-1, *[1] * (x.dim() - 2))
    return affine(x, *(None if v is None else v.reshape(shape) for v in (weight, bias)))


def masked_group_norm(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], kept_elements(run, args[0])
    groups = call.get("group", call.get("num_groups"))
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    grouped, kept = x.reshape(shape), mask.expand(x.shape).reshape(shape)
    dims = list(range(2, grouped.dim()))
    var, average = kept_variance(grouped, kept, dims, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = ((grouped - average) * rstd).reshape(x.shape)
    out = per_channel_affine(out, *(args[1:3] if "group" in call.named else args[2:4]))
    return as_returned(call, out, average.flatten(1), rstd.flatten(1))


def masked_batch_norm(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """Statistics of the batch are taken over kept positions; running ones are given."""
    x = args[0]
    mask = run.mask(run.ref(x))
    positions = [d for d in range(x.dim()) if d != 1]
    training = call.get("training", True)
    if not training or mask is None or all(mask.shape[d] == 1 for d in positions):
        return call.op.func(*args, **kwargs)
    var, average = kept_variance(x, mask.to(x.device), positions, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = per_channel_affine((x - average) * rstd, args[1], args[2])
    return as_returned(call, out, average.flatten(), rstd.flatten())


def masked_weight_norm(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """Zeros add nothing to a norm; a removed row's own norm is zero and must not divide."""
    v, g = args[0], args[1]
    dims = [d for d in range(v.dim()) if d != call.get("dim", 0)]
    mask = run.mask(run.ref(v))
    v = v if mask is None else v.masked_fill(~mask.to(v.device), 0.0)
    norm = v.square().sum(list(dims), keepdim=True).sqrt()
    return as_returned(call, v * (g / norm.masked_fill(norm == 0, 1.0)), norm)


BATCH_NORM = OpSpec(batch_norm, masked=masked_batch_norm, normalizes=True)
register(
    "native_batch_norm _native_batch_norm_legit* cudnn_batch_norm batch_norm _batch_norm_with_update* miopen_batch_norm"
    " _batch_norm_impl*",
    BATCH_NORM,
)
register("_batch_norm_no_update", dataclasses.replace(BATCH_NORM, masked=None))  # statistics are given
NORMALIZED = SizeArguments(1, ("normalized_shape",), lambda args, kwargs, ndim, count: ndim - count)
LAYER_NORM = OpSpec(layer_norm, sizes=NORMALIZED, masked=masked_layer_norm, normalizes=True)
register("native_layer_norm layer_norm", LAYER_NORM)
register("_fused_rms_norm rms_norm", dataclasses.replace(LAYER_NORM, masked=masked_rms_norm))
GROUP_NORM = OpSpec(group_norm, group_norm_groups, masked=masked_group_norm, normalizes=True)
register("group_norm", GROUP_NORM)
register("native_group_norm", dataclasses.replace(GROUP_NORM, rewrite=native_group_norm))
register("_weight_norm_interface _weight_norm", OpSpec(weight_norm, masked=masked_weight_norm))
