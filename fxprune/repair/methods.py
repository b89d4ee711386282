"""The methods of repair: what each does at one site of a pruned program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.criteria.activation_stats import wide
from fxprune.passes.ir.pytree import map_tensors
from fxprune.repair import cgls
from fxprune.repair.cgls import fitted, inputs_of
from fxprune.repair.interpreter import Walk
from fxprune.repair.normal_equations import Normal, add, as_weight, groups, is_convolution
from fxprune.repair.sites import Met, RepairSite

NO_PLACE = "it has no bias, and no normalisation with running statistics behind it"
NOT_FINITE = "its inputs or its result are not finite"


@dataclass(frozen=True, slots=True)
class RepairStep:
    """What one method did at one site.

    Attributes:
        layer: the parameter that names the site: a weight, or the running mean of a normalisation.
        method: which one.
        error: the relative error of its result before and after (root mean square, against the original's), where measured.
        done: whether anything was changed.
        note: what to know of it; for a site that was left as it is, why.
    """

    layer: str
    method: str
    error: tuple[float, float] | None
    done: bool
    note: str = ""


@dataclass
class Repairer:
    """The original and the pruned program side by side.

    Attributes:
        old: the original, which is only read.
        new: the pruned one, whose tensors are changed.
        masks: for each tensor of the original, which elements are kept.
        ridge: of least squares.
    """

    old: Walk
    new: Walk
    masks: Mapping[str, Tensor]
    ridge: float
    steps: list[RepairStep] = field(default_factory=list)

    def run(self, methods: tuple[str, ...]) -> None:
        """Every site in the order of the program, and at each the methods in turn; then what follows is run."""
        for node in self.new.nodes:
            for site in self.new.sites.get(node, ()):
                for name in methods:
                    for_norms, method = METHODS[name]
                    if site.norm == for_norms:
                        self.steps += method(self, node, site)
            self.new.run(node)
        self.new.at = len(self.new.nodes)
        self.old.finish()

    def step(self, site: RepairSite, method: str, error: tuple[float, float] | None = None, note: str = "") -> list[RepairStep]:
        return [RepairStep(site.key[0], method, error, True, note)]

    def skipped(self, site: RepairSite, method: str, note: str) -> list[RepairStep]:
        return [RepairStep(site.key[0], method, None, False, note)]

    def wanted(self, site: RepairSite) -> list[Tensor]:
        """What the site's result should be on each batch: the original's, without what was removed from it."""
        return [self.kept(met) for met in self.old.reach(site.key)]

    def mask(self, met: Met) -> Tensor:
        """Which elements of a weight of the original are kept; its shape is that of the weight in the call."""
        owner = self.old.tensors[met.name]
        laid = torch.empty_strided(owner.shape, owner.stride(), dtype=torch.bool, device=owner.device)
        laid.copy_(self.masks[met.name]) if met.name in self.masks else laid.fill_(True)
        offset = met.weight.storage_offset() - owner.storage_offset()
        return laid.as_strided(met.weight.shape, met.weight.stride(), offset)

    def kept(self, met: Met, out: Tensor | None = None) -> Tensor:
        """The entries of a result of the original that are computed in the pruned program, too."""
        out = met.out if out is None else out
        product = met.product
        if product is None or product.kept is None:
            return out
        mask = self.mask(met)
        if mask.dim() == 3 and not is_convolution(met):  # a matrix for each entry of a batch, and each may keep others
            rows = mask.any(product.summed)
            stays = rows.any(1)
            lines = out.movedim(product.out, 1)[stays][rows[stays]]
            return lines.reshape(int(stays.sum()), -1, out.shape[3 - product.out]).movedim(1, product.out)
        if groups(met) > 1 and product.kept == 1:  # a transposed convolution: the outputs of one group after another
            rows = mask.reshape(groups(met), -1, *mask.shape[1:]).flatten(3).any(3) if mask.dim() > 2 else mask
            rows = rows.any(1).reshape(-1)
        else:
            rows = mask.movedim(product.kept, 0).flatten(1).any(1)
        return out.index_select(product.out, rows.nonzero().flatten())


def reconstruct(repairer: Repairer, node: fx.Node, site: RepairSite) -> list[RepairStep]:
    """The weight, and the constant beside it, that come closest to the original's result from the inputs that are left."""
    wanted = repairer.wanted(site)
    if site.reason or not wanted:
        return repairer.skipped(site, "reconstruct", site.reason or "the original has no such product")
    normal, size, met = Normal(site.place is not None, repairer.ridge), 0.0, None
    many: list[tuple[Met, Tensor]] = []
    for target, met in zip(wanted, repairer.new.measure(node, site), strict=True):
        if target.shape != met.out.shape:
            return repairer.skipped(site, "reconstruct", "its result has another shape than the original's")
        size += float(wide(target).double().square().sum())
        residual = wide(target) - wide(met.out)
        if inputs_of(met) > cgls.WIDE:
            many.append((met, residual))
        else:
            add(normal, met, residual)
    if many:
        return gradually(repairer, site, many, size)
    if met is None or normal.squares == 0.0:
        return []
    if not math.isfinite(normal.squares + float(normal.gram.sum())):
        return repairer.skipped(site, "reconstruct", NOT_FINITE)
    change, shift = normal.solve()
    met.weight.add_(as_weight(met, change).to(met.weight.dtype))
    shifted(repairer, site, met, shift.reshape(-1))
    error = (relative(normal.squares, size), relative(normal.left(change, shift), size))
    columns = normal.gram.shape[1]
    note = (
        f"{normal.count:,} samples and positions for {columns:,} inputs: more data would help" if normal.count < columns else ""
    )
    return repairer.step(site, "reconstruct", error, note)


def gradually(repairer: Repairer, site: RepairSite, many: list[tuple[Met, Tensor]], size: float) -> list[RepairStep]:
    """`reconstruct` for a product whose normal equations are too large to be formed; `size` is that of the wanted result."""
    mets, residuals = zip(*many, strict=True)
    if not any(bool(r.any()) for r in residuals):
        return []
    if not all(bool(r.isfinite().all() and m.source.isfinite().all()) for m, r in many):
        return repairer.skipped(site, "reconstruct", NOT_FINITE)
    change, before, after = fitted(mets, residuals, repairer.ridge, site.place is not None)
    mets[-1].weight.add_(change.weight.to(mets[-1].weight.dtype))
    shifted(repairer, site, mets[-1], change.constant)
    note = f"{inputs_of(mets[-1]):,} inputs: in steps"
    return repairer.step(site, "reconstruct", (relative(before, size), relative(after, size)), note)


def compensate(repairer: Repairer, node: fx.Node, site: RepairSite) -> list[RepairStep]:
    """The constant that makes the mean of each result the original's."""
    wanted = repairer.wanted(site)
    if site.reason or not wanted:
        return repairer.skipped(site, "compensate", site.reason or "the original has no such product")
    total, squares, size, count, met = torch.zeros(()), 0.0, 0.0, 0, None
    for target, met in zip(wanted, repairer.new.measure(node, site), strict=True):
        if target.shape != met.out.shape:
            return repairer.skipped(site, "compensate", "its result has another shape than the original's")
        residual = (wide(target) - wide(met.out)).double().movedim(met.product.out, -1)  # type: ignore[union-attr]
        total = total.to(residual.device) + residual.flatten(0, -2).sum(0)
        squares += float(residual.square().sum())
        size += float(wide(target).double().square().sum())
        count += residual.numel() // residual.shape[-1]
    if met is None or squares == 0.0:
        return []
    if site.place is None:
        return repairer.skipped(site, "compensate", NO_PLACE)
    if not math.isfinite(squares):
        return repairer.skipped(site, "compensate", NOT_FINITE)
    shift = total / count
    shifted(repairer, site, met, shift)
    left = max(squares - count * float(shift.square().sum()), 0.0)
    return repairer.step(site, "compensate", (relative(squares, size), relative(left, size)))


def fold(repairer: Repairer, node: fx.Node, site: RepairSite) -> list[RepairStep]:
    """What removed inputs that are constant contribute to a product, put where a constant goes."""
    met = repairer.old.reach(site.key)
    if site.reason or not met:
        return repairer.skipped(site, "fold", site.reason or "the original has no such product")
    gone = ~repairer.mask(met[0])
    constant = unvarying([m.source.movedim(m.product.along, 0).flatten(1) for m in met])  # type: ignore[union-attr]
    if not bool(gone.any()) or not bool(constant.any()):
        return []
    alone = contribution(met[0], constant, gone)
    value, note = level(repairer.kept(met[0], alone), met[0].product.out), ""  # type: ignore[union-attr]
    if value is None and is_convolution(met[0]) and not met[0].call.get("transposed"):
        note = "exact but for the border, where zero padding enters"
        inner = contribution(met[0], constant, gone, padded=False)
        value = None if inner is None else level(repairer.kept(met[0], inner), met[0].product.out)  # type: ignore[union-attr]
    if value is None:
        return repairer.skipped(site, "fold", "what the removed inputs contribute differs from place to place")
    if not bool(value.any()):
        return []
    if site.place is None:
        return repairer.skipped(site, "fold", NO_PLACE)
    shifted(repairer, site, next(repairer.new.measure(node, site)), value)
    return repairer.step(site, "fold", note=note)


def recalibrate(repairer: Repairer, node: fx.Node, site: RepairSite) -> list[RepairStep]:
    """The mean and the (unbiased) variance of what a normalisation is given, over all of the data."""
    if site.reason:
        return repairer.skipped(site, "recalibrate", site.reason)
    count, mean, spread, met = 0, torch.zeros(()), torch.zeros(()), None
    for met in repairer.new.measure(node, site):  # merged as Chan et al. (1979) do
        x = wide(met.source).double().movedim(1, 0).flatten(1)
        n, fresh = x.shape[1], x.mean(1)
        change = fresh - mean.to(x.device)
        spread = spread.to(x.device) + (x - fresh.unsqueeze(1)).square().sum(1)
        spread = spread + change.square() * (count * n / (count + n))
        mean, count = mean.to(x.device) + change * (n / (count + n)), count + n
    if met is None or met.var is None or count < 2:
        return repairer.skipped(site, "recalibrate", "the data holds a single value for each channel")
    if not bool((mean + spread).isfinite().all()):
        return repairer.skipped(site, "recalibrate", NOT_FINITE)
    met.weight.copy_(mean)
    met.var.copy_(spread / (count - 1))
    return repairer.step(site, "recalibrate")


Method = Callable[[Repairer, fx.Node, RepairSite], list[RepairStep]]
METHODS: dict[str, tuple[bool, Method]] = {  # whether it is for normalisations or for products
    "fold": (False, fold),
    "reconstruct": (False, reconstruct),
    "compensate": (False, compensate),
    "recalibrate": (True, recalibrate),
}


def shifted(repairer: Repairer, site: RepairSite, met: Met, shift: Tensor) -> None:
    """Add a constant to a product's result: to its bias, or by taking it from the running mean that is subtracted next."""
    if site.place == "bias":
        assert met.bias is not None
        met.bias.add_(shift.to(met.bias.dtype))
    elif site.place is not None:
        mean = repairer.new.tensors[site.place[0]]
        mean.sub_(shift.to(mean.dtype))


def relative(squares: float, size: float) -> float:
    return math.sqrt(squares / size) if size > 0 else math.inf


def unvarying(parts: list[Tensor]) -> Tensor:
    """Which rows hold a single value, to the rounding of a few operations, in all of the parts."""
    low = torch.stack([p.amin(1) for p in parts]).amin(0)
    high = torch.stack([p.amax(1) for p in parts]).amax(0)
    return high - low <= 16 * torch.finfo(low.dtype).eps * torch.maximum(high.abs(), low.abs())


def contribution(met: Met, constant: Tensor, gone: Tensor, *, padded: bool = True) -> Any:
    """What a product makes of its constant inputs by the part of its weight that is gone; None where that cannot be run."""
    assert met.product is not None
    shape = [-1 if d == met.product.along else 1 for d in range(met.source.dim())]
    swap = {
        id(met.source): met.source * constant.reshape(shape).to(met.source.dtype),
        id(met.weight): met.weight.where(gone, torch.zeros((), dtype=met.weight.dtype, device=met.weight.device)),
    }
    if met.bias is not None:
        swap[id(met.bias)] = torch.zeros_like(met.bias)
    args, kwargs = map_tensors((met.args, met.kwargs), lambda t: swap.get(id(t), t))
    if not padded:
        at = [a.name for a in met.func._schema.arguments].index("padding")
        args = tuple([0] * len(v) if i == at else v for i, v in enumerate(args))
    try:
        return met.func(*args, **kwargs)
    except RuntimeError:  # without its padding an input may be smaller than the window
        return None


def level(out: Tensor, dim: int) -> Tensor | None:
    """The value of each channel of a result, if it has one everywhere."""
    rows = out.movedim(dim, 0).flatten(1)
    scale = rows.abs().amax()
    even = rows.amax(1) - rows.amin(1) <= 64 * torch.finfo(rows.dtype).eps * scale
    return rows.double().mean(1) if bool(even.all()) else None
