"""Refit: a weight that lost inputs is fitted to what these contributed in the original, from the original's activations.

The original runs on the data once; the pruned model does not run for it. What a weight lost, x_gone W_gone, is fitted by the
inputs that are left, x_kept: the moments of both are those of the original, so that no layer is fitted to the errors of those
before it, and nothing is held but a matrix for each layer. (`reconstruct` instead fits what the pruned model computes, layer
after layer: with little data such fits follow one another's noise.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.criteria.activation_stats import wide
from fxprune.criteria.calibration import BATCHES, Batch
from fxprune.form_programs import FormPrograms, Names, slots
from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import GuardError, PruneError
from fxprune.passes.ir.module_tree import named_tensors, private_copy, set_mode
from fxprune.passes.ir.progress import progress_bar
from fxprune.plan import PlanData
from fxprune.repair.held_out import SHARES, Errors, Outcome
from fxprune.repair.least_squares import NormalEquations, add_call, as_weight, count_inputs, fit, groups, run_product
from fxprune.repair.repairer import NOT_FINITE, WORSE, RepairStep, relative
from fxprune.repair.sites import SiteCall, SiteObserver, count_overlaps

NAME = "refit"
TOO_WIDE = 8192  # inputs of a product whose normal equations are not formed


@dataclass
class Lost:
    """What a weight lost, and what is left to make up for it with.

    Attributes:
        fitted, unseen: the normal equations of what is lost on what is left: on the data to fit, and on that held out.
        sizes: the sums of squares of the original's result, on both.
        call: one call of the product, without its activations, and with the weight that is left.
        turned: whether the call reads the parameter transposed.
        bias: the name of the bias, if the product has one of its own.
    """

    call: SiteCall
    turned: bool
    bias: str | None
    fitted: NormalEquations = field(init=False)
    unseen: NormalEquations = field(init=False)
    sizes: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def __post_init__(self) -> None:
        self.fitted, self.unseen = NormalEquations(self.bias is not None), NormalEquations(self.bias is not None)


class LostObserver(SiteObserver):
    """Watches the original run, and adds up the normal equations of what each weight lost.

    Arguments:
        names, owned: as for `SiteObserver`.
        masks: for each tensor of the original, which elements are kept.
        lost: what is known so far, by parameter; grows.
        skipped: parameters that cannot be fitted, with the reason; grows.
        held: whether the batch is held out.
    """

    def __init__(
        self,
        names: dict[int, str],
        owned: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        lost: dict[str, Lost],
        skipped: dict[str, str],
        *,
        held: bool,
    ) -> None:
        super().__init__(names, {int(t.untyped_storage().data_ptr()): name for name, t in owned.items() if t.numel()})
        self.tensors, self.masks, self.lost, self.skipped, self.held_out = owned, masks, lost, skipped, held
        self.spans: dict[str, Any] = {}

    def record(self, call: Any, tensors: dict[int, Tensor], func: Any, args: Any, kwargs: Any, out: Any) -> None:
        super().record(call, tensors, func, args, kwargs, out)
        while self.calls:
            self.look(self.calls.pop())

    def look(self, call: SiteCall) -> None:
        mask = self.masks.get(call.name)
        if call.product is None or call.name in self.skipped or mask is None or bool(mask.all()):
            return
        weight, whole = call.weight, self.tensors[call.name]
        turned = weight.shape == whole.mT.shape and weight.stride() == whole.mT.stride() if whole.dim() == 2 else False
        if not turned and (weight.shape != whole.shape or weight.stride() != whole.stride()):
            self.skipped[call.name] = "a part of it is used at a time"
            return
        mask = mask.mT if turned else mask
        inputs, outputs = kept_along(mask, call.product.summed), kept_along(mask, call.product.kept)
        if bool(inputs.all()):
            return
        if why := self.why_not(call, mask, inputs, outputs):
            self.skipped[call.name] = why
            return
        self.spans[call.name] = self.span(weight)
        gone = weight * lifted(~inputs, weight, call.product.summed)
        residual = run_product(call, wide(gone), wide(call.source))
        if call.product.kept is not None:
            residual = residual.index_select(call.product.out, outputs.nonzero().flatten().to(residual.device))
        kept = inputs.nonzero().flatten().to(weight.device)
        left = replace(call, source=call.source.index_select(call.product.along, kept), weight=cut(weight, mask))
        if call.name not in self.lost:
            bias = call.bias if call.bias is not None and call.bias.dim() == 1 and self.owner(call.bias) else None
            own = None if bias is None or call.op.get("beta", 1) != 1 else self.owner(bias)
            call_alone = replace(left, source=call.source[:0], out=call.out[:0], args=(), kwargs={})
            self.lost[call.name] = Lost(call_alone, turned, own)
        found = self.lost[call.name]
        found.sizes[self.held_out] += float(call.out.double().square().sum())
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
        return f"it has more than {TOO_WIDE:,} inputs" if count_inputs(call) > TOO_WIDE else ""

    def finish(self) -> None:
        """Give up what is used more than once."""
        for name, span in self.spans.items():
            if count_overlaps(span, self.uses) > 1:
                self.lost.pop(name, None)
                self.skipped[name] = "it is used more than once"


def kept_along(mask: Tensor, dim: int | None) -> Tensor:
    """Of each index along a dimension whether anything is kept there."""
    return torch.ones(1, dtype=torch.bool) if dim is None else mask.movedim(dim, 0).flatten(1).any(1)


def lifted(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    return vector.to(like.device).reshape([-1 if d == dim else 1 for d in range(like.dim())])


def cut(weight: Tensor, mask: Tensor) -> Tensor:
    """The rectangle of a weight that a mask keeps."""
    for d in range(weight.dim()):
        weight = weight.index_select(d, kept_along(mask, d).nonzero().flatten().to(weight.device))
    return weight


class Refit:
    """Both models, and the data.

    Arguments:
        model: the original.
        made: the pruned model, which is changed.
        plan: what it was made by.
        parts: the batches, each with whether it is held out.
    """

    def __init__(self, model: nn.Module, made: nn.Module, plan: PlanData, parts: Sequence[tuple[Batch, bool]]) -> None:
        self.model, self.made, self.plan, self.parts = model, made, plan, parts
        self.whole = set_mode(private_copy(model), False)
        made.eval()
        name = Names(model)
        self.own = {name(path): tensor for path, tensor, _, _ in slots(made)}
        self.name, self.forms, self.shared = name, FormPrograms(model, plan, self.own), set[int]()

    def run(self, ridge: float | None, refused: str = "") -> tuple[list[RepairStep], Outcome]:
        """Fit every weight that lost inputs, then go as far as the output on the samples held out comes closer.

        Where it is `refused`, with a reason, nothing is fitted.
        """
        lost, skipped = self.watch()
        start = {name: tensor.detach().clone() for name, tensor in self.own.items() if name in lost or name in biases(lost)}
        steps = [RepairStep(n, NAME, None, False, refused) if refused else self.fit(n, f, ridge) for n, f in lost.items()]
        steps += [RepairStep(name, NAME, None, False, why) for name, why in skipped.items()]
        return steps, self.choose_share(start)

    def watch(self) -> tuple[dict[str, Lost], dict[str, str]]:
        """Run the original on all batches; what each weight lost, and which are left as they are."""
        tensors = dict(named_tensors(self.whole))
        first = {id(t): name for name, t in named_tensors(self.model)}
        names = {id(t): first.get(id(t), name) for name, t in tensors.items()}
        owned = {names[id(t)]: t for t in tensors.values() if isinstance(t, nn.Parameter) and t.is_floating_point()}
        lost: dict[str, Lost] = {}
        skipped: dict[str, str] = {}
        masks = self.plan.masks(self.model)
        for batch, held in progress_bar(self.parts, "refit", "batch"):
            observer = LostObserver(names, owned, masks, lost, skipped, held=held)
            with observer:
                call(self.whole, batch)
            observer.finish()
        return {name: found for name, found in lost.items() if name in self.own}, skipped

    def fit(self, name: str, found: Lost, ridge: float | None) -> RepairStep:
        """Fit one weight, and keep the fit where what is lost grows smaller on the data held out."""
        step = RepairStep(name, NAME, None, False)
        normal, unseen = found.fitted, found.unseen
        if not normal.count or not math.isfinite(normal.squares + float(normal.gram.sum())):
            return replace(step, note=NOT_FINITE if normal.count else "none of the data that is fitted reaches it")
        change, shift = fit(normal, unseen, ridge)
        judge = unseen if unseen.count else normal
        size = found.sizes[bool(unseen.count)]
        error = relative(judge.squares, size), relative(judge.left(change, shift), size)
        if not error[1] < error[0]:
            return replace(step, error=error, note=WORSE)
        moved = as_weight(found.call, change)
        weight = self.own[name]
        weight.data.add_((moved.mT if found.turned else moved).reshape(weight.shape).to(weight.dtype))
        if found.bias is not None and found.bias in self.own:
            self.own[found.bias].data.add_(shift.reshape(-1).to(self.own[found.bias].dtype))
        return replace(step, error=error, done=True)

    def choose_share(self, start: Mapping[str, Tensor]) -> Outcome:
        """As `held_out.choose_share`, batch by batch: no output is held."""
        judged = [batch for batch, held in self.parts if held] or [batch for batch, _ in self.parts]
        checks = any(held for _, held in self.parts)
        made = {name: self.own[name].detach().clone() for name in start}

        def errors(share: float) -> Errors:
            for name, tensor in start.items():
                self.own[name].data.copy_(tensor.lerp(made[name], share))
            return sum_of(Errors.of([call(self.whole, b)], [self.output(b)], [b]) for b in judged)

        before = errors(0.0)
        for share in SHARES if checks else (1.0,):
            after = errors(share)
            if not checks or after.surely_less_than(before):
                return Outcome(share, (before.relative, after.relative))
        errors(0.0)
        return Outcome(0.0, (before.relative, before.relative))

    def output(self, batch: Batch) -> Any:
        """What the pruned model returns: its own program's result, or that of one captured for such a batch."""
        inputs = ExampleInputs(batch.args, batch.kwargs)
        try:
            return inputs.map(torch.clone).call(self.made)
        except (GuardError, PruneError, TypeError):
            return self.forms.run(inputs, lambda form: self.captured(form, inputs))[1]

    def captured(self, form: Any, inputs: ExampleInputs) -> Any:
        if id(form) not in self.shared:
            self.shared.add(id(form))
            form.pruned.eval()
            for path, tensor, _, _ in slots(form.pruned):
                if (own := self.own.get(self.name(path))) is not None:
                    tensor.data = own.data
        return inputs.map(torch.clone).call(form.pruned)


def biases(lost: Mapping[str, Lost]) -> set[str]:
    return {found.bias for found in lost.values() if found.bias is not None}


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """What a model returns for a batch."""
    try:
        return ExampleInputs(batch.args, batch.kwargs).map(torch.clone).call(model)
    except Exception as error:
        raise PruneError(f"the model raises {type(error).__name__} on a batch of data: {error}", fix=BATCHES) from error


def sum_of(parts: Iterator[Errors]) -> Errors:
    found = list(parts)
    return Errors([square for part in found for square in part.squares], sum(part.size for part in found))
