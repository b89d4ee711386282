"""Where a model's tensors hold the units of a family, and where they read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution


class NotAlike(Exception):
    """Why the units of a family cannot be compared, as what they are."""


@dataclass(frozen=True, eq=False)
class Place:
    """A dimension of a tensor that the units of a family share.

    Attributes:
        name: of the tensor.
        dim: the dimension.
        entries: the indices of each unit along it, ascending, shape (units, width).
        reads: whether a product with an activation sums over it, so that it holds what is made of a unit, not the unit.
    """

    name: str
    dim: int
    entries: Tensor
    reads: bool

    def rows(self, tensor: Tensor) -> Tensor:
        """What a tensor holds of each unit, shape (units, width, the other dimensions)."""
        return tensor.movedim(self.dim, 0)[self.entries.to(tensor.device)]

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write what `rows` returned, changed, back to the tensor."""
        tensor.movedim(self.dim, 0)[self.entries.to(tensor.device)] = rows


def places_of(solution: Solution, family: Family, reads: set[tuple[str, int]], *, holds_only: bool = False) -> list[Place]:
    """All places of a family, its units in ascending order.

    Arguments:
        reads: (parameter, dimension) pairs that products sum over, as `parameter_roles.roles` finds them.
        holds_only: leave out places that read.

    Raises: NotAlike where units are of different sizes, or are read group by group.
    """
    unit_of, found = solution.unit_of.numpy(), []
    dims = set(family.members)
    for name in dict.fromkeys(name for name, _ in family.members):
        for f in solution.leaves[name]:
            dim = f.major_to_minor[-1]
            if (name, dim) not in dims or (holds_only and (name, dim) in reads):
                continue
            units = unit_of[f.flat]
            at = np.searchsorted(family.units, units).clip(max=len(family.units) - 1)
            mine = np.flatnonzero(family.units[at] == units)
            if not len(mine):
                continue
            if len(f.major_to_minor) > 1:
                raise NotAlike("are read or held in groups, each by weights of its own")
            counts = np.bincount(at[mine], minlength=len(family.units))
            if (counts != counts[0]).any():
                raise NotAlike("are of different sizes")
            order = mine[np.argsort(at[mine], kind="stable")].reshape(len(family.units), -1)
            found.append(Place(name, dim, torch.from_numpy(order), (name, dim) in reads))
    return found


def signatures(places: Iterable[Place], tensors: Mapping[str, Tensor]) -> Tensor:
    """What is held of each unit as one row, float64, shape (units, elements).

    That is everything that writes the family or is applied to it unit by unit: rows of weights, biases, parameters and
    statistics of norms. Each tensor is divided by its root mean square over the family, so that all count alike.

    Raises: NotAlike where nothing is held of the units.
    """
    parts = []
    for place in places:
        tensor = tensors.get(place.name)
        if place.reads or tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        rows = place.rows(tensor.detach().resolve_conj()).flatten(1)
        rows = (torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows).double().cpu()
        size = float(rows.square().mean().sqrt())
        parts.append(rows / size if size > 0 else rows)
    if not parts:
        raise NotAlike("are written by no parameter")
    return torch.cat(parts, 1)
