"""Reshaping: dimensions are split and merged; only the part of the shape that a factor varies along is expanded."""

from __future__ import annotations

from collections.abc import Sequence

from fxprune.passes.labels import NONE, Factor, Labels, factor, fill
from fxprune.passes.rules import Call, rule


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
def view(call: Call) -> Labels:
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
    call: Call,
    f: Factor,
    runs: list[tuple[list[int], list[int]]],
    before: Sequence[int],
    after: Sequence[int],
) -> Factor:
    active = [(left, right) for left, right in runs if not f.dims.isdisjoint(left)]
    moved = one_to_one(active, before, after)
    if moved is not None:
        return f.over(tuple([moved[d] for d in f.nest]), len(after))
    sizes = [1] * len(after)
    nest: list[int] = []
    split = False
    for _, right in active:
        for d in right:
            sizes[d] = after[d]
        split = split or sum(after[d] > 1 for d in right) > 1
    done: set[int] = set()
    for d in f.nest:
        left, right = next(run for run in active if d in run[0])
        if left[0] not in done:
            done.add(left[0])
            nest += [r for r in right if after[r] > 1]
    order = [d for d in f.nest for run in active if d in run[0]]
    by_run = [d for left, _ in sorted(active, key=lambda run: f.nest.index(first(f, run[0]))) for d in left if d in f.dims]
    if order != by_run:  # the merged dimension would interleave rows that are packed one by one
        call.ties.same_columns(f)
    labels = fill(f, before, [d for left, _ in active for d in left]).reshape(sizes)
    g = factor(labels, nest)
    if split:
        call.ties.keep_rows_equal(g)
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
    return next(d for d in f.nest if d in dims)
