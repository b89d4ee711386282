"""Spatial ops: batch and channel dimensions pass, positions are mixed."""

from __future__ import annotations

from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import rule

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
def resample(call: RuleContext) -> list[Labels]:
    """Pooling and interpolation over the trailing dimensions that change size; equal sizes are told by the op's name."""
    x = call.first
    ndim = len(call.shape(x))
    name = call.op.func._schema.name
    spatial = next((n for n in (3, 2, 1) if f"{n}d" in name), max(1, ndim - 2))
    labels = call.freeze_dims(call.labels(x), range(ndim - spatial, ndim), MIXED)
    return [labels] * len(call.outputs)


@rule("aten::grid_sampler*", "aten::_grid_sampler*")
def grid_sample(call: RuleContext) -> Labels:
    """x (N, C, *) sampled at a grid (N, *, d)."""
    x, grid = call["input"], call["grid"]
    ndim = len(call.shape(x))
    call.freeze(call.labels(grid), "holds coordinates")
    return call.freeze_dims(call.labels(x), [0, *range(2, ndim)], MIXED)


@rule("torchvision::roi_align", "torchvision::roi_pool", "torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def roi(call: RuleContext) -> list[Labels]:
    """x (N, C, H, W) -> (boxes, C, h, w); position-sensitive ones read channels by place."""
    x = call.first
    for ref in call.inputs[1:]:
        call.freeze(call.labels(ref), "holds boxes")
    dims = [0, 1, 2, 3] if "::ps_" in call.op.func._schema.name else [0, 2, 3]
    return [call.freeze_dims(call.labels(x), dims, MIXED)] + [NONE] * (len(call.outputs) - 1)


@rule("torchvision::nms")
def nms(call: RuleContext) -> Labels:
    for ref in call.inputs:
        call.freeze(call.labels(ref), "holds boxes and scores")
    return NONE
