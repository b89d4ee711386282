"""Views: dimensions are permuted, split and merged; only the part of the shape that a factor varies along is expanded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, expand_along, factor
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import OpSpec, register, spec_of
from fxprune.passes.ops.rewriting import RewriteContext, SizeArguments, argument, resized, sizes_written_out


def moved(labels: Labels, order: Sequence[int]) -> Labels:
    """Factors of a tensor whose dimensions were permuted: output dimension i was input dimension order[i]."""
    place = {d: i for i, d in enumerate(order)}
    return tuple(
        [
            f.at(place[f.major_to_minor[0]], len(place))
            if len(f.major_to_minor) == 1
            else Factor(f.labels.permute(tuple(order)), tuple(place[d] for d in f.major_to_minor))
            for f in labels
        ]
    )


def permute(call: RuleContext) -> Labels:
    ndim = len(call.shape(call.first))
    return moved(call.labels(call.first), [d % ndim for d in call["dims"]])


def transpose(call: RuleContext) -> Labels:
    ndim = len(call.shape(call.first))
    if ndim < 2:
        return call.labels(call.first)
    order = list(range(ndim))
    a, b = call.dim(call.get("dim0", 0), ndim), call.dim(call.get("dim1", 1), ndim)
    order[a], order[b] = order[b], order[a]
    return moved(call.labels(call.first), order)


def segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions that hold the same elements before and after, as short as can be.

    >>> segments((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        size_left = size_right = 1
        if i < len(before):
            left, size_left, i = [i], before[i], i + 1
        if j < len(after):
            right, size_right, j = [j], after[j], j + 1
        while size_left != size_right:
            if size_left < size_right:
                left.append(i)
                size_left, i = size_left * before[i], i + 1
            else:
                right.append(j)
                size_right, j = size_right * after[j], j + 1
        if runs and (not left or not right):  # only sizes of 1 are left over
            runs[-1][0].extend(left)
            runs[-1][1].extend(right)
        else:
            runs.append((left, right))
    return runs


def view(call: RuleContext) -> Labels:
    before, after = call.shape(call.first), call.shape(call.outputs[0])
    labels = call.labels(call.first)
    if not labels:
        return NONE
    if 0 in before:
        call.freeze(labels, "belongs to an empty tensor that is reshaped")
        return NONE
    runs = segments(before, after)
    return tuple(g for f in labels for g in call.settle(reshape(call, f, runs, before, after)))


def reshape(
    call: RuleContext,
    f: Factor,
    runs: list[tuple[list[int], list[int]]],
    before: Sequence[int],
    after: Sequence[int],
) -> Factor:
    active = [(left, right) for left, right in runs if not f.dims.isdisjoint(left)]
    moved = one_to_one(active, before, after)
    if moved is not None:
        return f.over(tuple([moved[d] for d in f.major_to_minor]), len(after))
    if not call.state.seeking_heads and any(is_laid_out_anew(call, f, *run, before, after) for run in active):
        call.constraints.freeze(f.labels, "is laid out anew among positions")
    sizes = [1] * len(after)
    nest: list[int] = []
    split = False
    for _, right in active:
        for d in right:
            sizes[d] = after[d]
        split = split or sum(after[d] > 1 for d in right) > 1
    done: set[int] = set()
    for d in f.major_to_minor:
        left, right = next(run for run in active if d in run[0])
        if left[0] not in done:
            done.add(left[0])
            nest += [r for r in right if after[r] > 1]
    order = [d for d in f.major_to_minor for run in active if d in run[0]]
    by_run = [
        d for left, _ in sorted(active, key=lambda run: f.major_to_minor.index(first(f, run[0]))) for d in left if d in f.dims
    ]
    # the merged dimension would interleave rows that are packed one by one, within as without
    swapped = [i for i, (a, b) in enumerate(zip(order, by_run, strict=True)) if a != b]
    for i in range(swapped[0], swapped[-1]) if swapped else ():
        call.constraints.keep_columns_equal(f, minor=len(order) - i - 1)
    labels = expand_along(f, before, [d for left, _ in active for d in left]).reshape(sizes)
    g = factor(labels, nest)
    if split:
        call.constraints.keep_rows_equal(g)
    return g


def is_laid_out_anew(
    call: RuleContext, f: Factor, left: list[int], right: list[int], before: Sequence[int], after: Sequence[int]
) -> bool:
    """Whether it depends on the size of the input which labels come to lie in one row.

    `(B, h*w, C).reshape(B, C, h, w)` splits h*w*C entries by h*w, which cuts through the C channels.
    """
    real = [d for d in left if before[d] > 1]
    ends = {math.prod(after[d] for d in right[i:]): right[i:] for i in range(len(right), 0, -1)}
    for i in range(1, len(real)):
        inner = math.prod(before[d] for d in real[i:])
        if (real[i - 1] in f.dims) != (real[i] in f.dims) and inner not in ends:
            below = max((size for size in ends if size < inner), default=1)
            inside, given = ends.get(below, []), call.state.input_dims()
            rows = right[len(right) - len(inside) - 1]  # as many as before for any input, unless they are given as a size of it
            if rows not in given and not given.isdisjoint(inside):
                return True
    return False


def one_to_one(active: list[tuple[list[int], list[int]]], before: Sequence[int], after: Sequence[int]) -> dict[int, int] | None:
    """Where each dimension goes, if none of them is split or merged; None otherwise."""
    moved: dict[int, int] = {}
    for left, right in active:
        old, new = [d for d in left if before[d] > 1], [d for d in right if after[d] > 1]
        if len(old) != 1 or len(new) != 1:
            return None
        moved[old[0]] = new[0]
    return moved


def first(f: Factor, dims: Sequence[int]) -> int:
    return next(d for d in f.major_to_minor if d in dims)


def as_strided(call: RuleContext) -> Labels:
    """The same elements in the same places, or anything at all: only the first is followed."""
    shape, strides = call.shape(call.first), call["stride"]
    contiguous = torch.empty(shape, device="meta").stride()
    last = torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride() if len(shape) == 4 else contiguous
    real = [d for d, n in enumerate(shape) if n > 1]
    for expected in (contiguous, last):
        if tuple(call["size"]) == shape and all(strides[d] == expected[d] for d in real) and not call.get("storage_offset"):
            return call.labels(call.first)
    call.freeze(call.labels(call.first), "is read by strides")
    return NONE


def view_complex(call: RuleContext) -> Labels:
    """The pair of real and imaginary parts is a dimension of its own at the end."""
    before, after = len(call.shape(call.first)), len(call.shape(call.outputs[0]))
    labels = call.labels(call.first)
    if after > before:
        return tuple(Factor(f.labels.unsqueeze(-1), f.major_to_minor) for f in labels)
    passed = call.freeze_dims(labels, [before - 1], "is the pair of real and imaginary parts")
    return tuple(Factor(f.labels.squeeze(-1), f.major_to_minor) for f in passed)


def strides_of_result(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """Followed only where every element stays at its place, in one of the two usual orders."""
    after, before = r.after(r.result(node)), r.before(r.result(node))
    given, strides = list(argument(node, 1, "size")), tuple(argument(node, 2, "stride"))
    plain = strides == torch.empty(before, device="meta").stride()
    order = torch.contiguous_format if plain else torch.channels_last
    now = torch.empty(after, device="meta").to(memory_format=order).stride()
    return r.emit(node, (r.new[node.args[0]], tuple(resized(r, given, after)), now), {})  # type: ignore[index]


def dimension_split(args: Sequence[Any], kwargs: Mapping[str, Any], ndim: int, count: int) -> int:
    """The dimension of the result at which `unflatten` begins to write its sizes."""
    dim: int = args[1] if len(args) > 1 else kwargs["dim"]
    return dim % (ndim - count + 1)


def shaped_as(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """The shape of another tensor, of which other things may be removed."""
    sizes = sizes_written_out(r, r.result(node), argument(node, 1, "other"))
    return r.graph.call_method("reshape", (r.new[node.args[0]], tuple(sizes)))  # type: ignore[index]


def complex_of_a_part(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """Pairs that are part of a tensor of which something is removed may no longer begin at every second element of memory."""
    ref, trace = r.result(argument(node, 0, "self")), r.capture.op_trace
    while not r.cuts(ref):
        maker = trace.maker(ref.id)
        if maker is None or not spec_of(maker).views:
            return None
        ref = maker.inputs[0]
    return r.graph.call_function(complex_view, r.argument(tuple(node.args)), r.argument(dict(node.kwargs)))


def complex_view(self: Tensor) -> Tensor:
    """`torch.view_as_complex`, of a copy where the strides of a tensor are odd."""
    even = all(n % 2 == 0 for n in (self.storage_offset(), *self.stride()[:-1]))
    return torch.view_as_complex(self if even else self.contiguous())


VIEW = OpSpec(view, moves=True, views=True)
register("view reshape _unsafe_view view_copy", dataclasses.replace(VIEW, sizes=SizeArguments(1)))
register("unflatten", dataclasses.replace(VIEW, sizes=SizeArguments(2, ("sizes",), dimension_split)))
register("view_as", dataclasses.replace(VIEW, rewrite=shaped_as), functions="reshape_as")
register("_reshape_alias flatten squeeze unsqueeze squeeze_copy unsqueeze_copy", VIEW)
register("permute permute_copy", OpSpec(permute, moves=True, views=True), functions="movedim moveaxis")
register(
    "t transpose numpy_T mT swapaxes t_copy adjoint transpose_copy",
    OpSpec(transpose, moves=True, views=True),
    functions="swapdims",
)
register("as_strided", OpSpec(as_strided, strides_of_result, moves=True, views=True))
register("view_as_real", OpSpec(view_complex, moves=True, views=True))
register("view_as_complex", OpSpec(view_complex, complex_of_a_part, always=True, moves=True, views=True))
