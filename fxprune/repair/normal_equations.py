"""Least squares for one product: what its weight is multiplied with, and the change of it that leaves the smallest residual.

Every product is brought to one form: for each group a matrix of inputs, (rows, columns), times a weight, (columns, outputs).
A row is a sample and a position; the columns of a convolution are the entries of its window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.criteria.activation_stats import wide
from fxprune.repair.sites import SiteCall

LARGEST = 1 << 24  # elements of a matrix of inputs: windows are taken from a part of the samples at a time


@dataclass(slots=True)
class NormalEquations:
    """The normal equations of residuals on inputs, added up in double precision.

    Attributes:
        constant: whether a constant may be fitted beside the weight.
        ridge: the penalty on the change, as a share of the mean square of the inputs.
    """

    constant: bool
    ridge: float
    gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    inputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    residuals: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: float = 0.0
    count: int = 0

    def add(self, x: Tensor, r: Tensor) -> None:
        """Inputs of shape (groups, rows, columns) and residuals of shape (groups, rows, outputs)."""
        self.gram = self.gram.to(x.device) + (x.mT @ x).double()
        self.cross = self.cross.to(x.device) + (x.mT @ r).double()
        self.inputs = self.inputs.to(x.device) + x.sum(1, dtype=torch.float64)
        self.residuals = self.residuals.to(x.device) + r.sum(1, dtype=torch.float64)
        self.squares += float(r.double().square().sum())
        self.count += x.shape[1]

    def solve(self) -> tuple[Tensor, Tensor]:
        """The change of the weight, (groups, columns, outputs), and of the constant, (groups, outputs)."""
        gram, cross = self.gram, self.cross
        if self.constant:  # about the means, the constant takes care of itself
            gram = gram - self.inputs.unsqueeze(2) * self.inputs.unsqueeze(1) / self.count
            cross = cross - self.inputs.unsqueeze(2) * self.residuals.unsqueeze(1) / self.count
        damping = self.ridge * gram.diagonal(dim1=1, dim2=2).mean(1)
        damped = gram + damping.reshape(-1, 1, 1) * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        regular = factor.diagonal(dim1=1, dim2=2).amin(1) ** 2 > 1e-12 * gram.diagonal(dim1=1, dim2=2).amax(1)
        if bool((failed == 0).all()) and bool(regular.all()):
            change = torch.cholesky_solve(cross, factor)
        else:  # of all that leave the same residual, the smallest change
            change = torch.linalg.pinv(damped, rtol=1e-12, hermitian=True) @ cross
        shift = (self.residuals - (change.mT @ self.inputs.unsqueeze(2)).squeeze(2)) / self.count
        return change, shift if self.constant else torch.zeros_like(shift)

    def left(self, change: Tensor, shift: Tensor) -> float:
        """The sum of squared residuals after a change."""
        moved = 2 * (change * self.cross).sum() + 2 * (shift * self.residuals).sum()
        grown = (change * (self.gram @ change)).sum() + self.count * shift.square().sum()
        grown = grown + 2 * (shift * (change.mT @ self.inputs.unsqueeze(2)).squeeze(2)).sum()
        return max(self.squares - float(moved) + float(grown), 0.0)


def add_call(normal: NormalEquations, call: SiteCall, residual: Tensor) -> None:
    """Add one run of a product, whose result should have been larger by `residual`."""
    if is_convolution(call):
        window = call.weight[:, 0].numel() if call.op.get("transposed") else call.weight[0].numel() * groups(call)
        step = max(1, LARGEST // max(residual.shape[2:].numel() * window, 1))
        for source, r in zip(call.source.split(step), residual.split(step), strict=True):
            normal.add(windows(call, wide(source)), by_group(call, wide(r)))
        return
    normal.add(flat(call, call.source, call.product.along), flat(call, residual, call.product.out))  # type: ignore[union-attr]


def is_convolution(call: SiteCall) -> bool:
    return "dilation" in call.op.named


def groups(call: SiteCall) -> int:
    return int(call.op.get("groups", 1))


def flat(call: SiteCall, x: Tensor, dim: int) -> Tensor:
    """A matrix with one of its dimensions last; a batch of matrices stays one."""
    batched = x.dim() == 3 and call.weight.dim() == 3
    moved = wide(x).movedim(dim, -1)
    return moved.reshape(len(x) if batched else 1, -1, x.shape[dim])


def by_group(call: SiteCall, r: Tensor) -> Tensor:
    """Results of a convolution, (samples, channels, ...), as (groups, samples and positions, channels of a group)."""
    n, g = len(r), groups(call)
    return r.reshape(n, g, r.shape[1] // g, -1).permute(1, 0, 3, 2).reshape(g, -1, r.shape[1] // g)


def windows(call: SiteCall, x: Tensor) -> Tensor:
    """What each result of a convolution is a sum over: (groups, samples and positions, channels of a group and window)."""
    spatial, g = x.dim() - 2, groups(call)
    sizes = call.weight.shape[2:]
    stride, padding, dilation = (spread(call.op[name], spatial) for name in ("stride", "padding", "dilation"))
    if call.op.get("transposed"):  # the same as a convolution of what is spread out by the stride
        extra = spread(call.op["output_padding"], spatial)
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
    positions = x.shape[2 : 2 + spatial].numel()
    x = x.reshape(n, g, channels // g, positions, -1)
    return x.permute(1, 0, 3, 2, 4).reshape(g, n * positions, -1)


def spread(value: object, spatial: int) -> list[int]:
    """A setting of a convolution, one number for each dimension."""
    numbers = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
    return numbers * spatial if len(numbers) == 1 else numbers


def as_weight(call: SiteCall, change: Tensor) -> Tensor:
    """A change of shape (groups, columns, outputs) in the form of the product's weight."""
    product = call.product
    assert product is not None
    if not is_convolution(call):
        whole = change if call.weight.dim() == 3 else change.squeeze(0)
        return whole if product.summed < (product.kept or 0) else whole.mT
    sizes = call.weight.shape[2:]
    g, _, outputs = change.shape
    if call.op.get("transposed"):
        turned = change.reshape(g, -1, *sizes, outputs).flip(list(range(2, 2 + len(sizes))))
        return turned.movedim(-1, 2).reshape(call.weight.shape)
    return change.mT.reshape(call.weight.shape)
