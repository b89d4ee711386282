"""What a product reads, in the two forms in which least squares can use it: rows of a matrix, and images.

The windows of a convolution at all positions are never formed: their products with results, with a change of the weight and
with one another are convolutions, and derivatives of convolutions with respect to their weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.criteria.windows import spread
from fxprune.passes.ops.call import OpView

COLUMNS = 128  # of a block of a matrix of moments, of which only those on and above the diagonal are computed


class Inputs(Protocol):
    """Inputs of a product in `groups`, each with `rows` of `columns`; results belong to rows, in a form of their own."""

    x: Tensor
    fills: ClassVar[bool]  # whether `add_moments` adds those below the diagonal, too

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, rows, columns."""
        ...

    def add_moments(self, gram: Tensor) -> None:
        """Add the products of all pairs of columns, right on and above the diagonal."""
        ...

    def sums(self) -> Tensor:
        """Over rows: (groups, columns)."""
        ...

    def cross(self, r: Tensor) -> Tensor:
        """The products of columns and results, (groups, columns, outputs)."""
        ...

    def sums_of(self, r: Tensor) -> Tensor:
        """Of results, over rows: (groups, outputs), in double precision."""
        ...

    def times(self, change: Tensor, shift: Tensor) -> Tensor:
        """The results of a weight, (groups, columns, outputs), and a constant, (groups, outputs)."""
        ...


@dataclass(slots=True)
class Matrix:
    """Rows of shape (groups, rows, columns), to results of shape (groups, rows, outputs)."""

    x: Tensor
    fills: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.shape[0], self.x.shape[1], self.x.shape[2]

    def add_moments(self, gram: Tensor) -> None:
        for at in range(0, self.x.shape[2], COLUMNS):
            gram[:, at : at + COLUMNS, at:] += self.x[:, :, at : at + COLUMNS].mT @ self.x[:, :, at:]

    def sums(self) -> Tensor:
        return self.x.sum(1)

    def cross(self, r: Tensor) -> Tensor:
        return self.x.mT @ r

    def sums_of(self, r: Tensor) -> Tensor:
        return r.sum(1, dtype=torch.float64)

    def times(self, change: Tensor, shift: Tensor) -> Tensor:
        return (self.x @ change).add_(shift.unsqueeze(1))


