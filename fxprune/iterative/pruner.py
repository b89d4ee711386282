"""Pruner: iterative pruning, a step at a time, with training between the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.arguments import checked_call, checked_class, shown
from fxprune.distributed.sharded import Sharded, entered
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.iterative.history import History
from fxprune.iterative.masking import hold_at_zero, mask_again, muted
from fxprune.iterative.optimizer_state import Move, remap, remap_module, remap_state, taken
from fxprune.iterative.plan_mapping import tensors_of, widened
from fxprune.iterative.planner import Planner
from fxprune.iterative.proposal import Made, Proposal, StepChoice
from fxprune.iterative.pruner_state import AskedOfPruner, PresentModel, PrunerState, asked_of
from fxprune.iterative.regularizers import Regularizer, Spans, find, spans_of
from fxprune.iterative.schedules import Schedule, shares
from fxprune.iterative.sharded_steps import check_steps, learning, process_of, restorer, shrink_shards
from fxprune.passes.errors import PruneError
from fxprune.pipeline import AnyModule, Compilation
from fxprune.plan import PlanData
from fxprune.selection.argument_checks import check_flag, is_one_of
from fxprune.selection.choice import Choice
from fxprune.selection.options import ASKED, Asked, Options, Ratio, Verify

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fxprune.pipeline import Pruned

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


@checked_class
class Pruner(Generic[Made]):
    """Prunes a model in steps; what each one leaves is trained before the next.

    >>> import torch, fxprune
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> pruner = fxprune.Pruner(net, 0.5, example_inputs=torch.randn(1, 4), steps=2)
    >>> while not pruner.done:
    ...     small = pruner.step()  # then train it
    ...     print(small.get_submodule("0").out_features)
    6
    4

    Arguments:
        model: any module; it is not changed. In `DistributedDataParallel`, or sharded over processes (`fully_shard`, tensor
            parallelism), all of these step together, as with `prune`; `mask` takes no sharded model.
        ratio, params, macs, memory, latency: as for `prune`, after the last step. A ratio is a share of the original's units.
        example_inputs, same_class and others: as for `prune`. `data` is read in every step; what a generator yields is held.
        steps, schedule: the number of steps, and what is done after each: `linear`, `cubic` (arXiv:1710.01878), or a
            non-decreasing function from time to the share that is done, both from 0 to 1.
        regularizer: what `regularize` adds: `bn_l1`, `group_lasso`, `depgraph`, `growing`, one of the classes in
            `fxprune.regularizers` with options of its own, or a function of `fxprune.regularizers.Units`.
        mask: return the original architecture with zeros in place of removed elements: `hold` keeps them at zero in training;
            `soft` trains them beside the others and chooses anew in every step (after arXiv:1808.06866, but what grows counts
            from then on only). Both compute what `shrink` returns, which ends it.

    Attributes:
        model: what the last step returned; before the first, the original.
        plan: all steps so far as one plan of the original: `plan.apply(original)` has the present architecture.
        history: a record of each step; printable. `done`: whether all steps were taken.

    Raises: PruneError for anything that cannot be done, already here where the last step could not be.
    """

    @overload
    def __init__(
        self: Pruner[Pruned],
        model: nn.Module,
        ratio: Ratio | None = None,
        example_inputs: Any = None,
        *,
        mask: None = None,
        same_class: Literal[False] = False,
        **asked: Unpack[AskedOfPruner],
    ) -> None: ...

    @overload
    def __init__(
        self: Pruner[AnyModule],
        model: AnyModule,
        ratio: Ratio | None = None,
        example_inputs: Any = None,
        *,
        mask: Literal["hold", "soft"] | None = None,
        same_class: bool = False,
        **asked: Unpack[AskedOfPruner],
    ) -> None: ...

    @checked_call(ASKED)
    def __init__(
        self,
        model: nn.Module,
        ratio: Ratio | None = None,
        example_inputs: Any = None,
        *,
        verify: Verify = "auto",
        schedule: Literal["linear", "cubic"] | str | Schedule = "linear",
        steps: int = 1,
        regularizer: Literal["bn_l1", "group_lasso", "depgraph", "growing"] | str | Regularizer = "group_lasso",
        mask: Literal["hold", "soft"] | None = None,
        same_class: bool = False,
        **asked: Unpack[Asked],
    ) -> None:
        with entered(model) as (self._ranks, sharded, model):
            check_flag("same_class", same_class)
            options = Options.parse(model if sharded is None else sharded.model, ratio=ratio, verify=verify, **asked)
            self._shares, self._same_class, self._regularizer = shares(schedule, steps), same_class, find(regularizer)
            if mask is not None and not is_one_of(mask, ("hold", "soft")):
                raise PruneError(f"mask must be 'hold', 'soft' or None, not {shown(mask)}", fix="mask='hold'")
            inputs = ExampleInputs.parse(example_inputs, model).check(model)
            check_steps(sharded, options, mask)
            self._options, self._mask, self._original, self._sharded = options.held(), mask, model, sharded is not None
            self.model: Any = model if sharded is None else sharded.model
            self._asked = asked_of(self._shares, mask, options) | process_of(self._ranks, self._sharded)
            self._compilation = Compilation(model, inputs if sharded is None else inputs.beside(model), options.coupling)
            self._planner = Planner(self._compilation, self._options)
            self._gone = np.zeros(len(self._planner.unit_of), bool)
            self._choice = self._settled(self._gone, np.zeros(len(self._gone)))
            self.plan = self._compilation.plan(self._choice)
            self._view = self._whole = self.plan
            self._move: Move | None = None
            self._spans: Spans | None = None
            self._marked: np.ndarray | None = None
            self.history, self._calls = History(), 0

    @property
    def done(self) -> bool:
        return len(self.history) == len(self._shares)

    def __repr__(self) -> str:
        return f"Pruner({type(self._original).__name__}: step {len(self.history)} of {len(self._shares)}, {self.plan!r})"

    @overload
    def step(self, model: nn.Module | None = None, *, interactive: Literal[False] = False) -> Made: ...

    @overload
    def step(self, model: nn.Module | None = None, *, interactive: Literal[True]) -> Proposal[Made]: ...

    def step(self, model: nn.Module | None = None, *, interactive: bool = False) -> Any:
        """The next smaller model, from the present one as it is trained by now.

        Values, `requires_grad` and modes are taken over; whatever else was done to the present model (hooks, modules that
        were put in) is not. The present model stays as it is. Gradients are not carried over.

        Arguments:
            model: the present model, if it is not the very one that the last step returned (the original, before the first).
            interactive: return a `Proposal` instead, whose candidates are families to look at, edit and apply; its
                `finish()` takes the step with those that were applied, and returns the model.

        Returns: what `prune` does; with `mask`, a module of the original's class.

        Raises: PruneError when all steps were taken, or `model` is another model; nothing has changed then.
        """
        check_flag("interactive", interactive)
        if self.done:
            what = f"all {len(self._shares)} steps were taken" if len(self._shares) > 1 else "the only step was taken"
            raise PruneError(what, fix="steps= says how many there are; pruner.done tells when to stop")
        number = len(self.history)

        def take(removed: np.ndarray) -> nn.Module:
            if len(self.history) != number:
                raise PruneError("this step was taken already", fix="a new proposal: pruner.step(interactive=True)")
            with entry_point(present):
                choice = self._settled(removed, chosen.score)
                if interactive and self._fails(choice):
                    path, why = list(self._compilation.frozen_modules.items())[-1]
                    what = f"the proposal cuts {path}, which {why}"
                    raise PruneError(what, where=path, fix="a new proposal: pruner.step(interactive=True)")
                return self._take(present, choice, sharded)

        with entered(self.model if model is None else model, self._ranks) as (self._ranks, sharded, present):
            chosen = self._chosen(present, number, sharded)
            while not interactive and self._fails(self._settled(chosen.wanted, chosen.score)):
                chosen = self._chosen(present, number, sharded)
            return Proposal(chosen, self._planner.groups(), take) if interactive else take(chosen.wanted)

    def _chosen(self, present: nn.Module, number: int, sharded: Sharded | None = None) -> StepChoice:
        read = None if sharded is None else sharded.gather
        return self._planner.choose(*self._looked_at(present), self._stuck, self._shares[number], self._ranks, read)

    def _settled(self, removed: np.ndarray, score: np.ndarray) -> Choice:
        return Choice(self._planner.solution, *self._planner.settle(removed, score, self._stuck))

    def _fails(self, choice: Choice) -> bool:
        """Whether a module that is not captured fails once it is cut as chosen; it is frozen from here on."""
        if not self._planner.solution.captures[0].unseen or choice.slicer.keeps_all:
            return False
        self._compilation.follow()
        if fails := self._compilation.freeze_broken(self._compilation.keep(choice.kept)):
            self._planner = Planner(self._compilation, self._options)
        return fails

    def _take(self, present: nn.Module, choice: Choice, sharded: Sharded | None) -> nn.Module:
        plan = self._compilation.plan(choice)
        made = self._made(present, plan, choice, sharded)
        verification = getattr(made, "meta", {}).get("verification")  # with masks there is none
        step = self._planner.record(len(self.history), self._shares, self._choice, choice, self._gone, verification)
        view = self._view if self._mask else plan
        before, after = self._tensors(present), tensors_of(made, view)
        before, present = (before, present) if sharded is None else (sharded.tensors, sharded.model)
        zero = plan.masks(self._original) if self._mask == "hold" else {}
        self._move = Move(present, made, before, after, self._view, view, zero)
        self.model, self._view, self.plan, self._choice = made, view, plan, choice
        self._gone = self._planner.removed(choice.kept)
        self.history += step
        self._spans, self._marked, self._calls = None, None, 0
        return made

    def _made(self, present: nn.Module, plan: PlanData, choice: Choice, sharded: Sharded | None) -> nn.Module:
        if self._mask is None:
            return self._shrunk(present, plan, verify=True, sharded=sharded)
        whole = widened(self._original, present, self._tensors(present), self._view)
        if self._mask == "soft":
            return muted(whole, plan, self._planner.solution, choice.kept)
        hold_at_zero(whole, plan, plan.masks(whole), self._compilation.inputs.beside(whole))
        return whole

    def shrink(self, model: nn.Module | None = None) -> Any:
        """The pruned model of the plan so far, with the values of the present model: what ends training with `mask`.

        Arguments: as for `step`. Raises: PruneError if `model` is another model.
        """
        with entered(self.model if model is None else model, self._ranks) as (_, sharded, present):
            return self._shrunk(present, self.plan, verify=True, sharded=sharded)

    def _shrunk(self, present: nn.Module, plan: PlanData, verify: bool, sharded: Sharded | None = None) -> Any:
        if sharded is not None and self._tensors(present):  # which raises for another model
            return shrink_shards(sharded, self._compilation, plan, self._view)
        whole = widened(self._original, present, self._tensors(present), self._view)
        self._compilation.follow()
        choice = self._compilation.choice_of(plan)
        pruned = self._compilation.emit(choice, values=whole)
        if verify and self._options.verifies(whole):
            pruned = self._compilation.verify(pruned, choice, values=whole)
        return self._compilation.restore_class(pruned, whole) if verify and self._same_class else pruned

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return tensors_of(model, self._view, self._planner.learned)

    @property
    def _stuck(self) -> np.ndarray:  # units that are gone and cannot come back
        return np.zeros_like(self._gone) if self._mask == "soft" else self._gone

    def _looked_at(self, present: nn.Module) -> tuple[nn.Module, PlanData]:
        """The model whose units are scored: with masks that hold, what they leave."""
        if self._mask != "hold" or not self.plan.slices:
            return present, self._view
        return self._shrunk(present, self.plan, verify=False), self.plan

    def remap_optimizer(self, optimizer: AnyOptimizer) -> AnyOptimizer:
        """Remap an optimizer to the model that the last step returned: its parameters, and its state sliced as they are.

        State shaped like a parameter (momentum, the moments of Adam), or like its rows or columns, is sliced; other state
        stays. The optimizer is changed in place, so that a scheduler keeps it; other parameters stay in their groups.

        Arguments:
            optimizer: of the model that the last step was given.

        Returns: the same optimizer. Raises: PruneError where it holds none of that model's parameters, or state that cannot
        be sliced (that of LBFGS); nothing has changed then.
        """
        remap(optimizer, taken(self._move))
        return optimizer

    @overload
    def remap_average(self, average: Mapping[str, Any]) -> dict[str, Any]: ...

    @overload
    def remap_average(self, average: AnyModule) -> AnyModule: ...

    def remap_average(self, average: Any) -> Any:
        """Remap a moving average of the weights to the model that the last step returned.

        Arguments:
            average: a state dict of the model that the last step was given, or a module with averages in place of its values.
                What calls the model `module`, as `torch.optim.swa_utils.AveragedModel` does, is changed in place.

        Returns: the state dict or the module for the new model. Raises: PruneError for averages of another model.
        """
        move = taken(self._move)
        return remap_module(average, move) if isinstance(average, nn.Module) else remap_state(average, move)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors for `torch.save`: the plan, the history and the present model; `weights_only=True` reads it.

        Optimizers and averages have one of their own, to be saved with it. Each process of a sharded model saves its own.
        """
        model = PresentModel.of(self.model, self._original, cut=self._mask is None and len(self.history) > 0)
        units = (self._choice.kept, self._gone, self._marked)
        return PrunerState.of(self._asked, self.plan, units, self._calls, self.history, self._compilation, model).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the pruner was whose `state_dict` this is, bit by bit; it had the same arguments and architecture.

        `model` is the present model then, a new one: make the optimizer and an `AveragedModel` for it, and load their states.
        Raises: PruneError that says what differs; nothing has changed then.
        """
        with entered(self.model if self._sharded else self._original) as (_, sharded, _):
            found = PrunerState.from_dict(state, self._asked)
            self._compilation.follow()
            resumed = found.resume(self._compilation, self._planner, self._options, restorer(sharded, self._whole))
            if self._mask is not None and resumed.plan.slices:
                mask_again(resumed.model, resumed.plan, resumed.compilation.inputs, grows=self._mask == "soft")
            # nothing can fail from here on
            self._compilation, self._planner, self._choice = resumed.compilation, resumed.planner, resumed.choice
            self.model, self.plan, self.history, self._calls = resumed.model, resumed.plan, resumed.history, found.calls
            self._gone, self._marked, self._move, self._spans = resumed.gone, resumed.marked, None, None
            cut = self._mask is None and len(self.history) > 0
            self._view = self.plan if cut else self._whole
            self.model = self.shrink() if cut and self._same_class and not self._sharded else resumed.model

    def regularize(self, model: nn.Module) -> None:
        """Add the gradient of the regulariser's penalty to the gradients of a model: call it between backward() and step().

        Arguments:
            model: the present model (the original, before the first step). With a gradient scaler, `unscale_` comes before.

        Raises: PruneError for another model, or before any backward(); nothing has changed then.
        """
        with learning(model, self._sharded, self._ranks, self._tensors) as learned:
            if getattr(self._regularizer, "foresees", False) and self._marked is None:
                self._marked = np.zeros_like(self._gone) if self.done else self._foreseen(model)
            if self._spans is None:
                solution, free, plan = self._planner.solution, self._planner.free, self._view
                self._spans = spans_of(solution, free, self._stuck, plan, self._regularizer)
            self._spans.add(learned, self._regularizer, self._marked, self._calls)
            self._calls += 1

    def _foreseen(self, model: nn.Module) -> np.ndarray:  # units that would go in the next step
        with entered(model, self._ranks) as (_, sharded, present):
            return self._chosen(present, len(self.history), sharded).wanted & ~self._stuck
