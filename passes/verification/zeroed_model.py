"""The second reference: the original with its removed parameter and buffer elements zeroed, run as it is.

It knows nothing of labels: only the slices of the model's own tensors, as a plan has them. It is exact wherever zero stays
zero on the way, which `zero_flow` decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.capture.patches import visible
from fxprune.passes.ir.module_tree import copy_tree, named_tensors
from fxprune.passes.ir.slices import TensorSlice

Slices = Mapping[str, Sequence[TensorSlice]]


def removed_elements(shape: Sequence[int], slices: Sequence[TensorSlice]) -> Tensor:
    """A boolean tensor, True where slices of a tensor of this shape remove an element.

    >>> removed_elements((2, 3), [TensorSlice((1,), torch.tensor([0, 2]), (2,))]).int().tolist()
    [[0, 1, 0], [0, 1, 0]]
    """
    removed = torch.zeros(tuple(shape), dtype=torch.bool)
    for cut in slices:
        rest = [d for d in range(len(shape)) if d not in cut.dims]
        gone = torch.ones([shape[d] for d in cut.dims], dtype=torch.bool)
        gone.view(-1)[cut.keep] = False
        gone = gone.reshape(*gone.shape, *(1 for _ in rest))
        order = [*cut.dims, *rest]
        removed |= gone.permute([order.index(d) for d in range(len(shape))])
    return removed


class ZeroedOriginal:
    """A copy of a model, in evaluation mode, in which the elements that slices remove are zero.

    Integer and boolean buffers hold indices and choices rather than the values of channels: they stay.

    Attributes:
        model: the copy.
        removed: where its tensors are zeroed, by the identity of the tensor.
    """

    def __init__(self, model: nn.Module, slices: Slices) -> None:
        swap: dict[int, Tensor] = {}
        self.removed: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in named_tensors(model):
                made = tensor.detach().clone()
                cuts = slices.get(name, ())
                if cuts and (made.is_floating_point() or made.is_complex()):
                    gone = removed_elements(tensor.shape, cuts).to(made.device)
                    made.masked_fill_(gone, 0)
                else:
                    gone = None
                swap[id(tensor)] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made
                if gone is not None:
                    self.removed[id(swap[id(tensor)])] = swap[id(tensor)], gone
            self.model: Any = copy_tree(model, swap).eval()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad(), visible():
            return self.model(*args, **kwargs)
