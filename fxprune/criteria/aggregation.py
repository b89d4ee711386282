"""How the scores of one unit in several layers become one, and how families that compete are made comparable."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

Row = tuple[np.ndarray, np.ndarray]


def sums(rows: Iterable[Row], size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each unit the sum of its scores, and how many there are."""
    total, count = np.zeros(size), np.zeros(size)
    for units, values in rows:
        total[units] += values
        count[units] += 1
    return total, count


def mean(rows: Iterable[Row], size: int) -> np.ndarray:
    total, count = sums(rows, size)
    return total / np.maximum(count, 1)


def largest(rows: Iterable[Row], size: int) -> np.ndarray:
    best = np.full(size, -np.inf)
    for units, values in rows:
        best[units] = np.maximum(best[units], values)  # NaN stays NaN
    return np.where(np.isneginf(best), 0.0, best)


def product(rows: Iterable[Row], size: int) -> np.ndarray:
    total, met = np.ones(size), np.zeros(size, bool)
    for units, values in rows:
        total[units] *= values
        met[units] = True
    return np.where(met, total, 0.0)


def first(rows: Iterable[Row], size: int) -> np.ndarray:
    total, met = np.zeros(size), np.zeros(size, bool)
    for units, values in rows:
        fresh = ~met[units]
        total[units[fresh]] = values[fresh]
        met[units] = True
    return total


def geometric(rows: Iterable[Row], size: int) -> np.ndarray:
    """The geometric mean of magnitudes; a layer that gives zero makes the unit's score zero."""
    with np.errstate(divide="ignore"):
        logs, count = sums(((units, np.log(np.abs(values))) for units, values in rows), size)
    return np.where(count > 0, np.exp(logs / np.maximum(count, 1)), 0.0)


REDUCE: dict[str, Callable[[Iterable[Row], int], np.ndarray]] = {
    "sum": lambda rows, size: sums(rows, size)[0],
    "mean": mean,
    "max": largest,
    "prod": product,
    "first": first,
    "geometric": geometric,
}


def scaled(values: np.ndarray, by: float) -> np.ndarray:
    return values / by if by > 0 else values


def lamp(values: np.ndarray) -> np.ndarray:
    """Each score over the sum of those that are not smaller (Lee et al., arXiv:2010.07611, equation 2), times their number.

    Equal scores are told apart by their place, as the paper does with its sorting. The paper scores single weights. Of units
    one is 1/n of its family; without the factor one threshold would leave families of any size the same number of units.

    >>> lamp(np.array([3.0, 1.0])).tolist()
    [2.0, 0.5]
    """
    order = np.argsort(values, kind="stable")
    remaining = np.cumsum(values[order][::-1])[::-1]
    made = np.empty_like(values)
    made[order] = values[order] / np.where(remaining > 0, remaining, 1.0)
    return len(values) * made


LOSS = ("loss", "squared loss")  # scores that estimate by how much the loss changes: one scale for all families
RELATIVE = ("mean", "max", "sum")  # scores that say what part of its family a unit is, where it goes alone
NORMALISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda values: values,
    "loss": np.abs,
    "squared loss": lambda values: np.sqrt(np.abs(values)),
    "mean": lambda values: scaled(values, float(np.abs(values).mean())),
    "share": lambda values: scaled(values, float(np.abs(values).mean())),  # likewise, of units that go one after the other
    "max": lambda values: scaled(values, float(np.abs(values).max())),
    "sum": lambda values: scaled(values, float(np.abs(values).sum())),
    "standardise": lambda values: scaled(values - values.mean(), float(values.std())),
    "lamp": lamp,
}
