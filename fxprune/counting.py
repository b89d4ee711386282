"""How many indices, and how many parameter elements, each family holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.couple import Solution
from fxprune.passes.families import Family
from fxprune.passes.kept import clusters
from fxprune.passes.labels import Factor

Shares = tuple[float, dict[int, float]]


def family_of_labels(solution: Solution, found: Sequence[Family]) -> np.ndarray:
    """For each label the position in `found` of its family, -1 if it has none; shape (labels,)."""
    of_unit = np.full(len(solution.unit), -1, np.int64)
    for i, family in enumerate(found):
        of_unit[family.units] = i
    return of_unit[solution.unit.numpy()]


def elements(
    solution: Solution, found: Sequence[Family], tensors: Mapping[str, Tensor], kept: np.ndarray | None = None
) -> list[int]:
    """How many parameter elements go with each family.

    A weight counts for the family of its outputs and for that of its inputs.

    Arguments:
        solution: the coupling.
        found: its families.
        tensors: the model's tensors by name.
        kept: for each label whether it is still there, shape (labels,); by default all are.
    """
    member = family_of_labels(solution, found)
    alive = np.ones(len(member), bool) if kept is None else kept
    totals = np.zeros(len(found))
    for name, tensor in tensors.items():
        if not isinstance(tensor, nn.Parameter):
            continue
        groups = [shares(group, member, alive) for group in clusters(solution.leaves.get(name, ()))]
        left = tensor.numel() * float(np.prod([whole for whole, _ in groups]))
        for family in {i for _, mine in groups for i in mine}:
            # what would be left without the family, as a part of what is
            rest = np.prod([1 - mine.get(family, 0.0) / whole for whole, mine in groups if whole])
            totals[family] += left * (1 - float(rest))
    return [round(total) for total in totals]


def shares(group: list[Factor], member: np.ndarray, alive: np.ndarray) -> Shares:
    """The share of the indices that some factors span that is alive, and the share of each family."""
    if len(group) == 1:
        labels = group[0].labels.reshape(-1).numpy()
        there = alive[labels]
        families, counts = np.unique(member[labels][there], return_counts=True)
        return float(there.mean()), {int(f): n / len(labels) for f, n in zip(families, counts) if f >= 0}
    arrays = [a.numpy() for a in torch.broadcast_tensors(*(f.labels for f in group))]
    together = np.logical_and.reduce([alive[a] for a in arrays])
    families = np.unique(np.concatenate([member[f.labels.reshape(-1).numpy()] for f in group]))
    inside = {int(i): np.logical_or.reduce([member[a] == i for a in arrays]) for i in families if i >= 0}
    return float(together.mean()), {i: float((mask & together).mean()) for i, mask in inside.items()}
