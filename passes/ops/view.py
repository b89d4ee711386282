"""Reshaping: dimensions are split and merged; only the part of the shape that a factor varies along is expanded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, expand_along, factor
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import handles, rule
from fxprune.passes.ops.rewriting import argument, resized, sizes_after, with_argument

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


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


@rule(
    "aten::view",
    "aten::_unsafe_view",
    "aten::reshape",
    "aten::_reshape_alias",
    "aten::flatten",
    "aten::unflatten",
)
@rule("aten::squeeze", "aten::unsqueeze", "aten::view_copy", "aten::squeeze_copy", "aten::unsqueeze_copy")
def view(call: RuleContext) -> Labels:
    before, after = call.shape(call.first), call.shape(call.outputs[0])
    labels = call.labels(call.first)
    if not labels:
        return NONE
    if 0 in before:
        call.freeze(labels, "an empty tensor is reshaped")
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
    if order != by_run:  # the merged dimension would interleave rows that are packed one by one
        call.constraints.same_columns(f)
    labels = expand_along(f, before, [d for left, _ in active for d in left]).reshape(sizes)
    g = factor(labels, nest)
    if split:
        call.constraints.keep_rows_equal(g)
    return g


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


@handles("view", "reshape", "expand", "broadcast_to", "view_copy", "new_zeros", "new_ones", "new_empty", "_unsafe_view")
def shape_of_result(r: Rewriter, node: fx.Node) -> fx.Node | None:
    if any(isinstance(a, torch.dtype) for a in node.args[1:2]):
        return None
    key = next((k for k in ("size", "shape") if k in node.kwargs), "size")
    given, packed = sizes_after(r, node, 1, key)
    new = resized(r, given, r.after(r.result(node)))
    rest = {k: r.argument(v) for k, v in node.kwargs.items() if k != key}
    return r.emit(node, (r.new[node.args[0]], tuple(new)) if packed else (r.new[node.args[0]], *new), rest)  # type: ignore[index]


@handles("unflatten")
def unflatten(r: Rewriter, node: fx.Node) -> fx.Node | None:
    dim = argument(node, 1, "dim") % len(r.before(r.result(node.args[0])))
    given = list(argument(node, 2, "sizes"))
    wanted = r.after(r.result(node))[dim : dim + len(given)]
    return with_argument(r, node, 2, "sizes", tuple(resized(r, given, wanted)))


@handles("as_strided")
def strides_of_result(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """Followed only where every element stays at its place, in one of the two usual orders."""
    after, before = r.after(r.result(node)), r.before(r.result(node))
    given, strides = list(argument(node, 1, "size")), tuple(argument(node, 2, "stride"))
    plain = strides == torch.empty(before, device="meta").stride()
    order = torch.contiguous_format if plain else torch.channels_last
    now = torch.empty(after, device="meta").to(memory_format=order).stride()
    return r.emit(node, (r.new[node.args[0]], tuple(resized(r, given, after)), now), {})  # type: ignore[index]
