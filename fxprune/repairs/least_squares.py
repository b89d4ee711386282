"""Least squares for one product: the change of its weight that leaves the smallest residual, in one of two ways.

(1) *Normal equations.* Every product is brought to one form: for each group inputs, (rows, columns), times a weight,
    (columns, outputs). A row is a sample and a position; the columns of a convolution are the entries of its window.
(2) *Conjugate gradients.* The normal equations of a product with n inputs are an n by n matrix: 20 GB for a convolution that
    sums over 50,000 entries. Such a matrix is never formed (CGLS, Hestenes and Stiefel, Methods of conjugate gradients for
    solving linear systems, 1952): a step runs the product once, and its derivative with respect to the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fxprune.criteria.activation_stats import wide
from fxprune.passes.ir.pytree import map_tensors
from fxprune.repairs.inputs import Inputs
from fxprune.repairs.sites import SiteCall

RIDGES = (0.01, 0.1, 1.0, 10.0, 0.001, 0.0001)  # to choose from; the first one where nothing is there to choose by
PART = 1 << 16  # elements that are converted at a time
ENOUGH_ROWS = 64  # for each input of a product: positions of a convolution beyond that change its fit by a hundredth
FEWEST_ROWS = 1 << 16  # of all groups, which narrow layers, whose rows cost little, have at least
SINGLE = 1e-3  # the smallest penalty with which equations of inputs in single precision are factored in it


@dataclass(slots=True)
class NormalEquations:
    """The normal equations of residuals on inputs, added up in double precision.

    Attributes:
        constant: whether a constant may be fitted beside the weight.
        gram: the second moments of the inputs, (groups, columns, columns); right on and above the diagonal, until `whole`.
        squares: the sum of squares of the residuals.
        is_single: whether the inputs are in single precision.
        factors: of the matrix by penalty, those in use.
    """

    constant: bool
    gram: Tensor = field(default_factory=lambda: torch.zeros(()))
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    inputs: Tensor = field(default_factory=lambda: torch.zeros(()))
    residuals: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: float = 0.0
    count: int = 0
    mirrored: bool = False
    is_single: bool = False
    factors: dict[float, tuple[Tensor, bool]] = field(default_factory=dict)

    def add(self, x: Inputs, r: Tensor) -> None:
        """Inputs, and the residuals that belong to them."""
        self.add_moments(x)
        self.add_residuals(x, r)

    def add_moments(self, x: Inputs) -> None:
        groups, rows, columns = x.shape
        if not self.gram.dim():
            self.gram, self.inputs = (
                x.x.new_zeros(groups, *shape, dtype=torch.float64) for shape in ((columns, columns), (columns,))
            )
        self.mirrored = x.fills and (self.mirrored or not self.count)
        self.is_single = x.x.dtype == torch.float32
        self.factors.clear()
        x.add_moments(self.gram)
        self.inputs += x.sums()
        self.count += rows

    def add_residuals(self, x: Inputs, r: Tensor) -> None:
        """Those of inputs whose moments are added before or later."""
        cross, sums = x.cross(r), x.sums_of(r)
        self.cross = self.cross.to(sums) + cross
        self.residuals = self.residuals.to(sums) + sums
        self.squares += sum_of_squares(r)

    def forget_residuals(self) -> None:
        self.cross, self.residuals, self.squares = torch.zeros_like(self.cross), torch.zeros_like(self.residuals), 0.0

    def whole(self) -> Tensor:
        """The matrix with what is below its diagonal."""
        if not self.mirrored and self.gram.dim():
            self.gram, self.mirrored = self.gram.copy_(self.gram.triu() + self.gram.triu(1).mT), True
        return self.gram

    def factor(self, ridge: float) -> tuple[Tensor, bool]:
        """What the equations are solved by, and whether that is a Cholesky factor; otherwise it is the pseudo-inverse."""
        if ridge not in self.factors:
            means = (self.inputs / self.count).unsqueeze(1) if self.constant else torch.zeros_like(self.inputs).unsqueeze(1)
            damped = torch.baddbmm(self.whole(), self.inputs.unsqueeze(2), means, alpha=-1)  # the constant takes care of these
            diagonal = damped.diagonal(dim1=1, dim2=2)
            largest, penalty = diagonal.amax(1), ridge * diagonal.mean(1)
            diagonal += penalty.unsqueeze(1)
            factor = cholesky(damped.float(), penalty / 2) if self.is_single and ridge >= SINGLE else None
            factor = cholesky(damped, 1e-12 * largest) if factor is None else factor
            self.factors[ridge] = (
                (torch.linalg.pinv(damped, rtol=1e-12, hermitian=True), False) if factor is None else (factor, True)
            )
        return self.factors[ridge]

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The change of the weight, (groups, columns, outputs), and of the constant, (groups, outputs).

        Of all that leave the same residual, it is the smallest change.

        Arguments:
            ridge: the penalty on the change, as a share of the mean square of the inputs.
        """
        cross = self.cross
        if self.constant:
            cross = cross - self.inputs.unsqueeze(2) * (self.residuals / self.count).unsqueeze(1)
        factor, is_factor = self.factor(ridge)
        change = torch.cholesky_solve(cross.to(factor.dtype), factor).double() if is_factor else factor @ cross
        shift = (self.residuals - (change.mT @ self.inputs.unsqueeze(2)).squeeze(2)) / self.count
        return change, shift if self.constant else torch.zeros_like(shift)

    def left(self, change: Tensor, shift: Tensor) -> float:
        """The sum of squared residuals after a change."""
        moved = 2 * (change * self.cross).sum() + 2 * (shift * self.residuals).sum()
        grown = (change * (self.whole() @ change)).sum() + self.count * shift.square().sum()
        grown = grown + 2 * (shift * (change.mT @ self.inputs.unsqueeze(2)).squeeze(2)).sum()
        return max(self.squares - float(moved) + float(grown), 0.0)


