"""How a model of `thirdparty_models.py` is described: a constructor, its options and the inputs of one call.

Options are those that the package's constructors share, where the constructor has a parameter of that name, and its own.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

Inputs = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Inputs of a call (None: those of the package) and the constructor's own options."""

    inputs: Inputs | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """An option that is itself built by a constructor of the package, with the shared options."""

    path: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Package:
    """What is imported, what constructors share, and the cases by name."""

    root: str
    inputs: Inputs
    cases: Mapping[str, Case]
    shared: Mapping[str, Any] = field(default_factory=dict)
    find: Callable[[str], Callable[..., nn.Module]] | None = None

    def constructor(self, path: str) -> Callable[..., Any]:
        path = path.partition("#")[0]
        if self.find is not None:
            return self.find(path)
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"{self.root}.{module}" if module else self.root), name)

    def build(self, path: str, options: Mapping[str, Any]) -> Any:
        made = self.constructor(path)
        takes = inspect.signature(made).parameters
        shared = {name: value for name, value in self.shared.items() if name in takes}
        return made(**{name: self.resolved(value) for name, value in {**shared, **options}.items()})

    def resolved(self, value: Any) -> Any:
        """An option, or what it says how to make."""
        if isinstance(value, Made):
            return self.build(value.path, value.options)
        return [self.resolved(v) for v in value] if isinstance(value, list) else value


def case(inputs: Inputs | None = None, **options: Any) -> Case:
    return Case(inputs, options)


def made(path: str, **options: Any) -> Made:
    return Made(path, options)


def floats(*shape: int) -> Inputs:
    return lambda: torch.randn(*shape)


def ids(high: int, *shape: int) -> Inputs:
    return lambda: torch.randint(high, shape)


def lengths(*values: int) -> Inputs:
    return lambda: torch.tensor(values)


def image(size: int = 64, batch: int = 1, channels: int = 3) -> Inputs:
    return floats(batch, channels, size, size)


def several(*parts: Inputs, **named: Inputs) -> Inputs:
    """Positional arguments, or keyword arguments, of a call."""
    return (lambda: {name: part() for name, part in named.items()}) if named else lambda: tuple(part() for part in parts)


def plain(listed: str, inputs: Inputs | None = None, **options: Any) -> dict[str, Case]:
    """Cases that differ in their names alone."""
    return {name: Case(inputs, options) for name in listed.split()}


def listed(*parts: Inputs) -> Inputs:
    """One argument that is a list."""
    return lambda: ([part() for part in parts],)


def of_pytorchcv(name: str) -> Callable[..., nn.Module]:
    from pytorchcv.model_provider import get_model

    return partial(get_model, name)


def graph(nodes: int = 12, edges: int = 30, channels: int = 16) -> Inputs:
    """Features of nodes, and the ends of edges."""
    return several(floats(nodes, channels), ids(nodes, 2, edges))
