"""The pruned model of a checkpoint in form, from the original architecture and the plan; its values are filled in later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.checkpoints.file import WHOLE
from fxprune.checkpoints.record import Record
from fxprune.inputs import device_of, random_inputs
from fxprune.iterative.plan_mapping import undo_slices
from fxprune.module_state import aliases
from fxprune.original_state import with_tensors
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, named_tensors
from fxprune.passes.rewrite.basis import Basis
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData, derived_tensors, sign
from fxprune.plan_format import byte_size

CONTENTS = "original:"  # begins the names of tensors of the original
ROTATION = "rotation:"  # and this those of the rotations of a plan
MOST_BYTES = 1 << 27  # of example inputs that are made up


def original_names(tensors: Mapping[str, Tensor], first: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a pruned model by their names in the original; of a tied one the first, by `first`."""
    return {first.get(name, name): tensor for name, tensor in tensors.items()}


def other_names(original: nn.Module, tensors: Mapping[str, Tensor], made: nn.Module) -> dict[str, str]:
    """The names in a module made of the original, of tensors by the names in another one."""
    first = aliases(original)
    held = {first.get(name, name): name for name, _ in named_tensors(made)}
    return {name: held.get(first.get(name, name), name) for name in tensors}


def rotations_apart(plan: dict[str, Any], basis: Basis | None) -> dict[str, Tensor]:
    """The rotations of a plan as tensors by name, taken out of its plain data."""
    if basis is None:
        return {}
    plan["basis"]["rotations"] = []
    return {f"{ROTATION}{number}": rotation for number, rotation in enumerate(basis.rotations)}


def rotations_in(found: Mapping[str, Tensor]) -> list[Tensor]:
    """The rotations among the tensors of a file, in order."""
    names = [f"{ROTATION}{number}" for number in range(sum(name.startswith(ROTATION) for name in found))]
    if not found.keys() >= set(names):
        raise PruneError("this is no checkpoint: its rotations have no numbers", fix=WHOLE)
    return [found[name] for name in names]


