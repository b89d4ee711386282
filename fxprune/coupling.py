"""The coupling, as a user reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.passes.couple import Solution
from fxprune.passes.families import Family


@dataclass(frozen=True)
class CoupledFamily:
    """Layers that are pruned together.

    Attributes:
        name: the first parameter it spans, and the dimension.
        units: how many units it has: the smallest things that can be removed.
        width: how many channels of its first member one unit takes up.
        members: (parameter or buffer, dimension) pairs it spans.
        frozen: the reason it is kept whole, or None.
        parameters: how many parameter elements its units hold.
    """

    name: str
    units: int
    width: int
    members: tuple[tuple[str, int], ...]
    frozen: str | None
    parameters: int


class Coupling:
    """Families of a model; printable, and exportable as JSON or as a graph."""

    def __init__(self, model: str, found: list[Family], solution: Solution, tensors: dict[str, Tensor]) -> None:
        self.model = model
        self._found = found
        self._solution = solution
        self._tensors = tensors
        self.families: tuple[CoupledFamily, ...] = tuple(
            CoupledFamily(f.name, len(f.units), f.width, f.members, f.frozen, elements(f, solution, tensors)) for f in found
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "model": self.model,
            "families": [
                {
                    "name": f.name,
                    "units": f.units,
                    "width": f.width,
                    "parameters": f.parameters,
                    "frozen": f.frozen,
                    "members": [list(m) for m in f.members],
                }
                for f in self.families
            ],
        }


def elements(family: Family, solution: Solution, tensors: dict[str, Tensor]) -> int:
    """How many elements of the family's parameters go if all of its units do."""
    unit = solution.unit.numpy()
    mine = np.zeros(len(unit), bool)
    mine[family.units] = True
    total = 0
    for name in dict.fromkeys(name for name, _ in family.members):
        tensor = tensors.get(name)
        if tensor is None or not tensor.is_floating_point():
            continue
        share = 1.0
        for f in solution.leaves[name]:
            share *= 1 - float(mine[unit[f.labels.numpy()]].mean())
        total += round((1 - share) * tensor.numel())
    return total
