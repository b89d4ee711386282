"""Budgets: how much of a model may stay, and the fewest steps that get there.

The cost of a choice is computed from the plan: from the shapes that the labels say every tensor will have. Nothing is
pruned on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fxprune.counting import Costs
from fxprune.errors import PruneError
from fxprune.passes.kept import Cutter
from fxprune.ranking import Ladder, climbed, removed

KINDS = ("params", "macs", "memory")
UNITS = {"params": "parameters", "macs": "multiply-accumulates", "memory": "bytes"}
Settle = Callable[[np.ndarray], tuple[Tensor, Cutter]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What may stay: `kind` is one of params, macs and memory; `amount` a share of the original, or a number."""

    kind: str
    amount: float

    def limit(self, original: int) -> float:
        """The largest cost that is within it; raises PruneError for a budget above the original."""
        if isinstance(self.amount, float) and self.amount <= 1:
            return self.amount * original
        if self.amount > original:
            raise PruneError(
                f"{self.kind}={self.amount!r} is above the original, which has {original:,} {UNITS[self.kind]}",
                fix=f"{self.kind}=0.5 keeps half; an absolute amount is at most {original}",
            )
        return float(self.amount)


def budget_of(given: Mapping[str, float | None]) -> Budget | None:
    """The one budget that is asked for, if any; raises PruneError for several, and for what is no amount."""
    asked = {kind: amount for kind, amount in given.items() if amount is not None}
    if len(asked) > 1:
        raise PruneError(f"{' and '.join(asked)} are both given", fix="one of ratio, params, macs and memory")
    for kind, amount in asked.items():
        number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if not number or not math.isfinite(amount) or amount <= 0:
            raise PruneError(
                f"{kind} must be a positive number, not {amount!r}",
                fix=f"{kind}=0.5 keeps half of the original; a number above 1 is absolute",
            )
        return Budget(kind, amount)
    return None


def met(
    budget: Budget, ladders: Sequence[Ladder], sequence: Sequence[int], costs: Costs, settle: Settle, size: int
) -> tuple[Tensor, Cutter]:
    """The choice of the fewest steps whose cost is within the budget.

    Arguments:
        budget: what may stay.
        ladders: what every pool can lose.
        sequence: the order of their steps.
        costs: what a choice costs.
        settle: from removed classes to what is kept, such that every tensor is a rectangle.
        size: number of labels.

    Raises: PruneError where the budget is above the original or below the least that can be met.
    """
    limit = budget.limit(costs.original(budget.kind))

    def after(steps: int) -> tuple[Tensor, Cutter, int]:
        kept, cutter = settle(removed(ladders, climbed(ladders, sequence[:steps]), size))
        return kept, cutter, costs.of(cutter, budget.kind)

    kept, cutter, cost = after(0)
    if cost <= limit:
        return kept, cutter
    low, high = 0, len(sequence)
    kept, cutter, least = after(high)
    if least > limit:
        raise unreachable(budget, limit, least, costs.original(budget.kind))
    while high - low > 1:  # over at `low`, within at `high`
        middle = (low + high) // 2
        found = after(middle)
        if found[2] <= limit:
            high, (kept, cutter, _) = middle, found
        else:
            low = middle
    return kept, cutter


def unreachable(budget: Budget, limit: float, least: int, original: int) -> PruneError:
    share = math.ceil(least / original * 1000) / 1000
    return PruneError(
        f"{budget.kind}={budget.amount!r} cannot be met: the least that can is {least:,} of {original:,} {UNITS[budget.kind]}",
        fix=f"{budget.kind}={share} or more, a lower floor, or freeze less",
    )
