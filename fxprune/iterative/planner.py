"""The planner of iterative pruning: what each step removes, chosen among the units of the original.

The original is coupled once. A step looks at the values that are left, by the labels that they have in the original, and adds
to what is gone already; so the plan is always one of the original, and needs no composing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.criteria.calibration import BATCHES, Target
from fxprune.criteria.catalog import find, resolve
from fxprune.criteria.parameter_roles import roles
from fxprune.criteria.scorer import Read
from fxprune.criteria.unit_scores import normalise_scores, score_units
from fxprune.distributed.ranks import Ranks
from fxprune.iterative.history import HistoryStep
from fxprune.iterative.plan_mapping import narrow_labels, tensors_of
from fxprune.iterative.proposal import StepChoice
from fxprune.iterative.schedules import describe_request, part_of
from fxprune.passes.capture.programs import programs
from fxprune.passes.coupling.families import Family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors, on_meta
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.quiet import unobserved
from fxprune.passes.ir.slices import Slicer
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData
from fxprune.reports.coupling import CoupledFamily, coupled_family
from fxprune.selection.allocation import Allocator
from fxprune.selection.candidates import form_groups
from fxprune.selection.choice import Choice
from fxprune.selection.costs import Costs, elements
from fxprune.selection.latency import too_slow, used_share
from fxprune.selection.options import Options
from fxprune.selection.rectangles import find_nonempty_sets, restore_rectangles
from fxprune.selection.select import allocate, check_effect, find_free_families
from fxprune.verification import Verification, evaluating


class Planner:
    """The choices of all steps.

    Arguments:
        compilation: of the original.
        options: what is to be gone after the last step.

    Raises: PruneError where that cannot be reached.
    """

    def __init__(self, compilation: Compilation, options: Options) -> None:
        self.model, self.options = compilation.model, options
        self.compilation = compilation
        self.solution = solution = compilation.couple_for_good()
        model = self.model
        self.probe = compilation.latency_probe() if options.measures_latency else None
        self.unit_of = solution.unit_of.numpy()
        self.free = find_free_families(model, solution, options)
        if resolve(options.criterion).places == "scales":  # families without a scale have no score, and stay
            scales = roles(solution.captures).scales
            self.free = [f for f in self.free if any(name in scales for name, _ in f.members)] or self.free
        self.guards = find_nonempty_sets(solution)
        self.learned = frozenset(n for n, t in named_tensors(model) if n in solution.leaves and isinstance(t, nn.Parameter))
        self.costs = Costs(solution, dict(named_tensors(model)))
        self.original: float = 0
        if self.probe is not None:
            self.original = self.probe.original_seconds()
        elif options.budget is not None:
            self.original = options.budget.cost(self.costs)
        self.check()

    def check(self) -> None:
        """Raise PruneError where the last step would fail, or none would remove anything, whatever the scores."""
        spec = resolve(self.options.criterion)
        if spec.needs and self.options.data is None:
            raise PruneError(f"the criterion {spec.name} needs data", fix=BATCHES)
        score = np.zeros(len(self.unit_of))
        budget = self.options.budget
        limit = 0.0
        if budget is not None:
            limit = budget.limit(self.original)
            allocator = Allocator(self.free, score, self.solution, self.options)
            kept, slicer = allocator.apply(allocator.allocate_all())
            if self.probe is not None:
                with self.probe.restore_random_state():
                    [found] = self.probe.measure([self.probe.prune(slicer)], budget)
                if used_share(budget, found) > 1:
                    raise too_slow(budget, found)
            elif (least := budget.cost(self.costs, slicer)) > limit:
                raise budget.unreachable(least, self.original)
        if self.probe is None:
            kept, _ = allocate(self.free, score, self.costs, self.options)
        else:
            kept = torch.tensor([self.original <= limit])  # how much goes is found out in each step
        check_effect(self.model, self.free, score, self.solution, self.options, kept)

    def choose(
        self,
        present: nn.Module,
        view: PlanData,
        gone: np.ndarray,
        share: float,
        ranks: Ranks | None = None,
        read: Read | None = None,
    ) -> StepChoice:
        """What is removed when a share of what is asked for is done.

        Arguments:
            present: the model as it is now.
            view: the plan by which its tensors were cut from those of the original.
            gone: units that are removed already, shape (labels,), and stay so.
            share: in [0, 1].
            ranks: the processes that choose together, if there are several.
            read: finds the values of a parameter, if they are not those in the model; all processes find the same.
        """
        free, score = self.scores(present, view, gone, ranks, read)
        options = part_of(self.options, share, self.original)
        kept, _ = allocate(free, score, self.costs, options, self.probe, gone)
        wanted = self.removed(kept)
        if ranks is not None:
            ranks.check_same(wanted.tobytes())
        return StepChoice(gone, wanted, score, lambda more, held: self.settle(more, score, held))

    def removed(self, kept: Tensor) -> np.ndarray:
        """The units that go where these labels stay, shape (labels,)."""
        removed = np.zeros(len(self.unit_of), bool)
        removed[self.unit_of[~kept.numpy()]] = True
        return removed

    def settle(self, removed: np.ndarray, score: np.ndarray, held: np.ndarray) -> tuple[Tensor, Slicer]:
        return restore_rectangles(self.solution, removed, score, self.guards, held)

    def scores(
        self, present: nn.Module, view: PlanData, gone: np.ndarray, ranks: Ranks | None = None, read: Read | None = None
    ) -> tuple[list[Family], np.ndarray]:
        """The families that may lose units, and the score of every unit by the values and the outputs of a present model.

        What is gone scores lower than all else of its family.
        """
        criterion = find(self.options.criterion)
        tensors = tensors_of(present, view, self.learned)
        named = {id(t): name for name, t in named_tensors(present)}
        leaves = {
            named[id(tensors[name])]: narrow_labels(labels, view.slices.get(name, ()), view.shapes[name])
            for name, labels in self.solution.leaves.items()
            if name in tensors  # constants are none of the model's, index buffers were rewritten
        }
        alive = [dataclasses.replace(f, units=f.units[~gone[f.units]]) for f in self.free]
        runs = resolve(criterion).runs
        with evaluating(present) if runs else contextlib.nullcontext():  # a copy in another mode would share its program
            looked_at = dataclasses.replace(self.solution, leaves=leaves, captures=self.captures(present, view))
            target = Target(self.options.coupling.heads)
            given = self.options.data, self.options.loss, read, target
            score, seen = score_units(present, looked_at, alive, criterion, *given)
        score = score if ranks is None or read is not None else ranks.mean(score)
        told = [i for i, f in enumerate(alive) if seen[f.units].any()]
        free, alive = [self.free[i] for i in told], [alive[i] for i in told]
        if self.options.competes:
            score = normalise_scores(score, alive, criterion)
        for family, left in zip(free, alive, strict=True):
            low, high = score[left.units].min(), score[left.units].max()
            score[family.units[gone[family.units]]] = low - ((high - low) or 1.0)
        return free, score

    def record(
        self,
        number: int,
        shares: Sequence[float],
        last: Choice,
        choice: Choice,
        gone: np.ndarray,
        verification: Verification | None,
    ) -> HistoryStep:
        """What is said of step `number`, counted from 0, in which `last` became `choice`; `gone` are units that went before."""
        units = np.concatenate([f.units for f in self.free])
        now = ~choice.kept.numpy()
        return HistoryStep(
            number + 1,
            describe_request(part_of(self.options, shares[number], self.original)),
            (int(now[units].sum()), len(units)),
            int((now & ~gone)[units].sum()),
            (self.costs.of(last.slicer, "params"), self.costs.of(choice.slicer, "params")),
            (self.costs.of(last.slicer, "macs"), self.costs.of(choice.slicer, "macs")),
            None if verification is None else verification.error,
        )

    def captures(self, present: nn.Module, view: PlanData) -> list[CapturedProgram]:
        """The captured programs of a present model, for criteria that watch it run; else those of the original will do."""
        if not (view.slices and resolve(self.options.criterion).runs):
            return self.solution.captures
        inputs = self.compilation.inputs.beside(present)
        with unobserved(present):
            try:
                return programs(present, inputs.args, inputs.kwargs, on_meta)
            except Exception:  # as in `analyse`
                return programs(present, inputs.args, inputs.kwargs, None)

    def groups(self) -> list[list[tuple[Family, CoupledFamily]]]:
        """Families that one constraint ties together, each also as a user reads it."""
        tensors = dict(named_tensors(self.model))
        shown = [coupled_family(f, n) for f, n in zip(self.free, elements(self.solution, self.free, tensors), strict=True)]
        groups = form_groups([f.units for f in self.free], [1.0] * len(self.free), self.solution.equal_rows, len(self.unit_of))
        return [[(self.free[i], shown[i]) for i in group.families] for group in groups]
