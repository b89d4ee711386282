"""The programs of the original and of the pruned model, for each form of the batches, on the pruned model's own tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.criteria.calibration import Batch, batch_refused
from fxprune.form_programs import FormProgram, FormPrograms, Names, slots
from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import GuardError
from fxprune.passes.ir.pytree import collect
from fxprune.passes.rewrite.guards import guards_of
from fxprune.plan import PlanData
from fxprune.repairs.interpreter import ProgramRun
from fxprune.repairs.repairer import SideBySide


class Programs:
    """Both models as programs, and what they return.

    Arguments:
        model: the original.
        made: the pruned model to repair, of whatever class, whose tensors the programs share.
        plan: what it was made by.
        parts: the batches, each with whether it is held out.

    Attributes:
        runs: the programs of each form side by side.
        batches: with their programs, in the order of the runs.
        held: of each of them whether it is held out.
        before: what the pruned model returned for each of those held out, or of all where none is.
    """

    def __init__(self, model: nn.Module, made: nn.Module, plan: PlanData, parts: Sequence[tuple[Batch, bool]]) -> None:
        self.name = Names(model)
        unused = getattr(made, "meta", {}).get("unused", ())  # whole, whatever the program around them has lost
        self.own = {self.name(path): tensor for path, tensor, _, _ in slots(made) if self.name(path) not in unused}
        self.forms = FormPrograms(model, plan, self.own, originals=True)
        self.taken: set[Any] = set()  # which sizes of inputs a form's programs take
        groups: dict[int, list[tuple[Batch, bool, Any]]] = {}
        programs: dict[int, FormProgram] = {}
        checks = any(held for _, held in parts)
        for batch, held in parts:
            run = functools.partial(self.both, batch=batch, judged=held or not checks)
            form, out = self.forms.run(ExampleInputs(batch.args, batch.kwargs), run)
            programs[id(form)] = form
            groups.setdefault(id(form), []).append((batch, held, out))
        self.runs: list[SideBySide] = []
        self.batches: list[tuple[FormProgram, Batch]] = []
        self.held: list[bool] = []
        self.before: list[Any] = []
        for key, members in groups.items():
            form, batches = programs[key], [batch for batch, _, _ in members]
            assert form.original is not None
            old, new = (ProgramRun(program, batches, self.name) for program in (form.original, form.pruned))
            for site in [s for sites in new.sites.values() for s in sites if s.key[0] not in self.own]:
                site.reason = site.reason or "the pruned model does not hold it"
            self.runs.append(SideBySide(old, new, frozenset(i for i, (_, held, _) in enumerate(members) if held)))
            self.batches += [(form, batch) for batch in batches]
            self.held += [held for _, held, _ in members]
            self.before += [out for _, _, out in members]

    def both(self, form: FormProgram, batch: Batch, *, judged: bool) -> Any:
        """What the pruned program returns for a batch that the original's takes, too; None where it is not judged by it."""
        assert form.original is not None
        inputs = ExampleInputs(batch.args, batch.kwargs)
        try:
            sizes = id(form), tuple(t.shape for t in collect((batch.args, batch.kwargs), Tensor))
            known = sizes in self.taken
            if not known and guards_of(form.original):  # it runs later, if it takes what it is given
                inputs.map(torch.clone).call(form.original)
            out = self.output(form, batch) if judged or not known else None
            self.taken.add(sizes)
            return out
        except GuardError:
            raise
        except Exception as error:
            raise batch_refused(error) from error

    @staticmethod
    def output(form: FormProgram, batch: Batch) -> Any:
        """What the pruned program returns."""
        return ExampleInputs(batch.args, batch.kwargs).map(torch.clone).call(form.pruned)

    def outputs(self, at: Sequence[int]) -> list[Any]:
        """What the pruned programs return now for some batches, by their numbers."""
        return [self.output(*self.batches[i]) for i in at]

    @property
    def wanted(self) -> list[Any]:
        """What the original returned."""
        return [out for run in self.runs for out in run.old.result]

    @property
    def after(self) -> list[Any]:
        """What the pruned programs returned as they were repaired."""
        return [out for run in self.runs for out in run.new.result]
