"""Masks: removed elements that are zero in the original instead of gone, and the way from there to a pruned model.

A model with masks keeps its architecture, so that training code needs not know of pruning, and computes what the pruned model
will. Where zeros alone do that, its forward is its own. Where something counts channels that are zero (layer normalisation),
it is that of the pruned model (see `masked_forward.py`): its modules are not called then, so that hooks on them do not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.arguments import broadcasts, checked_call, did_you_mean, shown
from fxprune.criteria.base import CriterionOptions, describe
from fxprune.criteria.parameter_roles import roles
from fxprune.criteria.scorer import Scorer
from fxprune.entry_points import check_values, entry_point, inside_wrappers, without_wrappers
from fxprune.inputs import ExampleInputs, random_inputs
from fxprune.iterative.masked_forward import MaskedForward, zeros_suffice
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import every_tensor, named_parameters, named_tensors
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.verification.zeroed_model import zeroed_copy
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData
from fxprune.selection.options import Attention, Experts, Freeze, Options, Verify
from fxprune.selection.rectangles import find_nonempty_sets, restore_rectangles

if TYPE_CHECKING:
    from fxprune.pipeline import Pruned


def check_plan(plan: Any) -> PlanData:
    """The plan; raises PruneError for anything else."""
    if isinstance(plan, PlanData):
        return plan
    raise PruneError(f"plan must be a fxprune.Plan, not {shown(plan)}", fix="fxprune.plan_of(pruned), or pruner.plan")


@checked_call()
def masked(model: nn.Module, plan: PlanData) -> nn.Module:
    """A copy of a model, of its own class, in which everything that a plan removes is zero.

    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> x = torch.randn(3, 4)
    >>> small = fxprune.prune(net, 0.5, example_inputs=x)
    >>> torch.allclose(masked(net, small.plan)(x), small(x), atol=1e-6)
    True

    Arguments:
        model: of the architecture that the plan was made for; it is not touched.
        plan: what `prune` or a `Pruner` decided.

    Raises: PruneError if the plan is for another model.
    """
    with entry_point(model) as model:
        made = zeroed(model, check_plan(plan).masks(model))
        if (forward := forward_needed(made, plan)) is not None:
            vars(made)["forward"] = forward
        return made


def forward_needed(model: nn.Module, plan: PlanData, inputs: ExampleInputs | None = None) -> MaskedForward | None:
    """What computes what the pruned model will; None where a model does by itself once what the plan removes is zero.

    Arguments:
        inputs: example inputs, if there are any besides the plan's description.
    """
    try:
        suffices = zeros_suffice(without_wrappers(model), plan, inputs or random_inputs(plan.inputs, model))
    except PruneError:  # the description is not enough
        suffices = False
    return None if suffices else MaskedForward(model, plan, grows=False)


@checked_call()
def zeroed(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with zeros where a mask, if there is one for a tensor, says so; masks broadcast.

    Raises: PruneError for a name that is no tensor of the model, or a mask that is no boolean tensor of its shape.
    """
    with entry_point(model):
        check_values(model := inside_wrappers(model))
        copy: nn.Module = zeroed_copy(model, masks_by_tensor(model, masks))[0]
        return copy


def masks_by_tensor(model: nn.Module, masks: Any) -> dict[str, list[Tensor]]:
    """The masks of each tensor of a model, by the name that it goes by."""
    named = dict(named_tensors(model))
    names = {id(tensor): name for name, tensor in named.items()}
    first = {name: names[id(tensor)] for name, tensor in every_tensor(model)}  # of a tied tensor the name that it goes by
    if not isinstance(masks, Mapping):
        raise PruneError(f"masks must be a mapping, not {shown(masks)}", fix="masks=plan.masks(model)")
    given: dict[str, list[Tensor]] = {}
    for name, mask in masks.items():
        own = first.get(name, name)
        if own not in named:
            near = did_you_mean(name, named)
            raise PruneError(f"masks names {shown(name)}, which is no tensor of the model", fix=f"{near}plan.masks(model)")
        whole = named[own].shape
        fits = isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.layout is torch.strided and not mask.is_meta
        if not fits or not broadcasts(mask.shape, whole):
            kind = f", {mask.dtype} and {mask.layout} on {mask.device}" if isinstance(mask, Tensor) and not fits else ""
            what = f"the mask is {shown(mask)}{kind}, and the tensor has shape {tuple(whole)}"
            raise PruneError(what, where=name, fix="a boolean tensor of its shape, True where it is kept")
        given.setdefault(own, []).append(mask)
    return given


def muted(model: nn.Module, plan: PlanData, solution: Solution, kept: Tensor) -> nn.Module:
    """A copy of a model that computes what the pruned one does, and trains what is removed beside it.

    Nothing reads what is removed: the weights that would are zero. What writes it is left, so that the zeros have gradients,
    and units can come back: where all of a unit is zero, none of it ever learns again. Units that no weight reads are zero
    altogether. What grows counts when units are chosen anew, and not before.

    Arguments:
        model: of the architecture that was coupled.
        plan: what is removed.
        solution: its coupling.
        kept: for each label whether it stays, shape (labels,).
    """
    reads = roles(solution.captures).reads
    read = torch.zeros(len(kept), dtype=torch.bool)
    for name, labels in solution.leaves.items():
        for f in labels:
            if (name, f.major_to_minor[-1]) in reads:
                read[solution.unit_of[f.labels]] = True
    others = kept | read[solution.unit_of]
    masks: dict[str, Tensor] = {}
    for name in dict(named_tensors(model)).keys() & solution.leaves.keys():  # others are constants of its forward
        labels = solution.leaves[name]
        masks[name] = torch.ones((), dtype=torch.bool)
        for f in labels:
            masks[name] = masks[name] & (kept if (name, f.major_to_minor[-1]) in reads else others)[f.labels]
    made = zeroed(model, masks)
    vars(made)["forward"] = MaskedForward(made, plan, grows=True)
    return made


