"""Tensors on the meta device: a shape without contents."""

from __future__ import annotations

import torch
from torch import Tensor

empty, empty_strided = torch.empty, torch.empty_strided  # the originals: a capture replaces factories of torch
META = torch.device("meta")
NOTHING = empty(0, device=META)
PLAIN_TENSORS = frozenset([Tensor, torch.nn.Parameter, torch.nn.Buffer])


def like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same form on the meta device (`torch.empty_like` takes a detour through Python there)."""
    return empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
