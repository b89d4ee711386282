"""The methods of repair: one class each, listed in `METHODS`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from fxprune.criteria.activation_stats import Moments, wide
from fxprune.passes.ir.pytree import map_tensors
from fxprune.repair import least_squares
from fxprune.repair.interpreter import ProgramRun
from fxprune.repair.least_squares import (
    NormalEquations,
    add_call,
    as_weight,
    count_inputs,
    fit_gradually,
    groups,
    is_convolution,
)
from fxprune.repair.sites import RepairSite, SiteCall

NO_PLACE = "it has no bias, and no normalisation with running statistics behind it"
NOT_FINITE = "its inputs or its result are not finite"
NO_PRODUCT = "the original has no such product"


@dataclass(frozen=True, slots=True)
class RepairStep:
    """What one method did at one site.

    Attributes:
        layer: the parameter that names the site: a weight, or the running mean of a normalisation.
        method: its name.
        error: the relative error of the site's result before and after (root mean square, against the original's), where it
            was measured.
        done: whether anything was changed.
        note: a remark; for a site that was left as it is, the reason.
    """

    layer: str
    method: str
    error: tuple[float, float] | None
    done: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """What a method changed: the relative error before and after, where it was measured, and a remark."""

    error: tuple[float, float] | None = None
    note: str = ""


class Skip(Exception):
    """Raised by a method that leaves a site as it is, with the reason."""


@dataclass
class Repairer:
    """The original and the pruned program side by side.

    Attributes:
        old: the original, which is only read.
        new: the pruned program, whose tensors are changed.
        masks: for each tensor of the original, which elements are kept.
        ridge: of least squares.
        steps: what was done.
    """

    old: ProgramRun
    new: ProgramRun
    masks: Mapping[str, Tensor]
    ridge: float
    steps: list[RepairStep] = field(default_factory=list)

    def run(self, methods: Sequence[str]) -> None:
        """Repair every site in the order of the program by each method in turn, then run what follows."""
        for node in self.new.nodes:
            for site in self.new.sites.get(node, ()):
                for method in (METHODS[name] for name in methods):
                    if site.norm == method.for_norms:
                        self.apply(method, node, site)
            self.new.run(node)
        self.new.position = len(self.new.nodes)
        self.old.finish()

    def apply(self, method: RepairMethod, node: fx.Node, site: RepairSite) -> None:
        try:
            if site.reason:
                raise Skip(site.reason)
            change = method.apply(self, node, site)
        except Skip as reason:
            self.steps.append(RepairStep(site.key[0], method.name, None, False, str(reason)))
        else:
            if change is not None:
                self.steps.append(RepairStep(site.key[0], method.name, change.error, True, change.note))

    def residuals(self, node: fx.Node, site: RepairSite) -> Iterator[tuple[SiteCall, Tensor, Tensor]]:
        """For each batch the site's call, the result of the original without what was removed from it, and the difference."""
        wanted = [self.keep(call) for call in self.old.run_to(site.key)]
        if not wanted:
            raise Skip(NO_PRODUCT)
        for target, call in zip(wanted, self.new.measure(node, site), strict=True):
            if target.shape != call.out.shape:
                raise Skip("its result has another shape than the original's")
            yield call, wide(target), wide(target) - wide(call.out)

    def mask(self, call: SiteCall) -> Tensor:
        """Which elements of a weight of the original are kept; its shape is that of the weight in the call."""
        owner = self.old.tensors[call.name]
        laid = torch.empty_strided(owner.shape, owner.stride(), dtype=torch.bool, device=owner.device)
        laid.copy_(self.masks[call.name]) if call.name in self.masks else laid.fill_(True)
        offset = call.weight.storage_offset() - owner.storage_offset()
        return laid.as_strided(call.weight.shape, call.weight.stride(), offset)

    def keep(self, call: SiteCall, out: Tensor | None = None) -> Tensor:
        """The entries of a result of the original that the pruned program computes too."""
        out = call.out if out is None else out
        product = call.product
        if product is None or product.kept is None:
            return out
        mask = self.mask(call)
        if mask.dim() == 3 and not is_convolution(call):  # a batch of matrices, each of which may keep other outputs
            rows = mask.any(product.summed)
            stays = rows.any(1)
            lines = out.movedim(product.out, 1)[stays][rows[stays]]
            return lines.reshape(int(stays.sum()), -1, out.shape[3 - product.out]).movedim(1, product.out)
        if groups(call) > 1 and product.kept == 1:  # a transposed convolution: the outputs of one group after another
            rows = mask.reshape(groups(call), -1, *mask.shape[1:]).flatten(3).any(3) if mask.dim() > 2 else mask
            rows = rows.any(1).reshape(-1)
        else:
            rows = mask.movedim(product.kept, 0).flatten(1).any(1)
        return out.index_select(product.out, rows.nonzero().flatten())

    def add_constant(self, site: RepairSite, call: SiteCall, shift: Tensor) -> None:
        """Add a constant to a product's result: to its bias, or by subtracting it from the running mean behind it."""
        if site.place == "bias":
            assert call.bias is not None
            call.bias.add_(shift.to(call.bias.dtype))
        elif site.place is not None:
            mean = self.new.tensors[site.place[0]]
            mean.sub_(shift.to(mean.dtype))


