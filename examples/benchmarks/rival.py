"""Torch-Pruning brought to a budget, and what a user of any tool can do afterwards."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from fxprune import count

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": torch_pruning.importance.MagnitudeImportance,
    "bn_scale": torch_pruning.importance.BNScaleImportance,
    "lamp": torch_pruning.importance.LAMPImportance,
    "fpgm": torch_pruning.importance.FPGMImportance,
    "taylor": torch_pruning.importance.TaylorImportance,
    "hessian": torch_pruning.importance.HessianImportance,
    "obdc": torch_pruning.importance.OBDCImportance,
    "random": torch_pruning.importance.RandomImportance,
}


@dataclass
class Rival:
    """Torch-Pruning with one of its criteria.

    Attributes:
        model: it is not touched.
        criterion: one of `IMPORTANCES`; `ranking` is local, global or isomorphic.
        inputs, targets: what criteria that look at gradients see.
        loss: of outputs and targets, a mean over samples.
        ignored: the layers to leave alone; `heads`: how many each layer of attention has.
    """

    model: nn.Module
    criterion: str
    ranking: str
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    ignored: Callable[[nn.Module], list[nn.Module]]
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda model: {}

    def within_budget(self, most: float) -> nn.Module:
        """The result of the smallest ratio, to a thousandth, whose multiply-accumulates for one input are within `most`.

        Errors:
            ValueError: there is none below 0.95; layers that would lose more than its `max_pruning_ratio` lose nothing.
        """
        low, high = 0.0, 0.95
        best = None
        while high - low > 1e-3:
            middle = (low + high) / 2
            found = self.at(middle)
            if macs_of(found, self.inputs[:1]) <= most:
                high, best = middle, found
            else:
                low = middle
        if best is None:
            raise ValueError(f"no ratio up to {high} leaves {most:,.0f} multiply-accumulates or fewer")
        return best

    def at(self, ratio: float) -> nn.Module:
        made = copy.deepcopy(self.model)
        torch.manual_seed(0)  # of the random criterion
        importance = IMPORTANCES[self.criterion]()
        pruner = torch_pruning.pruner.BasePruner(
            made,
            self.inputs[:1],
            importance=importance,
            global_pruning=self.ranking != "local",
            isomorphic=self.ranking == "isomorphic",
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,
            ignored_layers=self.ignored(made),
            num_heads=self.heads(made),
        )
        if self.criterion == "obdc":
            importance._prepare_model(made, pruner)  # as its documentation does; it raises, see ACCURACY.md
            self.loss(made(self.inputs), self.targets).backward()
            importance.step()
            importance._rm_hooks(made)
        if self.criterion in ("taylor", "hessian"):
            for parameter, gradient in zip(made.parameters(), self.gradients, strict=True):
                parameter.grad = gradient.clone()
        pruner.step()
        made.zero_grad()
        return made

    @cached_property
    def gradients(self) -> list[Tensor]:
        """What the criterion reads from `.grad`.

        For the Hessian the square of the last sample's: its `accumulate_grad` asks for parameters by their names in a
        dictionary of parameters, finds none, and starts again with each sample.
        """
        seen = slice(-1, None) if self.criterion == "hessian" else slice(None)
        loss = self.loss(self.model(self.inputs[seen]), self.targets[seen])
        found = torch.autograd.grad(loss, list(self.model.parameters()))
        return [g.square() if self.criterion == "hessian" else g for g in found]


def macs_of(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates for an input."""
    return count(model, example).macs or 0


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
