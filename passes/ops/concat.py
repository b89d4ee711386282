"""Joining: factors of several tensors become one array along the joined dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.passes.ir.labels import NONE, Factor, Labels, expand_along, factor
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import OpSpec, register

LARGEST_JOINT = 1 << 22


def cat(call: RuleContext) -> Labels:
    refs = [r for r in call["tensors"] if call.shape(r) != (0,)]
    if not refs:
        return NONE
    dim = call.dim(call["dim"], len(call.shape(refs[0])))
    return join(call, [call.labels(r) for r in refs], [call.shape(r) for r in refs], dim)


def stack(call: RuleContext) -> Labels:
    refs: list[TensorRef] = list(call["tensors"])
    dim = call.dim(call["dim"], len(call.shape(refs[0])) + 1)
    lifted = [
        tuple(Factor(f.labels.unsqueeze(dim), tuple(d + (d >= dim) for d in f.major_to_minor)) for f in call.labels(r))
        for r in refs
    ]
    shapes = [(*call.shape(r)[:dim], 1, *call.shape(r)[dim:]) for r in refs]
    return join(call, lifted, shapes, dim)


def join(call: RuleContext, parts: Sequence[Labels], shapes: Sequence[Sequence[int]], dim: int) -> Labels:
    """Factors that vary along the same other dimensions are laid end to end; a part with no such factor counts as kept.

    (1) Along the joined dimension alone the parts are independent of one another.
    (2) Along other dimensions each part is a row of a joint factor: it must keep equally many entries, not the same ones.
    """
    signatures: list[frozenset[int]] = []
    for labels in parts:
        for f in labels:
            if f.dims - {dim} not in signatures:
                signatures.append(f.dims - {dim})
    result: Labels = NONE
    for other in sorted(signatures, key=sorted):
        chosen = [pick(call, labels, other, dim) for labels in parts]
        if other and any(f is None for f in chosen):
            for part in chosen:
                if part is not None:
                    call.constraints.freeze(
                        part.labels, "is joined along another dimension to a tensor that keeps all its channels"
                    )
            if not call.state.seeking_heads:
                continue
        arrays = [lay_out(f, shape, dim, other) for f, shape in zip(chosen, shapes, strict=True)]
        nests = {tuple(d for d in f.major_to_minor if d != dim) for f in chosen if f is not None}
        if other and same_everywhere(arrays, dim):
            result += (factor(arrays[0].narrow(dim, 0, 1), nests.pop()),)
            continue
        total = sum(shape[dim] for shape in shapes)
        if other and total * arrays[0].numel() // max(1, arrays[0].shape[dim]) > LARGEST_JOINT:
            result += tie_parts(call, arrays, dim, nests)
            continue
        grown = [a.expand(*a.shape[:dim], shape[dim], *a.shape[dim + 1 :]) for a, shape in zip(arrays, shapes, strict=True)]
        orders = {f.major_to_minor for f in chosen if f is not None and dim in f.dims} or {(dim, *nest) for nest in nests}
        alike = len(nests) == len(orders) == 1  # packed one way in all parts
        f = factor(torch.cat(grown, dim), min(orders) if alike else (dim,))
        if not alike:
            call.constraints.keep_columns_equal(f)
        call.constraints.keep_rows_equal(f)
        result += call.settle(f)
    return result


def pick(call: RuleContext, labels: Labels, other: frozenset[int], dim: int) -> Factor | None:
    """The part's factor over the given other dimensions; a second one there is frozen."""
    found = [f for f in labels if f.dims - {dim} == other]
    for f in found[1:]:
        call.constraints.freeze(f.labels, "overlaps another label in a join")
    return found[0] if found else None


def lay_out(f: Factor | None, shape: Sequence[int], dim: int, other: frozenset[int]) -> Tensor:
    if f is None:
        sizes = [n if d == dim or d in other else 1 for d, n in enumerate(shape)]
        return torch.zeros(sizes, dtype=torch.int64)
    return expand_along(f, shape, other | ({dim} if dim in f.dims or not other else set()))


def same_everywhere(arrays: Sequence[Tensor], dim: int) -> bool:
    """Whether the parts have the same labels, and those do not vary along the joined dimension."""
    first = arrays[0]
    return first.shape[dim] == 1 and all(a.shape == first.shape and bool((a == first).all()) for a in arrays[1:])


def tie_parts(call: RuleContext, arrays: Sequence[Tensor], dim: int, nests: set[tuple[int, ...]]) -> Labels:
    """A joint factor that would be as large as an activation: one row of labels for all instead."""
    head = arrays[0].narrow(dim, 0, 1)
    for a in arrays:
        call.constraints.tie(a, head, broadcast=a.shape != head.shape)
    return call.settle(factor(head, nests.pop()))


register("cat concat concatenate", OpSpec(cat))
register("stack", OpSpec(stack))
