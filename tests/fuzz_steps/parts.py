"""Modules that programs are made of and torch does not have."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
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


class Reads(nn.Module):
    """Looks at the values of what it is given, so that it stays one node of the program."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e30:
            raise ValueError("the input has exploded")
        return self.inner(x)


class Regroups(nn.Module):
    """The same, with sizes that are attributes: groups of channels change places, and each channel is scaled."""

    def __init__(self, channels: int, groups: int, axis: int) -> None:
        super().__init__()
        self.channels, self.groups, self.axis = channels, groups, axis
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e30:
            raise ValueError("the input has exploded")
        x = x.movedim(self.axis, -1) * self.scale
        x = x.view(*x.shape[:-1], self.groups, self.channels // self.groups).transpose(-1, -2)
        return x.reshape(*x.shape[:-2], self.channels).movedim(-1, self.axis)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and models have it
    scripted_swish = torch.jit.script(swish)


@functools.lru_cache
def remembered_slope(size: int) -> float:
    """Remembers what it is asked for, by size."""
    return 1 + 1 / (1 + size)


@functools.lru_cache
def remembered_ramp(size: int) -> Tensor:
    return torch.linspace(0, 1, size, dtype=torch.float64)


@dataclass
class Two:
    first: Tensor
    second: Tensor


class Record:
    """Two values as attributes of an object of a class of one's own."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


class Remembers(nn.Module):
    """Assigns a buffer anew, before it reads it, after it has, or only in training."""

    def __init__(self, shape: list[int], how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("held", torch.linspace(1, 2, max(shape)).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.held
        if self.how != "training" or self.training:
            self.held = self.held * 0.5
        return x * self.held if self.how == "read" else out


class Returns(nn.Module):
    """Returns two values together; where it is told to read one, it is no part of the program."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        if self.how == "read" and float(x.detach().abs().sum()) < 0:
            x = -x
        kind = {"dataclass": Two, "tuple": lambda *both: list(both)}.get(self.how, Record)
        return kind(x, x.tanh())
