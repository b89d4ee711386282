"""What experts contribute: the evidence that REAP needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.coupling.choices import chosen_units
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.module_tree import fetch
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.pytree import collect, map_tensors


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """Experts that one router chooses among.

    Attributes:
        path: the innermost module that holds all their parameters.
        routers: parameters with a row for each expert that decide which are chosen.
        stacks: those that are indexed by the choice, with an entry for each expert along their first dimension.
        count: the number of experts.
    """

    path: str
    routers: list[str]
    stacks: list[str]
    count: int


def expert_layers(solution: Solution, parameters: set[str]) -> Iterator[ExpertLayer]:
    """The layers of experts of a coupled model."""
    chosen, unit_of, trace = chosen_units(solution), solution.unit_of.numpy(), solution.captures[0].op_trace
    for family in families(solution, parameters):
        if not np.isin(family.units, chosen).any():
            continue
        picks = [i for i, labels in solution.picks[0].items() if np.isin(unit_of[labels[labels > 0]], family.units).any()]
        held = [name for name, dim in family.members if dim == 0 and name in parameters]
        behind = names_behind(trace, min(picks)) if picks else set()
        routers, stacks = [n for n in held if n in behind], [n for n in held if n not in behind]
        if routers and stacks:
            path = common_path(stacks)
            yield ExpertLayer(path, routers, stacks, solution.shapes[routers[0]][0])


def names_behind(trace: OpTrace, value: int) -> set[str]:
    """The names of the model's own tensors that a value is computed from."""
    wanted, found = [value], {value}
    while wanted:
        maker = trace.maker(wanted.pop())
        new = {ref.id for ref in maker.inputs} - found if maker is not None else set[int]()
        found |= new
        wanted += new
    return {name for i in found if (name := trace.values[i].name) is not None}


def common_path(names: Iterable[str]) -> str:
    """The path of the innermost module that some tensors are in."""
    parts = [name.split(".")[:-1] for name in names]
    same = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
    return ".".join(same[: min(len(p) for p in parts)])


class Contributions:
    """For each expert the sum of the norms of what it adds to the result of its layer, and of how many tokens.

    A layer runs again for each expert, without that one's parameters: what its result loses is gate times output. Where the
    layer is given the choice as whole numbers, it does so on the tokens of the expert alone.
    """

    def __init__(self, module: nn.Module, layer: ExpertLayer, parameters: dict[str, Tensor]) -> None:
        self.stacks, self.busy = [parameters[name] for name in layer.stacks], False
        self.sums = torch.zeros(layer.count, dtype=torch.float64)
        self.tokens = torch.zeros(layer.count, dtype=torch.float64)
        self.handle = module.register_forward_hook(self.measure, with_kwargs=True)

    def measure(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self.busy:
            return
        self.busy = True
        whole = [stack.data for stack in self.stacks]  # the original's, which are not written to
        for stack in self.stacks:
            stack.data = stack.data.clone()
        given = collect((args, kwargs), Tensor)
        choice = next((t for t in given if not t.is_floating_point() and t.dim() in (1, 2) and t.dtype != torch.bool), None)
        rows = given[0].shape[0] if given and given[0].dim() else -1
        if choice is not None and not all(t.dim() and t.shape[0] == rows for t in given):
            choice = None
        for expert in range(len(self.sums)):
            mine = None if choice is None else (choice.reshape(rows, -1) == expert).any(1)
            if mine is None or bool(mine.any()):
                self.add(expert, self.lost(module, args, kwargs, out, expert, mine))
        for stack, values in zip(self.stacks, whole, strict=True):
            stack.data = values
        self.busy = False

    def lost(self, module: nn.Module, args: Any, kwargs: Any, out: Any, expert: int, mine: Tensor | None) -> Tensor:
        """What a result loses without an expert, for the tokens `mine`."""
        args, kwargs = map_tensors((args, kwargs), lambda t: t.clone() if mine is None else t[mine])
        kept = [stack.data[expert].clone() for stack in self.stacks]
        for stack in self.stacks:
            stack.data[expert] = 0
        less = first(module(*args, **kwargs))
        for stack, values in zip(self.stacks, kept, strict=True):
            stack.data[expert] = values
        return (first(out) if mine is None else first(out)[mine]) - less

    def add(self, expert: int, lost: Tensor) -> None:
        norms = lost.double().flatten(0, -2).norm(dim=-1).cpu()
        self.sums[expert] += norms.sum()
        self.tokens[expert] += int((norms > 0).sum())


def first(out: Any) -> Tensor:
    return collect(out, Tensor)[0]


def contributions(source: Any) -> dict[str, Tensor]:
    """For each router the mean over an expert's tokens of the norm of what it contributes, shape (experts, 1, ...).

    Arguments:
        source: the model and its data, as criteria are given them.
    """
    layers = list(expert_layers(source.solution, set(source.parameters)))
    measured = [(layer, Contributions(fetch(source.model, layer.path), layer, source.parameters)) for layer in layers]
    try:
        with torch.no_grad():
            for batch in source.batches():
                source.run(batch)
    finally:
        for _, found in measured:
            found.handle.remove()
    evidence: dict[str, Tensor] = {}
    for layer, found in measured:
        name = layer.routers[0]
        shape = [-1] + [1] * (source.parameters[name].dim() - 1)
        evidence[name] = (found.sums / found.tokens.clamp(min=1)).reshape(shape).to(source.parameters[name].device)
    return evidence
