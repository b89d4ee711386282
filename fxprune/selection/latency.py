"""Measure latency: seconds of one forward on the model's own device, of the original and of pruned models in turns.

Models are compared within one window of time only: on a shared machine the ratio of two models' times moves by several per
cent from one half minute to the next.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors, private_copy, set_mode
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.budgets import KINDS, Budget

FRIENDLY = 8  # kernels are written for multiples of this many channels; preferred where `round_to` is not given
NEAR = 0.1  # a latency this close to the budget is measured for longer, until its error is
PRECISE = 0.01  # no more than this, or
PATIENCE = 12.0  # seconds are over
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
            f"{KINDS['latency'].format(self.original)} before, {KINDS['latency'].format(self.pruned)} now ({self.share:.0%}) on"
            f" {self.device}: medians of {self.runs} runs in turns, half of them within {self.spread:.0%}"
        )


def measure_seconds(runs: Sequence[Run], device: torch.device, *, least: int = 7, seconds: float = 0.4) -> list[list[float]]:
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


class LatencyProbe:
    """Measures the model on its own device, beside pruned models.

    Arguments:
        model: the original.
        args, kwargs: the example inputs.
        emit: from what a choice leaves to the pruned model.
        clock: times functions; see `measure_seconds`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        emit: Callable[[Slicer], nn.Module],
        clock: Stopwatch | None = None,
    ) -> None:
        self.model, self.args, self.kwargs, self.emit = model, args, kwargs, emit
        self.clock = clock or measure_seconds
        self.device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
        self.original = set_mode(private_copy(model), False)
        self.found: Latency | None = None

    def restore_random_state(self) -> contextlib.AbstractContextManager[None]:
        """Restore random state, whatever the model draws while it runs."""
        return torch.random.fork_rng(devices=[self.device.index or 0] if self.device.type == "cuda" else [])

    def run(self, model: nn.Module) -> Run:
        def forward() -> object:
            with torch.no_grad():
                return model(*self.args, **self.kwargs)

        return forward

    def seconds(self, run: Run) -> float:
        """The time of a single call, by few runs: a latency model takes several hundred of them."""
        with torch.no_grad():
            return statistics.median(self.clock([run], self.device, least=3, seconds=0.01)[0])

    def original_seconds(self) -> float:
        return statistics.median(self.clock([self.run(self.original)], self.device)[0])

    def prune(self, slicer: Slicer) -> nn.Module:
        """The pruned model of a choice."""
        return self.emit(slicer).eval()

    def measure(self, models: Sequence[nn.Module], budget: Budget) -> list[Latency]:
        """Time models and the original in turns; one that is within the budget is timed at least twice as often.

        This goes on until it is known on which side of the budget those near it are, or for `PATIENCE` seconds.
        """
        runs = [self.run(model) for model in (self.original, *models)]
        times: list[list[float]] = [[] for _ in runs]
        found: list[Latency] = []
        again = True
        while again or (any(is_unsure(budget, f) for f in found) and sum(map(sum, times)) < PATIENCE):
            for mine, more in zip(times, self.clock(runs, self.device), strict=True):
                mine += more
            again = not found
            found = [summarise(times[0], mine, self.device) for mine in times[1:]]
            again = again and any(used_share(budget, f) <= 1 for f in found)
        return found


def summarise(original: Sequence[float], pruned: Sequence[float], device: torch.device) -> Latency:
    """Medians of what was measured, and how far single turns are from them."""
    shares = [b / a for a, b in zip(original, pruned, strict=True)]
    share = statistics.median(shares)
    spread = statistics.median(abs(s - share) / share for s in shares)
    return Latency(statistics.median(original), statistics.median(pruned), share, len(shares), spread, str(device))


def used_share(budget: Budget, found: Latency) -> float:
    """The share of a budget that a measured latency uses; up to 1 it is within the budget."""
    return found.share / float(budget.amount) if budget.relative else found.pruned / budget.of(found.original)


def too_slow(budget: Budget, found: Latency) -> PruneError:
    """The error for a budget that the smallest model does not meet."""
    return budget.unreachable(used_share(budget, found) * budget.of(found.original), found.original)


def is_unsure(budget: Budget, found: Latency) -> bool:
    """Whether more runs would tell more about being within a budget."""
    return abs(used_share(budget, found) - 1) <= NEAR + 2 * found.error and found.error > PRECISE
