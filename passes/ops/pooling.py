"""Spatial ops: batch and channel dimensions pass, positions are mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.unify import unify

MIXED = "is mixed along a spatial dimension"


def resample(ndim: int) -> Callable[[RuleContext], list[Labels]]:
    """Pooling and interpolation over the last `ndim` dimensions."""

    def rule(call: RuleContext) -> list[Labels]:
        total = len(call.shape(call.first))
        labels = call.freeze_dims(call.labels(call.first), range(total - ndim, total), MIXED)
        return [labels] * len(call.outputs)

    return rule


def unpool(ndim: int) -> Callable[[RuleContext], Labels]:
    """x (*, positions) written to places along the last `ndim` dimensions, which are the contents of another tensor."""

    def rule(call: RuleContext) -> Labels:
        total = len(call.shape(call.first))
        labels: Labels = NONE
        shape = [1] * total
        for ref in call.inputs[:2]:
            passed = call.freeze_dims(call.labels(ref), range(total - ndim, total), MIXED)
            size = [n if d < total - ndim else 1 for d, n in enumerate(call.shape(ref))]
            labels = unify(call, labels, shape, passed, size)
            shape = [max(a, b) for a, b in zip(shape, size, strict=True)]
        return labels

    return rule


def grid_sample(call: RuleContext) -> Labels:
    """x (N, C, *) sampled at a grid (N, *, d)."""
    x, grid = call["input"], call["grid"]
    ndim = len(call.shape(x))
    call.freeze(call.labels(grid), "holds coordinates")
    return call.freeze_dims(call.labels(x), [0, *range(2, ndim)], MIXED)


def from_boxes(dims: Sequence[int]) -> Callable[[RuleContext], list[Labels]]:
    """x (N, C, H, W) -> (boxes, C, h, w), with the dimensions of x that are read by place."""

    def rule(call: RuleContext) -> list[Labels]:
        for ref in call.inputs[1:]:
            call.freeze(call.labels(ref), "holds boxes")
        return [call.freeze_dims(call.labels(call.first), dims, MIXED)] + [NONE] * (len(call.outputs) - 1)

    return rule


def nms(call: RuleContext) -> list[Labels]:
    return call.freeze_inputs("holds boxes and scores")


for ndim in (1, 2, 3):
    resampling = (
        "avg_pool{0}d* max_pool{0}d* adaptive_avg_pool{0}d* adaptive_max_pool{0}d* _adaptive_avg_pool{0}d*"
        " mkldnn_adaptive_avg_pool{0}d*"
        " fractional_max_pool{0}d* mkldnn_max_pool{0}d* quantized_max_pool{0}d*"
        " upsample_nearest{0}d* _upsample_nearest_exact{0}d*"
    )
    register(resampling.format(ndim), OpSpec(resample(ndim)))
    register(f"max_unpool{ndim}d", OpSpec(unpool(ndim)))
register("upsample_linear1d*", OpSpec(resample(1)))
register(
    "upsample_bilinear2d* upsample_bicubic2d* _upsample_bilinear2d* _upsample_bicubic2d* _upsample_lanczos2d*",
    OpSpec(resample(2)),
)
register("upsample_trilinear3d*", OpSpec(resample(3)))
register("grid_sampler* _grid_sampler*", OpSpec(grid_sample))
register("torchvision::roi_align torchvision::roi_pool", OpSpec(from_boxes([0, 2, 3])))
register("torchvision::ps_roi_align torchvision::ps_roi_pool", OpSpec(from_boxes([0, 1, 2, 3])))
register("torchvision::nms", OpSpec(nms))
