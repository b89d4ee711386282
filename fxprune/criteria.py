"""Criteria: one number for each unit; the units with the lowest are removed.

A criterion is a function of a tensor that gives the importance of each of its elements; sums over the elements of a unit,
over every layer the unit spans, are taken here as tensor reductions on the tensor's own device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
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
    classes = unit.numpy()
    total = np.zeros(len(unit))
    by_device: dict[torch.device, list[tuple[np.ndarray, Tensor]]] = {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            labels = leaves.get(name, ())
            if not labels or not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            rows = by_device.setdefault(parameter.device, [])
            for f, part in zip(labels, reduced(parameter.detach(), of, [f.dims for f in labels]), strict=True):
                span = classes[f.flat]
                if len(span) != part.numel():
                    span = np.broadcast_to(span.reshape(f.labels.shape), part.shape)
                rows.append((span.reshape(-1), part.reshape(-1)))
        for rows in by_device.values():
            # one transfer from each device
            values = torch.cat([v.double() for _, v in rows]).cpu().numpy()
            total += np.bincount(np.concatenate([c for c, _ in rows]), values, len(unit))
    return torch.from_numpy(total)


BLOCK = 1 << 18  # elements scored at a time: small enough to stay in a processor's cache


def reduced(weight: Tensor, of: Criterion, spans: Sequence[frozenset[int]]) -> list[Tensor]:
    """For each set of dimensions, the scores of a tensor's elements summed over all others (which keep size 1).

    The tensor is scored block by block, so that no second array of its size is made.
    """
    if weight.dim() == 1:
        scores = of(weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight)
        return [scores for _ in spans]
    rows = len(weight) if weight.is_cuda else max(1, BLOCK * len(weight) // weight.numel())
    parts: list[list[Tensor]] = [[] for _ in spans]
    for block in weight.split(rows):
        values = of(block.float() if block.dtype in (torch.float16, torch.bfloat16) else block)
        for found, dims in zip(parts, spans, strict=True):
            part = values
            if 0 not in dims:  # first over what lies furthest apart: whole rows are added
                part = part.sum(0, keepdim=True)
            rest = [d for d in range(1, weight.dim()) if d not in dims]
            part = part.sum(rest, keepdim=True) if rest else part
            if 0 in dims or not found:
                found.append(part)
            else:
                found[0] = found[0] + part
    return [torch.cat(found) if len(found) > 1 else found[0] for found in parts]
