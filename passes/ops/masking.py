"""What ops compute of kept elements only, where that is not what they compute anyway.

`MASKED` is the definition of exact: removed elements add nothing to a contraction, and statistics over channels (mean, softmax,
layer norm, ...) see kept elements only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxprune.passes.ir.labels import fill_removed
from fxprune.passes.ir.pytree import map_tensors
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import masked

if TYPE_CHECKING:
    from fxprune.passes.verification.masked_model import MaskedRun


def with_value(masker: MaskedRun, args: Any, kwargs: Any, value: float) -> tuple[Any, Any]:
    """The arguments with removed elements of every floating tensor set to one value."""

    def fill(tensor: Tensor) -> Tensor:
        ref = masker.ref(tensor)
        fractions = tensor.is_floating_point() or tensor.is_complex()
        if not fractions or (value == 0.0 and masker.is_zeroed(ref)):
            return tensor
        return fill_removed(tensor, masker.labels.get(ref.id, ()), masker.kept, value)

    return map_tensors(args, fill), map_tensors(kwargs, fill)


@masked(
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "dot",
    "linear",
    "matmul",
    "convolution",
    "_convolution",
    "_trilinear",
)
@masked("sum", "norm", "linalg_vector_norm", "cumsum", "nansum", "addmv", "count_nonzero", "renorm")
@masked("_cdist_forward", "any", "col2im")
def with_zeros(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    """A removed element adds nothing."""
    args, kwargs = with_value(masker, args, kwargs, 0.0)
    return call.op.func(*args, **kwargs)


def kept_mean(x: Tensor, mask: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean over kept elements, and their number."""
    count = mask.expand(x.shape).sum(list(dims), keepdim=True)
    total = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(list(dims), keepdim=True)
    return total / count.clamp(min=1), count


def kept_variance(x: Tensor, mask: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor]:
    """The variance and mean over kept elements."""
    mean, count = kept_mean(x, mask, dims)
    squares = torch.where(mask, (x - mean).square(), torch.zeros((), dtype=x.dtype, device=x.device))
    return squares.sum(list(dims), keepdim=True) / (count - correction).clamp(min=0), mean


def squeezed(out: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return out if keepdim else out.squeeze(tuple(dims))


def subject(masker: MaskedRun, x: Tensor) -> Tensor:
    mask = masker.mask(masker.ref(x))
    return (torch.ones((1,) * x.dim(), dtype=torch.bool) if mask is None else mask).to(x.device)
