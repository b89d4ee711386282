"""The methods of repair: one class each, listed in `METHODS`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxprune.criteria.activation_stats import Moments
from fxprune.passes.ir.pytree import map_tensors
from fxprune.repairs import least_squares
from fxprune.repairs.least_squares import (
    as_weight,
    count_inputs,
    fit_gradually,
    is_convolution,
    relative,
    sum_of_squares,
)
from fxprune.repairs.repairer import NO_PRODUCT, NOT_FINITE, Change, Repairer, RepairMethod, Skip
from fxprune.repairs.rows import RowFit
from fxprune.repairs.sites import RepairSite, SiteCall

ROUNDS = 4  # of fits, at most, whose aim depends on what was fitted before
NO_PLACE = "it has no bias, and no normalisation with running statistics behind it"


class Fold(RepairMethod):
    """Add what removed inputs contribute that are constant on all of the data."""

    name = "fold"

    def apply(self, repairer: Repairer, site: RepairSite) -> Change | None:
        calls = repairer.originals(site)
        if not calls:
            raise Skip(NO_PRODUCT)
        first, product = calls[0], calls[0].product
        assert product is not None
        gone = ~repairer.mask(first)
        constant = find_constant([call.source.movedim(product.along, 0).flatten(1) for call in calls])
        if not bool(gone.any()) or not bool(constant.any()):
            return None
        alone = contribution(first, constant, gone)
        value, note = constant_of_channels(repairer.keep(first, alone), product.out), ""
        if value is None and is_convolution(first) and not first.op.get("transposed"):
            note = "exact but for the border, where zero padding enters"
            inner = contribution(first, constant, gone, padded=False)
            value = None if inner is None else constant_of_channels(repairer.keep(first, inner), product.out)
        if value is None:
            raise Skip("what the removed inputs contribute differs from place to place")
        if not bool(value.any()):
            return None
        if site.place is None:
            raise Skip(NO_PLACE)
        repairer.add_constant(site, next(repairer.measured(site))[1], value)
        return Change(note=note)


class Reconstruct(RepairMethod):
    """Fit the weight, and the constant beside it, to the original's result by least squares on the inputs that are left."""

    name, measures, looks_ahead = "reconstruct", True, True

    def apply(self, repairer: Repairer, site: RepairSite) -> Change | None:
        call = next(call for _, call in repairer.measured(site))
        if count_inputs(call) > least_squares.WIDE:
            return self.apply_gradually(repairer, site)
        fitted, unseen = (repairer.rows(site, held=held) for held in (False, True))
        fit = RowFit(fitted, unseen, site.path, constant=site.place is not None)
        if fit.is_rounding:
            return None
        if not fit.gather():
            raise Skip(NOT_FINITE)
        fit.run(repairer.ridge, ROUNDS)
        call.weight.add_(as_weight(call, fit.change).to(call.weight.dtype))
        repairer.add_constant(site, call, fit.shift.reshape(-1))
        error, held = fit.error, fit.error if unseen else (0.0, 0.0)
        columns, count = fit.normal.gram.shape[1], fit.normal.count
        few = f"{count:,} samples and positions for {columns:,} inputs: more data would help"
        if call.weight.dtype not in (torch.float32, torch.float64):  # in which the change is another one, rounded
            repairer.forget()
            held = held[0], repairer.error(site) if repairer.checks else 0.0
        return Change(error, few if count < columns else "", held)

    def apply_gradually(self, repairer: Repairer, site: RepairSite) -> Change | None:
        """For a product whose normal equations are too large to be formed."""
        sizes = {False: 0.0, True: 0.0}
        fitted, unseen = list[tuple[SiteCall, Tensor]](), list[tuple[SiteCall, Tensor]]()
        for held, parts in ((False, fitted), (True, unseen)):
            for call, target, residual in repairer.residuals(site, held=held):
                sizes[held] += sum_of_squares(target)
                parts.append((call, residual))
        if not any(bool(r.any()) for _, r in fitted):
            return None
        if not all(bool(r.isfinite().all() and call.source.isfinite().all()) for call, r in fitted):
            raise Skip(NOT_FINITE)
        change, before, after = fit_gradually(fitted, unseen, repairer.ridge, site.place is not None)
        call = fitted[-1][0]
        start = relative(sum(sum_of_squares(r) for _, r in unseen), sizes[True])
        call.weight.add_(change.weight.to(call.weight.dtype))
        repairer.add_constant(site, call, change.constant)
        repairer.forget()
        held_out = (start, repairer.error(site)) if repairer.checks else None
        error = relative(before, sizes[False]), relative(after, sizes[False])
        return Change(error, f"{count_inputs(call):,} inputs: in steps", held_out)


