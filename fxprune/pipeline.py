"""The pipeline: capture, couple, select, rewrite, slice, verify. Every public function goes through a `Compilation`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, fx, nn

from fxprune.arguments import checked_call
from fxprune.batch_guards import Recompiled, for_any_batch
from fxprune.comparisons.compare import compare
from fxprune.criteria.calibration import read
from fxprune.distributed.sharded import in_shards
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs, device_of, random_inputs
from fxprune.original_state import describe_pruning, with_lazy_tensors
from fxprune.passes.coupling.choices import require_experts
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.program import Waiver
from fxprune.passes.ir.quiet import gc_paused, unobserved, without_modes
from fxprune.passes.ir.slices import Slicer, nothing_of
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.passes.rewrite.rewrite import Cut, rewrite_program
from fxprune.passes.verification.opaque_check import broken, opaque_sites
from fxprune.plan import PlanData, derived_tensors, kept_labels, plan_between, shapes_of, sign
from fxprune.same_class.configuration import followers
from fxprune.same_class.in_place import become, consume, whole
from fxprune.same_class.restore import in_class, restore_class
from fxprune.same_class.stand_ins import StandIns
from fxprune.selection.argument_checks import check_flag
from fxprune.selection.choice import Choice, removal_of, spent
from fxprune.selection.depth import select_with_depth
from fxprune.selection.latency import LatencyProbe
from fxprune.selection.options import Options
from fxprune.selection.select import select_half, select_units
from fxprune.selection.structures import narrow
from fxprune.stage_checks import check_choice, check_coupling
from fxprune.verification import Verification, inexact, tolerance_of, unverifiable

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Select = Callable[[Solution], tuple[Tensor, Slicer]]
TRIED = "belongs to a module that is not captured and fails once it is cut"


class Plan(PlanData):
    """Which indices of every tensor stay, as plain data that any copy of the architecture can be pruned by."""

    __doc__ = PlanData.__doc__

    @overload
    def apply(self, model: nn.Module, example_inputs: Any = None, *, same_class: Literal[False] = False) -> Pruned: ...

    @overload
    def apply(self, model: AnyModule, example_inputs: Any = None, *, same_class: Literal[True]) -> AnyModule: ...

    @overload
    def apply(self, model: AnyModule, example_inputs: Any = None, *, same_class: bool) -> AnyModule | Pruned: ...

    @checked_call()
    @without_modes()
    def apply(self, model: nn.Module, example_inputs: Any = None, *, same_class: bool = False) -> Any:
        """Prune a fresh copy of the architecture by this plan, with the values the copy holds.

        Arguments:
            model: a model whose tensors have the names and shapes the plan was made for; it is not touched. One that is
                sharded stays so, as with `prune`.
            example_inputs: as for `prune`; by default random ones like those the plan was made with.
            same_class: as for `prune`.

        Raises: PruneError if the plan does not fit the model.
        """
        check_flag("same_class", same_class)
        with in_shards(model) as sharded, entry_point(model if sharded is None else sharded.form) as model:
            rotated, plan = self.in_basis(model) if sharded is None else (model, sharded.taking(self))
            more = (same_class, None) if sharded is None else (True, sharded.stand_ins.cut)
            apply = lambda m, p: Compilation.of_plan(m, p, example_inputs).apply(p, *more)  # noqa: E731
            sign(made := plan.one_by_one(rotated, apply), self, model)
            return made if sharded is None else sharded.cut(made, self)


if TYPE_CHECKING:

    class Pruned(PrunedModule):
        """What `prune` returns, with the types of what it carries, which the compiler knows nothing of."""

        @property
        def plan(self) -> Plan: ...
        @property
        def verification(self) -> Verification | None: ...

        def __getattr__(self, name: str) -> Any: ...  # modules and parameters of the original, and of a Sequential
        def __getitem__(self, index: Any) -> Any: ...


class Compilation:
    """A model and example inputs on their way to a coupling, a choice, a pruned module and its verification.

    Modules that are not captured (see `passes/README.md`) cannot be known to work once they are cut. They are tried, and those
    that fail are frozen here, so that all that comes of one compilation agrees.

    Attributes:
        model: the original; it is not touched.
        inputs: example inputs.
        options: what may go and what may not.
        frozen_modules: paths of modules that were found to fail once they are cut, with the reason.
    """

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, options: CouplingOptions, frozen_modules: Mapping[str, str] | None = None
    ) -> None:
        self.model, self.inputs, self.options = model, inputs, options
        self.frozen_modules: dict[str, str] = dict(frozen_modules or {})
        self.tensors = dict(named_tensors(model))
        self._tried: tuple[Choice, PrunedModule] | None = None

    @classmethod
    def of_plan(
        cls, model: nn.Module, plan: PlanData, example_inputs: Any = None, frozen_modules: Mapping[str, str] | None = None
    ) -> Compilation:
        """A compilation in which a plan can be applied to a model of the architecture that it was made for."""
        plan.check(model)
        given = None if example_inputs is None else ExampleInputs.parse(example_inputs, model)
        inputs = (given or random_inputs(plan.inputs, model)).check(model)
        if plan.waiver is not None and inputs.batch == plan.waiver.size:
            inputs = inputs.one_more()  # the program was captured with a larger batch
        frozen = {**dict.fromkeys(plan.frozen_modules, TRIED), **(frozen_modules or {})}
        return cls(with_lazy_tensors(model, plan, inputs), inputs, plan.coupling_options, frozen)

    def with_inputs(self, inputs: ExampleInputs) -> Compilation:
        """The same with other inputs."""
        return Compilation(self.model, inputs, self.options, self.frozen_modules)

    def follow(self) -> None:
        """Move the example inputs to where the model is by now."""
        self.inputs = self.inputs.beside(self.model)

    @functools.cached_property
    def _followers(self) -> Mapping[str, set[tuple[str, int]]]:
        return followers(self.model)

    # -- capture and couple -----------------------------------------------------------------------------------------------

    def couple(self) -> Solution:
        """Capture the model and couple its channels; each call returns a coupling of its own, which one `emit` uses up."""
        solution = analyse(self.model, self.inputs.args, self.inputs.kwargs, self.options, self.frozen_modules)
        narrow(solution, self.options, self.model, lambda: self._followers)
        check_coupling(solution)
        return solution

    def couple_for_good(self) -> Solution:
        """A coupling for those who choose from it later: modules that are not captured are tried with half of all units cut."""
        solution = self.couple()
        if not solution.captures[0].unseen:
            return solution
        choice = self.choose_by(lambda coupled: select_half(self.model, coupled), solution)
        return choice.solution if not spent(choice.solution) else self.couple()

    # -- score and select -------------------------------------------------------------------------------------------------

    def choose(self, options: Options, solution: Solution | None = None, timed: nn.Module | None = None) -> Choice:
        """Score and select what options ask for, of a coupling that was made before, if one is given.

        A latency is a share of that of `timed`: the model, or what was rotated to it.
        """
        probe = self.latency_probe(timed) if options.measures_latency else None
        solution = solution or (self.couple() if probe is None else self.couple_for_good())  # what is timed must run
        if options.experts:
            require_experts(solution, type(self.model).__name__)
        if solution.captures[0].unseen and options.data is not None:  # which may be read again
            options = dataclasses.replace(options, data=list(read(options.data)))
        if options.depth:
            how = options, self.tensors, self.whole_program, probe
            choice = self.choose_by(lambda coupled: select_with_depth(self.model, coupled, *how), solution)
        else:
            choice = self.choose_by(lambda coupled: select_units(self.model, coupled, options, self.tensors, probe), solution)
        return choice if probe is None else dataclasses.replace(choice, latency=probe.found)

    def choose_by(self, select: Select, solution: Solution | None = None) -> Choice:
        """Couple and select, and again with those modules frozen that are not captured and fail once they are cut."""
        while True:
            solution = solution or self.couple()
            choice = Choice(solution, *select(solution))
            check_choice(choice.solution, choice.slicer)
            known = len(self.frozen_modules)
            if not self.freeze_broken(choice) or len(self.frozen_modules) == known:
                return choice
            solution = None

    def freeze_broken(self, choice: Choice) -> bool:
        """Try the modules that are not captured as a choice leaves them, and freeze those that fail; whether any does."""
        sites = opaque_sites(choice.solution, choice.slicer)
        if not sites:
            return False
        pruned = self.emit(choice)
        with unobserved(self.model):
            tried = self.model, pruned, choice.solution, choice.slicer, sites, self.inputs.args, self.inputs.kwargs
            found = broken(*tried, heads=self.options.heads, tolerance=tolerance_of(self.model))
        self.frozen_modules |= found
        self._tried = None if found else (choice, pruned)
        return bool(found)

    def latency_probe(self, timed: nn.Module | None = None) -> LatencyProbe:
        emit = lambda slicer: self.emit(self.keep(slicer.kept, slicer.removed.tensors))  # noqa: E731
        return LatencyProbe(timed or self.model, self.inputs.args, self.inputs.kwargs, emit)

    # -- plans ------------------------------------------------------------------------------------------------------------

    def plan(self, choice: Choice) -> Plan:
        """A choice as plain data."""
        found, gone = choice.slices, choice.slicer.removed.tensors
        return Plan(
            {name: tuple(t.shape) for name, t in self.tensors.items()},
            {n: found[n] for n in found if found[n] and n in self.tensors and n not in gone}
            | {n: [nothing_of(t.shape)] for n, t in self.tensors.items() if n in gone},
            self.options.attention,
            tuple(sorted(self.options.frozen)),
            self.inputs.describe(),
            self.options.release,
            derived=derived_tensors(self.model, self.tensors),
            frozen_modules=tuple(self.frozen_modules),
            experts=bool(self.options.choices),
        )

    def choice_of(self, plan: PlanData) -> Choice:
        """What a plan chooses; raises PruneError where it does not fit the model."""
        solution, plan = self.couple(), plan.fitted(shapes_of(self.model))
        try:
            kept = kept_labels(plan, solution, self.frozen_modules.values())
        except PruneError:
            if plan.attention == "dims":
                raise
            self.options = dataclasses.replace(self.options, heads=False)  # a later step may cut what is left of a single head
            return self.choice_of(dataclasses.replace(plan, attention="dims"))
        return Choice(solution, kept, Slicer(kept, removal_of(self.model, solution, kept, plan.removed)))

    def unpruned(self) -> Choice:
        """The choice that keeps everything."""
        solution = self.couple()
        kept = torch.ones(len(solution.unit_of), dtype=torch.bool)
        return Choice(solution, kept, Slicer(kept))

    def whole_program(self, inputs: ExampleInputs | None = None) -> tuple[Solution, fx.GraphModule]:
        """A coupling and the flat program of the whole model in evaluation mode; with other inputs, if they are given."""
        made = self if inputs is None else self.with_inputs(inputs.with_flags_of(self.inputs))
        choice = made.unpruned()
        return choice.solution, made.emit(choice).eval().flat()

    def keep(self, kept: Tensor, tensors: Collection[str] = ()) -> Choice:
        """The choice of these labels, shape (labels,), from a coupling of its own; `tensors` go with residual branches."""
        solution = self.couple()
        if len(kept) != len(solution.unit_of):
            raise RuntimeError("the model is coupled otherwise than when the choice was made")
        return Choice(solution, kept, Slicer(kept, removal_of(self.model, solution, kept, tensors)))

    # -- rewrite, slice and verify ----------------------------------------------------------------------------------------

    def emit(
        self, choice: Choice, *, values: nn.Module | None = None, waiver: Waiver | None = None, cut: Cut | None = None
    ) -> PrunedModule:
        """The pruned module of a choice; if its captured program was used before, the model is captured again.

        Arguments:
            choice: what stays.
            values: a model of the same architecture to take tensors from instead of the original.
            waiver: guards of the program that need not hold everywhere.
            cut: as for `rewrite_program`.
        """
        tried, self._tried = self._tried, None
        if tried is not None and tried[0] is choice and values is None and waiver is None:
            pruned = tried[1]
        else:
            choice = self.keep(choice.kept, choice.slicer.removed.tensors) if spent(choice.solution) else choice
            with gc_paused():
                what, own = (choice.solution, choice.kept, choice.slicer), self.tensors if values is None else None
                pruned = rewrite_program(values or self.model, *what, made=choice.slices, values=own, waiver=waiver, cut=cut)
            if values is not None:
                pruned.to(device_of(values))  # constants of a program that was captured elsewhere
        sign(pruned, dataclasses.replace(self.plan(choice), waiver=waiver), self.model)
        describe_pruning(self.model, self.tensors, pruned, choice, self.frozen_modules)
        return pruned

    def apply(self, plan: PlanData, same_class: bool = False, cut: Cut | None = None) -> Any:
        """What a plan leaves of the model; raises PruneError where it does not fit, or cuts a module that fails then."""
        choice = self.choice_of(plan)
        if self.freeze_broken(choice):
            path, why = next(reversed(self.frozen_modules.items()))
            raise PruneError(
                f"the plan cuts {path}, which {why}", where=path, fix="prune the model again, for a plan of its own"
            )
        pruned = self.emit(choice, waiver=plan.waiver, cut=cut)
        sign(pruned, plan, self.model)
        return self.restore_class(pruned) if same_class else pruned

    def verify(self, pruned: PrunedModule, choice: Choice, *, values: nn.Module | None = None) -> PrunedModule:
        """A pruned module that was found to be exact, for a batch of any size where it can be; else raises PruneError."""
        model = values or self.model
        inputs = self.inputs if values is None else self.inputs.beside(values)
        try:
            removal, expected = choice.removal(self.options.heads), choice.outlook(self.tensors)
            found = compare(model, pruned, removal, inputs, sizes=True, outlook=expected)
        except Exception as error:
            raise unverifiable(model, inputs, error) from error
        if not found.ok:
            raise inexact(model, inputs, found)
        pruned.meta["verification"] = found

        def at(other: ExampleInputs) -> Recompiled:
            again = self.with_inputs(other.beside(self.model))
            chosen = again.choice_of(plan_between(self.model, pruned))
            emit = lambda waiver: again.emit(chosen, values=values, waiver=waiver)  # noqa: E731
            return Recompiled(chosen.solution, chosen.removal(self.options.heads), chosen.outlook(again.tensors), emit)

        return for_any_batch(model, pruned, inputs, at, writes=expected.writes)

    def restore_class(self, pruned: PrunedModule, values: nn.Module | None = None) -> Any:
        """The pruned model in the original's own class; `values` is the model it was emitted with, if not the original."""
        model = values or self.model
        return restore_class(model, pruned, self.inputs.beside(model))[0]

    def prune(self, options: Options, *, same_class: bool = False, inplace: bool = False, choice: Choice | None = None) -> Any:
        """What `fxprune.prune` returns for these options, or for a choice that was made by them."""
        if same_class and options.data is not None:  # which may be read again
            options = dataclasses.replace(options, data=list(read(options.data)))
        with options.gc_paused():
            choice = choice or self.choose(options)  # capture, couple, score, select
            verifies = options.verifies(self.model)
            cut = (StandIns().cut if same_class else whole) if inplace and not verifies else None
            pruned = self.emit(choice, cut=cut)  # rewrite, slice
            pruned.meta["chosen"] = options.chosen
            if not verifies:
                del choice  # most of it is freed now, before the collector looks through what is left
        if verifies:
            pruned = self.verify(pruned, choice)
        if not same_class:
            return consume(self.model, pruned) if inplace else pruned
        made, coupling = in_class(self.model, pruned, self.inputs, self.options)
        if coupling is not None:
            again = Compilation(self.model, self.inputs, coupling, self.frozen_modules)
            return again.prune(dataclasses.replace(options, coupling=coupling), same_class=True, inplace=inplace)
        return become(self.model, made, with_values=verifies) if inplace else made
