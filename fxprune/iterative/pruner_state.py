"""The state of a `Pruner` as plain data and tensors, which `torch.load` reads with `weights_only=True`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.distributed.sharded import reshard
from fxprune.iterative.history import History, HistoryStep
from fxprune.iterative.planner import Planner
from fxprune.iterative.regularizers import Regularizer
from fxprune.iterative.schedules import Schedule, describe_request
from fxprune.module_state import ModuleState
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, named_tensors, own_copy
from fxprune.passes.ir.slice_algebra import same_slices
from fxprune.passes.ir.slices import Slicer
from fxprune.pipeline import Compilation, Plan
from fxprune.plan import PlanData, plan_between
from fxprune.records import parse_record, plain_record
from fxprune.selection.choice import Choice
from fxprune.selection.options import Asked, Options, Verify
from fxprune.verification import Verification

FORMAT = "fxprune.pruner/1"
ORIGINAL = "the architecture that it was saved from"
STATE = "what Pruner.state_dict() returned"


class AskedOfPruner(Asked, total=False):
    """The arguments of a `Pruner`, which documents them, beside those that say what its steps return."""

    verify: Verify
    schedule: Literal["linear", "cubic"] | str | Schedule
    steps: int
    regularizer: Literal["bn_l1", "group_lasso", "depgraph", "growing"] | str | Regularizer


def asked_of(shares: Sequence[float], mask: str | None, options: Options) -> dict[str, str]:
    """What a pruner was asked for, in words."""
    request = describe_request(options) + ", uniform=True" * options.coupling.uniform
    return {"shares": str(shares), "mask": repr(mask), "request": request}


@dataclass(frozen=True)
class PresentModel:
    """The model that the last step returned.

    Attributes:
        tensors: its tensors, by name.
        state: its modes and all else.
        plan: as JSON, the plan that makes a model of its form of the original; empty where it has the original's form.
        verification: of the last step, as a plain record.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    plan: str
    verification: dict[str, Any] | None

    @classmethod
    def of(cls, model: nn.Module, original: nn.Module, cut: bool) -> PresentModel:
        reshard(model)
        found = getattr(model, "meta", {}).get("verification") if cut else None
        return cls(
            {name: tensor.detach().clone() for name, tensor in named_tensors(model)},
            ModuleState.of(model).to_dict(),
            plan_between(original, model).to_json() if cut else "",
            None if found is None else plain_record(found),
        )

    def restore(self, compilation: Compilation, _: PlanData | None = None) -> nn.Module:
        """A new model from the original; raises PruneError where that is of another architecture."""
        original = compilation.model
        made: nn.Module
        if self.plan:
            plan, inputs = Plan.from_json(self.plan), compilation.inputs.beside(original)
            given = inputs.kwargs or inputs.args
            made = Compilation.of_plan(original, plan, given, compilation.frozen_modules).apply(plan)
        else:
            made = copy_tree(original, {id(t): own_copy(t) for _, t in named_tensors(original)})
        ModuleState.from_dict(self.state).fill(made, self.tensors)
        if self.verification is not None and isinstance(made, fx.GraphModule):
            made.meta["verification"] = parse_record(Verification, self.verification)
        return made


@dataclass(frozen=True)
class Resumed:
    """What a pruner goes on with; the attributes are those of `Pruner`."""

    compilation: Compilation
    planner: Planner
    choice: Choice
    plan: Plan
    gone: np.ndarray
    marked: np.ndarray | None
    history: History
    model: nn.Module


