"""Latency: how long a forward takes on the model's own device, and the fewest steps that bring it within a budget.

A timetable (see `timetable.py`) proposes how many steps to take, a few numbers of them at once; what they leave is pruned,
and timed in turns with the original and with one another. What was measured corrects the next proposals. So the table only
decides how many proposals it takes, and what is returned was measured to be within the budget.

Models are compared within one window of time only: on a machine that others use too, what a model takes of another's time
moves by several per cent from one half minute to the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from fxprune.passes.ir.slices import Slicer
from fxprune.selection.budgets import Budget, SettleBudget
from fxprune.selection.costs import Costs
from fxprune.selection.ladders import Ladder, climbed, removed
from fxprune.selection.latency import (
    ABREAST,
    CLOSE,
    LOOSE,
    MARGIN,
    ROUNDS,
    SPREAD,
    Latency,
    LatencyProbe,
    too_slow,
    used,
)
from fxprune.selection.latency_model import LatencyModel


def timely(
    budget: Budget,
    ladders: Sequence[Ladder],
    sequence: Sequence[int],
    costs: Costs,
    settle: SettleBudget,
    trial: LatencyProbe,
    names: Sequence[str],
) -> tuple[Tensor, Slicer]:
    """The choice of few steps whose measured latency is within the budget; `trial.found` then says what was measured.

    Arguments:
        budget: what may stay.
        ladders: what every pool can lose; `names` says what each is called.
        sequence: the order of their steps.
        costs: knows the program's calls.
        settle: from removed classes to what is kept, such that every tensor is a rectangle.
        trial: times choices.

    Raises: PruneError where the budget is above the original or below the least that was measured.
    """
    size = len(costs.solution.unit_of)
    total = trial.original_seconds()
    share = budget.limit(total) / total
    settled: dict[int, tuple[Tensor, Slicer]] = {}
    pruned: dict[int, nn.Module] = {}

    def measured(proposals: Sequence[int]) -> list[Latency]:
        for steps in [steps for steps in pruned if steps not in proposals]:
            del pruned[steps]
        for steps in [steps for steps in proposals if steps not in pruned]:
            settled[steps] = settle(removed(ladders, climbed(ladders, sequence[:steps]), size))
            pruned[steps] = trial.prune(settled[steps][0], costs.solution.unit_of)
        return trial.measure([pruned[steps] for steps in proposals], budget)

    if share >= 1:
        trial.found = measured([0])[0]
        return settled[0]
    table = LatencyModel(ladders, costs, trial.device, trial.seconds, total)
    steps, found = chase(budget, share, len(sequence), lambda k: table(climbed(ladders, sequence[:k])), measured)
    trial.found = replace(found, table=tuple((name, table.alone(i)) for i, name in enumerate(names)))
    return settled[steps]


class Point(NamedTuple):
    """A number of steps, the share of the original's time after them by the timetable, and the part of the budget used."""

    steps: int
    predicted: float
    used: float


def chase(
    budget: Budget,
    share: float,
    steps: int,
    predicted: Callable[[int], float],
    measured: Callable[[Sequence[int]], Sequence[Latency]],
) -> tuple[int, Latency]:
    """How many steps to take, and what was measured there, in the last window of time.

    At first proposals lie around the budget as the table has it. Then the fewest steps that were within the budget are timed
    again, beside two proposals between them and the most steps that were over it: where a line through both, over what was
    predicted for them, meets the budget; and just below that, or halfway where such a line leads nowhere. It ends with steps
    that leave little of the budget unused, with two that follow one another, or after `ROUNDS` windows.

    Arguments:
        budget: what may stay, a `share` of the original.
        steps: how many there are.
        predicted: seconds after some of them, by the timetable.
        measured: the latencies after some numbers of them, timed in one window.
    """
    whole = predicted(0)
    start = over = Point(0, 1.0, 1 / share)
    within: Point | None = None
    answer: tuple[int, Latency] | None = None
    halved = True  # whether the last window brought the two together by half

    def fewest(goal: float) -> int:
        """Steps after which the line through both meets a part of the budget; at first the table is taken at its word."""
        at = crossing(over, within or Point(steps, 0.0, 0.0), goal) * whole
        return min(1 + bisect_left(range(1, steps + 1), True, key=lambda k: predicted(k) <= at), steps)

    for turn in range(ROUNDS):
        if within is None:
            least = min(over.steps + 1, steps)
            asked = {max(fewest((1 - MARGIN) * (1 + SPREAD * i)), least) for i in (1, 0, -1)}
            asked |= {steps} if turn >= ROUNDS // 2 else set()
        else:
            between = fewest(1 - MARGIN), fewest(1 - 2 * MARGIN) if halved else (over.steps + within.steps + 1) // 2
            asked = {within.steps, *(min(max(k, over.steps + 1), within.steps) for k in between)}
            asked |= {max(over.steps, 1)} if len(asked) < ABREAST else set()
        window = sorted(asked)
        found = measured(window)
        points = [Point(k, predicted(k) / whole, used(budget, f)) for k, f in zip(window, found, strict=True)]
        best = next((i for i, point in enumerate(points) if point.used <= 1), None)
        if best is None:
            over, within, halved = points[-1], None, True
            if over.steps == steps:
                raise too_slow(budget, found[-1])
            continue
        apart = (within.steps if within else steps) - over.steps
        within, answer = points[best], (window[best], found[best])
        over = points[best - 1] if best else over if over.steps < within.steps else start
        halved = 2 * (within.steps - over.steps) <= apart
        adjoining = best > 0 and over.steps == within.steps - 1
        if adjoining or 1 - within.used <= min(max(CLOSE, found[best].error), LOOSE):
            break
    assert answer is not None, "all steps are proposed while nothing was found, and refused where they are not enough"
    return answer


def crossing(a: Point, b: Point, goal: float) -> float:
    """The predicted share at which a line through two points meets a part of the budget; through the origin if it falls."""
    slope = (a.used - b.used) / (a.predicted - b.predicted) if a.predicted != b.predicted else 0.0
    if slope <= 0:
        return a.predicted * goal / a.used
    return a.predicted + (goal - a.used) / slope