def split_contents(plan: PlanData, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the saved module and those of the original; raises PruneError where their shapes are not by the plan."""
    contents = {name.removeprefix(CONTENTS): t for name, t in found.items() if name.startswith(CONTENTS)}
    tensors = {name: t for name, t in found.items() if not name.startswith((CONTENTS, ROTATION))}
    for name, tensor in contents.items():
        if plan.shapes.get(name) != tuple(tensor.shape) or has_fractions(tensor):
            raise PruneError(f"the contents of {name} are not those of a tensor of the original", where=name, fix=WHOLE)
    for name, tensor in tensors.items():
        if name in plan.shapes and name not in plan.derived and tuple(tensor.shape) != plan.kept_shape(name):
            what = f"the plan leaves {plan.kept_shape(name)} of {name}, and {tuple(tensor.shape)} is stored"
            raise PruneError(what, where=name, fix=WHOLE)
    return tensors, contents


def rebuilt(
    model: nn.Module,
    record: Record,
    tensors: Mapping[str, Tensor],
    contents: Mapping[str, Tensor],
    same_class: bool,
    example_inputs: Any,
) -> Any:
    """The pruned model in form, from the original architecture; its values are still to be filled in.

    Programs that read no values are found without any. For others the model gets those that are stored, and zeros elsewhere.
    """
    record.plan.check(model)
    first = aliases(model)
    stored = original_names(tensors, first)
    plans = [record.plan, *record.plan.steps]
    if example_inputs is None and any(byte_size(plan.inputs) > MOST_BYTES for plan in plans):
        raise PruneError("the plan's example inputs are too large to be made up", fix="load(path, model, example_inputs=...)")
    needs_values = same_class or record.capture.startswith("opaque")
    for values in (True,) if needs_values else (False, True):
        form, given = in_form(model, record.plan, stored, contents, values)
        try:
            made = shrink(form, record, same_class, example_inputs)
        except PruneError:
            if values or form is model:
                raise
            continue
        if values or form is model or made.meta.get("capture") == record.capture:
            break
    held = original_names(dict(named_tensors(made)), first)
    for name in given:
        if name in held and not torch.equal(held[name], stored[name].to(held[name].device)):
            raise no_contents(model, name)
    return made


def shrink(model: nn.Module, record: Record, same_class: bool, example_inputs: Any) -> Any:
    """A model as the plan of a checkpoint leaves it."""

    def shrunk(model: Any, plan: PlanData) -> Any:
        inputs = example_inputs
        if inputs is None:
            found = random_inputs(plan.inputs, model)
            inputs = found.kwargs or found.args
        compilation = Compilation.of_plan(model, plan, inputs, record.frozen_modules if plan is record.plan else None)
        pruned = compilation.emit(compilation.choice_of(plan), waiver=plan.waiver)
        made = compilation.restore_class(pruned) if same_class else pruned
        sign(made, plan, model)
        return made

    made = record.plan.one_by_one(model, shrunk)
    sign(made, record.plan, model)
    return made


def in_form(
    model: nn.Module, plan: PlanData, stored: Mapping[str, Tensor], contents: Mapping[str, Tensor], values: bool
) -> tuple[nn.Module, list[str]]:
    """The original architecture with the dtypes that are stored, on a device that has memory.

    Arguments:
        model: the architecture, with values or without.
        plan: what was cut of it.
        stored: what is left of its tensors, by name.
        contents: tensors of the original that hold no fractions and are not among these.
        values: whether the others must have values. Without, nothing is written to their memory, so that the system gives none.

    Returns: the model itself where it will do, or a copy, and the names of tensors that have their contents from `stored`.
    """
    swap: dict[int, Tensor] = {}
    given: list[str] = []
    device = torch.device("cpu") if device_of(model).type == "meta" else device_of(model)
    for name, tensor in named_tensors(model):
        kept, dtype = stored.get(name), tensor.dtype
        if kept is not None and has_fractions(tensor) and has_fractions(kept):
            dtype = kept.dtype
        if dtype == tensor.dtype and not tensor.is_meta:
            continue
        if not has_fractions(tensor):
            if name not in contents and (kept is None or plan.slices.get(name) or kept.dtype != dtype):
                raise no_contents(model, name)
            made = contents.get(name, kept)
            assert made is not None
            made = made.to(device, dtype, copy=True)
            given += [name] if name not in contents else []
        elif not tensor.is_meta and values:
            made = tensor.detach().to(dtype)
        else:
            made = torch.empty(tensor.shape, dtype=dtype, device=device)
            made = made.zero_() if values else made
            if values and kept is not None:
                made = undo_slices(plan.slices.get(name, ()), kept.to(device), made)
        parameter = isinstance(tensor, nn.Parameter)
        swap[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if parameter else made
    form: nn.Module = copy_tree(model, swap) if swap else model
    return with_tensors(form, as_planned(form, plan, stored)), given


def as_planned(model: nn.Module, plan: PlanData, stored: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Tensors that the model's code makes and that had another shape when it was pruned, or were not there: as they were."""
    found: dict[str, Tensor | None] = {name: None for name in derived_tensors(model) if name not in plan.shapes}
    for name, tensor in named_tensors(model):
        shape = plan.shapes.get(name)
        if name in plan.derived and shape is not None and shape != tuple(tensor.shape):
            if name not in stored:  # the program did not read it
                found[name] = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            elif tuple(stored[name].shape) == shape:
                found[name] = stored[name].to(tensor.device, tensor.dtype)
    return found


def has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def no_contents(model: nn.Module, name: str) -> PruneError:
    return PruneError(
        f"{name} has no contents on the meta device, and the plan does not tell them",
        where=f"{name} in {type(model).__name__}",
        fix="the model with its buffers on the CPU; parameters may be on the meta device",
    )
