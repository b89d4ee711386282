"""What of an original is not in its weights: its configuration, its indices and masks, and what its first forward makes."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.couple import describe_capture
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import every_tensor, fetch, named_tensors, private_copy, set_mode
from fxprune.passes.ir.quiet import unobserved
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.plan import PlanData, derived_tensors, is_pruned, shapes_of
from fxprune.selection.choice import Choice

FOLDER = "a folder that fxprune.save wrote, or load(path, model)"


def config_of(model: nn.Module) -> Any:
    """A copy of the configuration that builds a model, which says so itself; None where there is none."""
    known, config = getattr(model, "meta", {}), getattr(model, "config", None)
    if isinstance(known, dict) and "config" in known:
        return known["config"]  # of the model that this one was pruned from
    if not (hasattr(model, "save_pretrained") and hasattr(config, "to_json_string")):
        return None
    made: Any = copy.deepcopy(config)
    made.architectures = [type(model).__name__]
    return made


def describe_pruning(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    pruned: PrunedModule,
    choice: Choice,
    frozen_modules: Mapping[str, str],
) -> None:
    """Note in `meta` of a pruned module how it was captured, what was removed, and what of the original it needs later."""
    pruned.meta["capture"] = describe_capture(choice.solution)
    pruned.meta["frozen_modules"] = dict(frozen_modules)
    pruned.meta["unused"] = tuple(name for name in tensors if name not in choice.solution.leaves)
    pruned.meta["contents"] = lost_contents(model, tensors, pruned, choice.slices)
    pruned.meta["branches"] = tuple(b.name for b in choice.slicer.removed.branches if b.name)
    known = {"config": config_of(model), "latency": choice.latency}
    pruned.meta.update({key: value for key, value in known.items() if value is not None})


def lost_contents(
    model: nn.Module, tensors: Mapping[str, Tensor], pruned: nn.Module, cut: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Copies of a model's tensors, by name, that hold no fractions (indices, masks), where its pruned module has less than all.

    Without them an architecture that has no values cannot be captured. What a model that was pruned before knows is handed on.
    `cut` has the slices of each tensor.
    """
    meta: Any = getattr(model, "meta", {})
    known = meta.get("contents", {}) if is_pruned(model) else {}
    found = dict(known)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta or name in known:
            continue
        try:
            fetch(pruned, name)
            lost = bool(cut.get(name))
        except AttributeError:
            lost = True
        if lost:
            found[name] = tensor.detach().clone()
    return found


def with_lazy_tensors(model: nn.Module, plan: PlanData, inputs: ExampleInputs) -> nn.Module:
    """A model as it is once it has run, if its plan is of one that has, and else the model itself.

    Some models make tensors in their first forward, or replace them, which pruning then cuts like any others. A copy runs, and
    the tensors that the plan knows are put in another copy.
    """
    have = shapes_of(model)
    lazy = {name for name in plan.derived if have.get(name) != plan.shapes[name]}
    if not lazy:
        return model
    ran = set_mode(private_copy(model), False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), unobserved(model):
            inputs.map(torch.clone).call(ran)
    except Exception:  # it is captured as it is, and the error is met there
        return model
    made = {name: t for name, t in named_tensors(ran) if name in lazy and tuple(t.shape) == plan.shapes[name]}
    return with_tensors(model, made)


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """A copy of a model that shares its parameters and has these tensors beside them; the model itself if there are none."""
    if not tensors:
        return model
    changed: nn.Module = private_copy(model)
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        try:
            owner = changed.get_submodule(path)
        except AttributeError:  # a module that the first forward made
            continue
        held: dict[str, Any] = owner._buffers if attribute in owner._buffers else vars(owner)
        held[attribute] = None if tensor is None else tensor.detach().clone()
    return changed


def left_by_forward(module: nn.Module, plan: PlanData) -> set[str]:
    """Names of tensors that a forward has put on a pruned module: neither the original's nor constants of its program."""
    held = every_tensor(module)
    original = {id(tensor) for name, tensor in held if name in plan.shapes}
    known = {*plan.shapes, *(name for name, tensor in held if id(tensor) in original)}
    return {n for n in derived_tensors(module) if n not in known and not n.rpartition(".")[2].startswith("_tensor_constant")}


@contextlib.contextmanager
def at_most(most: int, on_meta: bool = False) -> Iterator[None]:
    """Refuse models with more parameters than that in this thread, and with `on_meta` let none of them keep its memory."""
    thread, seen = threading.get_ident(), 0

    def registered(module: nn.Module, name: str, parameter: Any) -> Any:
        nonlocal seen
        if threading.get_ident() != thread or parameter is None:
            return None
        seen += not (on_meta and parameter.is_meta)
        if seen > 4 * most + 64:  # ties are set again
            raise PruneError("the configuration builds a larger model than the plan is for", fix=FOLDER)
        if not on_meta or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
