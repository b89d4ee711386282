"""Spatial ops: batch and channel dimensions pass, positions are mixed."""

from __future__ import annotations

from fxprune.passes.labels import NONE, Labels, factor
from fxprune.passes.rules import Call, rule
from fxprune.passes.rules.pointwise import unify
from fxprune.passes.tape import Ref

MIXED = "is mixed along a spatial dimension"


@rule(
    "aten::avg_pool*",
    "aten::max_pool*",
    "aten::adaptive_*",
    "aten::_adaptive_*",
    "aten::upsample_*",
    "aten::_upsample_*",
)
@rule("aten::fractional_max_pool*", "aten::mkldnn_max_pool*", "aten::quantized_max_pool*", "aten::max_unpool*")
def resample(call: Call) -> list[Labels]:
    """Pooling and interpolation over the trailing dimensions that change size; equal sizes are told by the op's name."""
    x = call.first
    ndim = len(call.shape(x))
    name = call.op.func._schema.name
    spatial = next((n for n in (3, 2, 1) if f"{n}d" in name), max(1, ndim - 2))
    labels = call.freeze_dims(call.labels(x), range(ndim - spatial, ndim), MIXED)
    return [labels] * len(call.outputs)


@rule("aten::grid_sampler*", "aten::_grid_sampler*")
def grid_sample(call: Call) -> Labels:
    """x (N, C, *) sampled at a grid (N, *, d)."""
    x, grid = call["input"], call["grid"]
    ndim = len(call.shape(x))
    call.freeze(call.labels(grid), "holds coordinates")
    return call.freeze_dims(call.labels(x), [0, *range(2, ndim)], MIXED)


@rule("torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def roi(call: Call) -> list[Labels]:
    """x (N, C, H, W) -> (boxes, C, h, w); position-sensitive ones read channels by place."""
    x = call.first
    for ref in call.inputs[1:]:
        call.freeze(call.labels(ref), "holds boxes")
    dims = [0, 1, 2, 3] if "::ps_" in call.op.func._schema.name else [0, 2, 3]
    return [call.freeze_dims(call.labels(x), dims, MIXED)] + [NONE] * (len(call.outputs) - 1)


@rule("torchvision::nms")
def nms(call: Call) -> Labels:
    for ref in call.inputs:
        call.freeze(call.labels(ref), "holds boxes and scores")
    return NONE


@rule("torchvision::deform_conv2d")
def deform_conv2d(call: Call) -> Labels:
    """A convolution whose sampling positions are computed: offsets and masks are read by place."""
    from fxprune.passes.labels import along
    from fxprune.passes.rules.contraction import flat_channels, grouped_convolution

    x, weight, offset, mask, bias = (call[n] for n in ("input", "weight", "offset", "mask", "bias"))
    for ref in (offset, mask):
        call.freeze(call.labels(ref), "holds sampling offsets")
    groups, offset_groups = call["groups"], call["offset_groups"]
    ins = flat_channels(call, call.labels(x))
    if offset_groups > 1:
        for f in ins:
            call.ties.keep_rows_equal(factor(f.labels.reshape(offset_groups, -1)))
    w = call.freeze_dims(call.labels(weight), [2, 3], "is a kernel's spatial dimension")
    outs = grouped_convolution(call, ins, call.shape(x), w, call.shape(weight), groups, False)
    result: Labels = tuple(along(f.labels.reshape(-1), 1, 4) for f in outs)
    if isinstance(bias, Ref):
        shape = call.shape(call.outputs[0])
        lifted = tuple(along(f.labels.reshape(-1), 1, 4) for f in call.labels(bias))
        result = unify(call, result, shape, lifted, [1, shape[1], 1, 1])
    return result