class Windows:
    """The windows of a convolution in one group whose stride is 1, at all of its positions.

    Results are those of the convolution, (samples, outputs, ...); columns are channels, and for each the places of the kernel.

    Arguments:
        call: the convolution.
        sizes: of its kernel.
        x: what it reads, (samples, channels, ...).

    Attributes:
        places: how many positions there are along each dimension.
    """

    fills: ClassVar[bool] = True

    @staticmethod
    def fit(call: OpView, sizes: Sequence[int], places: Sequence[int]) -> bool:
        """Whether there are more places than each window reaches over, and one group and no stride."""
        spatial = len(sizes)
        if call.get("transposed") or int(call.get("groups", 1)) > 1 or max(spread(call["stride"], spatial)) > 1:
            return False
        return all(n > d * (k - 1) for n, d, k in zip(places, spread(call["dilation"], spatial), sizes, strict=True))

    def __init__(self, call: OpView, sizes: Sequence[int], x: Tensor) -> None:
        spatial = x.dim() - 2
        self.padding, self.dilation = (spread(call[name], spatial) for name in ("padding", "dilation"))
        self.sizes, self.x = list(sizes), x
        reach = [d * (k - 1) for d, k in zip(self.dilation, sizes, strict=True)]
        self.places = [n + 2 * p - r for n, p, r in zip(x.shape[2:], self.padding, reach, strict=True)]

    @property
    def shape(self) -> tuple[int, int, int]:
        places, window = torch.Size(self.places).numel(), torch.Size(self.sizes).numel()
        return 1, len(self.x) * places, self.x.shape[1] * window

    def add_moments(self, gram: Tensor) -> None:
        """Products of what two places of the kernel read are, but for the border, those of any two as far from each other.

        So the whole image is multiplied once for each distance, and for each place what that does not read is taken off.
        Distances below zero along the first dimension are those above it, mirrored.
        """
        channels, sizes, every = self.x.shape[1], self.sizes, slice(None)
        image = [slice(0, n) for n in self.x.shape[2:]]
        shared = self.moved(image, [0, *(k - 1 for k in sizes[1:])], [sizes[0], *(2 * k - 1 for k in sizes[1:])])
        whole = gram.view(channels, *sizes, channels, *sizes)
        for at in itertools.product(*map(range, sizes)):
            read = [sizes[0] - at[0], *sizes[1:]]
            begin = [0, *(k - 1 - a for k, a in zip(sizes[1:], at[1:], strict=True))]
            found = part_of(shared, every, every, *(slice(b, b + k) for b, k in zip(begin, read, strict=True)))
            for box in self.unread(at, image):
                found = found - self.moved(box, [0, *at[1:]], read)
            part_of(whole, every, *at, every, slice(at[0], None)).add_(found)
            if read[0] > 1:
                mirrored = part_of(whole, every, slice(at[0] + 1, None), *[every] * len(sizes[1:]), every, *at)
                mirrored.add_(found[:, :, 1:].movedim(0, -1))

    def unread(self, at: Sequence[int], image: Sequence[slice]) -> Iterator[list[slice]]:
        """Boxes that make up what one place of the kernel does not read of the image."""
        box = list(image)
        for i, (d, a, p, n) in enumerate(zip(self.dilation, at, self.padding, self.places, strict=True)):
            start, stop = max(d * a - p, 0), min(d * a - p + n, image[i].stop)
            for side in (slice(box[i].start, start), slice(stop, box[i].stop)):
                if side.start < side.stop:
                    yield [*box[:i], side, *box[i + 1 :]]
            box[i] = slice(start, stop)

    def moved(self, box: Sequence[slice], back: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The products of a part with what is read from so many places before on, (channels, channels, ...)."""
        starts = [b.start - d * n for b, d, n in zip(box, self.dilation, back, strict=True)]
        ends = [s + b.stop - b.start + d * (k - 1) for s, b, d, k in zip(starts, box, self.dilation, sizes, strict=True)]
        around = [n for s, e, n in zip(starts, ends, self.x.shape[2:], strict=True) for n in (max(e - n, 0), max(-s, 0))]
        inside = [slice(max(s, 0), e) for s, e in zip(starts, ends, strict=True)]
        part, read = (part_of(self.x, slice(None), slice(None), *where) for where in (box, inside))
        read = F.pad(read, around[::-1]) if any(around) else read
        order = sorted(range(len(box)), key=lambda i: box[i].stop - box[i].start)  # the last one is what kernels run along
        part, read = (t.permute(0, 1, *(2 + i for i in order)).contiguous() for t in (part, read))
        sizes, dilation = ([setting[i] for i in order] for setting in (sizes, self.dilation))
        found = derivative(part, read, sizes, [0] * len(box), dilation)
        return found.permute(0, 1, *(2 + order.index(i) for i in range(len(box))))

    def sums(self) -> Tensor:
        return derivative(
            self.x.new_ones(len(self.x), 1, *self.places), self.x, self.sizes, self.padding, self.dilation
        ).reshape(1, -1)

    def cross(self, r: Tensor) -> Tensor:
        return derivative(r, self.x, self.sizes, self.padding, self.dilation).reshape(1, r.shape[1], -1).mT

    def sums_of(self, r: Tensor) -> Tensor:
        return r.sum([d for d in range(r.dim()) if d != 1], dtype=torch.float64).unsqueeze(0)

    def times(self, change: Tensor, shift: Tensor) -> Tensor:
        weight, ones = change[0].T.reshape(-1, self.x.shape[1], *self.sizes), [1] * len(self.sizes)
        return torch.convolution(self.x, weight, shift[0], ones, self.padding, self.dilation, False, [0] * len(ones), 1)


def part_of(x: Tensor, *where: Any) -> Tensor:
    return x[where]


def derivative(r: Tensor, x: Tensor, sizes: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Of the sum of a convolution's results, each times that of `r`, with respect to its weight."""
    weight, none, ones = x.new_empty(r.shape[1], x.shape[1], *sizes), [0] * len(sizes), [1] * len(sizes)
    wanted = [False, True, False]
    found = torch.ops.aten.convolution_backward(r, x, weight, None, ones, padding, dilation, False, none, 1, wanted)
    gradient: Tensor = found[1]
    return gradient
