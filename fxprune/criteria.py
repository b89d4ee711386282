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

Reduce = Callable[[Tensor, list[int]], Tensor]


def magnitude(weight: Tensor, dims: list[int]) -> Tensor:
    """The squared L2 norm over `dims` (Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710).

    >>> magnitude(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), [1]).tolist()
    [25.0, 1.0]
    """
    if not dims:
        return weight.float().square()
    return torch.linalg.vector_norm(weight, dim=dims, dtype=torch.promote_types(weight.dtype, torch.float32)).square()


CRITERIA: dict[str, Reduce] = {"magnitude": magnitude}


def find(name: str) -> Reduce:
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
    reduce = find(criterion)
    total = torch.zeros(len(unit), dtype=torch.float64)
    by_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            for f in leaves.get(name, ()):
                values = reduce(parameter.detach(), [d for d in range(parameter.dim()) if d not in f.dims])
                order = [d for d in range(parameter.dim()) if d in f.dims]
                classes = unit[f.labels].expand([n if d in order else 1 for d, n in enumerate(parameter.shape)])
                by_device.setdefault(parameter.device, []).append((classes.reshape(-1), values.reshape(-1)))
        for rows in by_device.values():
            # one transfer from each device
            values = torch.cat([v.double() for _, v in rows]).cpu()
            total.index_add_(0, torch.cat([c for c, _ in rows]), values)
    return total
