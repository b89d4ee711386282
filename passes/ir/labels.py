"""Labels: which removable thing each element of a tensor belongs to.

A tensor's labels are a few integer arrays, its *factors*, each broadcastable to the tensor's shape: size 1 along a
dimension says that the factor does not vary there. An element is removed when any of its labels is removed. Label 0
belongs to what is never removed, so a dimension that no factor covers is the same as one covered by zeros.

A factor that varies along several dimensions is *joint* (heads x head_dim, groups x channels per group). Its `nest`
lists those dimensions from major to minor: for every index of the major ones, the kept entries of the minor one are
packed together. Two joint factors can be matched only when they are nested alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

FROZEN = 0
LINES = [((d,), frozenset([d])) for d in range(16)]


class Factor:
    """One array of labels, broadcastable to the tensor's shape, and the nesting of the dimensions it varies along.

    Attributes:
        labels: the array. Most factors are *lines*, vectors laid along one dimension, and never need it.
        flat: the same array as one row of numbers.
        times: how often in a row each slice along the major dimension occurs, all of them equally often.
        brief: the array as one row of numbers, with each of these runs of slices once (the major dimension first).
        dims: the nest as a set.
        base: the array or vector it was made of; factors that share it hold the same labels.
        start: the first label, where the labels are known to be consecutive and ascending; else None.

    Factors do not change.
    """

    __slots__ = ("_compressed", "_flat", "_labels", "_ndim", "base", "dims", "major_to_minor", "start")
    _ndim: int
    _compressed: tuple[np.ndarray, int]

    def __init__(self, labels: Tensor, nest: tuple[int, ...]) -> None:
        self.start: int | None = None
        self._labels: Tensor | None = labels
        self._flat: np.ndarray | None = labels.reshape(-1).numpy() if len(nest) == 1 else None
        self.base: Tensor | np.ndarray = labels if self._flat is None else self._flat
        self.major_to_minor, self.dims = nest, frozenset(nest)

    @classmethod
    def line(cls, vector: np.ndarray, dim: int, ndim: int, start: int | None = None) -> Factor:
        """A vector of labels, not all the same, laid along one dimension of a tensor with `ndim` dimensions."""
        made = cls.__new__(cls)
        made.start = start
        made._labels, made._flat, made._ndim, made.base = None, vector, ndim, vector
        made.major_to_minor, made.dims = LINES[dim] if dim < len(LINES) else ((dim,), frozenset([dim]))
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
        """A factor along one dimension, laid along another one of another tensor."""
        return Factor.line(self.flat, dim, ndim, self.start)

    def lookup(self, table: np.ndarray) -> np.ndarray:
        """What a table says of the labels in `brief`, in their order; not to be written to."""
        if self.start is not None:
            return table[self.start : self.start + len(self.flat)]
        return table[self.compressed]

    def over(self, nest: tuple[int, ...], ndim: int) -> Factor:
        """The factor along other dimensions, in the same order, of a tensor with `ndim` dimensions."""
        if len(nest) == 1:
            return self.at(nest[0], ndim)
        sizes = [1] * ndim
        for old, new in zip(self.major_to_minor, nest, strict=True):
            sizes[new] = self.labels.shape[old]
        return Factor(self.labels.reshape(sizes), nest)

    def without(self, dim: int) -> Factor:
        """The factor after a dimension that it does not vary along was taken away."""
        dim %= self.ndim
        if len(self.major_to_minor) == 1:
            return self.at(self.major_to_minor[0] - (self.major_to_minor[0] > dim), self.ndim - 1)
        return Factor(self.labels.squeeze(dim), tuple(d - (d > dim) for d in self.major_to_minor))

    def rows(self) -> Tensor:
        """The labels as a matrix: a row for each index of the major dimensions, the minor dimension along it."""
        order = [d for d in range(self.labels.dim()) if d not in self.major_to_minor] + list(self.major_to_minor)
        return self.labels.permute(order).reshape(-1, self.labels.shape[self.major_to_minor[-1]])


Labels = tuple[Factor, ...]
NONE: Labels = ()


def varying(labels: Tensor, among: Iterable[int] | None = None) -> tuple[int, ...]:
    """The dimensions along which an array of labels really varies."""
    array = labels.numpy()
    dims = range(array.ndim) if among is None else among
    return tuple([d for d in dims if array.shape[d] > 1 and not (array == array[(slice(None),) * d + (slice(1),)]).all()])


def compress(labels: Tensor, keep: Iterable[int]) -> Tensor:
    """Size 1 along every dimension not in `keep`, taking the first entry."""
    kept = set(keep)
    for d, size in enumerate(labels.shape):
        if size > 1 and d not in kept:
            labels = labels.narrow(d, 0, 1)
    return labels


def factor(labels: Tensor, nest: Sequence[int] = ()) -> Factor:
    """A compressed factor. `nest` orders the dimensions where it is known; the rest follow in their own order.

    >>> factor(torch.tensor([[1, 2], [1, 2]])).major_to_minor
    (1,)
    """
    dims = varying(labels)
    ordered = tuple(d for d in nest if d in dims)
    small = compress(labels, dims)
    if small.numel() < labels.numel():
        small = small.clone()  # a view would keep the whole array
    return Factor(small, ordered + tuple(d for d in dims if d not in ordered))


def along(vector: Tensor, dim: int, ndim: int) -> Factor:
    """The factor of a vector of labels, not all the same, laid along one dimension of a tensor with `ndim` dimensions."""
    return Factor.line(vector.reshape(-1).numpy(), dim, ndim)


def align(labels: Labels, shape: Sequence[int], ndim: int) -> tuple[Labels, tuple[int, ...]]:
    """Labels and shape with leading dimensions of size 1, as broadcasting adds them."""
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
    """The factor's array expanded to the full size along `dims`."""
    sizes = list(f.labels.shape)
    for d in dims:
        sizes[d] = shape[d]
    return f.labels.expand(sizes)


