"""Convolutions: contractions over channels, within groups; a window along a dimension that shrinks slides at full width."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, along, factor
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.masking import MaskContext, products_with_zeros, with_zeros
from fxprune.passes.ops.matmul import contract
from fxprune.passes.ops.registry import OpSpec, Product, find_node, register, spec_of
from fxprune.passes.ops.rewriting import RewriteContext, argument, groups_left, spread_out, with_argument
from fxprune.passes.ops.unify import KEPT_WHOLE, unify


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
    w = kernel(call, weight)
    outs = grouped_convolution(call, ins, call.shape(x), w, w_shape, groups, transposed)
    result = tuple([f.at(1, ndim) for f in outs])
    result += tuple([f for f in ins if not f.dims & {1, *spatial}]) + along_channels
    return with_bias(call, result, bias)


def convolution_backward(call: RuleContext) -> list[Labels]:
    """Gradient (N, O, *), x (N, C, *) and weight of a convolution -> gradients of x, of the weight and of the bias (O).

    That of x is a convolution by the same weight, transposed where the other one is not.
    """
    gradient, x, weight = call["grad_output"], call["input"], call["weight"]
    ndim, w_shape = len(call.shape(x)), call.shape(weight)
    w = call.freeze_dims(call.labels(weight), range(2, len(w_shape)), "is a kernel's spatial dimension")
    lines = []
    for ref, transposed in ((gradient, not call["transposed"]), (x, call["transposed"])):
        ins = flat_channels(call, call.labels(ref))
        outs = grouped_convolution(call, ins, call.shape(ref), w, w_shape, call["groups"], transposed)
        lines.append((ins, outs))
    (passed, ins), (_, outs) = lines
    of_x = tuple([f.at(1, ndim) for f in ins]) + tuple([f for f in passed if not f.dims & {1, *range(2, ndim)}])
    found = of_x, w, tuple([f.at(0, 1) for f in outs])
    return [labels for labels, wanted in zip(found, call["output_mask"], strict=True) if wanted]


def slides(call: RuleContext, groups: int, transposed: bool) -> Labels:
    """Factors that a window slides along and leaves as wide as they are: entry by entry, what is removed is a zero to it.

    The rewriter lays such a dimension out at its original width, which it cannot do inside of an opaque module.
    """
    if groups != 1 or transposed or call.state.opaque:
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


def kernel(call: RuleContext, weight: TensorRef) -> Labels:
    """A weight's labels along channels; what varies along space as well, as in a kernel that is computed, is one unit there."""
    return call.freeze_dims(call.labels(weight), range(2, len(call.shape(weight))), "is a kernel's spatial dimension")


def deform_conv2d(call: RuleContext) -> Labels:
    """A convolution whose sampling positions are computed: offsets and masks are read by place."""
    x, weight, offset, mask, bias = (call[n] for n in ("input", "weight", "offset", "mask", "bias"))
    for ref in (offset, mask):
        call.freeze(call.labels(ref), "holds sampling offsets")
    groups, offset_groups = call["groups"], call["offset_groups"]
    ins = flat_channels(call, call.labels(x))
    if offset_groups > 1:
        for f in ins:
            call.constraints.keep_rows_equal(factor(f.labels.reshape(offset_groups, -1)))
    w = kernel(call, weight)
    outs = grouped_convolution(call, ins, call.shape(x), w, call.shape(weight), groups, False)
    result: Labels = tuple(along(f.labels.reshape(-1), 1, 4) for f in outs)
    return with_bias(call, result, bias)


