"""Find the fewest steps after which a model is within a budget that is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from fxprune.passes.ir.slices import Slicer
from fxprune.selection.allocation import Allocator, levels_after
from fxprune.selection.budgets import Budget
from fxprune.selection.costs import Costs

CLOSE = 0.995  # the share of its budget that an allocation has to use to be left as it is


class Attempt(NamedTuple):
    """What an allocation keeps, the slicer of it, and its cost."""

    kept: Tensor
    slicer: Slicer
    cost: float


def meet_budget(budget: Budget, allocator: Allocator, costs: Costs) -> tuple[Tensor, Slicer]:
    """What is kept after the fewest steps that bring the cost within the budget, less those that turn out not to be needed.

    Raises: PruneError where the budget is above the original or below the least cost there can be.
    """
    original = budget.cost(costs)
    limit = budget.limit(original)

    def attempt(levels: Sequence[int]) -> Attempt:
        kept, slicer = allocator.apply(levels)
        return Attempt(kept, slicer, budget.cost(costs, slicer))

    start = attempt([0] * len(allocator.candidates))
    if start.cost <= limit:
        return start.kept, start.slicer
    steps = allocator.order_steps()
    levels = lambda n: levels_after(allocator.candidates, steps[:n])  # noqa: E731
    low, high = 0, len(steps)  # over the budget after `low` steps, within it after `high`
    found = attempt(levels(high))
    if found.cost > limit:
        raise budget.unreachable(found.cost, original)
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(levels(middle))
        if tried.cost <= limit:
            high, found = middle, tried
        else:
            low = middle
    if found.cost < CLOSE * limit:
        found = return_surplus(levels(high), steps[:high], found, attempt, limit)
    return found.kept, found.slicer


def return_surplus(
    levels: list[int], steps: Sequence[int], found: Attempt, attempt: Callable[[Sequence[int]], Attempt], limit: float
) -> Attempt:
    """Use what a large last step left of the budget: the level of each group is lowered as far as the budget allows.

    The group of the last step comes first, since what it lost is the most important.

    Arguments:
        levels: of each group after `steps`; changed.
        found: what they come to.
        attempt: from levels to what they come to.
        limit: the largest cost.
    """
    for i in dict.fromkeys(reversed(steps)):
        low, high = 0, levels[i]  # over the budget below `low`, within it at `high`
        while low < high:
            middle = (low + high) // 2
            tried = attempt([*levels[:i], middle, *levels[i + 1 :]])
            if found.cost <= tried.cost <= limit:
                high, found = middle, tried
            else:
                low = middle + 1
        levels[i] = high
        if found.cost >= CLOSE * limit:
            break
    return found
