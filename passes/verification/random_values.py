"""Random values for operands of an operator that is tried, and where two results of it differ."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(like: Tensor) -> Tensor:
    """Values that activation functions neither clip nor zero; random truth values for a mask."""
    drawn = torch.rand_like(like, dtype=float_of(like))
    return drawn < 0.5 if like.dtype == torch.bool else drawn.mul_(0.7).add_(0.2).to(like.dtype)


def wide(like: Tensor) -> Tensor:
    """Values of both signs."""
    drawn = torch.randn_like(like, dtype=float_of(like))
    return drawn < 0 if like.dtype == torch.bool else drawn.mul_(3).to(like.dtype)


def far(like: Tensor, sign: int) -> Tensor:
    """Values far from those that are drawn, on one side of them; the opposite of masks."""
    if like.dtype == torch.bool:
        return ~like
    return torch.rand_like(like, dtype=float_of(like)).add_(3).mul_(sign).to(like.dtype)


def float_of(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.bool, torch.bfloat16, torch.float16) else tensor.dtype


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ; two NaNs do not."""
    return (a != b) & ~((a != a) & (b != b))
