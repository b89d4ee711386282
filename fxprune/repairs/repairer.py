"""The original and the pruned program side by side, layer by layer: what methods of repair fit to, and whether it helps."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxprune.criteria.activation_stats import wide
from fxprune.passes.ir.progress import progress_bar
from fxprune.repairs.interpreter import ProgramRun
from fxprune.repairs.least_squares import groups, is_convolution, lifted, relative, sum_of_squares
from fxprune.repairs.look_ahead import Path, divisor
from fxprune.repairs.rows import HELD, Rows, rows_of
from fxprune.repairs.sites import Key, RepairSite, SiteCall, merged

NO_PRODUCT = "the original, or a batch, has no such product"
NOT_FINITE = "its inputs or its result are not finite"
OTHER_ORDER = "another program, for other batches, has it earlier"
NO_DATA = "none of the data that is fitted reaches it"
OTHER_SHAPE = "its result has another shape than the original's"
WORSE = "on the data held out its result would be no closer to the original's"


@dataclass(frozen=True, slots=True)
class RepairStep:
    """What one method did at one site.

    Attributes:
        layer: the parameter that names the site: a weight, or the running mean of a normalisation; of `merge`, the
            name of the family.
        method: its name.
        error: the relative error of the site's result before and after (root mean square, against the original's), where it
            was measured: on the data held out, if any is.
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
    """What a method changed.

    Attributes:
        error: the relative error before and after on the data that was fitted, where it was measured.
        note: a remark.
        held: the same on the data held out, of a method that knows it.
    """

    error: tuple[float, float] | None = None
    note: str = ""
    held: tuple[float, float] | None = None


class Skip(Exception):
    """Raised by a method that leaves a site as it is, with the reason."""


@dataclass(frozen=True, eq=False)
class SideBySide:
    """The original and the pruned program for batches of one form; the first is only read.

    Attributes:
        held: the numbers of the batches that are held out.
    """

    old: ProgramRun
    new: ProgramRun
    held: frozenset[int]

    def batches(self, *, held: bool) -> list[int]:
        """The numbers of those that are held out, or of the others."""
        return [i for i in range(len(self.new.interpreters)) if (i in self.held) == held]

    def agree_on_paths(self, looks_ahead: bool) -> None:
        """Forget the paths of sites that are not the same in both programs, or all of them."""
        old, new = ({s.key: s for sites in run.sites.values() for s in sites} for run in (self.old, self.new))
        for key in {*old, *new}:
            if not looks_ahead or key not in old or key not in new or not new[key].path.fits(old[key].path):
                for site in (found[key] for found in (old, new) if key in found):
                    site.path = Path()


