"""How a conformance graph is declared, built and made non-trivial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Builder = Callable[..., tuple[nn.Module, Any]]

GRAPHS: dict[str, Graph] = {}


@dataclass(frozen=True)
class Graph:
    """One tiny model that stresses one index map.

    ``targets`` name the parameters that must come out smaller: the ones that could only shrink if the
    interesting operation was followed. ``stats`` says that a channel statistic sees the pruned channels, so
    that zeroing parameters alone is no reference. ``heads`` (linear layer -> number of heads) is no business
    of fxprune: it is the hint that pruners which cannot see heads ask for, kept for the comparison.
    """

    name: str
    family: str
    build: Builder
    args: tuple[Any, ...] = ()
    stats: bool = False
    targets: tuple[str, ...] = ()
    min_removed: float = 0.25
    heads: Mapping[str, int] = field(default_factory=dict)

    def make(self) -> tuple[nn.Module, Any]:
        """A fresh float64 model in eval mode, every weight and statistic random, and its example inputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.build(*self.args)
        randomise(model.double().eval())
        return model, inputs


def graph(
    name: str = "",
    *,
    args: tuple[Any, ...] = (),
    stats: bool = False,
    targets: tuple[str, ...] = (),
    min_removed: float = 0.25,
    heads: Mapping[str, int] | None = None,
) -> Callable[[Builder], Builder]:
    """Register a builder, by default under its own name; stacked, under several with as many ``args``."""

    def register(build: Builder) -> Builder:
        key = name or build.__name__
        if key in GRAPHS:
            raise ValueError(f"two graphs are called {key}")
        family = build.__module__.rpartition(".")[2]
        GRAPHS[key] = Graph(key, family, build, args, stats, targets, min_removed, heads or {})
        return build

    return register


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module with this ``forward`` and these layers, parameters, buffers and plain attributes."""
    module: nn.Module = type("Net", (nn.Module,), {"forward": forward, "__module__": forward.__module__})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 1) -> None:
    """Random values everywhere, so that no bias is zero, no scale is one and no two channels are alike.

    Variances stay positive; masks and integer buffers mean something and stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point() or name.endswith("mask"):
            continue
        fresh = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if name.endswith("var"):
            fresh = fresh.abs() + 0.5
        elif value.ndim >= 2:
            fresh *= 1.5 * (value.shape[0] / value.numel()) ** 0.5
        value.copy_(fresh)


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(channels: int = 3, height: int = 6, width: int = 10, seed: int = 2) -> Tensor:
    return normal(2, channels, height, width, seed=seed)


def tokens(channels: int = 10, length: int = 7, seed: int = 2) -> Tensor:
    return normal(2, length, channels, seed=seed)


def features(channels: int = 10, batch: int = 3, seed: int = 2) -> Tensor:
    return normal(batch, channels, seed=seed)


def words(vocabulary: int = 11, length: int = 7, batch: int = 2) -> Tensor:
    return torch.arange(batch * length).mul(5).remainder(vocabulary).view(batch, length)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=options.pop("padding", kernel // 2), **options)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def buffer(*shape: int) -> nn.Buffer:
    return nn.Buffer(torch.empty(shape))


def index(*values: int) -> nn.Buffer:
    return nn.Buffer(torch.tensor(values))


def pool(x: Tensor) -> Tensor:
    """Global average over height and width."""
    return x.mean((2, 3))
