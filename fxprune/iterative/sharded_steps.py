"""Steps of a model whose parameters are spread over processes: chosen in form, cut where the shards are."""

from __future__ import annotations

from torch import Tensor, nn

from fxprune.distributed.sharded import Sharded, check_options
from fxprune.distributed.units import UNSHARDED
from fxprune.iterative.optimizer_state import moved
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import walk
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData
from fxprune.selection.options import Options

FIX = UNSHARDED + " or parallelize_module()"


def check_steps(sharded: Sharded | None, options: Options, mask: str | None) -> None:
    """Raise PruneError for what cannot be asked of the steps of a model that is sharded."""
    if sharded is None:
        return
    if mask is not None:
        raise PruneError(f"mask={mask!r} takes the model in one process, and it is sharded", fix=f"mask=None, or {FIX}")
    check_options(options)


def refuse_sharded(sharded: bool, what: str) -> None:
    if sharded:
        raise PruneError(f"{what} takes the model in one process, and it is sharded", fix=FIX)


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
    modes = {path: module.training for module, path in walk(sharded.model).items()}
    for module, path in walk(made).items():
        module.training = modes.get(path, sharded.model.training)
    return made
