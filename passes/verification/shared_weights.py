"""A zeroed original that has the weights of its model: what is removed of them is left out where products read them.

To copy all weights takes longer than a run of one sample. A row of a weight that is zero makes a channel that is zero, so the
channels of the product are set to zero instead. Whatever else reads such a weight gets a copy of it with zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.passes.capture.recorder import by_ops
from fxprune.passes.ir.index_contents import storage_of
from fxprune.passes.ir.op_trace import arguments_written
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.slices import fast_index_select

aten = torch.ops.aten
# where the input, the weight and the bias are
PRODUCTS = {aten.addmm.default: (1, 2, 0), aten.mm.default: (0, 1, None), aten.convolution.default: (0, 1, 2)}

MANY = 64  # rows of inputs from which on it takes less time to multiply what is not zero than to multiply all


@dataclass(slots=True)
class Weight:
    """A contiguous weight of the model's, what is to be zero of it, and a copy with the zeros once one is needed.

    Attributes:
        removed: the indices along its first two dimensions that are to be zero.
    """

    tensor: Tensor
    removed: Mapping[int, Tensor]
    zeroed: Tensor | None = None

    def removed_from(self, view: Tensor) -> tuple[Tensor | None, Tensor | None] | None:
        """The rows and columns that are to be zero of a view of some of its rows, if any; None for any other view."""
        width = self.tensor[0].numel()
        first, rest = divmod(int(view.storage_offset() - self.tensor.storage_offset()), width)
        same = view.is_contiguous() and view.dtype == self.tensor.dtype and view[0].numel() == width
        rows, columns = self.removed.get(0), self.removed.get(1)
        if rest or not same or (columns is not None and view.shape[1] != self.tensor.shape[1]):
            return None
        if rows is not None:
            rows = rows[(rows >= first) & (rows < first + view.shape[0])] - first
        return rows, columns

    def with_zeros(self, view: Tensor) -> Tensor:
        """The same view of the copy that has the zeros."""
        if view.dtype != self.tensor.dtype:
            raise RuntimeError(f"a weight is read as {view.dtype}")
        if self.zeroed is None:
            self.zeroed = functools.reduce(lambda t, dim: t.index_fill(dim, self.removed[dim], 0), self.removed, self.tensor)
        return self.zeroed.as_strided(view.shape, view.stride(), view.storage_offset() - self.tensor.storage_offset())


class SharedWeights(TorchDispatchMode):
    """While a zeroed original runs that shares parameters with its model, puts zeros where they are read, and has none written.

    Raises RuntimeError where an operator is about to write to them, as it may do for other inputs than the example.

    Arguments:
        places: the memory that is not to be written to.
        weights: those that lack their zeros, by memory.

    Attributes:
        refused: whether an operator was about to.
    """

    supports_higher_order_operators = True

    def __init__(self, places: AbstractSet[int], weights: Mapping[int, Weight]) -> None:
        super().__init__()
        self.places, self.weights = places, weights
        self.refused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return by_ops(self, func, args, kwargs)
        written = collect(arguments_written(func, args, kwargs), Tensor)
        if any(t.layout is torch.strided and storage_of(t) in self.places for t in written):
            self.refused = True
            raise RuntimeError(f"{func} writes to a parameter")
        if not self.weights or all(self.weight_of(t) is None for t in collect((args, kwargs), Tensor)) or is_view(func):
            return func(*args, **kwargs)
        return self.read(func, args, kwargs)

    def weight_of(self, tensor: Tensor) -> Weight | None:
        return self.weights.get(storage_of(tensor)) if tensor.layout is torch.strided else None

    def read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator makes of weights with their zeros."""
        ways = {aten.embedding.default: looked_up} | dict.fromkeys(PRODUCTS, multiplied)
        if func in ways and not kwargs and sum(self.weight_of(t) is not None for t in args if isinstance(t, Tensor)) == 1:
            at = PRODUCTS[func][1] if func in PRODUCTS else 0
            weight = self.weight_of(args[at])
            made = None if weight is None else ways[func](func, args, weight)
            if made is not None:
                return made
        given, named = map_tensors((args, kwargs), lambda t: t if (w := self.weight_of(t)) is None else w.with_zeros(t))
        return func(*given, **named)


def looked_up(func: Any, args: tuple[Any, ...], weight: Weight) -> Tensor | None:
    """Rows of a table that lacks its zeros; None where whole rows are to be zero."""
    removed = weight.removed_from(args[0])
    if removed is None or removed[0] is not None:
        return None
    found: Tensor = func(*args)
    return found if removed[1] is None else found.index_fill_(-1, removed[1], 0)


def multiplied(func: Any, args: tuple[Any, ...], weight: Weight) -> Tensor | None:
    """The product with a weight that lacks its zeros; None where the product does not say which of its channels those make.

    A column that is zero is an input that counts as zero. A row that is zero is a channel that is zero, if its bias is.
    """
    first, at, bias = PRODUCTS[func]
    convolves = func is aten.convolution.default
    if convolves and (args[6] or (args[8] != 1 and 1 in weight.removed)):  # transposed, or with groups of inputs
        return None
    view = args[at] if convolves else args[at].t()
    removed, added = weight.removed_from(view), None if bias is None else args[bias]
    if removed is None:
        return None
    rows, columns = removed
    if rows is not None and added is not None and (added.shape[-1:] != view.shape[:1] or bool(added[..., rows].any())):
        return None
    given = list(args)
    if args[first].numel() >= MANY * view[0].numel() and not (convolves and args[8] != 1):
        stays = [None if gone is None else rest_of(gone, size) for gone, size in zip(removed, view.shape, strict=False)]
        part = taken(taken(view, 0, stays[0]), 1, stays[1])
        given[first], given[at] = taken(args[first], 1, stays[1]), part if convolves else part.t()
        if bias is not None and added is not None:
            given[bias] = taken(added, -1, stays[0])
        some: Tensor = func(*given)
        return some if stays[0] is None else with_rest(some, stays[0], view.shape[0])
    if columns is not None:
        given[first] = given[first].index_fill(1, columns, 0)
    made: Tensor = func(*given)
    return made if rows is None else made.index_fill_(1, rows, 0)


def rest_of(removed: Tensor, size: int) -> Tensor:
    """The indices of a dimension that are not among those removed."""
    stays = torch.ones(size, dtype=torch.bool, device=removed.device)
    stays[removed] = False
    return stays.nonzero().flatten()


def taken(tensor: Tensor, dim: int, indices: Tensor | None) -> Tensor:
    return tensor if indices is None else fast_index_select(tensor, dim % tensor.dim(), indices)


def with_rest(made: Tensor, indices: Tensor, size: int) -> Tensor:
    """Channels at their places among zeros."""
    return made.new_zeros(made.shape[0], size, *made.shape[2:]).index_copy_(1, indices, made)


def is_view(func: Any) -> bool:
    """Whether an operator returns memory of its arguments and computes nothing."""
    returned = func._schema.returns
    return bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)
