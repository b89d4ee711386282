"""Steps of a model whose parameters are spread over processes: chosen in form, cut where the shards are.

A state of a pruner holds the shards of one process, and is loaded in the process of the same number of as many.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import Tensor, nn

from fxprune.distributed.ranks import Ranks, is_dtensor, ranks_of, taken_off
from fxprune.distributed.sharded import Sharded, as_shard, check_options, local, reshard
from fxprune.distributed.units import UNSHARDED
from fxprune.entry_points import unwrapped
from fxprune.iterative.optimizer_state import moved
from fxprune.iterative.pruner_state import PresentModel
from fxprune.iterative.regularizers import with_gradients
from fxprune.module_state import ModuleState, take_modes
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData
from fxprune.selection.options import Options

FIX = UNSHARDED + " or parallelize_module()"


def check_steps(sharded: Sharded | None, options: Options, mask: str | None) -> None:
    """Raise PruneError for what cannot be asked of the steps of a model that is sharded."""
    if sharded is None:
        return
    if mask is not None:
        what = f"mask={mask!r} takes the model in one process, and it is sharded"
        why = "with masks it computes on what is kept of all its parameters at once, and modules that gather theirs do not run"
        raise PruneError(f"{what}: {why}", fix=f"mask=None, whose steps cut the shards, or {FIX}")
    check_options(options)


@contextlib.contextmanager
def learning(
    model: nn.Module, sharded: bool, before: Ranks | None, tensors_of: Callable[[nn.Module], dict[str, Tensor]]
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of a model that have gradients; if it is sharded, its processes work on together.

    Arguments:
        model: it may be wrapped.
        before: the processes of the model that it was made of.
        tensors_of: its tensors by name; raises PruneError for another model.
    """
    with ranks_of(model, before) if sharded else contextlib.nullcontext() as ranks:
        inner = taken_off(model) if sharded else unwrapped(model)
        reshard(inner)
        learned = with_gradients(inner, tensors_of(inner))
        if ranks is not None:
            ranks.exchange("penalty", None)  # where others learn of one that has failed
        yield learned


def process_of(ranks: Ranks | None, sharded: bool) -> dict[str, str]:
    """Which process this is of those that hold a sharded model, in words."""
    if ranks is None or not sharded:
        return {}
    return {"process": f"{dist.get_rank(ranks.group)} of {dist.get_world_size(ranks.group)}"}


def restorer(sharded: Sharded | None, whole: PlanData) -> Callable[[PresentModel, Compilation, PlanData], nn.Module]:
    """What makes the present model of a pruner of what its state says; arguments as for `restore_shards`."""
    return PresentModel.restore if sharded is None else functools.partial(restore_shards, sharded, whole)


def restore_shards(
    sharded: Sharded, whole: PlanData, present: PresentModel, compilation: Compilation, plan: PlanData
) -> nn.Module:
    """The sharded model of a state, made of the original; raises PruneError where the pruner has taken steps already.

    Arguments:
        sharded: the original.
        whole: the plan that leaves all of it.
        present: what is known of the model, with the shards of this process.
        compilation: of the original's form.
        plan: what is left of it.
    """
    if any(tuple(t.shape) != whole.kept_shape(n) for n, t in sharded.tensors.items() if n in whole.shapes):
        what = "a state of a sharded model is loaded into a Pruner that has taken no step: the original's shards are cut"
        raise PruneError(what, fix="a new Pruner of the original")
    made = shrink_shards(sharded, compilation, plan, whole)
    held, tensors = dict(named_tensors(made)), dict(present.tensors)
    for name in tensors.keys() & held.keys():
        if is_dtensor(held[name]) and is_dtensor(tensors[name]) and tensors[name].shape == held[name].shape:
            tensors[name] = as_shard(local(tensors[name]), held[name])
    ModuleState.from_dict(present.state).fill(made, tensors)
    return made


def shrink_shards(sharded: Sharded, compilation: Compilation, plan: PlanData, before: PlanData) -> nn.Module:
    """What a plan leaves of a sharded model, in shards.

    Arguments:
        sharded: the present model.
        compilation: of the original's form.
        plan: of the original.
        before: what leaves the present model of the original.
    """

    def left_of(name: str, tensor: Tensor) -> Tensor:
        left = moved(tensor, name, before, plan)
        return nn.Parameter(left, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left

    compilation.follow()
    pruned = compilation.emit(compilation.choice_of(plan), cut=sharded.stand_ins.cut)
    made = sharded.cut(compilation.restore_class(pruned), plan, left_of=left_of)
    take_modes(made, sharded.model)
    return made
