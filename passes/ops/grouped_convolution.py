"""Contractions: factors are unified along the contracted dimension, the free dimensions of each operand pass.

Batch dimensions of a product of activations are units of their own, heads, above the fine ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.passes.ir.labels import NONE, Factor, Labels, factor
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.unify import unify


def grouped_convolution(
    call: RuleContext,
    ins: Labels,
    x_shape: Sequence[int],
    w: Labels,
    w_shape: Sequence[int],
    groups: int,
    transposed: bool,
) -> Labels:
    """Ties of input channels to the weight, per group; returns the labels (O,) of the output channels.

    Index space: (batch, group, outputs per group, inputs per group).
    """
    channels = x_shape[1]
    if groups == 1 and all(f.major_to_minor == (1,) for f in ins) and all(len(f.major_to_minor) == 1 for f in w):
        per_in = 0 if transposed else 1
        x_line = tuple([f.at(0, 1) for f in ins])
        w_line = tuple([f.at(0, 1) for f in w if f.major_to_minor[0] == per_in])
        unify(call, x_line, [channels], w_line, [channels])
        return tuple([f for f in w if f.major_to_minor[0] == 1 - per_in])
    per_in = channels // groups
    per_out = w_shape[1] if transposed else w_shape[0] // groups
    if per_in == per_out == 1 and len(ins) == len(w) == 1 and ins[0].major_to_minor == (1,) and w[0].major_to_minor == (0,):
        call.constraints.join(ins[0], w[0])  # a group is one channel
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
    if groups > 1 and (per_in == 1 or per_out == 1):
        return whole_groups(call, x_part, w_part, w_size)
    x_size = [x_shape[0], groups, 1, per_in]
    for f in [*x_part, *w_part]:
        call.constraints.keep_rows_equal(f)
    if groups > 1:
        whole_or_part(call, x_part, w_part, groups)
    merged = unify(call, tuple(x_part), x_size, tuple(w_part), w_size)
    return tuple(factor(f.labels[:1].expand(1, groups, per_out, -1)[..., 0].reshape(-1)) for f in merged if f.dims <= {1, 2})


def whole_or_part(call: RuleContext, x: list[Factor], w: list[Factor], groups: int) -> None:
    """A group goes with its inputs and its outputs, or keeps some of both."""
    labels = call.constraints.fresh(groups).reshape(1, groups, 1, 1)
    for f in [*x, *w]:
        if 1 in f.dims:
            call.constraints.stand(labels, f.labels)
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
    lead = arrays[0][:, :1]
    for array in arrays:
        call.constraints.tie(array, lead.expand_as(array))
    if not any(1 in f.dims or 3 in f.dims for f in x):
        call.constraints.freeze(lead, "is a group of a convolution whose inputs are all kept")
    outs = next((f for f in w if f.dims & {1, 2}), None)
    labels = outs.labels.expand(1, groups, size[2], -1)[..., 0] if outs is not None else lead.expand(groups, size[2])
    return (factor(labels.reshape(-1)),)
