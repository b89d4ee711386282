"""Cut a model's own tensors, one at a time, so that two copies of its weights are never there.

Everything that can fail is done while the tensors are whole: the pruned module is put together around the original's tensor
objects, or around stand-ins, and then each tensor loses its data, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from fxprune.passes.ir.contents import CONTAINERS
from fxprune.passes.ir.module_tree import ATOMS, CHILDREN, HOOKS, named_parameters, named_tensors, walk
from fxprune.passes.ir.slices import TensorSlice
from fxprune.passes.rewrite.pruned_module import RewrittenForward
from fxprune.passes.rewrite.rewrite import drop, slice_tensor
from fxprune.plan import PlanData, plan_between
from fxprune.same_class.arguments import SelectingForward
from fxprune.same_class.saving import SavePretrained
from fxprune.same_class.silent import Silent

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def whole(name: str, tensor: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
    """The tensor itself, to be cut later: what `rewrite_program` is to put into a module whose tensors `consume` cuts."""
    return tensor


def consume(model: nn.Module, pruned: AnyModule, *, with_values: bool = True) -> AnyModule:
    """Make each tensor of a model what is left of it, one at a time; tensor objects stay, gradients go.

    Arguments:
        model: the original.
        pruned: made of it, with its tensors themselves (see `whole`), with tensors that were cut already, or with stand-ins.
        with_values: whether the tensors of `pruned` have the values that are left, so that they need not be cut again.

    Returns: `pruned`.
    """
    plan: PlanData = plan_between(model, pruned)
    removed = plan.removed
    made = dict(named_tensors(pruned)) if with_values else {}
    for name, tensor in list(named_tensors(model)):
        tensor.grad = None
        if made.get(name, tensor) is not tensor:
            tensor.data = made[name].data
        elif name in removed:
            tensor.data = tensor.data.new_empty(0)
        elif plan.slices.get(name):
            tensor.data = slice_tensor(tensor.detach(), plan.slices[name])
    return pruned


def become(model: nn.Module, made: nn.Module, *, with_values: bool) -> nn.Module:
    """Cut a model, and give its modules the numbers, configurations, forwards and new buffers of those of its shrunk copy.

    Arguments:
        model: the original.
        made: its shrunk copy; it is of no more use.
        with_values: as for `consume`.

    Raises: RuntimeError, before anything is cut, for a copy with other parameters than what is left of the model's.
    """
    plan: PlanData = plan_between(model, made)
    removed, held = plan.removed, named_parameters(model)
    for name, parameter in named_parameters(made).items():
        if name not in held or plan.kept_shape(name) != parameter.shape:
            raise RuntimeError(f"{name} is {tuple(parameter.shape)} in the copy of the class")
    consume(model, made, with_values=with_values)
    own = {path: module for module, path in walk(model).items()}
    theirs = walk(made)
    if removed:
        kept = [path for module, path in theirs.items() if not isinstance(module, Silent)]
        drop(model, own.keys() - kept, removed & dict(named_tensors(model)).keys())
    counterpart = {id(module): module if isinstance(module, Silent) else own.get(path) for module, path in theirs.items()}
    for module in theirs:
        mine = counterpart[id(module)]
        if mine is None or mine is module:
            continue
        state = vars(mine)
        for key, value in vars(module).items():
            if key == "_modules":
                state[key].update({k: counterpart[id(m)] for k, m in value.items() if counterpart.get(id(m)) is not None})
            elif key in CHILDREN:
                old = state[key]
                old.update({k: t for k, t in value.items() if t is None or old.get(k) is None or old[k].shape != t.shape})
            elif isinstance(value, RewrittenForward | SelectingForward | SavePretrained):
                state[key] = rebound(value, mine)
            elif key not in HOOKS and is_plain(value):
                state[key] = value
    for key in ("meta", "verification"):
        vars(model)[key] = vars(made)[key]
    return model


def rebound(value: Any, module: nn.Module) -> Any:
    """What stands for a method of a module of the copy, as that of the module itself."""
    value.module = module
    if isinstance(value, RewrittenForward) and value.other is not None:
        value.other.module = module
    if isinstance(value, SelectingForward) and isinstance(value.own, RewrittenForward):
        value.own.module = module
    return value


def is_plain(value: Any) -> bool:
    """Whether a value refers to no module: a number, a tensor, a configuration, or such in a container."""
    if type(value) in CONTAINERS:
        return all(map(is_plain, [*value.values(), *value] if isinstance(value, dict) else value))
    return type(value) in ATOMS or isinstance(value, Tensor) or hasattr(value, "to_json_string")