class Compensate(RepairMethod):
    """Add the constant that makes the mean of each result the original's."""

    name = "compensate"

    def apply(self, repairer: Repairer, site: RepairSite) -> Change | None:
        total, squares, size, count, call = torch.zeros(()), 0.0, 0.0, 0, None
        for call, target, difference in repairer.residuals(site):
            assert call.product is not None
            residual = difference.double().movedim(call.product.out, -1)
            total = total.to(residual.device) + residual.flatten(0, -2).sum(0)
            squares += float(residual.square().sum())
            size += sum_of_squares(target)
            count += residual.numel() // residual.shape[-1]
        if call is None or is_rounding(squares, size, difference):
            return None
        if site.place is None:
            raise Skip(NO_PLACE)
        if not math.isfinite(squares):
            raise Skip(NOT_FINITE)
        shift = total / count
        repairer.add_constant(site, call, shift)
        left = max(squares - count * float(shift.square().sum()), 0.0)
        return Change((relative(squares, size), relative(left, size)))


class Recalibrate(RepairMethod):
    """Set the running statistics of a normalisation to the mean and the (unbiased) variance of its inputs."""

    name, for_norms = "recalibrate", True

    def apply(self, repairer: Repairer, site: RepairSite) -> Change | None:
        moments, call = None, None
        for _, call in repairer.measured(site):
            channels = call.source.shape[1]
            moments = moments or Moments(channels)
            moments.add(torch.arange(channels), call.source, torch.arange(channels), 1)
        if moments is None or call is None or call.var is None or float(moments.count[0]) < 2:
            raise Skip("the data holds a single value for each channel")
        if not bool((moments.mean + moments.spread).isfinite().all()):
            raise Skip(NOT_FINITE)
        call.weight.copy_(moments.mean)
        call.var.copy_(moments.spread / (moments.count - 1))
        return Change()


METHODS: dict[str, RepairMethod] = {method.name: method for method in (Fold(), Reconstruct(), Compensate(), Recalibrate())}


def is_rounding(squares: float, size: float, residual: Tensor) -> bool:
    """Whether residuals are what sums in another order leave."""
    return relative(squares, size) <= 16 * torch.finfo(residual.dtype).eps


def find_constant(parts: list[Tensor]) -> Tensor:
    """Which rows hold a single value, to the rounding of a few operations, in all of the parts."""
    low = torch.stack([p.amin(1) for p in parts]).amin(0)
    high = torch.stack([p.amax(1) for p in parts]).amax(0)
    return high - low <= 16 * torch.finfo(low.dtype).eps * torch.maximum(high.abs(), low.abs())


def contribution(call: SiteCall, constant: Tensor, gone: Tensor, *, padded: bool = True) -> Any:
    """What a product makes of its constant inputs by the part of its weight that is gone; None where that cannot be run."""
    assert call.product is not None
    shape = [-1 if d == call.product.along else 1 for d in range(call.source.dim())]
    swap = {
        id(call.source): call.source * constant.reshape(shape).to(call.source.dtype),
        id(call.weight): call.weight.where(gone, torch.zeros((), dtype=call.weight.dtype, device=call.weight.device)),
    }
    if call.bias is not None:
        swap[id(call.bias)] = torch.zeros_like(call.bias)
    args, kwargs = map_tensors((call.args, call.kwargs), lambda t: swap.get(id(t), t))
    if not padded:
        at = [a.name for a in call.func._schema.arguments].index("padding")
        args = tuple([0] * len(v) if i == at else v for i, v in enumerate(args))
    try:
        return call.func(*args, **kwargs)
    except RuntimeError:  # without its padding an input may be smaller than the window
        return None


def constant_of_channels(out: Tensor, dim: int) -> Tensor | None:
    """The value of each channel of a result, if it has one everywhere."""
    rows = out.movedim(dim, 0).flatten(1)
    scale = rows.abs().amax()
    even = rows.amax(1) - rows.amin(1) <= 64 * torch.finfo(rows.dtype).eps * scale
    return rows.double().mean(1) if bool(even.all()) else None