def grouped_convolution(
    call: RuleContext, ins: Labels, x_shape: Sequence[int], w: Labels, w_shape: Sequence[int], groups: int, transposed: bool
) -> Labels:
    """Ties of input channels to the weight, per group; returns the labels (O,) of the output channels.

    Index space: (batch, group, outputs per group, inputs per group).
    """
    channels = x_shape[1]
    if groups == 1 and all(f.major_to_minor == (1,) for f in ins) and all(len(f.major_to_minor) == 1 for f in w):
        per_in = 0 if transposed else 1
        x_line = tuple([f.at(0, 1) for f in ins])
        w_line = tuple([f.at(0, 1) for f in w if f.major_to_minor[0] == per_in])
        call.constraints.keep_copies(unify(call, x_line, [channels], w_line, [channels]))
        return tuple([f for f in w if f.major_to_minor[0] == 1 - per_in])
    per_in = channels // groups
    per_out = w_shape[1] if transposed else w_shape[0] // groups
    if per_in == per_out == 1 and len(ins) == len(w) == 1 and ins[0].major_to_minor == (1,) and w[0].major_to_minor == (0,):
        call.constraints.tie_vectors(ins[0], w[0])  # a group is one channel
        return w
    x_part: list[Factor] = []
    for f in ins:
        if 1 in f.dims:
            nest = [n for d in f.major_to_minor for n in ((0,) if d == 0 else (1, 3))]
            x_part.append(factor(f.labels.reshape(f.labels.shape[0], groups, 1, per_in), nest))
    w_part: list[Factor] = []
    for f in w:
        rows = f.labels.shape[0] > 1
        array = f.labels.flatten(1).narrow(1, 0, 1) if f.labels.shape[1] == 1 else f.labels.reshape(f.labels.shape[:2])
        array = array.reshape(groups if rows else 1, -1 if rows else 1, array.shape[1])
        array = array.transpose(1, 2) if transposed else array
        w_part.append(factor(array.unsqueeze(0)))
    w_size = [1, groups, per_out, per_in]
    if groups > 1 and (per_in == 1 or per_out == 1) and any(1 in f.dims for f in x_part):
        return whole_groups(call, x_part, w_part, w_size)
    x_size = [x_shape[0], groups, 1, per_in]
    for f in [*x_part, *w_part]:
        call.constraints.keep_rows_equal(f)
    if groups > 1:
        whole_or_part(call, x_part, w_part, groups)
    merged = unify(call, tuple(x_part), x_size, tuple(w_part), w_size)
    call.constraints.keep_copies(f for f in merged if 3 in f.dims)
    return tuple(factor(f.labels[:1].expand(1, groups, per_out, -1)[..., 0].reshape(-1)) for f in merged if f.dims <= {1, 2})


def whole_or_part(call: RuleContext, x: list[Factor], w: list[Factor], groups: int) -> None:
    """A group goes with its inputs and its outputs, or keeps some of both."""
    labels = call.constraints.fresh(groups).reshape(1, groups, 1, 1)
    for f in [*x, *w]:
        if 1 in f.dims:
            call.constraints.tie_to_rows(labels, f.labels)
    if not any(1 in f.dims for f in x):
        call.constraints.freeze(labels, "is a group of a convolution whose inputs are all kept")


def whole_groups(call: RuleContext, x: list[Factor], w: list[Factor], size: Sequence[int]) -> Labels:
    """One channel in or out of each group (depthwise): a group goes with its channels, whole."""
    groups = size[1]
    arrays = [f.labels.narrow(0, 0, 1).expand(1, groups, -1, -1).reshape(groups, -1) for f in [*x, *w]]
    for f in x:
        call.constraints.tie(f.labels, f.labels.narrow(0, 0, 1))
    if not arrays:
        return NONE
    if not any(f.dims & {1, 2} for f in w):  # the weight keeps all that it has for each group
        for array in arrays:
            call.constraints.freeze(array, KEPT_WHOLE)
        return NONE
    lead = arrays[0][:, :1]
    for array in arrays:
        call.constraints.tie(array, lead.expand_as(array))
    outs = next(f for f in w if f.dims & {1, 2})
    return (factor(outs.labels.expand(1, groups, size[2], -1)[..., 0].reshape(-1)),)


def products(call: OpView) -> Iterator[Product]:
    summed, kept = (0, 1) if call.get("transposed", False) else (1, 0)
    yield Product(call["weight"], call["input"], summed, kept, 1, 1, call.get("groups", 1), call.tensor("bias"))


