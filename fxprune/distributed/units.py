"""What `fully_shard` (FSDP2) was told of a model: read from it, taken off a copy, and said again of a pruned one."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.entry_points import is_a
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, named_parameters, walk

FSDP, DISTRIBUTED = "torch.distributed.fsdp", "torch.distributed"
UNSHARDED = "prune the plain model, before fully_shard()"
# what methods of an `FSDPModule` set in its groups of parameters
SETTINGS = (
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "gradient_divide_factor",
    "force_sum_reduction_for_comms",
    "unshard_async_op",
    "unshard_in_backward",
    "reduce_scatter_unused_params",
)


@dataclass(frozen=True)
class Unit:
    """One call of `fully_shard`.

    Attributes:
        paths: the modules that it was given.
        mesh: the mesh, None where it has no parameters of its own.
        policies: its keyword arguments.
        settings: what was set afterwards, by attribute of a group of parameters.
        dims: the dimension that is sharded, by name of the parameter, where that is not the first.
        names: of the parameters that it shards.
        inner: of those that were sharded before, as by tensor parallelism, the mesh and the placements.
    """

    paths: tuple[str, ...]
    mesh: Any
    policies: Mapping[str, Any]
    settings: Mapping[str, Any]
    dims: Mapping[str, int]
    names: frozenset[str]
    inner: Mapping[str, tuple[Any, tuple[Any, ...]]]


def is_unit(module: nn.Module) -> bool:
    return is_a(module, FSDP, "FSDPModule")


def state_of(module: Any) -> Any:
    """What FSDP keeps of a module, perhaps together with others."""
    return module._get_fsdp_state()


def units_of(model: nn.Module) -> list[Unit]:
    """The calls of `fully_shard` that made a model what it is, innermost first; raises PruneError for unusual ones."""
    states: dict[int, tuple[Any, list[str]]] = {}
    for module, path in walk(model).items():
        if is_unit(module):
            state = state_of(module)
            states.setdefault(id(state), (state, []))[1].append(path)
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    return [read_unit(state, tuple(paths), names) for state, paths in reversed(states.values())]


def read_unit(state: Any, paths: tuple[str, ...], names: Mapping[int, str]) -> Unit:
    """A unit from the state that FSDP keeps of it; `names` has those of parameters by their identity."""
    groups = state._fsdp_param_groups
    policies: dict[str, Any] = {"mp_policy": state._mp_policy}
    if not groups:
        return Unit(paths, None, policies, {}, {}, frozenset(), {})
    group, info = groups[0], groups[0].mesh_info
    if len(groups) > 1 or not hasattr(info, "shard_mesh_size") or getattr(info, "is_spmd_mesh", False):
        what = "its parameters lie on a mesh of their own, or on one with dimensions that are not FSDP's"
        raise PruneError(f"the model is sharded in an unusual way: {what}", where=paths[0] or "FSDP", fix=UNSHARDED)
    after = group.post_forward_mesh_info
    told = False if after is None else True if after is info else after.shard_mesh_size
    policies |= {
        "offload_policy": group.offload_policy,
        "reshard_after_forward": None if state._auto_reshard_after_forward else told,
    }
    own = {names[id(registered(p))]: p for p in group.fsdp_params}
    return Unit(
        paths,
        info.mesh,
        policies,
        {name: getattr(group, name) for name in SETTINGS if hasattr(group, name)},
        {name: p.fsdp_placement.dim for name, p in own.items() if p.fsdp_placement.dim},
        frozenset(own),
        {
            name: (p._unsharded_dtensor_spec.mesh, tuple(p._unsharded_dtensor_spec.placements))
            for name, p in own.items()
            if p.is_dtensor
        },
    )


def registered(held: Any) -> nn.Parameter:
    """The parameter that FSDP takes what it keeps from: it looks again before the first forward, and when values are loaded."""
    found: nn.Parameter = held._module_info.module._parameters[held._module_info.param_name]
    return found


def let_go(model: nn.Module, parameter: nn.Parameter) -> None:
    """Have neither a model nor FSDP hold the values of a parameter."""
    for module in walk(model):
        for group in state_of(module)._fsdp_param_groups if is_unit(module) else ():
            for held in group.fsdp_params:
                if registered(held) is parameter:
                    held.sharded_param = held._sharded_param_data = None
    for module in walk(model):
        for key, value in module._parameters.items():
            if value is parameter:
                module._parameters[key] = nn.Parameter(torch.empty(0), parameter.requires_grad)


def shard_again(model: nn.Module, units: Iterable[Unit]) -> None:
    """Call `fully_shard` on the modules of a model, whose parameters are on the meta device, as it was called before."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    units = list(units)
    parameters = named_parameters(model)
    sharded = frozenset[str]().union(*(unit.names for unit in units))
    ignored = {parameter for name, parameter in parameters.items() if name not in sharded}
    for unit in units:
        modules = [model.get_submodule(path) for path in unit.paths]
        dims = {id(parameters[name]): dim for name, dim in unit.dims.items()}
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=unit.mesh or next(other.mesh for other in units if other.mesh is not None),
            shard_placement_fn=(lambda p, dims=dims: Shard(dims.get(id(p), 0))) if dims else None,
            ignored_params=ignored or None,
            **unit.policies,
        )
        for group in state_of(modules[0])._fsdp_param_groups:
            for name, value in unit.settings.items():
                setattr(group, name, value)


