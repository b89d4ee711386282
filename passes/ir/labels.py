"""Labels: for each element of a tensor, which removable units it belongs to.

The labels of a tensor are a few integer arrays, its *factors*, each broadcastable to the tensor's shape: size 1 along a
dimension means that the factor does not vary along it. An element is removed when any of its labels is. Label 0 is never
removed, so a dimension that no factor varies along is kept whole.

A factor that varies along several dimensions is *joint* (heads x head_dim, groups x channels per group). Its dimensions are
ordered from major to minor: for each index of the major ones the kept entries of the minor one are packed together. Only
factors of the same order can be tied without more ado.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

VECTOR_DIMS = [((d,), frozenset([d])) for d in range(16)]


class Factor:
    """An immutable array of labels, broadcastable to a tensor's shape. Most are vectors along one dimension.

    Attributes:
        labels: the array; of a vector it is made when first asked for.
        major_to_minor: the dimensions that it varies along.
        dims: the same as a set.
        flat: the array flattened.
        compressed: the same, but where along the major dimension each slice occurs `repeats` times in a row, with each once.
        base: the storage that the labels were first given in; factors that share it hold the same labels.
        start: the first label, if the labels are known to be consecutive and ascending; else None.
    """

    __slots__ = ("_compressed", "_flat", "_labels", "_largest", "_ndim", "base", "dims", "major_to_minor", "start")
    _ndim: int
    _compressed: tuple[np.ndarray, int]
    _largest: int

    def __init__(self, labels: Tensor, major_to_minor: tuple[int, ...]) -> None:
        self.start: int | None = None
        self._labels: Tensor | None = labels
        self._flat: np.ndarray | None = labels.reshape(-1).numpy() if len(major_to_minor) == 1 else None
        self.base: Tensor | np.ndarray = labels if self._flat is None else self._flat
        self.major_to_minor, self.dims = major_to_minor, frozenset(major_to_minor)

    @classmethod
    def vector(cls, labels: np.ndarray, dim: int, ndim: int, start: int | None = None) -> Factor:
        """A vector of labels, not all equal, along one dimension of a tensor with `ndim` dimensions."""
        made = cls.__new__(cls)
        made.start = start
        made._labels, made._flat, made._ndim, made.base = None, labels, ndim, labels
        made.major_to_minor, made.dims = VECTOR_DIMS[dim] if dim < len(VECTOR_DIMS) else ((dim,), frozenset([dim]))
        return made

    @property
    def labels(self) -> Tensor:
        if self._labels is None:
            assert self._flat is not None
            shape = [1] * self._ndim
            shape[self.major_to_minor[0]] = -1
            self._labels = torch.from_numpy(self._flat).view(shape)
        return self._labels

    @property
    def ndim(self) -> int:
        return self._ndim if self._labels is None else self._labels.dim()

    @property
    def flat(self) -> np.ndarray:
        if self._flat is None:
            self._flat = self.labels.reshape(-1).numpy()
        return self._flat

    @property
    def largest(self) -> int:
        if not hasattr(self, "_largest"):
            self._largest = int(self.flat[-1] if self.start is not None else self.flat.max())
        return self._largest

    @property
    def count(self) -> int:
        """How many different labels there are."""
        found = np.zeros(self.largest + 1, bool)
        found[self.flat] = True
        return int(found.sum())

    @property
    def compressed(self) -> np.ndarray:
        return self.flat if len(self.major_to_minor) == 1 else self.runs()[0]

    @property
    def repeats(self) -> int:
        return 1 if len(self.major_to_minor) == 1 else self.runs()[1]

    def runs(self) -> tuple[np.ndarray, int]:
        if not hasattr(self, "_compressed"):
            slices = self.labels.movedim(self.major_to_minor[0], 0).flatten(1).numpy()
            other = np.flatnonzero(slices[:, 0] != slices[0, 0])
            repeats = int(other[0]) if len(other) and len(slices) % other[0] == 0 else 1
            runs = slices.reshape(len(slices) // repeats, repeats, -1)
            once = repeats > 1 and bool((runs == runs[:, :1]).all())
            self._compressed = (runs[:, 0].reshape(-1), repeats) if once else (self.flat, 1)
        return self._compressed

    def at(self, dim: int, ndim: int) -> Factor:
        """A vector, along another dimension of another tensor."""
        return Factor.vector(self.flat, dim, ndim, self.start)

    def lookup(self, table: np.ndarray) -> np.ndarray:
        """The entries of a table for the labels in `compressed`; a view where possible, not to be written to."""
        if self.start is not None:
            return table[self.start : self.start + len(self.flat)]
        return table[self.compressed]

    def over(self, dims: tuple[int, ...], ndim: int) -> Factor:
        """The factor along other dimensions, in the same order, of a tensor with `ndim` dimensions."""
        if len(dims) == 1:
            return self.at(dims[0], ndim)
        sizes = [1] * ndim
        for old, new in zip(self.major_to_minor, dims, strict=True):
            sizes[new] = self.labels.shape[old]
        return Factor(self.labels.reshape(sizes), dims)

    def without(self, dim: int) -> Factor:
        """The factor of a tensor without one of its dimensions, along which the factor does not vary."""
        dim %= self.ndim
        if len(self.major_to_minor) == 1:
            return self.at(self.major_to_minor[0] - (self.major_to_minor[0] > dim), self.ndim - 1)
        return Factor(self.labels.squeeze(dim), tuple(d - (d > dim) for d in self.major_to_minor))

    def rows(self, minor: int = 1) -> Tensor:
        """The labels as a matrix: a row for each index of the major dimensions, with the `minor` last dimensions along it."""
        order = [d for d in range(self.labels.dim()) if d not in self.major_to_minor] + list(self.major_to_minor)
        return self.labels.permute(order).reshape(-1, math.prod(self.labels.shape[d] for d in self.major_to_minor[-minor:]))


Labels = tuple[Factor, ...]
NONE: Labels = ()


def varying(labels: Tensor, among: Iterable[int] | None = None) -> tuple[int, ...]:
    """The dimensions that an array of labels varies along."""
    array = labels.numpy()
    dims = [d for d in (range(array.ndim) if among is None else among) if array.shape[d] > 1]
    if not dims or not array.size:
        return ()
    first, zeros = array.item(0), (0,) * array.ndim
    # nearly always the last entry along a dimension tells it
    return tuple(
        [
            d
            for d in dims
            if array.item((*zeros[:d], -1, *zeros[d + 1 :])) != first
            or not (array == array[(slice(None),) * d + (slice(1),)]).all()
        ]
    )


def compress(labels: Tensor, keep: Iterable[int]) -> Tensor:
    """The first entry along every dimension that is not in `keep`."""
    kept = set(keep)
    for d, size in enumerate(labels.shape):
        if size > 1 and d not in kept:
            labels = labels.narrow(d, 0, 1)
    return labels


def factor(labels: Tensor, order: Sequence[int] = ()) -> Factor:
    """The factor of an array: size 1 where it does not vary. Dimensions in `order` come first, the others in their own order.

    >>> factor(torch.tensor([[1, 2], [1, 2]])).major_to_minor
    (1,)
    """
    dims = varying(labels)
    ordered = tuple(d for d in order if d in dims)
    small = compress(labels, dims)
    if small.numel() < labels.numel():
        small = small.clone()  # a view would keep the whole array
    return Factor(small, ordered + tuple(d for d in dims if d not in ordered))


def along(vector: Tensor, dim: int, ndim: int) -> Factor:
    """The factor of a vector of labels, not all equal, along one dimension of a tensor with `ndim` dimensions."""
    return Factor.vector(vector.reshape(-1).numpy(), dim, ndim)


def align(labels: Labels, shape: Sequence[int], ndim: int) -> tuple[Labels, tuple[int, ...]]:
    """Labels and shape with the leading dimensions of size 1 that broadcasting adds."""
    extra = ndim - len(shape)
    if extra == 0:
        return labels, tuple(shape)
    lifted = tuple(
        f.at(f.major_to_minor[0] + extra, ndim)
        if len(f.major_to_minor) == 1
        else Factor(f.labels.reshape((1,) * extra + tuple(f.labels.shape)), tuple(d + extra for d in f.major_to_minor))
        for f in labels
    )
    return lifted, (1,) * extra + tuple(shape)


def expand_along(f: Factor, shape: Sequence[int], dims: Iterable[int]) -> Tensor:
    """The factor's array, expanded to the tensor's size along `dims`."""
    sizes = list(f.labels.shape)
    for d in dims:
        sizes[d] = shape[d]
    return f.labels.expand(sizes)


def kept_mask(labels: Labels, shape: Sequence[int], table: Tensor) -> Tensor:
    """Which elements a boolean table over labels (`True`: kept) keeps: those all of whose labels it keeps."""
    mask = torch.ones((1,) * len(shape), dtype=torch.bool)
    for f in labels:
        mask = mask & table[f.labels]
    return mask


def keeps_all(labels: Iterable[Factor], table: np.ndarray) -> bool:
    """Whether a boolean table over labels (`True`: kept) keeps every element."""
    return all(bool(f.lookup(table).all()) for f in labels)


def fill_removed(tensor: Tensor, labels: Labels, table: Tensor, value: float) -> Tensor:
    """A tensor with one value at the elements that a boolean table over labels removes; the same tensor if it keeps all."""
    return fill_outside(tensor, [table[f.labels] for f in labels], value)


def fill_outside(tensor: Tensor, masks: Iterable[Tensor], value: float) -> Tensor:
    """A tensor with one value where any mask that can be broadcast to it is False; the same tensor if none is anywhere."""
    stays = [mask.to(tensor.device) for mask in masks if not bool(mask.all())]
    if not stays:
        return tensor
    if value == 0.0:  # a product takes a quarter of the time, but infinity times zero is not zero
        made = tensor * stays[0]
        for mask in stays[1:]:
            made *= mask
        if bool(made.sum().isfinite()):
            return made
    return tensor.masked_fill(~functools.reduce(torch.logical_and, stays), value)


def counts_channels(labels: Labels, dim: int, may_go: np.ndarray, unit_of: np.ndarray) -> bool:
    """Whether the size of a dimension is a number of channels and nothing else: all entries along it differ.

    Labels that repeat along it come from a size of the inputs, or from a repetition, merged with channels. Frozen ones say
    nothing of what the dimension is.

    Arguments: `may_go`, for each unit whether it may be removed; `unit_of`, the unit of each label.
    """
    units = [unit_of[row] for row in first_rows(labels, dim)]
    return any(len(np.unique(u)) == len(u) and bool(may_go[u].any()) for u in units)


def counts_entries(labels: Labels, dim: int, may_go: np.ndarray, unit_of: np.ndarray) -> bool:
    """Whether the size of a dimension is that of a parameter; entries may go together, unlike in `counts_channels`."""
    return any(len(np.unique(row)) == len(row) and bool(may_go[unit_of[row]].any()) for row in first_rows(labels, dim))


def first_rows(labels: Labels, dim: int) -> list[np.ndarray]:
    """The labels along a dimension, of each factor that varies along it, at the first place of the others."""
    return [f.labels.movedim(dim, -1).reshape(-1, f.labels.shape[dim])[0].numpy() for f in labels if dim in f.dims]
