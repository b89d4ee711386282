"""Refit: a weight that lost inputs is fitted to what these contributed in the original, from the original's activations.

The original runs on the data once; the pruned model does not run for it. What a weight lost, x_gone W_gone, is fitted by the
inputs that are left, x_kept: the moments of both are those of the original, so that no layer is fitted to the errors of those
before it, and nothing is held but a matrix for each layer of one block, and what goes into that block. (`reconstruct` instead
fits what the pruned model computes, layer after layer: with little data such fits follow one another's noise.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.criteria.activation_stats import wide
from fxprune.criteria.calibration import Batch
from fxprune.criteria.lockstep import Lockstep, stopping
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.slices import mask_of
from fxprune.passes.ops.registry import find
from fxprune.plan import shapes_of
from fxprune.repairs.both_models import BothModels, call, uncached
from fxprune.repairs.held_out import Outcome
from fxprune.repairs.least_squares import (
    WIDE,
    NormalEquations,
    as_weight,
    count_inputs,
    fit,
    groups,
    lifted,
    relative,
    run_product,
    sum_of_squares,
)
from fxprune.repairs.repairer import NO_DATA, NOT_FINITE, WORSE, RepairStep
from fxprune.repairs.rows import add_call
from fxprune.repairs.sites import SiteCall, SiteObserver, count_overlaps
from fxprune.repairs.stacks import Picks, matrices
from fxprune.selection.names import block_chains

NAME = "refit"
USED_AGAIN = "it is used more than once"
UNSEEN = "no row of the data held out meets it"

Matrix = tuple[str, int | None]  # a parameter, and the number of a matrix in it where it is a stack of them


@dataclass
class Lost:
    """What a weight lost, and what is left to make up for it with.

    Attributes:
        fitted, unseen: the normal equations of what is lost on what is left: on the data to fit, and on that held out.
        sizes: the sums of squares of the original's result, on both.
        call: one call of the product, without its activations, and with the weight that is left.
        place: of the matrix in the stack of those that are left, if it is one of several in one tensor.
        turned: whether the call reads the parameter transposed.
        bias: the name of the bias, if the product has one of its own.
    """

    call: SiteCall
    turned: bool
    bias: str | None
    place: int | None
    fitted: NormalEquations = field(init=False)
    unseen: NormalEquations = field(init=False)
    sizes: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def __post_init__(self) -> None:
        self.fitted, self.unseen = NormalEquations(self.bias is not None), NormalEquations(self.bias is not None)


class LostObserver(SiteObserver):
    """Watches the original run, and adds up the normal equations of what each weight lost.

    Arguments:
        names, owned: as for `SiteObserver`.
        mask: of a tensor of the original, which elements are kept; None where all are.
        lost: what is known so far, by parameter and number of the matrix in it; grows.
        skipped: parameters that cannot be fitted, with the reason; grows.
        held: whether the batch is held out.
    """

    def __init__(
        self,
        names: dict[int, str],
        owned: Mapping[str, Tensor],
        mask: Callable[[str], Tensor | None],
        lost: dict[Matrix, Lost],
        skipped: dict[str, str],
        *,
        held: bool,
    ) -> None:
        super().__init__(names, {int(t.untyped_storage().data_ptr()): name for name, t in owned.items() if t.numel()})
        self.tensors, self.mask, self.lost, self.skipped, self.held_out = owned, mask, lost, skipped, held
        self.spans: dict[str, Any] = {}
        self.picks = Picks()

    def record(self, call: Any, tensors: dict[int, Tensor], func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if call.inputs:
            self.picks.note(func, args, self.owner(tensors[call.first.id]), out)
        super().record(call, tensors, func, args, kwargs, out)
        for product in find(func).products_of(call):
            weight = tensors[product.weight.id]
            if (picked := self.picks.of(weight)) is not None:
                self.look(
                    SiteCall(picked[0], product, tensors[product.source.id], out, call, func, args, kwargs, weight), picked[1]
                )
        while self.calls:
            self.look(self.calls.pop())

    def look(self, call: SiteCall, numbers: Tensor | None = None) -> None:
        mask = None if call.product is None or call.name in self.skipped else self.mask(call.name)
        if call.product is None or mask is None:
            return
        whole = self.tensors[call.name]
        for number, each in matrices(call, whole, numbers):
            if number is None:
                self.look_at(each, whole, mask, None, None)
            elif bool(mask[number].any()):
                place = int(mask[:number].flatten(1).any(1).sum())
                self.look_at(each, whole[number], mask[number], number, place)

    def look_at(self, call: SiteCall, whole: Tensor, mask: Tensor, number: int | None, place: int | None) -> None:
        """One matrix, `whole` in the original, and the rows that it multiplies."""
        assert call.product is not None
        weight, key = call.weight, (call.name, number)
        turned = weight.shape == whole.mT.shape and weight.stride() == whole.mT.stride() if whole.dim() == 2 else False
        if not turned and (weight.shape != whole.shape or weight.stride() != whole.stride()):
            self.skipped[call.name] = "a part of it is used at a time"
            return
        mask = mask.mT if turned else mask
        summed, along = call.product.summed, call.product.along
        inputs, outputs = kept_along(mask, summed), kept_along(mask, call.product.kept)
        if bool(inputs.all()) or not bool(inputs.any()):  # it lost none, or there is nothing left to fit
            return
        if why := self.why_not(call, mask, inputs, outputs):
            self.skipped[call.name] = why
            return
        self.spans[call.name] = self.span(whole)
        kept, gone = (which.nonzero().flatten().to(weight.device) for which in (inputs, ~inputs))
        residual = run_product(call, wide(weight.index_select(summed, gone)), wide(call.source.index_select(along, gone)))
        weight = weight.index_select(summed, kept)
        if call.product.kept is not None and not bool(outputs.all()):
            stay = outputs.nonzero().flatten().to(weight.device)
            residual, weight = residual.index_select(call.product.out, stay), weight.index_select(call.product.kept, stay)
        left = replace(call, source=call.source.index_select(along, kept), weight=weight)
        if key not in self.lost:
            bias = call.bias if call.bias is not None and call.bias.dim() == 1 and self.owner(call.bias) else None
            own = None if bias is None or number is not None or call.op.get("beta", 1) != 1 else self.owner(bias)
            call_alone = replace(left, source=call.source[:0], out=call.out[:0], args=(), kwargs={})
            self.lost[key] = Lost(call_alone, turned, own, place)
        found = self.lost[key]
        found.sizes[self.held_out] += sum_of_squares(call.out)
        add_call(found.unseen if self.held_out else found.fitted, left, residual)

    def why_not(self, call: SiteCall, mask: Tensor, inputs: Tensor, outputs: Tensor) -> str:
        """Why a weight cannot be fitted, or ""."""
        assert call.product is not None
        if groups(call) > 1 or (call.weight.dim() == 3 and "dilation" not in call.op.named):
            return "its inputs are in groups"
        whole = lifted(inputs, mask, call.product.summed)
        if call.product.kept is not None:
            whole = whole & lifted(outputs, mask, call.product.kept)
        if not torch.equal(whole.expand_as(mask), mask):
            return "what is left of it is no rectangle"
        if call.op.get("alpha", 1) != 1:
            return "its product is scaled"
        return f"it has more than {WIDE:,} inputs" if count_inputs(call) > WIDE else ""

    def used_again(self) -> list[str]:
        """Weights that lost inputs and are used more than once."""
        return [name for name, span in self.spans.items() if count_overlaps(span, self.uses) > 1]


def kept_along(mask: Tensor, dim: int | None) -> Tensor:
    """Of each index along a dimension whether anything is kept there."""
    return torch.ones(1, dtype=torch.bool) if dim is None else mask.any([d for d in range(mask.dim()) if d != dim])


class Refit:
    """Fits the weights of the pruned model that lost inputs; `both` are the models and the data."""

    def __init__(self, both: BothModels) -> None:
        self.both, self.own = both, both.own
        self.checks = any(held for _, held in both.parts)

    def run(self, ridge: float | None) -> tuple[list[RepairStep], Outcome]:
        """Fit every weight that lost inputs, then go as far as the output on the samples held out comes closer."""
        start: dict[str, Tensor] = {}
        steps: dict[Matrix, RepairStep] = {}
        for lost in self.watch(start, steps):
            for (name, number), found in lost.items():
                layer = name if number is None else f"{name}[{number}]"
                if self.both.refused:
                    steps[name, number] = RepairStep(layer, NAME, None, False, self.both.refused)
                    continue
                start |= {n: self.own[n].detach().clone() for n in (name, found.bias) if n in self.own and n not in start}
                steps[name, number] = self.fit(name, layer, found, ridge)
        return list(steps.values()), self.both.choose_share(start)

    def watch(self, start: dict[str, Tensor], steps: dict[Matrix, RepairStep]) -> Iterator[dict[Matrix, Lost]]:
        """Run the original on all batches, block by block, and yield what the weights of each lost.

        Arguments:
            start: the values of weights that were fitted: those of a weight that is used again are put back.
            steps: what was done, by weight; those that are left as they are are added.
        """
        whole, model, parts = self.both.whole, self.both.model, self.both.parts
        tensors = dict(named_tensors(whole))
        first = {id(t): name for name, t in named_tensors(model)}
        names = {id(t): first.get(id(t), name) for name, t in tensors.items()}
        owned = {names[id(t)]: t for t in tensors.values() if isinstance(t, nn.Parameter) and t.is_floating_point()}
        cuts, lost, skipped = self.both.plan.fitted(shapes_of(model)).slices, dict[Matrix, Lost](), dict[str, str]()

        @functools.cache
        def mask(name: str) -> Tensor | None:
            stays = name in self.own and name not in start  # what went with its branch has nothing to be fitted
            return mask_of(cuts[name], owned[name].shape) if cuts.get(name) and stays else None

        observers = [LostObserver(names, owned, mask, lost, skipped, held=held) for _, held in parts]

        def ready() -> dict[Matrix, Lost]:
            skipped.update((name, USED_AGAIN) for observer in observers for name in observer.used_again())
            found = {key: each for key, each in lost.items() if key[0] in self.own and key[0] not in skipped}
            lost.clear()
            mask.cache_clear()
            return found

        paths = [path for chain in block_chains(whole) for path in chain]
        works = [functools.partial(observed, o, whole, batch) for o, (batch, _) in zip(observers, parts, strict=True)]
        with stopping(whole, paths), Lockstep(paths, works) as lockstep:
            for _, at in progress_bar(lockstep.stages(), "refit", "block", len(paths)):
                answers = []
                for i in at:
                    with observers[i]:
                        answers.append(lockstep.call(i).run())
                yield ready()
                for i, answer in zip(at, answers, strict=True):
                    lockstep.answer(i, answer)
            yield ready()
        for name, number in [key for key in steps if key[0] in skipped]:
            self.own[name].data.copy_(start.get(name, self.own[name]))
            del steps[name, number]
        steps |= {(name, None): RepairStep(name, NAME, None, False, why) for name, why in skipped.items()}

    def fit(self, name: str, layer: str, found: Lost, ridge: float | None) -> RepairStep:
        """Fit one weight, and keep the fit where what is lost grows smaller on the data held out."""
        step = RepairStep(layer, NAME, None, False)
        normal, unseen = found.fitted, found.unseen
        if found.place is not None and self.checks and not unseen.count:
            return replace(step, note=UNSEEN)
        if not normal.count or not math.isfinite(normal.squares + float(normal.gram.sum())):
            return replace(step, note=NOT_FINITE if normal.count else NO_DATA)
        change, shift, _ = fit(normal, ridge, unseen.left if unseen.count else None)
        judge = unseen if unseen.count else normal
        size = found.sizes[bool(unseen.count)]
        error = relative(judge.squares, size), relative(judge.left(change, shift), size)
        if not error[1] < error[0]:
            return replace(step, error=error, note=WORSE)
        moved = as_weight(found.call, change)
        weight = self.own[name] if found.place is None else self.own[name][found.place]
        weight.data.add_((moved.mT if found.turned else moved).reshape(weight.shape).to(weight.dtype))
        if found.bias is not None and found.bias in self.own:
            self.own[found.bias].data.add_(shift.reshape(-1).to(self.own[found.bias].dtype))
        return replace(step, error=error, done=True)


def observed(observer: LostObserver, model: nn.Module, batch: Batch) -> None:
    with observer:
        call(model, uncached(model, batch))