@dataclass(frozen=True)
class PrunerState:
    """All that a schedule goes on with.

    Attributes:
        asked: the steps, the mask and what is to be gone, in words: a pruner that loads this must agree.
        plan: all steps so far, as JSON.
        kept: labels that stay, shape (labels,).
        gone: units that are gone, shape (labels,).
        marked: units that the regulariser was told will go, shape (labels,); None if it was told of none.
        calls: of `regularize` since the last step.
        history: plain records of the steps.
        frozen_modules: modules that were found to fail once they are cut, with the reason.
        model: the present one.
    """

    asked: dict[str, str]
    plan: str
    kept: Tensor
    gone: Tensor
    marked: Tensor | None
    calls: int
    history: list[dict[str, Any]]
    frozen_modules: dict[str, str]
    model: PresentModel

    @classmethod
    def of(
        cls,
        asked: dict[str, str],
        plan: PlanData,
        units: tuple[Tensor, np.ndarray, np.ndarray | None],
        calls: int,
        history: History,
        compilation: Compilation,
        model: PresentModel,
    ) -> PrunerState:
        kept, gone, marked = units
        return cls(
            asked,
            plan.to_json(),
            kept.clone(),
            torch.from_numpy(gone.copy()),
            None if marked is None else torch.from_numpy(marked.copy()),
            calls,
            [step.to_dict() for step in history],
            dict(compilation.frozen_modules),
            model,
        )

    def to_dict(self) -> dict[str, Any]:
        model = {field.name: getattr(self.model, field.name) for field in fields(self.model)}
        return {"format": FORMAT, **{field.name: getattr(self, field.name) for field in fields(self)}, "model": model}

    @classmethod
    def from_dict(cls, data: Any, asked: Mapping[str, str]) -> PrunerState:
        """The state from `to_dict`; raises PruneError for anything else, and for that of a pruner asked for something else."""
        form = data.get("format") if isinstance(data, Mapping) else None
        if form != FORMAT:
            raise PruneError(f"this is no state of a Pruner: its format is {str(form)[:60]!r}", fix=STATE)
        kinds: dict[str, Any] = {"asked": dict, "plan": str, "calls": int, "history": list, "frozen_modules": dict}
        kinds |= {"kept": Tensor, "gone": Tensor, "marked": Tensor | None, "model": Mapping}
        for name, kind in kinds.items():
            if not isinstance(data.get(name, ()), kind):
                raise PruneError(f"this is no state of a Pruner: {name} is of type {type(data.get(name)).__name__}", fix=STATE)
        for name in {**asked, **data["asked"]}:
            if data["asked"].get(name) != asked.get(name):
                what = f"the state is of a Pruner with {name} {data['asked'].get(name)}, and this one has {asked.get(name)}"
                raise PruneError(what, fix="a Pruner with the arguments of the one that was saved")
        model = data["model"]
        kinds = {"tensors": Mapping, "state": Mapping, "plan": str, "verification": Mapping | None}
        if model.keys() != kinds.keys() or not all(isinstance(model[name], kind) for name, kind in kinds.items()):
            raise PruneError("this is no state of a Pruner: it holds no model", fix=STATE)
        if not all(isinstance(tensor, Tensor) for tensor in model["tensors"].values()):
            raise PruneError("this is no state of a Pruner: its model holds what is no tensor", fix=STATE)
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name != "model"}, model=PresentModel(**model))

    def resume(
        self,
        compilation: Compilation,
        planner: Planner,
        options: Options,
        restore: Callable[[PresentModel, Compilation, PlanData], nn.Module],
    ) -> Resumed:
        """What a pruner of the same architecture goes on with; raises PruneError where it is of another one.

        Arguments:
            restore: makes the present model of what is known of it; `PresentModel.restore`, for a model of one process.
        """
        if self.frozen_modules != compilation.frozen_modules:
            compilation = Compilation(compilation.model, compilation.inputs, options.coupling, self.frozen_modules)
            planner = Planner(compilation, options)
        saved, count = PlanData.from_json(self.plan), len(planner.unit_of)
        saved.check(compilation.model)
        kept, gone = torch.from_numpy(self.units("kept", count)), self.units("gone", count)
        choice = Choice(planner.solution, kept, Slicer(kept))
        plan = compilation.plan(choice)
        for name in sorted({*plan.slices, *saved.slices} - {*saved.derived}):
            if not same_slices(plan.slices.get(name, []), saved.slices.get(name, []), plan.shapes[name]):
                what = f"the state is of another model: it cuts {name} in another way than the labels that it keeps"
                raise PruneError(what, where=name, fix=ORIGINAL)
        marked = None if self.marked is None else self.units("marked", count)
        history = History([parse_record(HistoryStep, step) for step in self.history])
        model = restore(self.model, compilation, plan)
        return Resumed(compilation, planner, choice, plan, gone, marked, history, model)

    def units(self, name: str, count: int) -> np.ndarray:
        """`kept`, `gone` or `marked` as an array; raises PruneError unless it is of as many labels as the model has."""
        found = getattr(self, name)
        if found.dtype != torch.bool or tuple(found.shape) != (count,):
            what = f"the state is of another model: {name} is {found.dtype}, {tuple(found.shape)}, not of {count} labels"
            raise PruneError(what, fix=ORIGINAL)
        array: np.ndarray = found.cpu().numpy().copy()
        return array
