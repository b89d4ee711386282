"""Places: a dimension of one of the model's tensors, the names that users have for it, and the units at its indices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fxprune.arguments import did_you_mean
from fxprune.passes.coupling.families import Family, place_of
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import every_path, every_tensor, named_modules, named_tensors
from fxprune.selection.indices import spelled
from fxprune.selection.names import OUTPUTS_SECOND, near_modules, paths_of


@dataclass(frozen=True, eq=False)
class Place:
    """What indices that a user names are indices of.

    Attributes:
        name: what to call it.
        tensor, dim: the dimension; None for the units of a family by number.
        units: the units at its indices, one row for each factor that varies along it; shape (factors, indices).
    """

    name: str
    tensor: str | None
    dim: int | None
    units: np.ndarray

    @property
    def size(self) -> int:
        """The number of its indices."""
        return int(self.units.shape[1])

    def some(self, indices: Sequence[int]) -> str:
        """Some of its indices, as the subject of a sentence."""
        noun = "unit" if self.tensor is None else "channel"
        return f"{noun}{'s' if len(indices) > 1 else ''} {spelled(indices, 6)} of {self.name}"


def labels_at(solution: Solution, tensor: str, dim: int) -> np.ndarray:
    """The labels along a dimension of a tensor, shape (factors, indices).

    The second dimension of a grouped convolution's weight has an index for each of its input (transposed: output) channels.
    """
    rows = [f.compressed for f in solution.leaves.get(tensor, ()) if f.major_to_minor[-1] == dim]
    length = max(map(len, rows), default=0)
    return np.stack([row for row in rows if len(row) == length]) if rows else np.zeros((0, 0), np.int64)


def find_place(model: nn.Module, solution: Solution, found: Sequence[Family], key: Any, argument: str) -> Place:
    """The place that a key of `remove` names; raises PruneError where it names none.

    Arguments:
        found: the families of the solution.
        key: a layer (a module, or its name) for its outputs, `layer:dim` or `tensor:dim`, a tensor for its first dimension;
            a family, or its name with a number (`layer#2`), for its units.
        argument: where the key is given.
    """
    number = isinstance(key, str) and "#" in key
    name = key if number else getattr(key, "name", None) if hasattr(key, "members") else None
    if name is not None:
        family = next((f for f in found if f.name == name), None)
        if family is None:
            near = [f.name for f in found if f.name.partition("#")[0] == str(name).partition("#")[0]]
            fix = f"one of {', '.join(near)}" if near else "a name that print(fxprune.couple(model, example_inputs)) shows"
            raise PruneError(f"{name!r} in {argument} names no family of the model", fix=fix)
        return Place(family.name, None, None, family.units[None])
    if isinstance(key, nn.Module):
        key = paths_of(model, key, argument)[0]
    if not isinstance(key, str):
        raise PruneError(f"{argument} names {key!r}, which is no layer", fix=f"{argument}={{'layer1.conv1': [2, 6, 9]}}")
    tensor, dim = dimension_of(model, solution, key, argument)
    labels = labels_at(solution, tensor, dim)
    if not labels.size:
        shape = solution.shapes.get(tensor)
        why = "has a single channel" if shape is not None and shape[dim] < 2 else "is never cut: it is one head, or not used"
        raise PruneError(f"{key} {why}", where=f"{tensor}:{dim}", fix=f"another layer in {argument}")
    return Place(key, tensor, dim, solution.unit_of.numpy()[labels])


def dimension_of(model: nn.Module, solution: Solution, key: str, argument: str) -> tuple[str, int]:
    """The dimension of a tensor that a text names; of tied tensors the one that the solution knows."""
    canonical = {id(t): name for name, t in named_tensors(model)}
    tensors = {name: canonical.get(id(t), name) for name, t in every_tensor(model)}
    split = re.fullmatch(r"(.*):(\d+)", key)
    path, wanted = (split[1], int(split[2])) if split else (key, None)
    if path not in tensors:
        module = dict(every_path(model)).get(path)
        if module is None:
            modules = [name for name, _ in named_modules(model)]
            fix = did_you_mean(path, modules).rstrip() or did_you_mean(path, tensors).rstrip() or near_modules(path, modules)
            raise PruneError(f"{key!r} in {argument} names no layer and no tensor of the model", fix=fix)
        own = [n for n in ("weight", "bias") if f"{path}.{n}" in tensors] or packed(solution, module, path, tensors)
        if not own:
            inside = [f"{name}:0" for name in tensors if not path or name.startswith(f"{path}.")]
            shown = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
            what = f"{key!r} in {argument} is a {type(module).__name__}, which has no weight of its own"
            raise PruneError(what, fix=f"a layer or a tensor inside it: {shown}" if inside else "a layer with a weight")
        second = isinstance(module, OUTPUTS_SECOND) and own[0] == "weight"
        wanted = int(second) if wanted is None else wanted
        path = f"{path}.{own[0]}"
    dim, tensor = wanted or 0, tensors[path]
    ndim = len(solution.shapes.get(tensor, ()))
    if tensor not in solution.shapes:
        raise PruneError(f"{path} is not used in the model's forward", where=key, fix=f"another layer in {argument}")
    if dim >= ndim:
        raise PruneError(f"{path} has {ndim} dimensions, and none with number {dim}", where=key, fix=f"{path}:{ndim - 1}")
    return tensor, dim


def packed(solution: Solution, module: nn.Module, path: str, tensors: dict[str, str]) -> list[str]:
    """The weights of a layer that has no `weight`, as `in_proj_weight` of attention, where there is no doubt which channels
    are its: along their first dimension all of them hold the same units, and several."""
    own = [name for name, _ in module.named_parameters(path, recurse=False) if "weight" in name.rpartition(".")[2]]
    rows = [solution.unit_of.numpy()[labels_at(solution, tensors[name], 0)] for name in own]
    same = all(row.shape == rows[0].shape and (row == rows[0]).all() for row in rows)
    return [name.removeprefix(f"{path}.") for name in own] if same and rows and rows[0].shape[-1] > 1 else []


def where_units_are(solution: Solution, units: np.ndarray) -> str:
    """Some units as a user reads them: indices of the first place that holds any of them."""
    unit = solution.unit_of.numpy()
    for tensor, labels in solution.leaves.items():
        for f in labels:
            at = np.flatnonzero(np.isin(unit[f.compressed], units))
            if len(at):
                return f"{spelled(at.tolist(), 6)} of {place_of(tensor)}:{f.major_to_minor[-1]}"
    return "what no tensor of the model holds"
