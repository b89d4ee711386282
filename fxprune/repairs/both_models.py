"""The original and the pruned model on one batch after the other: no output is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.criteria.calibration import Batch, batch_refused, loss_in
from fxprune.criteria.lockstep import without_cache
from fxprune.form_programs import FormPrograms, Names, slots
from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import GuardError, PruneError, told
from fxprune.passes.ir.module_tree import private_copy, set_mode
from fxprune.plan import PlanData
from fxprune.repairs.held_out import SHARES, Errors, Outcome

Loss = Callable[..., Tensor]


class BothModels:
    """Both models, and the data.

    Arguments:
        model: the original.
        made: the pruned model, which is changed.
        plan: what it was made by.
        parts: the batches, each with whether it is held out.
        loss: as for `repair`.
        refused: why nothing is to be changed, if so.

    Attributes:
        whole: a copy of the original to run.
        own: the tensors of the pruned model, by their names in the original.
    """

    def __init__(
        self,
        model: nn.Module,
        made: nn.Module,
        plan: PlanData,
        parts: Sequence[tuple[Batch, bool]],
        loss: Loss | None = None,
        refused: str = "",
    ) -> None:
        self.refused = refused
        self.model, self.made, self.plan, self.parts, self.loss = model, made, plan, parts, loss
        self.whole: nn.Module = set_mode(private_copy(model), False)
        made.eval()
        self.name = Names(model)
        self.own = {self.name(path): tensor for path, tensor, _, _ in slots(made)}
        self.forms = FormPrograms(model, plan, self.own)

    def run(self, batch: Batch) -> tuple[nn.Module, Any]:
        """The pruned model, or its program that takes a batch, and what it returns."""
        inputs = ExampleInputs(batch.args, batch.kwargs)
        try:
            return self.made, inputs.map(torch.clone).call(self.made)
        except (GuardError, PruneError, TypeError):
            form, found = self.forms.run(inputs, lambda form: inputs.map(torch.clone).call(form.pruned))
            return form.pruned, found
        except Exception as error:
            raise batch_refused(error) from error

    def choose_share(self, start: Mapping[str, Tensor]) -> Outcome:
        """As `held_out.choose_share`, batch by batch; nor may the loss on the samples held out rise, if there is one."""
        judged = [batch for batch, held in self.parts if held] or [batch for batch, _ in self.parts]
        checks = any(held for _, held in self.parts)

        def before_and_after() -> Iterator[None]:
            for _ in range(2):
                swap(self.own, start)
                yield

        (before, loss), (after, now) = self.judge(judged, before_and_after)
        if not checks or (after.surely_less_than(before) and not now > loss):
            return Outcome(1.0, (before.relative, after.relative))
        made = {name: self.own[name].detach().clone() for name in start}

        def less(shares: Sequence[float] = SHARES[1:]) -> Iterator[None]:
            for share in shares:
                for name, tensor in start.items():
                    self.own[name].data.copy_(tensor.lerp(made[name], share))
                yield

        for share, (after, now) in zip(SHARES[1:], self.judge(judged, less), strict=True):
            if after.surely_less_than(before) and not now > loss:
                next(less([share]))
                return Outcome(share, (before.relative, after.relative))
        next(less([0.0]))
        return Outcome(0.0, (before.relative, before.relative))

    def judge(self, batches: Sequence[Batch], states: Callable[[], Iterator[None]]) -> list[tuple[Errors, float]]:
        """The errors of the pruned model's outputs, and the sum of its losses over samples, in each of some states.

        Arguments:
            states: sets the tensors of the pruned model to one after the other. The original runs once for all of them.
        """
        found: list[tuple[list[Errors], list[float]]] = []
        for batch in batches:
            wanted = call(self.whole, batch)
            for i, _ in enumerate(states()):
                found += [([], [])] if i == len(found) else []
                out = self.run(batch)[1]
                found[i][0].append(Errors.of([wanted], [out], [batch]))
                found[i][1].append(batch.size * self.value(out, batch))
        return [(Errors.joined(errors), sum(losses)) for errors, losses in found]

    def value(self, out: Any, batch: Batch) -> float:
        held = loss_in(out)
        if self.loss is None:
            return 0.0 if held is None else float(held)
        try:
            return float(self.loss(out, *batch.extra))
        except Exception as error:
            text = f"the loss raises {told(error)}"
            raise PruneError(text, fix="a function of the output and the target of a batch that returns a scalar") from error


def swap(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Exchange the values of tensors with those of others of the same names, one at a time."""
    for name, other in others.items():
        own = tensors[name].detach().clone()
        tensors[name].data.copy_(other)
        other.copy_(own)


def call(model: nn.Module, batch: Batch) -> Any:
    """What a model returns for a batch."""
    try:
        return ExampleInputs(batch.args, batch.kwargs).map(torch.clone).call(model)
    except Exception as error:
        raise batch_refused(error) from error


def uncached(model: nn.Module, batch: Batch) -> Batch:
    """The batch with keywords by which a model keeps nothing for later tokens."""
    return replace(batch, kwargs=without_cache(model, batch.kwargs))
