"""Torch-Pruning brought to a budget, and what a user of any tool can do afterwards."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from fxprune.report import count_macs


def within_budget(
    model: nn.Module,
    example: Tensor,
    most: float,
    *,
    importance: Callable[[], Any],
    ignored: Callable[[nn.Module], list[nn.Module]],
    gradients: Sequence[Tensor] | None = None,
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda model: {},
    global_pruning: bool = False,
) -> nn.Module:
    """The result of the smallest ratio, to a thousandth, whose multiply-accumulates are within a budget.

    Arguments:
        model: it is not touched.
        example: an input with one item; `most` is what that may cost.
        importance: makes the criterion.
        ignored: the layers to leave alone; `heads`: how many each layer of attention has.
        gradients: of the parameters, in their order, for criteria that look at them.
    """

    def at(ratio: float) -> nn.Module:
        made = copy.deepcopy(model)
        for i, parameter in enumerate(made.parameters()):
            parameter.grad = None if gradients is None else gradients[i].clone()
        torch_pruning.pruner.BasePruner(
            made,
            example,
            importance=importance(),
            global_pruning=global_pruning,
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=ignored(made),
            num_heads=heads(made),
        ).step()
        made.zero_grad()
        return made

    low, high = 0.0, 0.95
    best = at(high)
    while high - low > 1e-3:
        middle = (low + high) / 2
        found = at(middle)
        if macs_of(found, example) <= most:
            high, best = middle, found
        else:
            low = middle
    return best


def macs_of(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates for an input."""
    return count_macs(model, (example,), {})


def with_fresh_norms(model: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy whose batch normalisation has the statistics of some inputs."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    made.train()
    with torch.no_grad():
        made(inputs)
    return made.eval()
