"""Modules that programs are made of and torch does not have."""

from __future__ import annotations

from torch import Tensor, nn


class Either(nn.Module):
    """One of two modules, by the mode."""

    def __init__(self, evaluated: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        self.evaluated, self.trained = evaluated, trained

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(x) if self.training else self.evaluated(x)


class Chosen(nn.Module):
    """One of two tensors, by the mode."""

    def __init__(self, evaluated: Tensor, trained: Tensor) -> None:
        super().__init__()
        self.evaluated, self.trained = nn.Buffer(evaluated), nn.Buffer(trained)

    def forward(self) -> Tensor:
        return self.trained if self.training else self.evaluated
