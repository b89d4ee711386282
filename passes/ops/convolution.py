"""Contractions: factors are unified along the contracted dimension, the free dimensions of each operand pass.

Batch dimensions of a product of activations are units of their own, heads, above the fine ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, factor
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.grouped_convolution import grouped_convolution
from fxprune.passes.ops.matmul import contract
from fxprune.passes.ops.registry import handles, rule
from fxprune.passes.ops.rewriting import argument, function_name, groups_left, with_argument
from fxprune.passes.ops.unify import unify

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


@rule(
    "aten::convolution",
    "aten::_convolution",
    "aten::conv*",
    "aten::mkldnn_convolution",
    "aten::cudnn_convolution*",
)
@rule(
    "aten::miopen_convolution*",
    "aten::conv_depthwise*",
    "aten::_conv_depthwise*",
    "aten::thnn_conv*",
    "aten::slow_conv*",
)
def convolution(call: RuleContext) -> Labels:
    """x (N, C, *), weight (O, C/g, *) or, transposed, (C, O/g, *), bias (O) -> (N, O, *)."""
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    groups, transposed = call.get("groups", 1), call.get("transposed", False)
    ndim = len(call.shape(x))
    w_shape = call.shape(weight)
    spatial = range(2, ndim)
    if groups == 1 and not transposed and by_position(call) and any(f.dims & set(spatial) for f in call.labels(x)):
        return pointwise_convolution(call)
    along_channels = slides(call, groups, transposed)
    ins = flat_channels(call, tuple(f for f in call.labels(x) if f not in along_channels))
    w = call.freeze_dims(call.labels(weight), range(2, len(w_shape)), "is a kernel's spatial dimension")
    outs = grouped_convolution(call, ins, call.shape(x), w, w_shape, groups, transposed)
    result = tuple([f.at(1, ndim) for f in outs])
    result += tuple([f for f in ins if not f.dims & {1, *spatial}]) + along_channels
    return with_bias(call, result, bias)


def slides(call: RuleContext, groups: int, transposed: bool) -> Labels:
    """Factors that a window slides along and leaves as wide as they are: entry by entry, what is removed is a zero to it.

    The rewriter lays such a dimension out at its original width, which it cannot do inside of an opaque module.
    """
    if groups != 1 or transposed or call.constraints.maker == "opaque":
        return NONE
    before, after = call.shape(call["input"]), call.shape(call.outputs[0])
    labels = call.labels(call["input"])
    return tuple(
        f
        for f in labels
        if len(f.major_to_minor) == 1 and f.major_to_minor[0] > 1 and before[f.major_to_minor[0]] == after[f.major_to_minor[0]]
    )


def by_position(call: RuleContext) -> bool:
    """Whether a convolution looks at one position at a time and visits all of them."""
    kernel = call.shape(call["weight"])[2:]
    return set(kernel) == {1} and set(call["stride"]) == {1} and not any(call["padding"])


def pointwise_convolution(call: RuleContext) -> Labels:
    """A matrix product at every position, so that what varies along space passes."""
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    ndim = len(call.shape(x))
    w = tuple(Factor(f.labels.flatten(1), f.major_to_minor) for f in call.labels(weight))
    places = [0, ndim, *range(2, ndim)]
    out = contract(call, call.labels(x), call.shape(x), places, w, call.shape(weight)[:2], [1, ndim], ndim + 1, [ndim])
    out = tuple([f.without(-1) for f in out])
    return with_bias(call, out, bias)


def with_bias(call: RuleContext, result: Labels, bias: TensorRef | None) -> Labels:
    """The labels of a convolution's result, with those of its bias (O)."""
    if bias is None:
        return result
    shape = call.shape(call.outputs[0])
    ndim = len(shape)
    lifted = tuple([f.at(1, ndim) for f in call.labels(bias)])
    return unify(call, result, shape, lifted, [1, shape[1]] + [1] * (ndim - 2))


def flat_channels(call: RuleContext, labels: Labels) -> Labels:
    """A window mixes positions: what varies along space must be one unit there."""
    result: list[Factor] = []
    for f in labels:
        if len(f.major_to_minor) == 1 and f.major_to_minor[0] < 2:
            result.append(f)
            continue
        space = [d for d in f.major_to_minor if d > 1]
        if space and len(space) == len(f.major_to_minor):
            call.constraints.freeze(f.labels, "is a spatial dimension of a convolution")
        else:
            result += call.collapse(f, space)
    return tuple(result)


def channel_dim(r: Rewriter, node: fx.Node) -> int:
    """The channel dimension of a convolution's input, which may come without a batch."""
    return len(r.before(r.result(node.args[0]))) - len(r.before(r.result(argument(node, 1, "weight")))) + 1


@handles("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def conv_groups(r: Rewriter, node: fx.Node) -> fx.Node | None:
    at = 8 if function_name(node) == "convolution" else 6
    given = argument(node, at, "groups", 1)
    groups = r.number_of(given)
    if groups == 1:
        return None
    left = groups_left(r, r.result(node.args[0]), channel_dim(r, node), groups)
    return with_argument(r, node, at, "groups", r.size(given, left))


@rule("torchvision::deform_conv2d")
def deform_conv2d(call: RuleContext) -> Labels:
    """A convolution whose sampling positions are computed: offsets and masks are read by place."""
    from fxprune.passes.ir.labels import along
    from fxprune.passes.ops.grouped_convolution import grouped_convolution

    x, weight, offset, mask, bias = (call[n] for n in ("input", "weight", "offset", "mask", "bias"))
    for ref in (offset, mask):
        call.freeze(call.labels(ref), "holds sampling offsets")
    groups, offset_groups = call["groups"], call["offset_groups"]
    ins = flat_channels(call, call.labels(x))
    if offset_groups > 1:
        for f in ins:
            call.constraints.keep_rows_equal(factor(f.labels.reshape(offset_groups, -1)))
    w = call.freeze_dims(call.labels(weight), [2, 3], "is a kernel's spatial dimension")
    outs = grouped_convolution(call, ins, call.shape(x), w, call.shape(weight), groups, False)
    result: Labels = tuple(along(f.labels.reshape(-1), 1, 4) for f in outs)
    if isinstance(bias, TensorRef):
        shape = call.shape(call.outputs[0])
        lifted = tuple(along(f.labels.reshape(-1), 1, 4) for f in call.labels(bias))
        result = unify(call, result, shape, lifted, [1, shape[1], 1, 1])
    return result
