"""Spatial ops: batch and channel dimensions pass, positions are mixed, but those of windows that do not overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxprune.passes.ir.labels import NONE, Factor, Labels, factor
from fxprune.passes.ops.call import RuleContext, frozen
from fxprune.passes.ops.index_maps import one_by_one
from fxprune.passes.ops.registry import OpSpec, register, spec_of
from fxprune.passes.ops.unify import unify

MIXED = "is mixed along a spatial dimension"


def resample(ndim: int) -> Callable[[RuleContext], list[Labels]]:
    """Pooling and interpolation over the last `ndim` dimensions."""

    def rule(call: RuleContext) -> list[Labels]:
        total = len(call.shape(call.first))
        labels = call.labels(call.first)
        pooled = any(d >= total - ndim for f in labels for d in f.dims) and not reads_positions(call)
        apart = {total - ndim + i: size for i, size in enumerate(windows_apart(call, ndim) if pooled else ())}
        for dim, size in apart.items():
            labels = tuple(g for f in labels for g in whole_windows(call, f, dim, size))
        labels = call.freeze_dims(labels, [d for d in range(total - ndim, total) if d not in apart], MIXED)
        return [labels] * len(call.outputs)

    return rule


def reads_positions(call: RuleContext) -> bool:
    """Whether anything is computed from the places of maxima, which are numbers among all that there are."""
    places = {ref.id for ref in call.outputs[1:]}
    for op in call.op_trace.ops if places else ():
        if any(ref.id in places for ref in op.inputs):
            if not spec_of(op).views:
                return True
            places |= {ref.id for ref in op.outputs}
    return False


def windows_apart(call: RuleContext, ndim: int) -> list[int]:
    """How wide the windows of pooling are along the last `ndim` dimensions, if all entries are in one of them; else none."""
    sizes = call.shape(call.first)[len(call.shape(call.first)) - ndim :]
    kernel = given(call, "kernel_size", ndim)
    stride = given(call, "stride", ndim) or kernel
    apart = not any(given(call, "padding", ndim)) and set(given(call, "dilation", ndim)) <= {1}
    if not kernel or kernel != stride or not apart or call.get("divisor_override") is not None:
        return []
    return kernel if all(n % k == 0 for n, k in zip(sizes, kernel, strict=True)) else []


def given(call: RuleContext, name: str, ndim: int) -> list[int]:
    value = call.get(name)
    listed = [] if value is None else [value] if isinstance(value, int) else list(value)
    return listed * ndim if len(listed) == 1 else listed


def whole_windows(call: RuleContext, f: Factor, dim: int, size: int) -> Labels:
    """The labels of windows along a dimension, each of which goes whole."""
    if dim not in f.dims or size == 1:
        return (f,)
    one_by_one(call, f, dim)
    windows = f.labels.unflatten(dim, (-1, size))
    head = windows.narrow(dim + 1, 0, 1)
    call.constraints.tie(windows, head, broadcast=True)
    return call.settle(factor(head.squeeze(dim + 1), f.major_to_minor), MIXED)


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
register("torchvision::nms", OpSpec(frozen("holds boxes and scores")))
