"""Find the fewest steps after which the measured latency is within a budget.

A latency model (see `latency_model.py`) proposes how many steps to take, a few numbers of them at once. The models they
leave are pruned and timed in turns with the original and with one another, and what was measured corrects the next
proposals. So the model only decides how many proposals are needed: what is returned was measured to be within the budget.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.allocation import Allocator, levels_after
from fxprune.selection.budgets import Budget
from fxprune.selection.costs import Costs
from fxprune.selection.latency import Latency, LatencyProbe, too_slow, used_share
from fxprune.selection.latency_model import LatencyModel

CLOSE, LOOSE = 0.02, 0.15  # the search ends where this share of the budget is left, or as little as can be told between them
MARGIN = 0.01  # proposals aim this far below the budget,
SPREAD = 0.08  # and at first so far to both sides of that
ABREAST = 3  # proposals that are timed in one window
ROUNDS = 8


def meet_latency(budget: Budget, allocator: Allocator, costs: Costs, probe: LatencyProbe) -> tuple[Tensor, Slicer]:
    """What is kept after few steps whose measured latency is within the budget; `probe.found` is what was measured.

    Arguments:
        budget: what may stay.
        allocator: what every group can lose.
        costs: knows the program's calls.
        probe: measures pruned models.

    Raises: PruneError where the budget is above the original or below the least that was measured.
    """
    total = probe.original_seconds()
    share = budget.limit(total) / total
    kept: dict[int, tuple[Tensor, Slicer]] = {}
    pruned: dict[int, nn.Module] = {}

    def measure(proposals: Sequence[int]) -> list[Latency]:
        for steps in [steps for steps in pruned if steps not in proposals]:
            del pruned[steps]
        for steps in [steps for steps in proposals if steps not in pruned]:
            kept[steps] = allocator.apply(levels_after(allocator.candidates, order[:steps]))
            pruned[steps] = probe.prune(kept[steps][1])
        return probe.measure([pruned[steps] for steps in proposals], budget)

    order: list[int] = []
    if share >= 1:
        probe.found = measure([0])[0]
        return kept[0]
    model = LatencyModel(allocator.candidates, costs, probe.device, probe.seconds, total, allocator.lost)
    allocator.weigh(model, model.without)
    order = allocator.order_steps()
    predict = lambda steps: model(levels_after(allocator.candidates, order[:steps]))  # noqa: E731
    steps, found = bracket_budget(budget, share, len(order), predict, measure)
    probe.found = replace(found, table=tuple((name, model.alone(i)) for i, name in enumerate(allocator.names)))
    return kept[steps]


class Point(NamedTuple):
    """A number of steps, the predicted share of the original's time after them, and the share of the budget used."""

    steps: int
    predicted: float
    used: float


def bracket_budget(
    budget: Budget,
    share: float,
    steps: int,
    predict: Callable[[int], float],
    measure: Callable[[Sequence[int]], Sequence[Latency]],
) -> tuple[int, Latency]:
    """How many steps to take, and what was measured there, in the last window of time.

    The first proposals lie around the budget as predicted. Then the fewest steps that were within the budget are timed
    again, beside two proposals between them and the most steps that were over it: where a line through both, over what was
    predicted for them, meets the budget; and just below that, or halfway where such a line leads nowhere. It ends with steps
    that leave little of the budget unused, with two that follow one another, or after `ROUNDS` windows.

    Arguments:
        budget: what may stay, a `share` of the original.
        steps: how many there are.
        predict: predicted seconds after some of them.
        measure: the latencies after some numbers of them, measured in one window.
    """
    whole = predict(0)
    start = over = Point(0, 1.0, 1 / share)
    within: Point | None = None
    answer: tuple[int, Latency] | None = None
    halved = True  # whether the last window brought the two together by half

    def fewest(goal: float) -> int:
        """Steps after which the line through both points meets a share of the budget; at first by prediction alone."""
        at = interpolate(over, within or Point(steps, 0.0, 0.0), goal) * whole
        return min(1 + bisect_left(range(1, steps + 1), True, key=lambda k: predict(k) <= at), steps)

    for turn in progress_bar(range(ROUNDS), "latency search", "window"):
        if within is None:
            least = min(over.steps + 1, steps)
            proposals = {max(fewest((1 - MARGIN) * (1 + SPREAD * i)), least) for i in (1, 0, -1)}
            proposals |= {steps} if turn >= ROUNDS // 2 else set()
        else:
            between = fewest(1 - MARGIN), fewest(1 - 2 * MARGIN) if halved else (over.steps + within.steps + 1) // 2
            proposals = {within.steps, *(min(max(k, over.steps + 1), within.steps) for k in between)}
            proposals |= {max(over.steps, 1)} if len(proposals) < ABREAST else set()
        window = sorted(proposals)
        found = measure(window)
        points = [Point(k, predict(k) / whole, used_share(budget, f)) for k, f in zip(window, found, strict=True)]
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


def interpolate(a: Point, b: Point, goal: float) -> float:
    """The predicted share at which a line through two points meets a part of the budget; through the origin if it falls."""
    slope = (a.used - b.used) / (a.predicted - b.predicted) if a.predicted != b.predicted else 0.0
    if slope <= 0:
        return a.predicted * goal / a.used
    return a.predicted + (goal - a.used) / slope
