"""Models of any size with stand-ins for their values, in the memory of a few tensors.

What a class computes at other sizes is seen by running it. No tensor has to have its own values for that: all that read about
as many inputs share one block of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.ir.module_tree import copy_tree, named_tensors
from fxprune.passes.ir.slices import TensorSlice, cut_shape
from fxprune.passes.rewrite.rewrite import slice_tensor

PERIOD = 1_000_003  # a prime, so that no row is like another


class StandIns:
    """Blocks of random numbers from which tensors of any shape are made; those of one kind overlap."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def like(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of a shape, with the dtype and device of another one; a parameter where that is one.

        A matrix has the scale that keeps the size of activations, a vector numbers around one.
        """
        size, inputs = math.prod(shape) * tensor.element_size(), math.prod(shape[1:])
        kind = round(math.log2(max(inputs, 1))) if len(shape) > 1 else -1
        key = kind, tensor.dtype, torch.device("cpu") if tensor.is_meta else tensor.device
        block = self.blocks.get(key)
        if block is None or len(block) < size:
            numbers = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))
            numbers = numbers * 2 ** (-kind / 2) if kind >= 0 else 1 + numbers.clamp(-3, 3) / 8
            period = numbers.to(key[2], tensor.dtype).view(torch.uint8)
            block = self.blocks[key] = period.new_empty(size)
            for part in block.split(len(period)):
                part.copy_(period[: len(part)])
        # each has a storage of its own, over the same memory: nothing takes one for a view of another
        made: Tensor = torch.from_dlpack(block[:size]).view(tensor.dtype).view(tuple(shape))
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def fill(self, model: nn.Module, known: Mapping[str, Tensor]) -> Any:
        """A copy of a model in which tensors on the meta device have values: those that are known, or stand-ins."""
        swap = {id(t): known[n] if n in known else self.like(t, t.shape) for n, t in named_tensors(model) if t.is_meta}
        return copy_tree(model, swap)

    def cut(self, name: str, tensor: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
        """What is left of a tensor, in form (see `rewrite_program`); tensors that hold no fractions have their contents."""
        if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return slice_tensor(tensor, slices)
        return self.like(tensor, cut_shape(tensor.shape, slices))
