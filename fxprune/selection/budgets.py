"""Budgets: how much of a model may stay, and the fewest steps that get there.

The cost of a choice is computed from the plan: from the shapes that the labels say every tensor will have. Nothing is
pruned on the way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.costs import Costs
from fxprune.selection.ladders import Ladder, climbed, removed

KINDS = ("params", "macs", "memory")  # what is computed; latency is measured
FIX = "one of ratio, params, macs, memory and latency"
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
UNITS = {"params": "parameters", "macs": "multiply-accumulates", "memory": "bytes"}
CLOSE = 0.995  # a choice that uses this much of its budget is not looked at again
SettleBudget = Callable[[np.ndarray], tuple[Tensor, Slicer]]
Choice = tuple[Tensor, Slicer, int]


@dataclass(frozen=True, slots=True)
class Budget:
    """What may stay: `kind` is one of params, macs, memory and latency; `amount` a share of the original, or absolute.

    >>> Budget("params", 0.5).of(100), Budget("params", 30).of(100), Budget("latency", "20ms").of(0.05)
    (50.0, 30.0, 0.02)
    """

    kind: str
    amount: float | str

    def of(self, original: float) -> float:
        """The largest cost that is within it."""
        if isinstance(self.amount, str):
            return seconds(self.amount) or 0.0
        return float(self.amount * original if self.relative else self.amount)

    @property
    def relative(self) -> bool:
        """Whether it is a share of the original."""
        return isinstance(self.amount, float) and self.amount <= 1

    def limit(self, original: float) -> float:
        """The same; raises PruneError for a budget above the original."""
        if self.of(original) <= original:
            return self.of(original)
        verb = "takes" if self.kind == "latency" else "has"
        most = f"'{original * 1e3:.3g}ms'" if self.kind == "latency" else original
        raise PruneError(
            f"{self.kind}={self.amount!r} is above the original, which {verb} {spoken(self.kind, original)}",
            fix=f"{self.kind}=0.5 keeps half; an absolute amount is at most {most}",
        )


def seconds(text: str) -> float | None:
    """What a time such as "20ms", "1.5 s" or "800us" says; None for what is no time.

    >>> seconds("20ms"), seconds("1.5 s"), seconds("soon")
    (0.02, 1.5, None)
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?(s|ms|us)", text.strip())
    return float(found[1]) * SECONDS[found[2]] if found else None


def spoken(kind: str, cost: float) -> str:
    """A cost with its unit.

    >>> spoken("params", 25557032), spoken("latency", 0.0123), spoken("latency", 1.5)
    ('25,557,032 parameters', '12.3 ms', '1.5 s')
    """
    if kind == "latency":
        return f"{cost:.3g} s" if cost >= 1 else f"{cost * 1e3:.3g} ms"
    return f"{cost:,} {UNITS[kind]}"


def budget_of(given: Mapping[str, float | str | None]) -> Budget | None:
    """The one budget that is asked for, if any; raises PruneError for several, and for what is no amount."""
    asked = {kind: amount for kind, amount in given.items() if amount is not None}
    if len(asked) > 1:
        raise PruneError(f"{' and '.join(asked)} are both given", fix=FIX)
    for kind, amount in asked.items():
        if kind == "latency" and isinstance(amount, str):
            if not seconds(amount):
                raise PruneError(
                    f"latency must be a share up to 1, seconds above 1, or a time, not {amount!r}",
                    fix="latency=0.5 keeps half of the original's; latency='20ms' is absolute",
                )
            return Budget(kind, amount)
        number = isinstance(amount, int | float) and not isinstance(amount, bool)
        if not number or not 0 < float(amount) < math.inf:
            raise PruneError(
                f"{kind} must be a positive number, not {amount!r}",
                fix=f"{kind}=0.5 keeps half of the original; a number above 1 is absolute",
            )
        return Budget(kind, amount)
    return None


def met(
    budget: Budget, ladders: Sequence[Ladder], sequence: Sequence[int], costs: Costs, settle: SettleBudget, size: int
) -> tuple[Tensor, Slicer]:
    """The choice of the fewest steps whose cost is within the budget, less those that turn out not to be needed.

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

    def after(rungs: Sequence[int]) -> tuple[Tensor, Slicer, int]:
        kept, slicer = settle(removed(ladders, rungs, size))
        return kept, slicer, costs.of(slicer, budget.kind)

    whole = after([0] * len(ladders))
    if whole[2] <= limit:
        return whole[:2]
    low, high = 0, len(sequence)
    found = after(climbed(ladders, sequence))
    if found[2] > limit:
        raise unreachable(budget, found[2], costs.original(budget.kind))
    while high - low > 1:  # over at `low`, within at `high`
        middle = (low + high) // 2
        tried = after(climbed(ladders, sequence[:middle]))
        if tried[2] <= limit:
            high, found = middle, tried
        else:
            low = middle
    if found[2] < CLOSE * limit:
        found = given_back(climbed(ladders, sequence[:high]), sequence[:high], found, after, limit)
    return found[:2]


def given_back(
    rungs: list[int], taken: Sequence[int], found: Choice, after: Callable[[Sequence[int]], Choice], limit: float
) -> Choice:
    """What is left of the budget by a last step that was large, filled: each ladder steps back as far as fits.

    The ladder that was climbed last goes first: what it lost is worth most.

    Arguments:
        rungs: how far each ladder is climbed.
        taken: the steps that led there.
        found: the choice there, and its cost.
        after: the choice at some rungs, and its cost.
        limit: the largest cost.
    """
    for i in dict.fromkeys(reversed(taken)):
        low, high = 0, rungs[i]  # over at `low`, unless that is 0; within at `high`
        while low < high:
            middle = (low + high) // 2
            tried = after([*rungs[:i], middle, *rungs[i + 1 :]])
            if found[2] <= tried[2] <= limit:
                high, found = middle, tried
            else:
                low = middle + 1
        rungs[i] = high
        if found[2] >= CLOSE * limit:
            break
    return found


def unreachable(budget: Budget, least: float, original: float) -> PruneError:
    share = math.ceil(least / original * 1000) / 1000
    of = f"{least:,} of" if budget.kind != "latency" else f"{spoken('latency', least)} of"
    return PruneError(
        f"{budget.kind}={budget.amount!r} cannot be met: the least that can is {of} {spoken(budget.kind, original)}",
        fix=f"{budget.kind}={share} or more, a lower floor, or freeze less",
    )
