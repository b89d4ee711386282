"""The windows of a convolution as rows of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.passes.ops.call import OpView


def windows(call: OpView, sizes: Sequence[int], x: Tensor, at: Tensor | None = None) -> Tensor:
    """What each result of a convolution is a sum over: (groups, samples and positions, channels of a group and window).

    Arguments:
        call: the convolution.
        sizes: of its kernel.
        x: what it reads, (samples, channels, ...).
        at: numbers of the positions of the result that are wanted; all of them where it is None.
    """
    spatial, g = x.dim() - 2, int(call.get("groups", 1))
    stride, padding, dilation = (spread(call[name], spatial) for name in ("stride", "padding", "dilation"))
    if call.get("transposed"):  # the same as a convolution of what is spread out by the stride
        extra = spread(call["output_padding"], spatial)
        grown = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
        every = [slice(None), slice(None), *(slice(None, None, s) for s in stride)]
        grown[tuple(every)] = x
        around = [d * (k - 1) - p for d, k, p in zip(dilation, sizes, padding, strict=True)]
        x = F.pad(grown, [n for a, e in reversed(list(zip(around, extra, strict=True))) for n in (a, a + e)])
        stride = [1] * spatial
    else:
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for i, (k, s, d) in enumerate(zip(sizes, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    n, channels = x.shape[:2]
    x, places = x.movedim(1, 1 + spatial), x.shape[2 : 2 + spatial]
    if at is None:
        positions, at_channels = places.numel(), 1 + spatial
    else:
        wanted: list[Any] = [slice(None), *torch.unravel_index(at, places)]
        x = x[tuple(wanted)]
        positions, at_channels = len(at), 2
    return x.unflatten(at_channels, (g, channels // g)).movedim(at_channels, 0).reshape(g, n * positions, -1)


def spread(value: object, spatial: int) -> list[int]:
    """A setting of a convolution, one number for each dimension."""
    numbers = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
    return numbers * spatial if len(numbers) == 1 else numbers
