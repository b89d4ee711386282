"""Tensors and labels of a pruned model in terms of the original, and back.

A slice says where in the original every element of a pruned tensor stands. So whatever is shaped like a pruned tensor (its
value, an optimizer's state, a moving average) can be put back into the original's shape, and cut again by another plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fxprune.module_state import take_modes
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.labels import Factor, Labels, compress, varying
from fxprune.passes.ir.module_tree import check_module, copy_tree, fetch, named_tensors
from fxprune.passes.ir.slices import TensorSlice, apply_slices
from fxprune.plan import PlanData


def undo_slices(cuts: Sequence[TensorSlice], tensor: Tensor, into: Tensor) -> Tensor:
    """A copy of a tensor of the original shape, in which what the cuts leave has the values of the cut one.

    >>> slices = [TensorSlice((0,), torch.tensor([0, 2]), (2,))]
    >>> undo_slices(slices, torch.tensor([7, 8]), torch.zeros(4, dtype=torch.int64)).tolist()
    [7, 0, 8, 0]
    """
    if not cuts:
        return tensor.detach().clone()
    where = apply_slices(cuts, torch.arange(math.prod(into.shape), device=tensor.device).reshape(into.shape))
    made = into.detach().clone(memory_format=torch.contiguous_format)
    made.view(-1)[where.reshape(-1)] = tensor.detach().reshape(-1).to(made.dtype)
    return made


def narrow_labels(labels: Labels, cuts: Sequence[TensorSlice], shape: Sequence[int]) -> Labels:
    """The labels of what cuts leave of a tensor; the labels themselves stay those of the original."""
    made = []
    for f in labels:
        mine = [c for c in cuts if f.dims & set(c.dims)]
        along = {d for c in mine for d in c.dims}
        array = apply_slices(mine, f.labels.expand([n if d in along else f.labels.shape[d] for d, n in enumerate(shape)]))
        nest = f.major_to_minor + tuple(d for d in varying(array) if d not in f.major_to_minor)
        made.append(Factor(compress(array, nest), nest))
    return tuple(made)


def tensors_of(model: nn.Module, plan: PlanData, needed: Collection[str] = ()) -> dict[str, Tensor]:
    """A model's tensors by the names they have in the original.

    Arguments:
        model: the original architecture as a plan leaves it.
        plan: what was cut; with no cuts, `model` is the original architecture itself.
        needed: names that the model must have; what its program does not use may be missing or out of date.

    Raises: PruneError where a tensor is missing or has another shape.
    """
    check_module(model)
    fix = "the module that step() returned, trained or not; of a wrapper around it, what is inside (wrapper.module)"
    found: dict[str, Tensor] = {}
    for name in plan.shapes:
        try:
            tensor = fetch(model, name)
        except AttributeError:
            if name in needed:
                raise PruneError(f"this is another model: it has no {name}", where=type(model).__name__, fix=fix) from None
            continue
        if tuple(tensor.shape) != plan.kept_shape(name):
            if name not in needed:  # left over from a hook that computes it anew
                continue
            what = f"this is another model: {name} has shape {tuple(tensor.shape)}, not {plan.kept_shape(name)}"
            raise PruneError(what, where=type(model).__name__, fix=fix)
        found[name] = tensor
    return found


def widened(original: nn.Module, model: nn.Module, tensors: Mapping[str, Tensor], plan: PlanData) -> nn.Module:
    """A copy of the original with the values, the modes and the `requires_grad` of a model that was cut from it.

    What was removed is zero; buffers of integers keep what the original has there.
    """
    swap: dict[int, Tensor] = {}
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    with torch.no_grad():
        for name, old in named_tensors(original):
            now = tensors.get(name, old).to(device)
            into = torch.zeros_like(old, device=device) if old.is_floating_point() else old.to(device)
            new = undo_slices(plan.slices.get(name, ()) if name in tensors else (), now, into)
            parameter = isinstance(old, nn.Parameter)
            learns = tensors.get(name, old).requires_grad
            swap[id(old)] = nn.Parameter(new, learns) if parameter else new
    copy: nn.Module = copy_tree(original, swap)
    take_modes(copy, model)
    return copy
