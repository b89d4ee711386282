"""Models of any size with stand-ins for their values, in the memory of a few tensors.

What a class computes at other sizes is seen by running it. No tensor has to have its own values for that: all that read about
as many inputs share one block of random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.ir.module_tree import copy_tree, named_tensors
from fxprune.passes.ir.slices import TensorSlice, cut_shape
from fxprune.passes.rewrite.rewrite import slice_tensor

PERIOD = 1_000_003  # a prime, so that no row is like another


class StandIns:
    """Blocks of random numbers from which tensors of any shape are made; those of one kind overlap."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, torch.dtype], np.ndarray] = {}

    def like(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor of a shape, with the dtype of another one; a parameter where that is one.

        A matrix has the scale that keeps the size of activations, a vector numbers around one.
        """
        count, inputs = math.prod(shape), math.prod(shape[1:])
        kind = round(math.log2(max(inputs, 1))) if len(shape) > 1 else -1
        block = self.blocks.get((kind, tensor.dtype))
        if block is None or len(block) < count * tensor.element_size():
            numbers = torch.from_numpy(np.random.default_rng(0).standard_normal(PERIOD, np.float32))
            numbers = numbers * 2 ** (-kind / 2) if kind >= 0 else 1 + numbers.clamp(-3, 3) / 8
            period = numbers.to(tensor.dtype).view(torch.uint8).numpy()
            block = np.empty(count * tensor.element_size(), np.uint8)
            for start in range(0, len(block), len(period)):
                block[start : start + len(period)] = period[: len(block) - start]
            self.blocks[kind, tensor.dtype] = block
        # each has a storage of its own, over the same memory: nothing takes one for a view of another
        made = torch.from_numpy(block[: count * tensor.element_size()]).view(tensor.dtype).view(tuple(shape))
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
