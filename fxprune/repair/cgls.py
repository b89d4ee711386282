"""Least squares for a product with very many inputs, by conjugate gradients on the call itself.

The normal equations of a product with n inputs are an n by n matrix: 20 gigabytes for a convolution that sums over 50,000
entries. Here they are never formed (CGLS, Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems,
1952): a step runs the product once, and its derivative with respect to the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.criteria.activation_stats import wide
from fxprune.passes.ir.pytree import map_tensors
from fxprune.repair.normal_equations import groups, is_convolution
from fxprune.repair.sites import SiteCall

WIDE = 8192  # inputs of a product; with more of them the normal equations are not formed
STEPS = 30  # at most
ENOUGH = 1e-3  # of the gradient's norm at the start


class WeightChange(NamedTuple):
    """A change of a product's weight, in its form, and of the constant beside it, (outputs,)."""

    weight: Tensor
    constant: Tensor

    def moved(self, step: float, by: WeightChange) -> WeightChange:
        return WeightChange(self.weight + step * by.weight, self.constant + step * by.constant)

    def square(self) -> float:
        return float(self.weight.double().square().sum() + self.constant.double().square().sum())


def count_inputs(call: SiteCall) -> int:
    """How many numbers each result of a product is a sum over."""
    assert call.product is not None
    if not is_convolution(call):
        return call.source.shape[call.product.along]
    return call.weight[:, 0].numel() // groups(call) if call.op.get("transposed") else call.weight[0].numel()


def fit_gradually(
    calls: Sequence[SiteCall], residuals: Sequence[Tensor], ridge: float, constant: bool
) -> tuple[WeightChange, float, float]:
    """The change that makes the residuals small, and their sum of squares before and after.

    Arguments:
        calls: runs of one product.
        residuals: what each result should have been larger by.
        ridge: the penalty on the squared change of the weight, as a share of the mean square of the inputs.
        constant: whether a constant may be fitted beside the weight.
    """
    left = [wide(r) for r in residuals]
    damping = ridge * energy(calls, constant)
    change = WeightChange(torch.zeros_like(wide(calls[0].weight)), torch.zeros_like(summed(calls[0], left[0])))
    beside = [run_product(call, change.weight, wide(call.source)) for call in calls]
    beside = [extra if bool(extra.any()) else extra.new_zeros(()) for extra in beside]
    downhill = gradient(calls, left, constant)
    before, start = squares(left), downhill.square()
    direction, now = downhill, start
    for _ in range(STEPS):
        if now <= ENOUGH**2 * start:
            break
        made = [result(call, direction) - extra for call, extra in zip(calls, beside, strict=True)]
        length = squares(made) + float((damping * direction.weight.double().square()).sum())
        if not length > 0:
            break
        step = now / length
        change = change.moved(step, direction)
        left = [r - step * m for r, m in zip(left, made, strict=True)]
        weight, shift = gradient(calls, left, constant)
        downhill = WeightChange(weight - damping.to(weight.dtype) * change.weight, shift)
        now, last = downhill.square(), now
        direction = downhill.moved(now / last, direction)
    return change, before, squares(left)


def squares(parts: Sequence[Tensor]) -> float:
    return sum(float(p.double().square().sum()) for p in parts)


def run_product(call: SiteCall, weight: Tensor, source: Tensor) -> Tensor:
    """The product of another weight and source, with no bias."""
    swap = {id(call.weight): weight, id(call.source): source}
    if call.bias is not None:
        swap[id(call.bias)] = torch.zeros_like(wide(call.bias))
    args, kwargs = map_tensors((call.args, call.kwargs), lambda t: swap.get(id(t), t))
    out: Tensor = call.func(*args, **kwargs)
    return out


def transposed(call: SiteCall, source: Tensor, r: Tensor) -> Tensor:
    """The transpose of the product, as a map of its weight, applied to a result: in the form of the weight."""
    with torch.enable_grad():
        at = torch.zeros_like(wide(call.weight)).requires_grad_()
        return torch.autograd.grad(run_product(call, at, source), at, r)[0]


def result(call: SiteCall, change: WeightChange) -> Tensor:
    """What a change adds to the result."""
    out = run_product(call, change.weight, wide(call.source))
    return out + change.constant.reshape([-1 if d == out_dim(call, out) else 1 for d in range(out.dim())])


def gradient(calls: Sequence[SiteCall], left: Sequence[Tensor], constant: bool) -> WeightChange:
    """The change along which the residuals fall fastest."""
    weight = torch.zeros_like(wide(calls[0].weight))
    shift = torch.zeros_like(summed(calls[0], left[0]))
    for call, r in zip(calls, left, strict=True):
        weight += transposed(call, wide(call.source), r)
        if constant:
            shift += summed(call, r)
    return WeightChange(weight, shift)


def summed(call: SiteCall, r: Tensor) -> Tensor:
    """A result summed over all but its outputs, (outputs,)."""
    return r.sum([d for d in range(r.dim()) if d != out_dim(call, r)])


def out_dim(call: SiteCall, r: Tensor) -> int:
    assert call.product is not None
    return call.product.out % r.dim()


def energy(calls: Sequence[SiteCall], constant: bool) -> Tensor:
    """For each group of inputs the mean of their sums of squares, about their means where a constant is fitted.

    This is the mean of the diagonal of the normal equations; its shape is broadcastable to the weight's.
    """
    weight = wide(calls[0].weight)
    total, sums, count = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(weight, dtype=torch.float64), 0
    for call in calls:
        source, ones = wide(call.source), torch.ones_like(wide(call.out))
        total += transposed(call, source.square(), ones)
        sums += transposed(call, source, ones)
        count += ones.numel() // ones.shape[out_dim(call, ones)]
    if constant:
        total -= sums.square() / count
    if is_convolution(calls[0]):
        g = groups(calls[0])
        means = total.reshape(g, -1).mean(1)
        return means.repeat_interleave(len(weight) // g).reshape(-1, *[1] * (weight.dim() - 1))
    return total.mean([-2, -1], keepdim=True)
