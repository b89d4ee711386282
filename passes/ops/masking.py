"""Masked forms: what an op computes of kept elements, where that is not what it computes with zeros for the others.

They are the definition of exact: removed elements add nothing to a contraction, and statistics over channels (mean, softmax,
layer norm, ...) see kept elements only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fxprune.passes.ir.labels import Labels, fill_removed
from fxprune.passes.ir.op_trace import written_by
from fxprune.passes.ir.pytree import TensorRef, map_tensors
from fxprune.passes.ops.call import OpView


class MaskContext(Protocol):
    """What a masked form may ask of the run that it is part of.

    Attributes:
        labels: of every value so far, by number.
    """

    labels: dict[int, Labels]

    @property
    def kept(self) -> Tensor:
        """Which labels are kept, shape (labels,)."""

    def ref(self, tensor: Tensor) -> TensorRef:
        """The number of a value."""

    def is_zeroed(self, ref: TensorRef) -> bool:
        """Whether removed elements of a value are known to be zero."""

    def mask(self, ref: TensorRef) -> Tensor | None:
        """A boolean tensor broadcastable to the value, True where kept; None where all of it is."""


def with_value(run: MaskContext, args: Any, kwargs: Any, value: float) -> tuple[Any, Any]:
    """The arguments with removed elements of every tensor set to one value, or to the nearest that it can hold."""

    def fill(tensor: Tensor) -> Tensor:
        ref = run.ref(tensor)
        fractions = tensor.is_floating_point() or tensor.is_complex()
        if fractions and value == 0.0 and run.is_zeroed(ref):
            return tensor
        held = value if fractions else nearest(value, tensor.dtype)
        return fill_removed(tensor, run.labels.get(ref.id, ()), run.kept, held)

    return map_tensors(args, fill), map_tensors(kwargs, fill)


def nearest(value: float, dtype: torch.dtype) -> float:
    """The integer or truth value nearest to a number."""
    if dtype == torch.bool:
        return value > 0
    limits = torch.iinfo(dtype)
    return 0 if math.isnan(value) else limits.min if value < limits.min else limits.max if value > limits.max else int(value)


def filled_with(value: float) -> Callable[[MaskContext, OpView, Any, Any], Any]:
    """The masked form of an op for which an element of this value is as good as none."""

    def form(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
        args, kwargs = with_value(run, args, kwargs, value)
        return call.op.func(*args, **kwargs)

    return form


with_zeros = filled_with(0.0)


def products_with_zeros(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """The masked form of a sum of products: if all operands but one are zero already, so are the products, unless not finite.

    Operands that are contracted lose the same elements, or the pruned op would not run.
    """
    refs = [ref for ref in call.op.inputs if run.mask(ref) is not None]
    zeroed = [ref for ref in refs if run.is_zeroed(ref)]
    if zeroed and len(refs) - len(zeroed) <= 1 and not written_by(call.op.func):
        out = call.op.func(*args, **kwargs)
        if bool(out.sum().isfinite()):
            return out
    return with_zeros(run, call, args, kwargs)


def kept_mean(x: Tensor, mask: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean over kept elements, and their number."""
    count = mask.expand(x.shape).sum(list(dims), keepdim=True)
    total = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(list(dims), keepdim=True)
    return total / count.clamp(min=1), count


def kept_variance(x: Tensor, mask: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor]:
    """The variance and mean over kept elements."""
    mean, count = kept_mean(x, mask, dims)
    squares = torch.where(mask, (x - mean).square(), torch.zeros((), dtype=x.dtype, device=x.device))
    return squares.sum(list(dims), keepdim=True) / (count.to(x.real.dtype) - correction).clamp(min=0), mean


def squeezed(out: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return out if keepdim else out.squeeze(tuple(dims))


def kept_elements(run: MaskContext, x: Tensor) -> Tensor:
    """Which elements of a tensor are kept, broadcastable to it and on its device."""
    mask = run.mask(run.ref(x))
    return (torch.ones((1,) * x.dim(), dtype=torch.bool) if mask is None else mask).to(x.device)


def as_returned(call: OpView, *values: Tensor) -> Any:
    """Results in the number that the op has: further ones are empty, as nothing reads them."""
    wanted = len(call.op.func._schema.returns)
    made = (*values, *(values[0].new_empty(0) for _ in range(wanted - len(values))))
    return made[0] if wanted == 1 else made[:wanted]
