"""The order in which units merge: each time the two clusters for which it costs least."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def merge_errors(rows: Tensor) -> np.ndarray:
    """What the merge in which each unit goes adds to the error, as a share of the sum of squares; shape (units,).

    Of two clusters that merge the larger one stays. Two of a and b units whose means differ by d add a b / (a + b) d^2, and
    what a third one would add after that follows from what it would have added to each (Lance and Williams).
    The unit that is left in the end scores twice the last merge.

    >>> merge_errors(torch.tensor([[1.0], [4.0], [2.0]]).double()).round(3).tolist()
    [0.397, 0.198, 0.024]
    """
    count, total = len(rows), float(rows.square().sum())
    if not np.isfinite(total):
        return np.full(count, np.nan)
    cost = (torch.cdist(rows, rows).square() / 2 / (total or 1.0)).numpy()
    np.fill_diagonal(cost, np.inf)
    nearest, least = cost.argmin(1), cost.min(1)
    size, score, last, stays = np.ones(count), np.zeros(count), -np.inf, 0
    for _ in range(count - 1):
        i = int(least.argmin())
        stays, goes = sorted((i, int(nearest[i])), key=lambda k: (-size[k], k))
        between = cost[stays, goes]
        last = score[goes] = max(float(between), np.nextafter(last, np.inf), 0.0)
        with np.errstate(invalid="ignore"):
            row = (size[stays] + size) * cost[stays] + (size[goes] + size) * cost[goes] - size * between
        row = row / (size[stays] + size[goes] + size)
        row[~np.isfinite(row)] = np.inf
        row[[stays, goes]] = np.inf
        size[stays] += size[goes]
        cost[stays], cost[:, stays], cost[goes], cost[:, goes] = row, row, np.inf, np.inf
        least[goes] = np.inf
        closer = row < least
        nearest[closer], least[closer] = stays, row[closer]
        stale = np.isfinite(least) & ~closer & np.isin(nearest, (stays, goes))
        for k in [*np.flatnonzero(stale).tolist(), stays]:
            nearest[k], least[k] = cost[k].argmin(), cost[k].min()
    score[stays] = 2 * max(last, 0.0) + np.nextafter(0, 1)
    return score
