"""A weight that is a stack of matrices in one tensor, as those of experts are: each multiplies rows of its own.

Which rows these are is said by where they end (`_grouped_mm`), by the numbers that matrices are picked with (`weight[experts]`
before a `bmm`), or by which matrix a loop has come to.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.passes.ir.pytree import collect
from fxprune.repairs.least_squares import is_convolution
from fxprune.repairs.sites import SiteCall, address

PICKING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)


class Picks:
    """Tensors that are matrices picked from stacks, by address, with the name of the stack and their numbers."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[weakref.ref[Tensor], str, Tensor]] = {}

    def note(self, func: Any, args: Any, name: str | None, out: Any) -> None:
        """Note what a call picked from the parameter of a name."""
        if name is None or func not in PICKING or args[0].dim() != 3:
            return
        numbers = args[1][0] if func is PICKING[0] and len(args[1]) == 1 else args[2] if args[1] == 0 else None
        if (
            isinstance(numbers, Tensor)
            and numbers.dim() <= 1
            and not numbers.is_floating_point()
            and numbers.dtype != torch.bool
        ):
            self.found[address(out)] = weakref.ref(out), name, numbers

    def of(self, weight: Tensor) -> tuple[str, Tensor] | None:
        """The stack that a tensor's matrices were picked from, and their numbers."""
        alive, name, numbers = self.found.get(address(weight), (lambda: None, "", weight))
        return None if alive() is None else (name, numbers)


def matrices(call: SiteCall, stack: Tensor, numbers: Tensor | None) -> Iterator[tuple[int | None, SiteCall]]:
    """The products of single matrices that one call makes, with the number of each; None with a call of all of a weight.

    Arguments:
        stack: the parameter.
        numbers: of the matrices that were picked, if they were.
    """
    weight, product = call.weight, call.product
    assert product is not None
    if stack.dim() != 3 or is_convolution(call):
        yield None, call
    elif weight.dim() == 2:
        at, rest = divmod(int(weight.storage_offset()) - int(stack.storage_offset()), stack.stride(0))
        number = at if numbers is None else int(numbers)
        yield (number, call) if numbers is not None or rest == 0 else (None, call)
    elif numbers is None and (len(weight) != len(stack) or weight.stride(0) != stack.stride(0)):
        yield None, call
    else:
        which = list(range(len(weight))) if numbers is None else numbers.tolist()
        others = [t for t in collect((call.args, call.kwargs), Tensor) if not t.is_floating_point()]
        by_rows = call.source.dim() == 2
        if by_rows and len(others) != 1:
            yield None, call
            return
        ends = [0, *others[0].tolist()] if by_rows else []
        for number in dict.fromkeys(which):
            places = [i for i, other in enumerate(which) if other == number]
            first = places[0]
            if by_rows:
                source, out = (t[ends[first] : ends[first + 1]] for t in (call.source, call.out))
            else:
                rows = torch.tensor(places, device=call.source.device)
                source, out = (
                    t.index_select(0, rows).movedim(dim, -1).flatten(0, -2)
                    for t, dim in ((call.source, product.along), (call.out, product.out))
                )
            if len(source):
                yield number, alone(call, weight[first], source, out)


def alone(call: SiteCall, weight: Tensor, source: Tensor, out: Tensor) -> SiteCall:
    """The product of one matrix with rows of its own."""
    assert call.product is not None and call.product.kept is not None
    summed, kept = call.product.summed - 1, call.product.kept - 1
    product = replace(call.product, summed=summed, kept=kept, along=1, out=1)
    func: Any = torch.mm if summed < kept else F.linear
    args = (source, weight)
    return replace(call, product=product, weight=weight, source=source, out=out, func=func, args=args, kwargs={}, bias=None)