class RepairMethod:
    """A method of repair; the class docstring of each is what `fxprune.repair` says of it.

    Attributes:
        name: of the `method` argument.
        for_norms: whether it repairs normalisations with running statistics, instead of products.
    """

    name: ClassVar[str]
    for_norms: ClassVar[bool] = False

    def apply(self, repairer: Repairer, node: fx.Node, site: RepairSite) -> Change | None:
        """Change the parameters of a site; None where nothing is left to change, Skip where it cannot be done."""
        raise NotImplementedError


class Fold(RepairMethod):
    """Add what removed inputs contribute that are constant on all of the data."""

    name = "fold"

    def apply(self, repairer: Repairer, node: fx.Node, site: RepairSite) -> Change | None:
        calls = repairer.old.run_to(site.key)
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
        repairer.add_constant(site, next(repairer.new.measure(node, site)), value)
        return Change(note=note)


class Reconstruct(RepairMethod):
    """Fit the weight, and the constant beside it, to the original's result by least squares on the inputs that are left."""

    name = "reconstruct"

    def apply(self, repairer: Repairer, node: fx.Node, site: RepairSite) -> Change | None:
        normal, size, call = NormalEquations(site.place is not None, repairer.ridge), 0.0, None
        large: list[tuple[SiteCall, Tensor]] = []
        for call, target, residual in repairer.residuals(node, site):
            size += float(target.double().square().sum())
            if count_inputs(call) > least_squares.WIDE:
                large.append((call, residual))
            else:
                add_call(normal, call, residual)
        if large:
            return self.apply_gradually(repairer, site, large, size)
        if call is None or normal.squares == 0.0:
            return None
        if not math.isfinite(normal.squares + float(normal.gram.sum())):
            raise Skip(NOT_FINITE)
        change, shift = normal.solve()
        call.weight.add_(as_weight(call, change).to(call.weight.dtype))
        repairer.add_constant(site, call, shift.reshape(-1))
        error = (relative(normal.squares, size), relative(normal.left(change, shift), size))
        columns = normal.gram.shape[1]
        few = f"{normal.count:,} samples and positions for {columns:,} inputs: more data would help"
        return Change(error, few if normal.count < columns else "")

    def apply_gradually(
        self, repairer: Repairer, site: RepairSite, large: Sequence[tuple[SiteCall, Tensor]], size: float
    ) -> Change | None:
        """For a product whose normal equations are too large to be formed; `size` is that of the wanted result."""
        calls, residuals = zip(*large, strict=True)
        if not any(bool(r.any()) for r in residuals):
            return None
        if not all(bool(r.isfinite().all() and call.source.isfinite().all()) for call, r in large):
            raise Skip(NOT_FINITE)
        change, before, after = fit_gradually(calls, residuals, repairer.ridge, site.place is not None)
        calls[-1].weight.add_(change.weight.to(calls[-1].weight.dtype))
        repairer.add_constant(site, calls[-1], change.constant)
        return Change((relative(before, size), relative(after, size)), f"{count_inputs(calls[-1]):,} inputs: in steps")


class Compensate(RepairMethod):
    """Add the constant that makes the mean of each result the original's."""

    name = "compensate"

    def apply(self, repairer: Repairer, node: fx.Node, site: RepairSite) -> Change | None:
        total, squares, size, count, call = torch.zeros(()), 0.0, 0.0, 0, None
        for call, target, difference in repairer.residuals(node, site):
            assert call.product is not None
            residual = difference.double().movedim(call.product.out, -1)
            total = total.to(residual.device) + residual.flatten(0, -2).sum(0)
            squares += float(residual.square().sum())
            size += float(target.double().square().sum())
            count += residual.numel() // residual.shape[-1]
        if call is None or squares == 0.0:
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

    def apply(self, repairer: Repairer, node: fx.Node, site: RepairSite) -> Change | None:
        moments, call = None, None
        for call in repairer.new.measure(node, site):
            channels = call.source.shape[1]
            moments = moments or Moments(channels)
            moments.add(torch.arange(channels), call.source.double(), torch.arange(channels), 1)
        if moments is None or call is None or call.var is None or float(moments.count[0]) < 2:
            raise Skip("the data holds a single value for each channel")
        if not bool((moments.mean + moments.spread).isfinite().all()):
            raise Skip(NOT_FINITE)
        call.weight.copy_(moments.mean)
        call.var.copy_(moments.spread / (moments.count - 1))
        return Change()


METHODS: dict[str, RepairMethod] = {method.name: method for method in (Fold(), Reconstruct(), Compensate(), Recalibrate())}


def relative(squares: float, size: float) -> float:
    return math.sqrt(squares / size) if size > 0 else math.inf


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
