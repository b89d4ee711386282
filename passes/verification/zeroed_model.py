"""The second reference: the original with its removed parameter and buffer elements zeroed.

It knows nothing of labels: only the slices of the model's own tensors, as a plan has them. It is exact wherever zero stays zero
on the way; `zero_flow.py` finds out where it does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.capture.patches import visible
from fxprune.passes.ir.index_contents import storage_of
from fxprune.passes.ir.labels import fill_outside
from fxprune.passes.ir.module_tree import copy_tree, named_parameters, named_tensors, set_mode
from fxprune.passes.ir.slices import TensorSlice
from fxprune.passes.verification.shared_weights import SharedWeights, Weight
from fxprune.passes.verification.zeros_needed import Needed

LARGE = 1 << 22  # elements of all weights together from which on to copy them costs more than a look at who reads them
Slices = Mapping[str, Sequence[TensorSlice]]


def zeroed_copy(
    model: nn.Module,
    masks: Mapping[str, Sequence[Tensor]],
    shifts: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    shared: bool = False,
) -> tuple[Any, dict[str, Tensor]]:
    """A copy of a model with zeros where a mask of a floating tensor is False; and its tensors, by name.

    Masks can be broadcast to their tensor. What is in `shifts` is added to tensors before. With `shared`, parameters that stay
    what they are lie where those of the model do: for a forward that writes to none.
    """
    swap: dict[int, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model):
        own = tensor.detach() + shifts[name] if name in shifts else tensor.detach()
        fractions = own.is_floating_point() or own.is_complex()
        new = fill_outside(own, masks.get(name, ()) if fractions else (), 0.0)
        if new is own and name not in shifts and not (shared and isinstance(tensor, nn.Parameter)):
            new = own.clone()
        made[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        swap[id(tensor)] = made[name]
    return copy_tree(model, swap), made


class Masks:
    """The masks of slices; tensors that share a slice share its mask."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Tensor] = {}

    def __call__(self, cut: TensorSlice, shape: Sequence[int]) -> Tensor:
        if len(cut.dims) > 1:
            return cut.mask(shape)
        key = id(cut), len(shape)
        if key not in self.found:
            self.found[key] = cut.mask(shape)
        return self.found[key]


class ZeroedOriginal:
    """A copy of a model, in evaluation mode, in which the elements that slices remove are zero.

    Integer and boolean buffers hold indices and choices rather than the values of channels: they stay.

    Arguments:
        shifts: what is added to tensors of the model before, by name.
        needed: for weights by name, the dimensions along which zeros are needed; other removed entries of weights that are
            copied stay. None where the model's forward may write to its parameters: with it, those that stay what they are are
            not copied, nor are those that get their zeros where they are read.
    """

    def __init__(
        self,
        model: nn.Module,
        slices: Slices,
        shifts: Mapping[str, Tensor] = MappingProxyType({}),
        needed: Needed | None = None,
    ) -> None:
        late = {} if needed is None else self.without_zeros(model, slices, shifts, needed)
        self.slices = slices
        if needed:
            self.slices = {
                name: [cut for cut in cuts if name in late or not set(cut.dims).isdisjoint(needed.get(name, cut.dims))]
                for name, cuts in slices.items()
            }
        masks, early = Masks(), [(name, t.shape) for name, t in named_tensors(model) if name not in late]
        kept = {name: [masks(cut, shape) for cut in self.slices.get(name, ())] for name, shape in early}
        self.model, self.tensors = zeroed_copy(model, kept, shifts, shared=needed is not None)
        strided = [t for t in named_parameters(model).values() if t.layout is torch.strided] if needed is not None else []
        weights = {storage_of(w.tensor): w for w in late.values()}
        self.sharing = SharedWeights(frozenset(map(storage_of, strided)), weights) if strided else nullcontext()
        set_mode(self.model, False)

    def without_zeros(
        self, model: nn.Module, slices: Slices, shifts: Mapping[str, Tensor], needed: Needed
    ) -> dict[str, Weight]:
        """Weights, by name, whose zeros are left to what reads them; none where all such weights together are small."""
        alone = Counter(storage_of(t) for _, t in named_tensors(model) if t.layout is torch.strided)
        late = {
            name: Weight(t.detach(), {c.dims[0]: (~c.kept(t.shape)).nonzero().flatten().to(t.device) for c in cuts})
            for name, t in named_tensors(model)
            if type(t) is nn.Parameter and t.layout is torch.strided and alone[storage_of(t)] == 1 and t.dim() > 1
            if t.is_floating_point() and t.is_contiguous() and name not in shifts
            if (cuts := slices.get(name, ())) and all(c.dims in ((0,), (1,)) for c in cuts) and needed.get(name, True)
        }
        return late if sum(w.tensor.numel() for w in late.values()) >= LARGE else {}

    def cut(self) -> list[tuple[Tensor, Sequence[TensorSlice]]]:
        """Its tensors that are zeroed in part, each with the slices that stay."""
        numbers = [(name, t) for name, t in self.tensors.items() if t.is_floating_point() or t.is_complex()]
        return [(t, self.slices[name]) for name, t in numbers if self.slices.get(name) and t.layout is torch.strided]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], within: AbstractContextManager[Any] | None = None) -> Any:
        """What it returns, run in a context that sees each operator before weights get their zeros."""
        with torch.no_grad(), visible(), self.sharing, within or nullcontext():
            return self.model(*args, **kwargs)