def mask_again(model: nn.Module, plan: PlanData, inputs: ExampleInputs, *, grows: bool) -> None:
    """Give a model with the values of one that was masked the masks again; `grows` as for `muted`, else as `hold` has them."""
    if grows:
        vars(model)["forward"] = MaskedForward(model, plan, grows=True)
    else:
        hold_at_zero(model, plan, plan.masks(model), inputs.beside(model))


@dataclass(frozen=True, slots=True)
class Hold:
    """What keeps masked elements at zero; `remove()` lets them go, and gives the model the forward that it had."""

    handles: tuple[Any, ...]
    forward: MaskedForward | None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.forward is not None:
            self.forward.end()


@checked_call()
def hold(model: nn.Module, plan: PlanData) -> Hold:
    """Zero, in a model itself, what a plan removes, and keep it there while the model is trained.

    The gradients of the removed elements become zero (also gradients that are no numbers). An optimizer whose state is zero
    there leaves them at zero then: any new one, with or without weight decay, or one that `Pruner.remap_optimizer` was given.
    A copy of the model is not held.

    Arguments:
        model: of the architecture that the plan was made for. Parameters without `requires_grad` are zeroed, not held.
        plan: what goes.

    Returns: a handle whose `remove()` ends it, in any order. What is zero in all layers has no gradients even so: it stays
    where it is.

    Raises: PruneError if the plan is for another model, or the model cannot be written to; nothing has changed then.
    """
    with entry_point(model):
        check_values(model := inside_wrappers(model))
        masks = check_plan(plan).masks(model)
        fixed = next((name for name, t in named_tensors(model) if t.is_inference() and name in masks), None)
        if fixed is not None:
            what = f"{fixed} was made in inference mode, and cannot be written to outside of it"
            raise PruneError(what, where=type(model).__name__, fix="make the model outside of torch.inference_mode()")
        return hold_at_zero(model, plan, masks)


def hold_at_zero(model: nn.Module, plan: PlanData, masks: Mapping[str, Tensor], inputs: ExampleInputs | None = None) -> Hold:
    """The same for a model and masks that are known to fit, perhaps with example inputs besides the plan's description."""
    forward, handles = forward_needed(model, plan, inputs), []
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            if name not in masks or bool(masks[name].all()) or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            gone = ~masks[name].to(tensor.device)
            tensor.masked_fill_(gone, 0)
            if tensor.requires_grad and tensor.is_leaf:
                handles.append(tensor.register_hook(lambda g, gone=gone: g.masked_fill(gone.to(g.device), 0)))
    if forward is not None:
        vars(model)["forward"] = forward
    return Hold(tuple(handles), forward)


class Nonzero(CriterionOptions):
    """One for each element that is not zero."""

    def __call__(self, weight: Tensor) -> Tensor:
        return (weight != 0).to(weight.dtype)


@checked_call()
def prune_zeros(
    model: nn.Module,
    example_inputs: Any,
    *,
    freeze: Freeze = (),
    release: str | Sequence[str] = (),
    attention: Attention = "heads",
    experts: Experts = False,
    verify: Verify = "auto",
) -> Pruned:
    """The pruned model of one with masks: units go whose every parameter element is zero.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> with torch.no_grad():
    ...     for part in (net[0].weight[2:4], net[0].bias[2:4], net[2].weight[:, 2:4]):
    ...         _ = part.zero_()
    >>> prune_zeros(net, torch.randn(1, 4)).get_submodule("0").out_features
    4

    A unit that is zero in some of its layers only is not removed: with a bias, or read by another layer, it still counts. So
    are units that rows of equal length need. Outputs stay as they are, unless the model takes statistics over channels.

    Arguments: as for `prune`. Raises: PruneError where no unit is zero.
    """
    with entry_point(model) as model:
        options = Options.parse(model, freeze=freeze, release=release, attention=attention, experts=experts, verify=verify)
        compilation = Compilation(model, ExampleInputs.parse(example_inputs, model).check(model), options.coupling)
        choice = compilation.choose_by(lambda solution: zero_units(model, solution))
        pruned: Any = compilation.emit(choice)
        if options.verifies(model):
            pruned = compilation.verify(pruned, choice)
        return pruned


def zero_units(model: nn.Module, solution: Solution) -> tuple[Tensor, Slicer]:
    """What is left where the units go whose every parameter element is zero; raises PruneError where none is."""
    parameters = named_parameters(model)
    free = [f for f in families(solution, set(parameters)) if f.kept_whole is None]
    none = PruneError(
        "no unit of the model is zero in all the layers it spans",
        where=type(model).__name__,
        fix="fxprune.masks.masked(model, plan) zeroes all that belongs to a unit",
    )
    if not free:
        raise none
    scorer = Scorer(parameters, solution.leaves, solution.unit_of.numpy(), describe(Nonzero()), free)
    count = scorer()
    zero = np.zeros(len(count), bool)
    for family in free:
        zero[family.units] = (count[family.units] == 0) & scorer.seen[family.units]
    kept, slicer = restore_rectangles(solution, zero, count, find_nonempty_sets(solution))
    if slicer.keeps_all:
        raise none
    return kept, slicer
