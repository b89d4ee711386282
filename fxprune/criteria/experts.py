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
        parts: for each expert its parameters: names, with the entry along the first dimension of those that all share.
        indexed: whether the module is given the choice, as numbers.
    """

    path: str
    routers: list[str]
    parts: list[list[tuple[str, int | None]]]
    indexed: bool


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
        if not routers:
            continue
        rows = next((unit_of[f.flat] for f in solution.leaves[routers[0]] if f.major_to_minor == (0,)), ())
        alone = solution.experts
        own = [[] if alone is None else sorted(alone.tensors(unit) & parameters) for unit in map(int, rows)]
        parts = [[*((name, e) for name in stacks), *((name, None) for name in names)] for e, names in enumerate(own)]
        if any(parts):
            path = common_path([*stacks, *(name for names in own for name in names)])
            yield ExpertLayer(path, routers, parts, not any(own))


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
        self.parts, self.indexed = [[(parameters[name], e) for name, e in part] for part in layer.parts], layer.indexed
        self.held, self.busy = list({id(tensor): tensor for part in self.parts for tensor, _ in part}.values()), False
        self.sums, self.tokens = torch.zeros(2, len(self.parts), dtype=torch.float64)
        self.handle = module.register_forward_hook(self.measure, with_kwargs=True)

    def measure(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self.busy:
            return
        self.busy = True
        whole = [tensor.data for tensor in self.held]  # the original's, which are not written to
        for tensor in self.held:
            tensor.data = tensor.data.clone()
        given = collect((args, kwargs), Tensor)
        choice = next((t for t in given if not t.is_floating_point() and t.dim() in (1, 2) and t.dtype != torch.bool), None)
        rows = given[0].shape[0] if given and given[0].dim() else -1
        if choice is not None and not (self.indexed and all(t.dim() and t.shape[0] == rows for t in given)):
            choice = None
        for expert in range(len(self.sums)):
            mine = None if choice is None else (choice.reshape(rows, -1) == expert).any(1)
            if mine is None or bool(mine.any()):
                self.add(expert, self.lost(module, args, kwargs, out, expert, mine))
        for tensor, values in zip(self.held, whole, strict=True):
            tensor.data = values
        self.busy = False

    def lost(self, module: nn.Module, args: Any, kwargs: Any, out: Any, expert: int, mine: Tensor | None) -> Tensor:
        """What a result loses without an expert, for the tokens `mine`."""
        args, kwargs = map_tensors((args, kwargs), lambda t: t.clone() if mine is None else t[mine])
        part = [tensor.data if e is None else tensor.data[e] for tensor, e in self.parts[expert]]
        kept = [values.clone() for values in part]
        for values in part:
            values.zero_()
        less = first(module(*args, **kwargs))
        for values, was in zip(part, kept, strict=True):
            values.copy_(was)
        return (first(out) if mine is None else first(out)[mine]) - less

    def add(self, expert: int, lost: Tensor) -> None:
        norms = lost.double().flatten(0, -2).norm(dim=-1).cpu()
        self.sums[expert] += norms.sum()
        self.tokens[expert] += int((norms > 0).sum())


def called(model: nn.Module, path: str) -> nn.Module:
    """The innermost module around a path that has a forward of its own."""
    while path and isinstance(fetch(model, path), nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return fetch(model, path) if path else model


def first(out: Any) -> Tensor:
    return collect(out, Tensor)[0]


def contributions(source: Any) -> dict[str, Tensor]:
    """For each router the mean over an expert's tokens of the norm of what it contributes, shape (experts, 1, ...).

    Arguments:
        source: the model and its data, as criteria are given them.
    """
    layers = list(expert_layers(source.solution, set(source.parameters)))
    measured = [(layer, Contributions(called(source.model, layer.path), layer, source.parameters)) for layer in layers]
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