def groups_of(call: OpView) -> tuple[TensorRef, int]:
    return call["weight"], call.get("groups", 1)


def macs(call: OpView) -> int:
    """One for each entry of the weight, each position and each image."""
    x, out = call.shape(call["input"]), call.shape(call.outputs[0])
    positions = x[2:] if call.get("transposed", False) else out[2:]
    return math.prod(call.shape(call["weight"])) * math.prod(positions) * x[0]


# -- rewriting ---------------------------------------------------------------------------------------------------------


def regroup(at: int) -> Callable[[RewriteContext, fx.Node], fx.Node | None]:
    """Groups that go whole change their number, which is the argument in position `at`."""

    def rewrite(r: RewriteContext, node: fx.Node) -> fx.Node | None:
        given = argument(node, at, "groups", 1)
        groups = r.number_of(given)
        if groups == 1:
            return None
        x, weight = r.result(argument(node, 0, "input")), r.result(argument(node, 1, "weight"))
        channels = len(r.before(x)) - len(r.before(weight)) + 1  # it may come without a batch
        return with_argument(r, node, at, "groups", r.size(given, groups_left(r, x, channels, groups)))

    return rewrite


def sliding(op_trace: OpTrace) -> dict[int, int]:
    """The nodes that convolve with a kernel of more than one entry, and over how many dimensions they slide."""
    found = {}
    for op in op_trace.ops:
        if spec_of(op) is CONVOLUTION:
            kernel = op_trace.shape(op.args[1])[2:]
            if set(kernel) != {1}:
                found[op.node] = len(kernel)
    return found


def slid(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """The node at the original width of the dimensions that a window slides along; None where nothing was removed there.

    What stays has other neighbours than before. So the tensor is laid out at its original width, with zeros for what is
    removed, as the masked original has them; it is convolved there, and the result is sliced (ECA's gate over channels).
    """
    spatial = r.sliding.get(r.capture.index[node])
    if spatial is None or not node.args or not isinstance(node.args[0], fx.Node) or str(node.target) in r.capture.opaque:
        return None
    source, target = r.result(node.args[0]), r.result(node)
    ndim = len(r.before(source))
    dims = [d for d in range(ndim - spatial, ndim) if r.after(source)[d] < r.before(source)[d]]
    if not dims:
        return None
    wide = r.new[node.args[0]]
    for d in dims:
        wide = spread_out(r, wide, source, d)
    rewrite, narrow = find_node(node).rewrite, r.new.pop(node.args[0], None)
    r.new[node.args[0]] = wide
    made = None if rewrite is None else rewrite(r, node)  # groups may go, too
    made = made or r.emit(node, r.argument(tuple(node.args)), r.argument(dict(node.kwargs)))
    del r.new[node.args[0]]
    r.new.update({node.args[0]: narrow} if narrow is not None else {})
    for d in dims:
        made = r.graph.call_method("index_select", (made, d, r.constant(r.positions(target, d))))
    return made


def convolution_with_zeros(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """The masked form: along positions, which a window mixes, it does not help that the weight is zero for others' channels."""
    mask = run.mask(call.op.inputs[0])
    along_positions = mask is not None and any(size > 1 for size in mask.shape[2:])
    return (with_zeros if along_positions else products_with_zeros)(run, call, args, kwargs)


CONVOLUTION = OpSpec(convolution, regroup(8), masked=convolution_with_zeros, products=products, groups=groups_of, macs=macs)
register(
    "convolution _convolution mkldnn_convolution cudnn_convolution* miopen_convolution* conv_depthwise* _conv_depthwise*"
    " thnn_conv* slow_conv*",
    CONVOLUTION,
)
register("convolution_backward", OpSpec(convolution_backward, masked=with_zeros))
register(
    "conv1d conv2d conv3d",
    dataclasses.replace(CONVOLUTION, rewrite=regroup(6)),
    functions="conv_transpose1d conv_transpose2d conv_transpose3d",
)
register("torchvision::deform_conv2d", OpSpec(deform_conv2d, groups=groups_of))