# -- copies of the module tree --------------------------------------------------------------------------------------------


def plain_tree(model: nn.Module, swap: Mapping[int, Tensor]) -> Any:
    """A copy of a model in which no module communicates: of its own class, without hooks of `torch.distributed`.

    Arguments:
        model: the original.
        swap: what to put in place of its tensors, by their identity.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    keys = [STATE_KEY, REGISTRY_KEY]
    modules = walk(model)
    nothing: dict[int, Any] = {id(vars(module)[key]): None for module in modules for key in keys if key in vars(module)}
    copied = copy_tree(model, nothing | dict(swap))
    for module in walk(copied):
        state = vars(module)
        for key in [key for key, value in state.items() if key in keys or is_wrapped(value)]:
            del state[key]
        for hooks in hooks_of(module).values():
            for number in [number for number, hook in hooks.items() if home(hook).startswith(DISTRIBUTED)]:
                del hooks[number]
        if is_unit(module):
            kind: Any = type(module)
            module.__class__ = kind.__mro__[kind._orig_cls_mro_index]
    return copied


def give_hooks(model: nn.Module, made: nn.Module) -> None:
    """Give a pruned model the hooks of `torch.distributed` that a model has, in the same order, except those of FSDP."""
    for module, path in walk(model).items():
        theirs = hooks_of(made.get_submodule(path))
        for name, hooks in hooks_of(module).items():
            if any(is_parallel(hook) for hook in hooks.values()):
                own = theirs[name]
                before = [(k, own.get(k, hook)) for k, hook in hooks.items() if k in own or is_parallel(hook)]
                after = [(k, hook) for k, hook in own.items() if k not in hooks]
                own.clear()
                own.update([*before, *after])


def give_methods(model: nn.Module, made: nn.Module) -> None:
    """Register again the methods for which parameters are gathered beside `forward`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for module, path in walk(model).items():
        for name in [name for name, value in vars(module).items() if is_wrapped(value)]:
            register_fsdp_forward_method(made.get_submodule(path), name)


def hooks_of(module: nn.Module) -> dict[str, dict[int, Callable[..., Any]]]:
    """The hooks of a module by the attribute that holds them."""
    return {name: value for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)}


def home(hook: Any) -> str:
    """The Python module in which a hook is defined."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(getattr(hook, "hook", hook), "__module__", None) or ""


def is_parallel(hook: Any) -> bool:
    """Whether a hook is tensor parallelism's, or another one of `torch.distributed` that is not FSDP's."""
    return home(hook).startswith(DISTRIBUTED) and not home(hook).startswith(FSDP)


def is_wrapped(value: Any) -> bool:
    """Whether an attribute is a method that `register_fsdp_forward_method` made."""
    return isinstance(value, types.MethodType) and home(value).startswith(FSDP)
