"""What slices of a tensor do one after the other, and whether two lists of them leave the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.slices import TensorSlice, apply_slices, keeps_nothing, nothing_of

Slices = Sequence[TensorSlice]


def clusters(slices: Iterable[TensorSlice]) -> list[tuple[int, ...]]:
    """The dimensions of slices, with those together that any slice takes together; the longest slice says their order."""
    found: list[tuple[int, ...]] = []
    for cut in sorted(slices, key=lambda c: -len(c.dims)):
        touching = [dims for dims in found if set(dims) & set(cut.dims)]
        found = [dims for dims in found if dims not in touching]
        found.append(tuple(dict.fromkeys([d for dims in touching for d in dims] + list(cut.dims))))
    return found


def within(slices: Slices, dims: Sequence[int]) -> list[TensorSlice]:
    """The slices along some dimensions, as those of a tensor that has no others, in this order."""
    return [TensorSlice(tuple(dims.index(d) for d in c.dims), c.keep, c.sizes) for c in slices if set(c.dims) <= set(dims)]


def positions(slices: Slices, dims: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Where what slices leave along some dimensions stood before: indices into these dimensions, flattened.

    >>> positions([TensorSlice((1,), torch.tensor([0, 2]), (2,))], (1,), (5, 3)).tolist()
    [0, 2]
    """
    sizes = [shape[d] for d in dims]
    return apply_slices(within(slices, dims), torch.arange(math.prod(sizes)).reshape(sizes))


def compose_slices(first: Slices, second: Slices, shape: Sequence[int]) -> list[TensorSlice]:
    """Slices of a tensor that leave what two lists of them leave, the second one of what the first one leaves.

    >>> a = [TensorSlice((0,), torch.tensor([1, 3, 4]), (3,))]
    >>> b = [TensorSlice((0,), torch.tensor([0, 2]), (2,))]
    >>> compose_slices(a, b, (6, 2))[0].keep.tolist()
    [1, 4]
    """
    if keeps_nothing(second):
        return [nothing_of(shape)]
    made = []
    for cluster in clusters([*first, *second]):
        for dims in itertools.permutations(cluster):  # one of which has them in ascending order
            left = apply_slices(within(second, dims), positions(first, dims, shape))
            keep = left.reshape(-1)
            if bool((keep[1:] > keep[:-1]).all()):
                made.append(TensorSlice(dims, keep.clone(), tuple(left.shape)))
                break
        else:
            raise PruneError("the plans cannot be composed: they order the channels of a tensor in two ways", fix="a new plan")
    return made


def same_slices(a: Slices, b: Slices, shape: Sequence[int]) -> bool:
    """Whether two lists of slices leave the same of a tensor."""
    left, right = ({c.dims: c.keep for c in found} for found in (a, b))
    if left.keys() == right.keys():
        return all(torch.equal(left[dims], right[dims]) for dims in left)
    return all(torch.equal(positions(a, dims, shape), positions(b, dims, shape)) for dims in clusters([*a, *b]))
