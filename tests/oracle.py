"""What a pruned model must compute, found without the engine.

This file may read a plan's masks and nothing else of fxprune's, so that a mistake in the engine cannot also
be a mistake in the reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

TINY = 1e-30


class HasMasks(Protocol):
    def masks(self, model: nn.Module) -> Mapping[str, Tensor]: ...


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output for ``example_inputs`` as ``prune`` takes them: a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, even where a hook has left a computed weight (which deepcopy refuses) on a module."""
    computed = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


@torch.no_grad()
def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which every removed element of every parameter and buffer is zero.

    Integer and boolean buffers hold indices and choices, not channels' values: they stay.
    """
    model = duplicate(model)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() or value.is_complex():
            if masks[name].shape != value.shape:
                raise AssertionError(f"the mask of {name} is {tuple(masks[name].shape)}, not {tuple(value.shape)}")
            # Not a product: zero times a mask's minus infinity would not be zero.
            value.copy_(torch.where(masks[name], value, 0))
    return model


def plain_masked(model: nn.Module, plan: HasMasks) -> nn.Module:
    """The original with the removed elements zeroed: a reference where no channel statistic sees them."""
    return masked(model, plan.masks(model))


def leaves(output: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples, lists, dicts and objects with a ``__dict__``, with where it is."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from leaves(value, f"{path}[{i}]")


def relative_error(reference: Any, other: Any) -> float:
    """The largest difference, relative to the largest value of the reference; infinite where shapes differ.

    >>> relative_error({"x": torch.tensor([1.0, -4.0])}, {"x": torch.tensor([1.0, -3.0])})
    0.25
    """
    expected, found = dict(leaves(reference)), dict(leaves(other))
    if not expected or expected.keys() != found.keys():
        return float("inf")
    worst = 0.0
    for path, value in expected.items():
        if value.shape != found[path].shape or not found[path].isfinite().all():
            return float("inf")
        if value.numel():
            value, difference = value.double(), (value.double() - found[path].double()).abs().max()
            worst = max(worst, (difference / value.abs().max().clamp_min(TINY)).item())
    return worst


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters, a shared one counted once."""
    return sum(value.numel() for value in model.parameters())