def kept_mask(labels: Labels, shape: Sequence[int], table: Tensor) -> Tensor:
    """Look every element's labels up in a boolean table (`True`: kept); an element is kept when all of them are."""
    mask = torch.ones((1,) * len(shape), dtype=torch.bool)
    for f in labels:
        mask = mask & table[f.labels]
    return mask


def keeps_all(labels: Iterable[Factor], table: np.ndarray) -> bool:
    """Whether a boolean table (`True`: kept) keeps every element."""
    return all(bool(f.lookup(table).all()) for f in labels)


def fill_removed(tensor: Tensor, labels: Labels, table: Tensor, value: float) -> Tensor:
    """A tensor with one value where a boolean table does not keep the element: a copy, where there is any such."""
    stays = [table[f.labels] for f in labels]
    stays = [s.to(tensor.device) for s in stays if not bool(s.all())]
    if not stays:
        return tensor
    if value == 0.0:  # a product takes a quarter of the time, but infinity times zero is not zero
        made = tensor * stays[0]
        for line in stays[1:]:
            made *= line
        if bool(made.sum().isfinite()):
            return made
    return tensor.masked_fill(~functools.reduce(torch.logical_and, stays), value)


def counts_channels(labels: Labels, dim: int, may_go: np.ndarray, unit: np.ndarray) -> bool:
    """Whether the size of a dimension is a number of channels and nothing else: all entries along it differ.

    Labels that repeat along it come from a size of the inputs, or from a repetition, merged with channels. Those that can
    never go say nothing of what the dimension is.

    Arguments: `may_go`, for each class of labels; `unit`, the class of each label.
    """
    for f in labels:
        if dim in f.dims:
            line = unit[f.labels.movedim(dim, -1).reshape(-1, f.labels.shape[dim])[0].numpy()]
            if len(np.unique(line)) == len(line) and bool(may_go[line].any()):
                return True
    return False
