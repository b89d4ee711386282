"""Latency: how long a forward takes on the model's own device, and the fewest steps that bring it within a budget.

A timetable (see `timetable.py`) proposes how many steps to take, a few numbers of them at once; what they leave is pruned,
and timed in turns with the original and with one another. What was measured corrects the next proposals. So the table only
decides how many proposals it takes, and what is returned was measured to be within the budget.

Models are compared within one window of time only: on a machine that others use too, what a model takes of another's time
moves by several per cent from one half minute to the next.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprune.budget import Budget, Settle, spoken, unreachable
from fxprune.counting import Costs
from fxprune.errors import PruneError
from fxprune.passes.couple import Solution
from fxprune.passes.kept import Cutter
from fxprune.passes.shrink import shrink
from fxprune.passes.tree import named_tensors, private_copy
from fxprune.ranking import Ladder, climbed, removed
from fxprune.timetable import Timetable

FRIENDLY = 8  # channels in a multiple of which kernels are written; preferred where the request names none
CLOSE, LOOSE = 0.02, 0.15  # good enough is what leaves as little of its budget as can be told, within these limits
MARGIN = 0.01  # proposals aim this far below the budget,
SPREAD = 0.08  # and at first so far to both sides of that
ABREAST = 3  # proposals that are timed in one window
NEAR = 0.1  # what is this close to the budget is timed for longer, until its error is
PRECISE = 0.01  # no more than this, or
PATIENCE = 12.0  # seconds are over
ROUNDS = 8
Run = Callable[[], object]
Stopwatch = Callable[..., list[list[float]]]


@dataclass(frozen=True)
class Latency:
    """Measured seconds of one forward of the example inputs, before and after pruning.

    Attributes:
        original: the median over all runs of the original.
        pruned: that of the pruned model, run in turns with it.
        share: the median over all turns of what the pruned model took of the original's time. What slows a machine down for
            a while slows both down, so turns agree better than times do.
        runs: how many of each.
        spread: half of the turns differ from `share` by at most this part of it.
        device: where they ran.
        table: for each family (its first parameter) how many units were left and the seconds the model was predicted to
            take with only that family narrowed.
    """

    original: float
    pruned: float
    share: float
    runs: int
    spread: float
    device: str
    table: tuple[tuple[str, tuple[tuple[int, float], ...]], ...] = field(default=(), repr=False)

    @property
    def error(self) -> float:
        """The standard error of `share`, as a part of it.

        Of normal numbers half lie within 0.6745 standard deviations, and the median of n has a standard error of 1.2533 of
        them over the square root of n.
        """
        return 1.2533 / 0.6745 * self.spread / self.runs**0.5

    def __str__(self) -> str:
        return (
            f"{spoken('latency', self.original)} before, {spoken('latency', self.pruned)} now ({self.share:.0%}) on"
            f" {self.device}: medians of {self.runs} runs in turns, half of them within {self.spread:.0%}"
        )


def stopwatch(runs: Sequence[Run], device: torch.device, *, least: int = 7, seconds: float = 0.4) -> list[list[float]]:
    """Seconds of some functions, run in turns after a warm-up: at least `least` times, longer if that took little time."""
    wait = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    for run in [*runs, *runs]:
        run()
    found: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds * len(runs)
    while len(found[0]) < least or (len(found[0]) < 100 and time.perf_counter() < end):
        for run, times in zip(runs, found, strict=True):
            wait()
            start = time.perf_counter()
            run()
            wait()
            times.append(time.perf_counter() - start)
    return found


class Trial:
    """The model on its own device and the example inputs, to be timed against what a choice leaves of it.

    Arguments:
        model: the original.
        args, kwargs: the example inputs.
        coupled: captures and couples the model; a capture can be cut only once.
        clock: what times functions; see `stopwatch`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        coupled: Callable[[], Solution],
        clock: Stopwatch | None = None,
    ) -> None:
        self.model, self.args, self.kwargs, self.coupled = model, args, kwargs, coupled
        self.clock = clock or stopwatch
        self.device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
        self.original = private_copy(model).eval()
        self.found: Latency | None = None

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Put random state back, whatever the model draws when it is run."""
        return torch.random.fork_rng(devices=[self.device.index or 0] if self.device.type == "cuda" else [])

    def run(self, model: nn.Module) -> Run:
        def forward() -> object:
            with torch.no_grad():
                return model(*self.args, **self.kwargs)

        return forward

    def seconds(self, run: Run) -> float:
        """The time of a single call; several hundred of them make a timetable, so few runs must do."""
        with torch.no_grad():
            return statistics.median(self.clock([run], self.device, least=3, seconds=0.01)[0])

    def original_seconds(self) -> float:
        """The time of the original."""
        return statistics.median(self.clock([self.run(self.original)], self.device)[0])

    def prune(self, kept: Tensor, unit: Tensor) -> nn.Module:
        """What a choice leaves of the model: the labels that stay, of those whose classes are `unit`."""
        solution = self.coupled()
        assert torch.equal(solution.unit, unit), "a model is coupled in the same way each time"
        return shrink(self.model, solution, kept).eval()

    def measure(self, models: Sequence[nn.Module], budget: Budget) -> list[Latency]:
        """Time models and the original in turns; what is within the budget must be so in at least twice as many runs.

        They are timed until it is known on which side those near the budget are, or for as long as `PATIENCE` lasts.
        """
        runs = [self.run(model) for model in (self.original, *models)]
        times: list[list[float]] = [[] for _ in runs]
        found: list[Latency] = []
        again = True
        while again or (any(unsure(budget, f) for f in found) and sum(map(sum, times)) < PATIENCE):
            for mine, more in zip(times, self.clock(runs, self.device), strict=True):
                mine += more
            again = not found
            found = [summary(times[0], mine, self.device) for mine in times[1:]]
            again = again and any(used(budget, f) <= 1 for f in found)
        return found


def summary(original: Sequence[float], pruned: Sequence[float], device: torch.device) -> Latency:
    """Medians of what was measured, and how far the turns are from them."""
    shares = [b / a for a, b in zip(original, pruned, strict=True)]
    share = statistics.median(shares)
    spread = statistics.median(abs(s - share) / share for s in shares)
    return Latency(statistics.median(original), statistics.median(pruned), share, len(shares), spread, str(device))


def used(budget: Budget, found: Latency) -> float:
    """The part of a budget that a measured latency takes; up to 1 it is within it."""
    return found.share / float(budget.amount) if budget.relative else found.pruned / budget.of(found.original)


def too_slow(budget: Budget, found: Latency) -> PruneError:
    """The error for a budget that the least there can be does not meet."""
    return unreachable(budget, used(budget, found) * budget.of(found.original), found.original)


def unsure(budget: Budget, found: Latency) -> bool:
    """Whether more runs would tell more about being within a budget."""
    return abs(used(budget, found) - 1) <= NEAR + 2 * found.error and found.error > PRECISE


def timely(
    budget: Budget,
    ladders: Sequence[Ladder],
    sequence: Sequence[int],
    costs: Costs,
    settle: Settle,
    trial: Trial,
    names: Sequence[str],
) -> tuple[Tensor, Cutter]:
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
    size = len(costs.solution.unit)
    total = trial.original_seconds()
    share = budget.limit(total) / total
    settled: dict[int, tuple[Tensor, Cutter]] = {}
    pruned: dict[int, nn.Module] = {}

    def measured(proposals: Sequence[int]) -> list[Latency]:
        for steps in [steps for steps in pruned if steps not in proposals]:
            del pruned[steps]
        for steps in [steps for steps in proposals if steps not in pruned]:
            settled[steps] = settle(removed(ladders, climbed(ladders, sequence[:steps]), size))
            pruned[steps] = trial.prune(settled[steps][0], costs.solution.unit)
        return trial.measure([pruned[steps] for steps in proposals], budget)

    if share >= 1:
        trial.found = measured([0])[0]
        return settled[0]
    table = Timetable(ladders, costs, trial.device, trial.seconds, total)
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
