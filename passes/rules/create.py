"""New entries that are all alike: constants, broadcast copies and padding get fresh labels, so any number of them may go."""

from __future__ import annotations

import torch

from fxprune.passes.labels import NONE, Labels, align, factor
from fxprune.passes.rules import Call, rule

UNIFORM = [
    "zeros",
    "ones",
    "full",
    "empty",
    "empty_strided",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "bernoulli_like",
    "new_empty_strided",
    "randint",
    "scalar_tensor",
]


@rule(*(f"aten::{name}" for name in UNIFORM))
def uniform(call: Call) -> Labels:
    shape = call.shape(call.outputs[0])
    if call.op.func._schema.name.endswith("_like"):
        return call.labels(call.first)
    if call.ties.maker == "opaque":
        return NONE  # its size is written where it cannot be changed
    call.ties.alike[call.outputs[0].id] = call.outputs[0].id
    return tuple(call.fresh(n, d, len(shape)) for d, n in enumerate(shape) if n > 1 and n not in call.ties.literals)


@rule("aten::arange", "aten::linspace", "aten::logspace", "aten::eye", "aten::hann_window")
def ramp(call: Call) -> Labels:
    """Entries that differ, each by its place: the tensor is made whole and then cut."""
    shape = call.shape(call.outputs[0])
    return tuple(call.fresh(n, d, len(shape)) for d, n in enumerate(shape) if n > 1 and n not in call.ties.literals)


@rule("aten::lift_fresh", "aten::lift")
def literal(call: Call) -> Labels:
    """A tensor written out in the program."""
    shape = call.shape(call.first)
    if call.ties.maker not in ("tensor", "as_tensor") or call.labels(call.first):
        return call.labels(call.first)
    call.known[call.first.id] = tuple(call.fresh(n, d, len(shape)) for d, n in enumerate(shape) if n > 1)
    return call.known[call.first.id]


@rule(
    "aten::randperm",
    "aten::tril_indices",
    "aten::triu_indices",
    "aten::_local_scalar_dense",
    "aten::_assert_async",
)
def distinct(call: Call) -> list[Labels]:
    """Entries that differ: none can go."""
    return [NONE] * len(call.outputs)


@rule("aten::expand", "aten::expand_copy", "aten::broadcast_to")
def expand(call: Call) -> Labels:
    after = call.shape(call.outputs[0])
    labels, before = align(call.labels(call.first), call.shape(call.first), len(after))
    grown = [d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a == 1 and b > 1]
    return labels + tuple(call.fresh(after[d], d, len(after)) for d in grown)


@rule("aten::repeat")
def repeat(call: Call) -> Labels:
    repeats = list(call["repeats"])
    labels, before = align(call.labels(call.first), call.shape(call.first), len(repeats))
    result: Labels = NONE
    for f in labels:
        tiles = [r if d in f.dims else 1 for d, r in enumerate(repeats)]
        if len(f.nest) > 1 and any(t > 1 for t in tiles):
            call.ties.same_columns(f)
        result += (factor(f.labels.repeat(tiles), f.nest),)
    return result + tuple(call.fresh(r, d, len(repeats)) for d, r in enumerate(repeats) if r > 1 and before[d] == 1)


@rule("aten::constant_pad_nd", "aten::pad", "aten::reflection_pad*", "aten::replication_pad*")
def pad(call: Call) -> Labels:
    """Padding along a labelled dimension adds removable entries; other modes than constant copy entries around."""
    shape = call.shape(call.first)
    amounts = list(call.get("pad", call.get("padding")))
    labels = call.labels(call.first)
    constant = call.op.func._schema.name in ("aten::constant_pad_nd", "aten::pad")
    padded = {len(shape) - 1 - i // 2 for i, n in enumerate(amounts) if n}
    if not constant:
        return call.freeze_dims(labels, sorted(padded), "is padded with copies of other entries")
    result: Labels = NONE
    for f in labels:
        for d in sorted(padded & f.dims):
            if len(f.nest) > 1:
                call.ties.same_columns(f)
            before, after = amounts[2 * (len(shape) - 1 - d)], amounts[2 * (len(shape) - 1 - d) + 1]
            array = f.labels.narrow(d, max(0, -before), f.labels.shape[d] + min(0, before) + min(0, after))
            sides = [array]
            for count, at in ((before, 0), (after, len(sides) + 1)):
                if count > 0:
                    new = call.fresh(max(2, count), d, len(shape)).labels.narrow(d, 0, count)
                    sizes = list(array.shape)
                    sizes[d] = count
                    sides.insert(at, new.expand(sizes))
            f = factor(torch.cat(sides, d), f.nest)
        result += call.settle(f)
    return result