def cholesky(matrix: Tensor, least: Tensor) -> Tensor | None:
    """A factor, unless the square of an entry of its diagonal is not above what it is in exact arithmetic at least."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    regular = factor.diagonal(dim1=1, dim2=2).amin(1) ** 2 > least
    return factor if bool((failed == 0).all()) and bool(regular.all()) else None


def sum_of_squares(x: Tensor) -> float:
    """Sums of parts, added up in double precision."""
    flat = x.reshape(-1) if x.dtype in (torch.float32, torch.float64) else x.reshape(-1).float()
    return float(torch.stack([part.dot(part) for part in flat.split(PART)]).double().sum()) if flat.numel() else 0.0


def lifted(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector along one dimension of a tensor, on its device."""
    return vector.to(like.device).reshape([-1 if d == dim % like.dim() else 1 for d in range(like.dim())])


def relative(squares: float, size: float) -> float:
    """The root of one sum of squares over that of another; nothing of nothing is no error."""
    return math.sqrt(squares / size) if size > 0 else 0.0 if squares == 0 else math.inf


Judge = Callable[[Tensor, Tensor], float]  # of a change of the weight and of the constant


def fit(normal: NormalEquations, ridge: float | None, judge: Judge | None) -> tuple[Tensor, Tensor, float]:
    """The change of the weight and of the constant, and the penalty they were found with.

    Arguments:
        ridge: if it is not to be chosen.
        judge: the sum of squares that a change leaves of data held out, which a ridge is chosen by: from the first of
            `RIDGES` on, as long as it falls.
    """
    if ridge is not None or judge is None:
        ridge = RIDGES[0] if ridge is None else ridge
        return *normal.solve(ridge), ridge
    chosen, best, least = RIDGES[0], None, math.inf
    for up in (True, False):  # towards stiffer fits; if the first one was best, towards looser ones
        for value in [r for r in RIDGES if r >= RIDGES[0]] if up else [r for r in RIDGES if r < RIDGES[0]]:
            found = normal.solve(value)
            left = judge(*found)
            if best is not None and not left < least:
                normal.factors.pop(value)
                break
            if best is not None:
                normal.factors.pop(chosen)
            best, least, chosen = found, left, value
        if chosen != RIDGES[0]:
            break
    assert best is not None
    return *best, chosen


def is_convolution(call: SiteCall) -> bool:
    return "dilation" in call.op.named


def groups(call: SiteCall) -> int:
    return int(call.op.get("groups", 1))


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
        return sum_of_squares(self.weight) + sum_of_squares(self.constant)


def count_inputs(call: SiteCall) -> int:
    """How many numbers each result of a product is a sum over."""
    assert call.product is not None
    if not is_convolution(call):
        return call.source.shape[call.product.along]
    return call.weight[:, 0].numel() // groups(call) if call.op.get("transposed") else call.weight[0].numel()


Calls = Sequence[tuple[SiteCall, Tensor]]  # runs of one product, with what each result should have been larger by


def fit_gradually(fitted: Calls, held: Calls, ridge: float | None, constant: bool) -> tuple[WeightChange, float, float]:
    """The change that makes the residuals small, and their sum of squares before and after.

    Arguments:
        fitted: the data to fit.
        held: data held out. Where no ridge is given, the step is taken after which the residuals are smallest there.
        ridge: the penalty on the squared change of the weight, as a share of the mean square of the inputs.
        constant: whether a constant may be fitted beside the weight.
    """
    calls, left = [call for call, _ in fitted], [wide(r) for _, r in fitted]
    others, unseen = [call for call, _ in held], [wide(r) for _, r in held]
    damping = (RIDGES[0] if ridge is None else ridge) * energy(calls, constant)
    change = WeightChange(torch.zeros_like(wide(calls[0].weight)), torch.zeros_like(summed(calls[0], left[0])))
    beside, beside_others = added(calls, change), added(others, change)
    downhill = gradient(calls, left, constant)
    before, start = squares(left), downhill.square()
    direction, now = downhill, start
    best, least = (change, before), squares(unseen)
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
        if ridge is None and held:
            more = [result(call, direction) - extra for call, extra in zip(others, beside_others, strict=True)]
            unseen = [r - step * m for r, m in zip(unseen, more, strict=True)]
            if not squares(unseen) < least:
                break
            least = squares(unseen)
        best = change, squares(left)
        weight, shift = gradient(calls, left, constant)
        downhill = WeightChange(weight - damping.to(weight.dtype) * change.weight, shift)
        now, last = downhill.square(), now
        direction = downhill.moved(now / last, direction)
    return best[0], before, best[1]


def added(calls: Sequence[SiteCall], change: WeightChange) -> list[Tensor]:
    """What each call adds to its product, which is that of a weight of zero; a number where it is nothing."""
    extras = [run_product(call, torch.zeros_like(change.weight), wide(call.source)) for call in calls]
    return [extra if bool(extra.any()) else extra.new_zeros(()) for extra in extras]


def squares(parts: Sequence[Tensor]) -> float:
    return sum(map(sum_of_squares, parts))


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
