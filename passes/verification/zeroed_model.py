"""The second reference: the original with its removed parameter and buffer elements zeroed.

It knows nothing of labels: only the slices of the model's own tensors, as a plan has them. It is exact wherever zero stays zero
on the way; `zero_flow.py` finds out where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.passes.capture.patches import visible
from fxprune.passes.capture.recorder import by_ops
from fxprune.passes.ir.index_contents import storage_of
from fxprune.passes.ir.labels import fill_outside
from fxprune.passes.ir.module_tree import copy_tree, named_parameters, named_tensors, set_mode
from fxprune.passes.ir.op_trace import arguments_written
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.slices import TensorSlice
from fxprune.passes.verification.zeros_needed import Needed

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


class Unwritten(TorchDispatchMode):
    """Raises where an operator is about to write to memory of the model's own, as it may do for other inputs than the example.

    Arguments:
        places: the memory that is not to be written to.
    """

    supports_higher_order_operators = True

    def __init__(self, places: AbstractSet[int]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return by_ops(self, func, args, kwargs)
        written = collect(arguments_written(func, args, kwargs), Tensor)
        if any(t.layout is torch.strided and storage_of(t) in self.places for t in written):
            raise RuntimeError(f"{func} writes to a parameter")
        return func(*args, **kwargs)


class ZeroedOriginal:
    """A copy of a model, in evaluation mode, in which the elements that slices remove are zero.

    Integer and boolean buffers hold indices and choices rather than the values of channels: they stay.

    Arguments:
        shifts: what is added to tensors of the model before, by name.
        needed: for weights by name, the dimensions along which zeros are needed; their other removed entries stay. None where
            the model's forward may write to its parameters: with it, those that stay what they are are not copied.
    """

    def __init__(
        self,
        model: nn.Module,
        slices: Slices,
        shifts: Mapping[str, Tensor] = MappingProxyType({}),
        needed: Needed | None = None,
    ) -> None:
        self.slices = slices
        if needed:
            self.slices = {
                name: [cut for cut in cuts if not set(cut.dims).isdisjoint(needed.get(name, cut.dims))]
                for name, cuts in slices.items()
            }
        masks = Masks()
        kept = {name: [masks(cut, t.shape) for cut in self.slices.get(name, ())] for name, t in named_tensors(model)}
        self.model, self.tensors = zeroed_copy(model, kept, shifts, shared=needed is not None)
        strided = [t for t in named_parameters(model).values() if t.layout is torch.strided] if needed is not None else []
        self.shared = frozenset(map(storage_of, strided))  # memory of the model's, in which parameters lie that were not copied
        set_mode(self.model, False)

    def cut(self) -> list[tuple[Tensor, Sequence[TensorSlice]]]:
        """Its tensors that are zeroed in part, each with the slices that stay."""
        numbers = [(name, t) for name, t in self.tensors.items() if t.is_floating_point() or t.is_complex()]
        return [(t, self.slices[name]) for name, t in numbers if self.slices.get(name) and t.layout is torch.strided]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad(), visible():
            return self.model(*args, **kwargs)
