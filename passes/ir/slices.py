"""What is kept: shapes and indices of every tensor once some units are removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.errors import NotARectangle
from fxprune.passes.ir.labels import Factor, Labels


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Kept indices along some dimensions of a tensor, taken together.

    Attributes:
        dims: one dimension, or the nested dimensions of a joint factor from major to minor.
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
            return picked(tensor, self.dims[0], keep)
        rest = [d for d in range(tensor.dim()) if d not in self.dims]
        order = [*self.dims, *rest]
        moved = tensor.permute(order).flatten(0, len(self.dims) - 1).index_select(0, keep)
        moved = moved.reshape(*self.sizes, *(tensor.shape[d] for d in rest))
        return moved.permute([order.index(d) for d in range(tensor.dim())])


WIDE = 1 << 17  # elements from which on a second thread is worth its start


def picked(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    """What lies at some indices along one dimension.

    Along the last one `index_select` uses one thread and takes elements of two bytes one by one (torch 2.14, on a CPU):
    `gather` does what it does otherwise.
    """
    if tensor.is_cpu and dim == tensor.dim() - 1 > 0:
        large = torch.get_num_threads() > 1 and tensor.numel() >= WIDE
        if large or tensor.dtype in (torch.bfloat16, torch.float16):
            return torch.gather(tensor, dim, keep.expand(*tensor.shape[:-1], -1))
    return torch.index_select(tensor, dim, keep)


def clusters(labels: Labels) -> list[list[Factor]]:
    """Factors that share dimensions, together."""
    if len(labels) == 1 or sum([len(f.major_to_minor) for f in labels]) == len({d for f in labels for d in f.major_to_minor}):
        return [[f] for f in labels]
    groups: list[list[Factor]] = []
    for f in labels:
        touching = [g for g in groups if any(f.dims & other.dims for other in g)]
        groups = [g for g in groups if g not in touching]
        groups.append([f, *(other for g in touching for other in g)])
    return groups


class Slicer:
    """Cuts for one choice of what is kept; values that share their labels share the work."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept
        self.table = kept.numpy()
        self.whole = bool(self.table.all())
        self.made: dict[tuple[int, ...], tuple[Labels, list[TensorSlice]]] = {}
        self.lines: dict[tuple[tuple[int, ...], bytes], TensorSlice | None] = {}

    def __call__(self, labels: Labels, shape: Sequence[int]) -> list[TensorSlice]:
        if not labels or self.whole:
            return []
        key = tuple([id(f) for f in labels])
        found = self.made.get(key)
        if found is None:  # the labels are held on to, so that their identity stays theirs
            found = self.made[key] = (labels, self.cuts(labels, shape))
        return found[1]

    def cuts(self, labels: Labels, shape: Sequence[int]) -> list[TensorSlice]:
        """The cuts that leave of a tensor what is kept; untouched dimensions have none."""
        found = []
        for group in clusters(labels):
            if len(group) == 1 and len(group[0].major_to_minor) == 1:
                line = self.line(group[0])
                if line is not None:
                    found.append(line)
                continue
            stays = [self.table[f.compressed] for f in group]
            if all(bool(s.all()) for s in stays):
                continue
            lead = max(group, key=lambda f: len(f.major_to_minor))
            nest = lead.major_to_minor + tuple(d for f in group for d in f.major_to_minor if d not in lead.major_to_minor)
            nest = tuple(dict.fromkeys(nest))
            mask = np.ones([shape[d] if d in nest else 1 for d in range(len(shape))], bool)
            for f, s in zip(group, stays, strict=True):
                mask = mask & spread_over(f, s)
            mask = mask.transpose([*nest, *(d for d in range(len(shape)) if d not in nest)]).reshape([shape[d] for d in nest])
            sizes = rectangle(mask)
            if sizes is None or self.loses_all(group, mask, nest):
                raise NotARectangle(torch.cat([f.labels.reshape(-1) for f in group]))
            found.append(TensorSlice(nest, torch.from_numpy(np.flatnonzero(mask)), sizes))
        return found

    def loses_all(self, group: Sequence[Factor], mask: np.ndarray, nest: Sequence[int]) -> bool:
        """Whether an index that its own dimension's labels keep has nothing left along the others."""
        for at, d in enumerate(nest):
            mine = [f for f in group if f.major_to_minor == (d,)]
            if mine and len(nest) > 1:
                stays = np.logical_and.reduce([self.table[f.flat] for f in mine])
                alive = np.moveaxis(mask, at, 0).reshape(mask.shape[at], -1).any(1)
                if bool((stays & ~alive).any()):
                    return True
        return False

    def line(self, f: Factor) -> TensorSlice | None:
        """The cut along the one dimension of a factor; None if all stays. Layers that keep the same share one."""
        stays = f.lookup(self.table)
        key = (f.major_to_minor, stays.tobytes())
        if key not in self.lines:
            keep = np.flatnonzero(stays)
            if not len(keep):
                raise NotARectangle(f.labels.reshape(-1))
            whole = len(keep) == len(stays)
            self.lines[key] = None if whole else TensorSlice(f.major_to_minor, torch.from_numpy(keep), (len(keep),))
        return self.lines[key]


def spread_over(f: Factor, brief: np.ndarray) -> np.ndarray:
    """What is said of a factor's `brief` labels, as an array of the form of its labels."""
    if f.repeats == 1:
        return brief.reshape(f.labels.shape)
    n, *rest = f.labels.movedim(f.major_to_minor[0], 0).shape
    runs = np.broadcast_to(brief.reshape(n // f.repeats, 1, *rest), (n // f.repeats, f.repeats, *rest))
    return np.moveaxis(runs.reshape(n, *rest), 0, f.major_to_minor[0])


def rectangle(mask: np.ndarray) -> tuple[int, ...] | None:
    """Sizes of what a mask keeps, dimension by dimension from the major one; None if rows differ."""
    alive, sizes = mask, []
    for _ in range(mask.ndim):  # from the minor one: a row is alive where anything in it is
        counts = alive.sum(-1, dtype=np.int32)
        alive = counts > 0
        some = counts[alive]
        if not len(some) or bool((some != some[0]).any()):
            return None
        sizes.append(int(some[0]))
    return tuple(sizes[::-1])


def cut_shape(shape: Sequence[int], made: Sequence[TensorSlice]) -> tuple[int, ...]:
    if not made:
        return tuple(shape)
    sizes = list(shape)
    for cut in made:
        for d, n in zip(cut.dims, cut.sizes, strict=True):
            sizes[d] = n
    return tuple(sizes)


def apply_slices(cuts: Sequence[TensorSlice], tensor: Tensor) -> Tensor:
    """What cuts leave of a tensor.

    >>> apply_slices([TensorSlice((0,), torch.tensor([0, 2]), (2,))], torch.arange(4)).tolist()
    [0, 2]
    """
    for cut in cuts:
        tensor = cut.take(tensor)
    return tensor
