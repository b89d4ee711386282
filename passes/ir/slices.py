"""Slices: the indices that are kept along the dimensions of a tensor, for one choice of removed labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.errors import NotARectangle
from fxprune.passes.ir.branches import NOTHING, Removed
from fxprune.passes.ir.labels import Factor, Labels


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Kept indices along some dimensions of a tensor, taken together.

    Attributes:
        dims: one dimension, or the dimensions of a joint factor, from major to minor.
        keep: ascending indices into those dimensions, flattened.
        sizes: how many stay along each of them.
    """

    dims: tuple[int, ...]
    keep: Tensor
    sizes: tuple[int, ...]

    def take(self, tensor: Tensor) -> Tensor:
        """The kept part of a tensor."""
        keep = self.keep if tensor.is_cpu else self.keep.to(tensor.device)
        if len(self.dims) == 1:
            return fast_index_select(tensor, self.dims[0], keep)
        rest = [d for d in range(tensor.dim()) if d not in self.dims]
        order = [*self.dims, *rest]
        moved = tensor.permute(order).flatten(0, len(self.dims) - 1).index_select(0, keep)
        moved = moved.reshape(*self.sizes, *(tensor.shape[d] for d in rest))
        return moved.permute([order.index(d) for d in range(tensor.dim())])

    def kept(self, shape: Sequence[int]) -> Tensor:
        """Which indices into `dims` are kept: booleans with the sizes of those dimensions, in their order."""
        mask = torch.zeros([shape[d] for d in self.dims], dtype=torch.bool)
        mask.view(-1)[self.keep] = True
        return mask

    def mask(self, shape: Sequence[int]) -> Tensor:
        """The same, broadcastable to a tensor of this shape."""
        order = sorted(range(len(self.dims)), key=self.dims.__getitem__)
        return self.kept(shape).permute(order).reshape([n if d in self.dims else 1 for d, n in enumerate(shape)])


WIDE = 1 << 17  # elements from which on several threads are faster than one


def fast_index_select(tensor: Tensor, dim: int, keep: Tensor, out: Tensor | None = None) -> Tensor:
    """`index_select`, or `gather` where that is faster.

    Along the last dimension `index_select` uses one thread and copies elements of two bytes one by one (torch 2.14, on a CPU).
    """
    if tensor.is_cpu and dim == tensor.dim() - 1 > 0:
        large = torch.get_num_threads() > 1 and tensor.numel() >= WIDE
        if large or tensor.dtype in (torch.bfloat16, torch.float16):
            return torch.gather(tensor, dim, keep.expand(*tensor.shape[:-1], -1), out=out)
    return torch.index_select(tensor, dim, keep, out=out)


def clusters(labels: Labels) -> list[list[Factor]]:
    """The factors, grouped so that those of different groups share no dimension."""
    if len(labels) == 1 or sum([len(f.major_to_minor) for f in labels]) == len({d for f in labels for d in f.major_to_minor}):
        return [[f] for f in labels]
    groups: list[list[Factor]] = []
    for f in labels:
        touching = [g for g in groups if any(f.dims & other.dims for other in g)]
        groups = [g for g in groups if g not in touching]
        groups.append([f, *(other for g in touching for other in g)])
    return groups


class Slicer:
    """The slices of tensors for one choice of kept labels. Tensors that share their labels share their slices.

    Arguments:
        kept: which labels are kept, shape (labels,).
        removed: what goes with residual branches, whatever its labels.
    """

    def __init__(self, kept: Tensor, removed: Removed = NOTHING) -> None:
        self.kept, self.removed = kept, removed
        self.table = kept.numpy()
        self.keeps_all = bool(self.table.all())
        self.found: dict[tuple[int, ...], tuple[Labels, list[TensorSlice]]] = {}
        self.vectors: dict[tuple[tuple[int, ...], bytes], TensorSlice | None] = {}

    def __call__(self, labels: Labels, shape: Sequence[int]) -> list[TensorSlice]:
        if not labels or self.keeps_all:
            return []
        key = tuple([id(f) for f in labels])
        known = self.found.get(key)
        if known is None:  # the labels are stored with it, so that no other object gets their ids
            known = self.found[key] = (labels, self.slices(labels, shape))
        return known[1]

    def take(self, labels: Labels, tensor: Tensor) -> Tensor:
        """What is kept of a tensor with these labels."""
        return apply_slices(self(labels, tensor.shape), tensor)

    def slices(self, labels: Labels, shape: Sequence[int]) -> list[TensorSlice]:
        """A slice for each group of dimensions that loses anything; raises NotARectangle if rows would differ in length."""
        found = []
        for group in clusters(labels):
            if len(group) == 1 and len(group[0].major_to_minor) == 1:
                vector = self.vector(group[0])
                if vector is not None:
                    found.append(vector)
                continue
            stays = [self.table[f.compressed] for f in group]
            if all(bool(s.all()) for s in stays):
                continue
            lead = max(group, key=lambda f: len(f.major_to_minor))
            dims = tuple(dict.fromkeys([*lead.major_to_minor, *(d for f in group for d in f.major_to_minor)]))
            mask = np.ones([shape[d] if d in dims else 1 for d in range(len(shape))], bool)
            for f, s in zip(group, stays, strict=True):
                mask = mask & decompressed(f, s)
            mask = mask.transpose([*dims, *(d for d in range(len(shape)) if d not in dims)]).reshape([shape[d] for d in dims])
            sizes = rectangle(mask)
            if sizes is None or self.loses_all(group, mask, dims):
                raise NotARectangle(torch.cat([f.labels.reshape(-1) for f in group]))
            found.append(TensorSlice(dims, torch.from_numpy(np.flatnonzero(mask)), sizes))
        return found

    def loses_all(self, group: Sequence[Factor], mask: np.ndarray, dims: Sequence[int]) -> bool:
        """Whether nothing is left of an index that its own dimension's labels keep."""
        for at, d in enumerate(dims):
            mine = [f for f in group if f.major_to_minor == (d,)]
            if mine and len(dims) > 1:
                stays = np.logical_and.reduce([self.table[f.flat] for f in mine])
                alive = np.moveaxis(mask, at, 0).reshape(mask.shape[at], -1).any(1)
                if bool((stays & ~alive).any()):
                    return True
        return False

    def vector(self, f: Factor) -> TensorSlice | None:
        """The slice along the one dimension of a factor; None if all is kept. Tensors that keep the same share one."""
        stays = f.lookup(self.table)
        key = (f.major_to_minor, stays.tobytes())
        if key not in self.vectors:
            keep = np.flatnonzero(stays)
            if not len(keep):
                raise NotARectangle(f.labels.reshape(-1))
            self.vectors[key] = (
                None if len(keep) == len(stays) else TensorSlice(f.major_to_minor, torch.from_numpy(keep), (len(keep),))
            )
        return self.vectors[key]


