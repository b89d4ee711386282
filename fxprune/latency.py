"""Latency: how long a forward takes on the model's own device, and the fewest steps that bring it within a budget.

A timetable (see `timetable.py`) proposes how many steps to take; what it proposes is pruned, and timed in turns with the
original. What was measured corrects the next proposal. So the table only decides how many proposals it takes, and what is
returned was measured to be within the budget.
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
MARGIN = 0.01  # proposals stay this far below the budget
NEAR = 0.1  # what is this close to the budget is timed for longer, until its error is
PRECISE = 0.01  # no more than this, or
PATIENCE = 8.0  # seconds are over
ROUNDS = 12
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


class Point(NamedTuple):
    """A choice's share of the original's time, as the timetable says and as it was measured."""

    predicted: float
    measured: float


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

    def measure(self, kept: Tensor, unit: Tensor, budget: Budget) -> Latency:
        """Time a choice and the original in turns; what is within the budget must be so in at least twice as many runs.

        What is near the budget is timed until it is known which side it is on, or for as long as `PATIENCE` lasts.

        Arguments:
            kept: which labels stay, of those whose classes are `unit`.
            budget: what may stay.
        """
        solution = self.coupled()
        assert torch.equal(solution.unit, unit), "a model is coupled in the same way each time"
        pruned = shrink(self.model, solution, kept).eval()
        runs = [self.run(self.original), self.run(pruned)]
        before, after = self.clock(runs, self.device)
        found = summary(before, after, self.device)
        again = used(budget, found) <= 1
        while again or (unsure(budget, found) and sum(before) + sum(after) < PATIENCE):
            more = self.clock(runs, self.device)
            before, after = before + more[0], after + more[1]
            found, again = summary(before, after, self.device), False
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

    def measured(steps: int) -> Latency:
        settled[steps] = settle(removed(ladders, climbed(ladders, sequence[:steps]), size))
        return trial.measure(settled[steps][0], costs.solution.unit, budget)

    if share >= 1:
        trial.found = measured(0)
        return settled[0]
    table = Timetable(ladders, costs, trial.device, trial.seconds, total)
    steps, found = chase(budget, share, len(sequence), lambda k: table(climbed(ladders, sequence[:k])), measured)
    trial.found = replace(found, table=tuple((name, table.alone(i)) for i, name in enumerate(names)))
    return settled[steps]


def chase(
    budget: Budget, share: float, steps: int, predicted: Callable[[int], float], measured: Callable[[int], Latency]
) -> tuple[int, Latency]:
    """How many steps to take, and what was measured there.

    What was measured to be over the budget lies below what was measured to be within it; the next proposal lies between,
    where a line through the last two measurements, over what was predicted for them, meets the budget. Where nothing is left
    between and much of the budget is unused, what was over it by no more than its error is looked at once more.

    Arguments:
        budget: what may stay, a `share` of the original.
        steps: how many there are.
        predicted: seconds after some of them, by the timetable.
        measured: the latency after some of them.
    """
    low, high, best, repeated, before = 0, steps, None, 0, False
    surely, reopened = 0, False  # the most steps after which the time was over the budget, and not by chance
    over, beside = Point(1.0, 1.0), Point(0.0, 0.0)  # at first the table is taken at its word
    for turn in range(ROUNDS):
        last = high if best is None else high - 1
        if low >= last and turn:
            if reopened or surely == low:
                break
            low, reopened, repeated = surely, True, 2
        goal = crossing(over, beside, share * (1 - MARGIN)) * predicted(0)
        at = min(low + 1 + bisect_left(range(low + 1, last), True, key=lambda k: predicted(k) <= goal), steps)
        if best is None and turn >= ROUNDS // 2:
            at = steps
        elif repeated > 1:  # twice on the same side: the line leads nowhere
            at = (low + last + 1) // 2
        found = measured(at)
        point = Point(predicted(at) / predicted(0), found.share)
        within = used(budget, found) <= 1
        repeated = repeated + 1 if best is not None and within is before else 0
        before = within
        if within:
            high, best, beside = at, found, point
            if 1 - used(budget, found) <= min(max(CLOSE, found.error), LOOSE):
                break
        elif at == steps:
            raise too_slow(budget, found)
        else:
            low, over, beside = at, point, over if best is None else beside
            surely = at if used(budget, found) - 1 > 2 * found.error else surely
    assert best is not None, "all steps are proposed while nothing was found, and refused where they are not enough"
    return high, best


def crossing(a: Point, b: Point, measured: float) -> float:
    """The predicted share at which a line through two points meets a measured one; through the origin if it falls."""
    slope = (a.measured - b.measured) / (a.predicted - b.predicted) if a.predicted != b.predicted else 0.0
    if slope <= 0:
        return a.predicted * measured / a.measured
    return a.predicted + (measured - a.measured) / slope
