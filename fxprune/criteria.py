"""Criteria: one number for each unit; the units with the lowest are removed.

A criterion is a function of a tensor that gives the importance of each of its elements; sums over the elements of a unit,
over every layer the unit spans, are taken here as tensor reductions on the tensor's own device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxprune.errors import PruneError
from fxprune.passes.labels import Labels

Criterion = Callable[[Tensor], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """Squared L2 magnitude (Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710).

    >>> magnitude(torch.tensor([3.0, -4.0])).tolist()
    [9.0, 16.0]
    """
    return weight.square()


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}


def find(name: str) -> Criterion:
    """The criterion of a given name; raises PruneError for one that does not exist."""
    if name not in CRITERIA:
        raise PruneError(f"there is no criterion {name!r}", fix=f"one of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]


def score(parameters: Mapping[str, Tensor], leaves: Mapping[str, Labels], unit: Tensor, criterion: str) -> Tensor:
    """The importance of every unit, summed over all parameters it spans.

    Arguments:
        parameters: the model's parameters by name, on any device.
        leaves: their labels.
        unit: the class of each label, shape (labels,).
        criterion: the name of a criterion.

    Returns: float64 scores indexed by class, shape (labels,); 0 for what no parameter belongs to.
    """
    of = find(criterion)
    total = torch.zeros(len(unit), dtype=torch.float64)
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            labels = leaves.get(name, ())
            if not labels or not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            weight = parameter.detach()
            weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
            covered = {d for f in labels for d in f.dims}
            values = summed(of(weight), [d for d in range(weight.dim()) if d not in covered])
            for f in labels:
                part = summed(values, sorted(covered - f.dims))
                classes = unit[f.labels].expand(part.shape)
                by_device.setdefault(parameter.device, []).append((classes.reshape(-1), part.reshape(-1)))
        for rows in by_device.values():
            # one transfer from each device
            values = torch.cat([v.double() for _, v in rows]).cpu()
            total.index_add_(0, torch.cat([c for c, _ in rows]), values)
    return total


def summed(values: Tensor, dims: list[int]) -> Tensor:
    return values.sum(dims, keepdim=True) if dims else values