def decompressed(f: Factor, values: np.ndarray) -> np.ndarray:
    """Values for a factor's `compressed` labels, as an array of the shape of its labels."""
    if f.repeats == 1:
        return values.reshape(f.labels.shape)
    n, *rest = f.labels.movedim(f.major_to_minor[0], 0).shape
    runs = np.broadcast_to(values.reshape(n // f.repeats, 1, *rest), (n // f.repeats, f.repeats, *rest))
    return np.moveaxis(runs.reshape(n, *rest), 0, f.major_to_minor[0])


def rectangle(mask: np.ndarray) -> tuple[int, ...] | None:
    """The sizes of what a mask keeps, from the major dimension on; None if rows differ in length."""
    alive, sizes = mask, []
    for _ in range(mask.ndim):  # from the minor one: a row is alive where anything in it is
        counts = alive.sum(-1, dtype=np.int32)
        alive = counts > 0
        some = counts[alive]
        if not len(some) or bool((some != some[0]).any()):
            return None
        sizes.append(int(some[0]))
    return tuple(sizes[::-1])


def nothing_of(shape: Sequence[int]) -> TensorSlice:
    """The slice that keeps nothing of a tensor of a given shape."""
    return TensorSlice(tuple(range(len(shape))), torch.zeros(0, dtype=torch.int64), (0,) * len(shape))


def keeps_nothing(slices: Sequence[TensorSlice]) -> bool:
    """Whether slices leave nothing of their tensor."""
    return any(not len(cut.keep) for cut in slices)


def cut_shape(shape: Sequence[int], slices: Sequence[TensorSlice]) -> tuple[int, ...]:
    """The shape of what slices leave of a tensor."""
    if not slices:
        return tuple(shape)
    sizes = list(shape)
    for cut in slices:
        for d, n in zip(cut.dims, cut.sizes, strict=True):
            sizes[d] = n
    return tuple(sizes)


def apply_slices(slices: Sequence[TensorSlice], tensor: Tensor) -> Tensor:
    """What slices leave of a tensor.

    >>> apply_slices([TensorSlice((0,), torch.tensor([0, 2]), (2,))], torch.arange(4)).tolist()
    [0, 2]
    """
    for cut in slices:
        tensor = cut.take(tensor)
    return tensor


def in_format_of(source: Tensor, tensor: Tensor) -> Tensor:
    """A dense tensor whose dimensions lie in memory in the order in which those of `source` lie."""
    order = major_to_minor(source)
    if order == list(range(tensor.dim())):
        return tensor.contiguous()
    return torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def major_to_minor(tensor: Tensor) -> list[int]:
    """The dimensions in the order of their strides, those of size 1 behind others of the same stride, as torch has them."""
    dims = list(range(tensor.dim()))
    if tensor.layout is not torch.strided:
        return dims
    strides = tensor.stride()
    return sorted(dims, key=lambda d: (-strides[d], tensor.shape[d] == 1))


def mask_of(slices: Sequence[TensorSlice], shape: Sequence[int]) -> Tensor:
    """Which elements of a tensor of a given shape slices keep: booleans of that shape.

    >>> mask_of([TensorSlice((1,), torch.tensor([0, 2]), (2,))], (2, 3)).tolist()
    [[True, False, True], [True, False, True]]
    """
    mask = torch.ones(tuple(shape), dtype=torch.bool)
    for cut in slices:
        mask &= cut.mask(shape)
    return mask
