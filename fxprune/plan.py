"""The plan: which indices stay in every parameter and buffer, as plain data."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.arguments import checked_class, shown
from fxprune.entry_points import inside_wrappers
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.errors import NotARectangle, PruneError
from fxprune.passes.ir.module_tree import check_module, every_tensor, named_tensors, walk
from fxprune.passes.ir.program import Waiver
from fxprune.passes.ir.slice_algebra import compose_slices, same_slices
from fxprune.passes.ir.slices import TensorSlice, cut_shape, keeps_nothing, mask_of
from fxprune.passes.rewrite.basis import Basis
from fxprune.passes.rewrite.rewrite import tensor_cuts
from fxprune.plan_format import FORMATS, parse_plan, steps_of

if TYPE_CHECKING:
    from typing_extensions import Self

TEXT = "the text that Plan.to_json() returned"
ORIGINAL = "apply it to the original architecture"
AT_ONCE = "the model that the last step was made of: a coupling of the original does not allow all steps at once"
STEPS = "apply it to the original; meta['step'] of a model that was pruned in steps is the plan of the last one"


@checked_class
@dataclass(frozen=True, eq=False)
class PlanData:
    """Which indices of every tensor stay, as plain data; `fxprune.Plan` can also be applied.

    Attributes:
        shapes: the original shape of every tensor of the model, by name.
        slices: for each tensor that shrinks, its slices: dimensions, kept indices (flattened over those), sizes. Of a tensor
            that goes with a residual branch one slice keeps nothing.
        attention: the granularity it was made with, `heads`, `queries` or `dims`.
        freeze: names of tensors that were kept by request.
        inputs: what the example inputs looked like, so that the plan can be applied without them.
        release: globs over names of outputs that were allowed to shrink.
        waiver: guards of the pruned program that were tried at another batch than that of `inputs`, where they do not hold.
        derived: names of tensors that are neither parameters nor in the state dict. The model's code makes them, perhaps in its
            first forward; so a model that the plan is for may lack them, or have them in another shape.
        basis: the change of basis that comes first; all else is then said of the rotated model.
        frozen_modules: paths of modules that were found to fail once they are cut: where they stay whole, they tie less.
        experts: whether what is chosen by value, as experts are, might go, or was named by index.
        steps: the plans that it was composed of, if it was; that of the first step is one of the original (after `basis`).
    """

    shapes: dict[str, tuple[int, ...]]
    slices: dict[str, list[TensorSlice]]
    attention: str = "heads"
    freeze: tuple[str, ...] = ()
    inputs: Any = field(default=None)
    release: tuple[str, ...] = ()
    waiver: Waiver | None = None
    derived: tuple[str, ...] = ()
    basis: Basis | None = None
    frozen_modules: tuple[str, ...] = ()
    experts: bool = False
    steps: tuple[PlanData, ...] = ()

    def __repr__(self) -> str:
        elements = sum(math.prod(shape) for shape in self.shapes.values())
        sizes = {name: math.prod(self.kept_shape(name)) for name in self.slices}
        left = elements - sum(math.prod(self.shapes[name]) - n for name, n in sizes.items())
        cut = f"{len(self.slices)} of {len(self.shapes)} tensors"
        return f"Plan({cut} cut, {left:,} of {elements:,} elements left)"

    def __str__(self) -> str:
        lines = [f"  {name}: {self.shapes[name]} -> {self.kept_shape(name)}" for name in self.slices]
        return "\n".join([repr(self), *lines])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanData) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def keep(self) -> dict[str, list[TensorSlice]]:
        """The former name of `slices`."""
        return self.slices

    @property
    def removed(self) -> frozenset[str]:
        """The tensors that go whole, with residual branches."""
        return frozenset(name for name, found in self.slices.items() if keeps_nothing(found))

    @property
    def coupling_options(self) -> CouplingOptions:
        """What it was asked of a coupling to make the plan."""
        frozen = dict.fromkeys(self.freeze, "is frozen by request")
        return CouplingOptions(CouplingOptions.heads_of(self.attention), frozen, self.release, choices=self.experts)

    def kept_shape(self, name: str) -> tuple[int, ...]:
        """What is left of a tensor's shape; raises PruneError for a name that the plan does not know."""
        if name not in self.shapes:
            raise PruneError(f"the plan knows of no tensor {shown(name)}", fix="a name in plan.shapes")
        return cut_shape(self.shapes[name], self.slices.get(name, ()))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        cuts = {
            name: [{"dims": list(c.dims), "keep": c.keep.tolist(), "sizes": list(c.sizes)} for c in found]
            for name, found in self.slices.items()
        }
        return {
            "format": FORMATS[bool(self.removed) if self.basis is None else 2],
            "attention": self.attention,
            "freeze": list(self.freeze),
            "release": list(self.release),
            "inputs": self.inputs,
            "waiver": None if self.waiver is None else asdict(self.waiver),
            "derived": list(self.derived),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "keep": cuts,
            **({} if self.basis is None else {"basis": self.basis.to_dict()}),
            **({"frozen_modules": list(self.frozen_modules)} if self.frozen_modules else {}),
            **({"experts": True} if self.experts else {}),
            **({"steps": [step.to_dict() for step in self.steps]} if self.steps else {}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """A plan from `to_dict`, checked field by field before anything is made of it; raises PruneError for anything else."""
        return cls(**parse_plan(data), steps=tuple(cls(**parse_plan(step)) for step in steps_of(data)))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """A plan from `to_json`; raises PruneError for anything else."""
        try:
            data = json.loads(text)
        except RecursionError as error:
            raise PruneError("this is no plan: it is nested too deeply", fix=TEXT) from error
        except (ValueError, TypeError) as error:
            raise PruneError(f"this is no plan: {error}", fix=TEXT) from error
        if not isinstance(data, dict):
            raise PruneError("this is no plan: not a JSON object", fix=TEXT)
        return cls.from_dict(data)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """For every parameter and buffer a boolean tensor of its shape, True where it is kept.

        Of a plan with a change of basis they are those of the rotated model: `model, plan = plan.in_basis(model)`.
        """
        self.check(model := inside_wrappers(model))
        plan = self.fitted(shapes_of(model))
        names = {id(t): name for name, t in named_tensors(model)}  # of a tied tensor, the name it has in the plan
        return {name: mask_of(plan.slices.get(names.get(id(t), name), ()), t.shape) for name, t in every_tensor(model)}

    def in_basis(self, model: Any, *, whole: bool = False) -> tuple[Any, Self]:
        """The model and the plan after the change of basis, if there is one; raises PruneError where it does not fit.

        `whole`: as for `Basis.apply`.
        """
        check_module(model := inside_wrappers(model))
        return (model, self) if self.basis is None else (self.basis.apply(model, whole=whole), replace(self, basis=None))

    def check(self, model: Any) -> None:
        """Raise PruneError unless the model's tensors have the names and shapes the plan was made for."""
        check_module(model := inside_wrappers(model))
        if self.basis is not None:
            what = "the plan begins with a change of basis, and its indices are those of the rotated model"
            raise PruneError(what, fix="model, plan = plan.in_basis(model), or plan.apply(model)")
        have, derived = shapes_of(model), set(derived_tensors(model))
        for name, shape in self.shapes.items():
            if name in self.derived and (name not in have or name in derived):
                continue
            if name not in have:
                raise PruneError(f"the plan is for another model: this one has no {name}", fix=ORIGINAL)
            if have[name] != shape:
                known = getattr(model, "meta", {}).get("plan")
                pruned = isinstance(known, PlanData) and known != self
                raise PruneError(
                    f"the plan is for another model: {name} has shape {have[name]}, not {shape}",
                    where=f"{type(model).__name__}, which was pruned already" if pruned else None,
                    fix=STEPS if pruned else "apply it to the original, unpruned architecture",
                )
        extra = sorted(have.keys() - self.shapes.keys() - derived)
        if extra:
            raise PruneError(f"the plan is for another model: it knows nothing of {extra[0]}", fix=ORIGINAL)

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The same without tensors that the model's code makes and that now have another shape, or are not there."""
        drop = {name for name in self.derived if shapes.get(name) != self.shapes[name]}
        if not drop:
            return self
        left = {name: shape for name, shape in self.shapes.items() if name not in drop}
        slices = {name: found for name, found in self.slices.items() if name not in drop}
        return replace(self, shapes=left, slices=slices, derived=tuple(name for name in self.derived if name in left))

    def one_by_one(self, model: Any, apply: Callable[[Any, PlanData], Any]) -> Any:
        """What the plan leaves of a model: at once, or step by step where the model's coupling does not allow that.

        `apply` makes of a model what a plan leaves of it, and raises PruneError where the plan does not fit.
        """
        self.check(model)
        try:
            return apply(model, self)
        except PruneError:
            if not self.steps:
                raise
        for step in self.steps:
            model = apply(model, step)
        for name, shape in shapes_of(model).items():
            if name in self.slices and name not in self.derived and shape != self.kept_shape(name):
                raise PruneError(f"this is no plan: its steps leave {shape} of {name}", where=name, fix=TEXT)
        return model

    def compose(self, later: PlanData) -> Self:
        """One plan of the original that does what this plan does and then another one, of the model that this one leaves.

        `prune` does so when it is given a pruned model. Raises: PruneError where the other plan is of another model, or begins
        with a change of basis.
        """
        if not isinstance(later, PlanData) or later.basis is not None:
            why = "the second one begins with a change of basis" if isinstance(later, PlanData) else f"{shown(later)} is none"
            raise PruneError(f"the plans cannot be composed: {why}", fix="apply one after the other: plan.apply(model)")
        for name, shape in later.shapes.items():
            if name in self.shapes and shape != self.kept_shape(name) and name not in later.derived:
                what = f"{name} has shape {shape} there, and {self.kept_shape(name)} is left of it here"
                raise PruneError(f"the plans cannot be composed: {what}", fix="the plan of the model that this plan leaves")
            if name not in self.shapes and name not in later.derived:  # constants of a program are derived
                what = f"this one knows nothing of {name}"
                raise PruneError(f"the plans cannot be composed: {what}", fix="the plan of the model that this plan leaves")
        slices = dict(self.slices)
        for name, found in later.slices.items():
            if name in self.shapes and later.shapes[name] == self.kept_shape(name):
                slices[name] = compose_slices(self.slices.get(name, ()), found, self.shapes[name])
        return replace(
            self,
            slices=slices,
            attention=self.attention if self.attention == later.attention else "dims",
            freeze=tuple(name for name in self.freeze if name in later.freeze),
            release=tuple(dict.fromkeys([*self.release, *later.release])),
            inputs=later.inputs if self.inputs is None else self.inputs,
            waiver=later.waiver or self.waiver,
            frozen_modules=tuple(dict.fromkeys([*self.frozen_modules, *later.frozen_modules])),
            experts=self.experts or later.experts,
            steps=(*(self.steps or (replace(self, basis=None),)), *(later.steps or (later,))),
        )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, by name."""
    return {name: tuple(t.shape) for name, t in named_tensors(model)}


def derived_tensors(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> tuple[str, ...]:
    """Names of a model's tensors (`tensors`, where they are at hand) that are neither parameters nor in its state dict."""
    saved = {
        id(tensor)
        for module in walk(model)
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if name not in module._non_persistent_buffers_set
    }
    named = named_tensors(model) if tensors is None else tensors.items()
    return tuple(name for name, tensor in named if id(tensor) not in saved)


def kept_labels(plan: PlanData, solution: Solution, trials: Collection[str] = ()) -> Tensor:
    """Which labels a plan keeps, shape (labels,); raises PruneError where it does not fit the model's coupling.

    Arguments:
        plan: fitted to the model.
        solution: the model's coupling.
        trials: why modules were frozen that failed when more of them was cut: what went before stays gone.
    """
    gone = plan.removed
    removed = solution.removed_by(plan.slices, {name: shape for name, shape in plan.shapes.items() if name not in gone})
    facts = np.array([not any(trial in reason for trial in trials) for reason in solution.reasons] + [False])  # -1: not frozen
    fix = AT_ONCE if plan.steps else "apply it to the architecture it was made for, unchanged"
    frozen = np.flatnonzero(removed & facts[solution.frozen])
    removed[frozen] = False  # it may be that all its entries are removed with others that share their places
    kept = torch.from_numpy(~removed[solution.unit_of.numpy()])
    try:
        now = {name: found for name, found in tensor_cuts(solution, kept).items() if found and name in plan.shapes}
    except NotARectangle as error:
        raise PruneError("the plan does not fit the model: rows would differ in length", fix="make a new plan") from error
    for name in sorted({*plan.slices, *now} - gone):
        if not same_slices(plan.slices.get(name, []), now.get(name, []), plan.shapes[name]):
            if len(frozen):
                why = solution.reasons[int(solution.frozen[frozen[0]])]
                what = f"it removes channels of {occurring(solution, int(frozen[0]))}, of which one {why}"
                raise PruneError(f"the plan does not fit the model: {what}", fix=fix)
            what = f"the plan does not fit the model: it cuts {name} in another way than the model's coupling allows"
            raise PruneError(what, where=name, fix=fix)
    return kept


def occurring(solution: Solution, unit: int) -> str:
    """The name of a tensor that a unit occurs in."""
    found = (name for name, labels in solution.leaves.items() for f in labels if (solution.unit_of[f.labels] == unit).any())
    return next(found, "a tensor")


def is_pruned(model: Any) -> bool:
    """Whether a model carries the plan that it was pruned by."""
    meta = getattr(model, "meta", None)
    return isinstance(meta, Mapping) and isinstance(meta.get("plan"), PlanData)


def plan_carried(pruned: nn.Module) -> Any:
    """The plan that a pruned model was made by; raises PruneError for a model that was not."""
    if not is_pruned(pruned):
        raise PruneError("this module carries no plan", where=type(pruned).__name__, fix="pass what fxprune.prune returned")
    return getattr(pruned, "meta", {})["plan"]


def plan_between(model: nn.Module, pruned: nn.Module) -> Any:
    """The plan that leads from a model to one that was made of it, perhaps in steps; raises PruneError if there is none.

    What was pruned of a pruned model carries two: `plan` of the original, and `step` of the model that it was made of.
    """
    if is_pruned(model) and not is_pruned(pruned):
        what = "the second model is none that was pruned, and the first one is"
        raise PruneError(what, where=type(model).__name__, fix="the original comes first: (model, pruned, ...)")
    whole, step = plan_carried(pruned), getattr(pruned, "meta", {}).get("step")
    if step is None:
        return whole
    try:
        step.check(model)
    except PruneError:
        return whole
    return step


def sign(pruned: nn.Module, plan: PlanData, model: nn.Module) -> None:
    """Note in a pruned model the plan by which it was made of `model`, as one of the original if that was pruned itself."""
    meta: Any = pruned.meta
    meta.pop("step", None)
    before, meta["plan"] = getattr(model, "meta", {}), plan
    before = before.get("plan") if isinstance(before, dict) else None
    if isinstance(before, PlanData):
        with contextlib.suppress(PruneError):  # other things were done to the pruned model: then it is an original of its own
            meta["plan"], meta["step"] = before.compose(plan), plan
