"""Cut a model's own tensors, one at a time, so that two copies of its weights are never there.

Everything that can fail is done while the tensors are whole: the pruned module is put together around the original's tensor
objects, which then lose their data one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fxprune.inputs import ExampleInputs
from fxprune.passes.ir.module_tree import ATOMS, CHILDREN, CONTAINERS, HOOKS, named_tensors, on_meta, private_copy, walk
from fxprune.passes.ir.slices import TensorSlice
from fxprune.passes.rewrite.pruned_module import PrunedModule, RewrittenForward
from fxprune.passes.rewrite.rewrite import slice_tensor
from fxprune.plan import PlanData, plan_between
from fxprune.same_class.configuration import build, shapes
from fxprune.same_class.constants import widths_in_constants
from fxprune.same_class.restore import restore_class, shrunk_copy


def whole(name: str, tensor: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
    """The tensor itself, to be cut later: what `rewrite_program` is to put into a module whose tensors `consume` cuts."""
    return tensor


def consume(model: nn.Module, pruned: nn.Module) -> None:
    """Make each tensor of a model what is left of it, one at a time; tensor objects stay, gradients go.

    Arguments:
        model: the original.
        pruned: made of it, with its tensors themselves (see `whole`), or with tensors that were cut already.
    """
    slices: Mapping[str, Sequence[TensorSlice]] = plan_between(model, pruned).slices
    own = {id(tensor): (name, tensor) for name, tensor in named_tensors(model)}
    given = dict(own.values())
    for name, tensor in list(named_tensors(pruned)):
        if id(tensor) in own:
            tensor.grad = None
            cut = slices.get(own[id(tensor)][0], ())
            if cut:
                tensor.data = slice_tensor(tensor.detach(), cut)
        elif name in given:
            given[name].grad = None
            given[name].data = tensor.data


def restore_in_place(model: nn.Module, pruned: PrunedModule, inputs: ExampleInputs) -> nn.Module:
    """The model itself as its pruned one, in its own class; `pruned` as for `consume`."""
    shrunk = shrunk_copy(model, pruned, inputs)
    form = private_copy(model, on_meta)
    consume(model, pruned)
    made, _ = restore_class(form, pruned, inputs, shrunk)
    return become(model, made)


def become(model: nn.Module, made: nn.Module) -> nn.Module:
    """Give the modules of a model the tensors, numbers, configurations and forwards of those of its shrunk copy."""
    own = {path: module for module, path in walk(model).items()}
    for module, path in walk(made).items():
        if path not in own:
            continue
        held = vars(own[path])
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                mine = held[key]
                mine.update({k: t for k, t in value.items() if t is None or mine.get(k) is None or mine[k].shape != t.shape})
            elif isinstance(value, RewrittenForward):
                value.module = own[path]
                held[key] = value
            elif key not in HOOKS and key not in CHILDREN and is_plain(value):
                held[key] = value
    for key in ("meta", "verification"):
        vars(model)[key] = vars(made)[key]
    return model


def is_plain(value: Any) -> bool:
    """Whether a value refers to no module: a number, a tensor, a configuration, or such in a container."""
    if type(value) in CONTAINERS:
        return all(map(is_plain, [*value.values(), *value] if isinstance(value, dict) else value))
    return type(value) in ATOMS or isinstance(value, Tensor) or hasattr(value, "to_json_string")


def widths_held(model: nn.Module, plan: PlanData) -> dict[str, str]:
    """The tensors of a model that have to stay whole for a configuration (see `widths_in_constants`), before any is cut."""
    config: Any = getattr(model, "config", None)
    if config is None or build(model, config) is None:
        return {}
    return widths_in_constants(model, {name: plan.kept_shape(name) for name in shapes(model) if name in plan.shapes})
