"""Normalisation layers: statistics are taken over kept entries; the affine parameters are tied to what they scale."""

from __future__ import annotations

from fxprune.passes.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.rules import Call, rule
from fxprune.passes.rules.pointwise import unify
from fxprune.passes.tape import Ref


@rule("aten::native_batch_norm", "aten::_native_batch_norm_legit*", "aten::cudnn_batch_norm", "aten::batch_norm")
@rule(
    "aten::_batch_norm_with_update*",
    "aten::_batch_norm_no_update",
    "aten::miopen_batch_norm",
    "aten::_batch_norm_impl*",
)
def batch_norm(call: Call) -> list[Labels]:
    """x (N, C, *) with weight, bias and running statistics (C)."""
    x = call["input"]
    shape = call.shape(x)
    ndim = len(shape)
    labels: list[Factor] = []
    for f in call.labels(x):
        if len(f.nest) == 1 and f.nest[0] == 1:
            labels.append(f)
            continue
        rest = [d for d in f.nest if d != 1]
        if len(rest) == len(f.nest):
            labels.append(f)  # per position: statistics run over it, entries stay where they are
        else:
            labels += call.collapse(f, rest)
    merged = tuple(labels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        ref = call.get(name)
        if isinstance(ref, Ref):
            merged = unify(call, merged, shape, per_channel(call, ref, ndim), [1, shape[1]] + [1] * (ndim - 2))
    return [merged] + [NONE] * (len(call.outputs) - 1)


def per_channel(call: Call, ref: Ref, ndim: int) -> Labels:
    return tuple([f.at(1, ndim) for f in call.labels(ref)])


@rule("aten::native_layer_norm", "aten::layer_norm", "aten::_fused_rms_norm", "aten::rms_norm")
def layer_norm(call: Call) -> list[Labels]:
    """Over the last dimensions, with weight and bias of their shape."""
    x = call["input"]
    shape = call.shape(x)
    labels = call.labels(x)
    normalised = range(len(shape) - len(call["normalized_shape"]), len(shape))
    for f in labels:
        if f.dims & set(normalised) and f.nest[-1] not in normalised:
            call.ties.same_columns(f)
    for name in ("weight", "bias"):
        ref = call.get(name)
        if isinstance(ref, Ref):
            labels = unify(call, labels, shape, *align(call.labels(ref), call.shape(ref), len(shape)))
    return [labels] + [NONE] * (len(call.outputs) - 1)


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(call: Call) -> list[Labels]:
    """x (N, C, *) in runs of C / groups channels: every group that is left keeps equally many."""
    x = call["input"]
    shape = call.shape(x)
    ndim = len(shape)
    groups = call.get("group", call.get("num_groups"))
    labels: list[Factor] = []
    for f in call.labels(x):
        if 1 in f.dims:
            for g in call.collapse(f, [d for d in f.nest if d != 1]):
                rows = g.labels.reshape(groups, -1)
                call.ties.keep_rows_equal(factor(rows))
                labels.append(g)
        else:  # per position: statistics run over it, entries stay where they are
            if len(f.nest) > 1 and f.nest[-1] < 2:
                call.ties.same_columns(f)
            labels.append(f)
    merged = tuple(labels)
    for name in ("weight", "bias"):
        ref = call.get(name)
        if isinstance(ref, Ref):
            merged = unify(call, merged, shape, per_channel(call, ref, ndim), [1, shape[1]] + [1] * (ndim - 2))
    return [merged] + [NONE] * (len(call.outputs) - 1)
