"""Parameters whose elements are all equal, as those of a new model often are, shifted for a comparison.

Behind a last layer or a scale that starts at zero nothing can be seen of what comes before it, and the elements of a bias or a
norm that has learned nothing yet stand in for one another, wrong ones as well as right ones. So for as long as a pruned model
and its reference are compared, the same random numbers are added to such parameters of both.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.slices import TensorSlice, apply_slices, cut_shape

SMALL = 0.1  # a scale below it (1e-6 in ConvNeXt) hides a branch as well as zero does

Shifts = Mapping[str, Tensor]


def shifts_of(model: nn.Module, pruned: nn.Module, slices: Mapping[str, Sequence[TensorSlice]]) -> dict[str, Tensor]:
    """What to add to parameters of a model, by name: those whose elements are all equal, and that the pruned model has."""
    generator, theirs, found = torch.Generator().manual_seed(0), named_parameters(pruned), dict[str, Tensor]()
    for name, parameter in named_parameters(model).items():
        mine, own = parameter.detach(), theirs.get(name)
        if own is None or not can_be_shifted(mine) or own.shape != cut_shape(mine.shape, slices.get(name, ())):
            continue
        if own.data_ptr() == mine.data_ptr() or own.dtype != mine.dtype:
            continue
        size = abs(float(mine.view(-1)[0]))
        bound = size / 2 if size > SMALL else 1 / math.sqrt(mine.numel() / mine.shape[0] if mine.dim() > 1 else 4)
        drawn = torch.rand(mine.shape, generator=generator).mul_(2 * bound).sub_(bound)
        found[name] = drawn.to(mine.device, mine.dtype)
    return found


def can_be_shifted(tensor: Tensor) -> bool:
    """Whether a parameter holds several real numbers that are all equal, in memory of its own."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta or not tensor.is_floating_point():
        return False
    if tensor.numel() < 2 or not tensor.is_contiguous() or tensor.untyped_storage().nbytes() > tensor.nbytes:
        return False
    flat = tensor.view(-1)
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())


@contextlib.contextmanager
def shifted(pruned: nn.Module, shifts: Shifts, slices: Mapping[str, Sequence[TensorSlice]]) -> Iterator[None]:
    """The pruned model with the kept part of each shift added to its parameters; they are as before afterwards."""
    parameters = named_parameters(pruned)
    before = {name: parameters[name].data for name in shifts}
    try:
        for name, value in before.items():
            parameters[name].data = value + apply_slices(slices.get(name, ()), shifts[name])
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value