@dataclass
class Repairer:
    """The original and the pruned programs, one for each form of the batches.

    Attributes:
        runs: their programs, which share the tensors that are changed.
        masks: for each tensor of the original, which elements are kept.
        ridge: of least squares; None where it is chosen by the data held out.
        refusal: why no site may be changed, or "".
        steps: what was done.
        calls: the calls of the site that is being repaired, by run and batch, until it is changed.
        start: the tensors of that site, with what they were.
        settled: normalisations that a product in front of them was fitted through.
    """

    runs: Sequence[SideBySide]
    masks: Mapping[str, Tensor]
    ridge: float | None
    refusal: str = ""
    steps: list[RepairStep] = field(default_factory=list)
    calls: dict[tuple[int, int], tuple[SiteCall, SiteCall]] = field(default_factory=dict)
    start: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    settled: set[Key] = field(default_factory=set)

    def run(self, methods: Sequence[RepairMethod]) -> None:
        """Repair every site in the order of the programs by each method in turn, then run what follows."""
        for run in self.runs:
            run.agree_on_paths(any(method.looks_ahead for method in methods))
        sites = merged([[s for sites in run.new.sites.values() for s in sites] for run in self.runs])
        for site in progress_bar(sites, "repair", "layer"):
            for method in methods:
                if site.norm == method.for_norms and site.key not in self.settled:
                    steps = self.apply(method, site)
                    exact = not steps and self.checks  # then nothing is to be gained behind it, either
                    if method.looks_ahead and (exact or any(step.done for step in steps)):
                        self.settled |= self.norms_behind(site)
                    self.steps += steps
        for run in self.runs:
            run.new.finish()
            run.old.finish()

    @property
    def checks(self) -> bool:
        """Whether any data is held out."""
        return any(run.held for run in self.runs)

    def apply(self, method: RepairMethod, site: RepairSite) -> list[RepairStep]:
        """Repair a site, and undo it where that does not bring it closer to the original on the data held out."""
        step = RepairStep(site.key[0], method.name, None, False)
        self.start = []
        try:
            if site.reason or self.refusal:
                raise Skip(site.reason or self.refusal)
            if site.place == "bias" and not self.has_bias(site):
                site.place = None
            self.start = self.tensors(site)
            before = self.error(site) if self.checks and not method.measures else math.inf
            change = method.apply(self, site)
            self.forget()
            if change is None:
                return []
            if not self.checks:
                return [replace(step, error=change.error, done=True, note=change.note)]
            error = change.held or (before, self.error(site))
        except Skip as reason:
            for tensor, value in self.start:
                tensor.copy_(value)
            return [replace(step, note=str(reason))]
        finally:
            self.forget()
        if error[1] < error[0]:
            return [replace(step, error=error, done=True, note=change.note)]
        for tensor, value in self.start:
            tensor.copy_(value)
        return [replace(step, error=error, note=WORSE)]

    def forget(self) -> None:
        """The site has changed, or is done with."""
        self.calls.clear()
        for run in self.runs:
            run.new.lines.clear()

    def has_bias(self, site: RepairSite) -> bool:
        """Whether every batch adds the bias in the site's own call; torch chooses by the layout of what a linear map reads."""
        return all(call.bias is not None for held in (False, True) for _, call in self.measured(site, held=held))

    def tensors(self, site: RepairSite) -> list[tuple[Tensor, Tensor]]:
        """The tensors that a method may change at a site, each with a copy."""
        call = next((call for _, call in self.measured(site)), None)
        if call is None:
            raise Skip(NO_DATA)
        found = [t for t in (call.weight, call.bias, call.var, self.mean_behind(site)) if t is not None]
        return [(t, t.clone()) for t in found]

    def mean_behind(self, site: RepairSite) -> Tensor | None:
        """The running mean that takes the constants of a site."""
        if site.place is None or site.place == "bias":
            return None
        return next(run.new.tensors[site.place[0]] for run in self.runs if site.place[0] in run.new.tensors)

    def norms_behind(self, site: RepairSite) -> set[Key]:
        """The normalisations on the path of a site."""
        return {s.key for run in self.runs for node in site.path.nodes[1:] for s in run.new.sites.get(node, ()) if s.norm}

    def error(self, site: RepairSite) -> float:
        """The relative error of a site's result on the data held out."""
        squares = size = 0.0
        mean = None if site.path.kinds else self.mean_behind(site)  # which the path goes through
        moved = next((mean - value for t, value in self.start if t is mean), None)  # what it takes off the result
        for call, target, residual in self.residuals(site, held=True):
            if moved is not None and call.product is not None:
                residual = residual + lifted(moved, residual, call.product.out)
            squares += sum_of_squares(residual)
            size += sum_of_squares(target)
        if not math.isfinite(squares):
            raise Skip(NOT_FINITE)
        return relative(squares, size)

    def measured(self, site: RepairSite, *, held: bool = False) -> Iterator[tuple[SiteCall, SiteCall]]:
        """The calls of a site in both programs, on the batches to fit or on those held out."""
        for number, run in enumerate(self.runs):
            found = run.new.run_until(site.key)
            if found is None:
                if any(s.key == site.key for sites in run.new.sites.values() for s in sites):
                    raise Skip(OTHER_ORDER)
                continue
            batches = run.batches(held=held)
            wanted = run.old.run_to(site.key)
            if not wanted:
                raise Skip(NO_PRODUCT)
            for i in batches:
                if (number, i) not in self.calls:
                    if (call := next(run.new.measure(*found, [i]), None)) is None:
                        raise Skip(NO_PRODUCT)
                    self.calls[number, i] = wanted[i], call
                yield self.calls[number, i]

    def originals(self, site: RepairSite) -> list[SiteCall]:
        """The calls of a site in the original, on all batches."""
        return [call for run in self.runs for call in run.old.run_to(site.key)]

    def residuals(self, site: RepairSite, *, held: bool = False) -> Iterator[tuple[SiteCall, Tensor, Tensor]]:
        """For each batch the site's call, the result of the original without what was removed from it, and the difference.

        Where the site has a path, it is the smallest change after which the reader of what the result becomes along it
        tells nothing from the original.

        Arguments:
            held: whether on the batches held out, instead of those to fit.
        """
        for wanted, call in self.measured(site, held=held):
            target = self.keep(wanted)
            if target.shape != call.out.shape:
                raise Skip(OTHER_SHAPE)
            residual = wide(target) - wide(call.out)
            (aim, _), (found, slope) = ahead_of(wanted), ahead_of(call)
            if aim is not None and found is not None and slope is not None:
                residual = (site.path.beyond(self.keep(wanted, aim), found) - found) / slope
            yield call, wide(target), residual

    def rows(self, site: RepairSite, *, held: bool) -> list[Rows]:
        """What a product reads, what its result is to be and what it is, row by row."""
        found, seed = list[Rows](), 0
        samples = sum(len(call.out) for _, call in self.measured(site))  # as many positions of each for those held out
        for wanted, call in self.measured(site, held=held):
            if is_convolution(call) and wanted.out[:, 0].shape != call.out[:, 0].shape:
                raise Skip(OTHER_SHAPE)
            for rows in rows_of(wanted, call, functools.partial(self.keep, wanted), samples, seed):
                if rows.aim.shape != rows.found.shape:
                    raise Skip(OTHER_SHAPE)
                rows.holds = sum(each.elements for each in [*found, rows]) <= HELD
                found.append(rows)
                seed += rows.aim.numel()
        return found

    def mask(self, call: SiteCall) -> Tensor:
        """Which elements of a weight of the original are kept; its shape is that of the weight in the call."""
        memory = call.weight.untyped_storage().data_ptr()
        owners = [run.old.tensors[call.name] for run in self.runs if call.name in run.old.tensors]
        owner = next(t for t in owners if t.untyped_storage().data_ptr() == memory)
        laid = torch.empty_strided(owner.shape, owner.stride(), dtype=torch.bool, device=owner.device)
        laid.copy_(self.masks[call.name]) if call.name in self.masks else laid.fill_(True)
        offset = call.weight.storage_offset() - owner.storage_offset()
        return laid.as_strided(call.weight.shape, call.weight.stride(), offset)

    def keep(self, call: SiteCall, out: Tensor | None = None) -> Tensor:
        """The entries of a result of the original that the pruned program computes too."""
        out = call.out if out is None else out
        product = call.product
        if product is None and call.name in self.masks:  # the channels of a normalisation
            return out.index_select(1, self.masks[call.name].nonzero().flatten().to(out.device))
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
        elif (mean := self.mean_behind(site)) is not None:
            mean.sub_(shift.to(mean.dtype))


class RepairMethod:
    """A method of repair; the class docstring of each is what `fxprune.repair` says of it.

    Attributes:
        name: of the `method` argument.
        for_norms: whether it repairs normalisations with running statistics, instead of products.
        measures: whether it finds the errors on the data held out itself.
        looks_ahead: whether it gets right what its result becomes, instead of the result.
    """

    name: ClassVar[str]
    for_norms: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False

    def apply(self, repairer: Repairer, site: RepairSite) -> Change | None:
        """Change the parameters of a site; None where nothing is left to change, Skip where it cannot be done."""
        raise NotImplementedError


def ahead_of(call: SiteCall) -> tuple[Tensor | None, Tensor | None]:
    """What a result becomes along the path of its site, if it has one, and by how much that grows with it."""
    if call.line is None:
        return None if call.ahead is None else wide(call.ahead), call.slope
    dim = 1 if call.product is None else call.product.out
    slope, offset = (lifted(t, call.out, dim) for t in call.line)
    return wide(call.out) * slope + offset, divisor(slope)
