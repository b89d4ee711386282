"""Schedules: how much of what is asked for is done after each of several steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from fxprune.arguments import did_you_mean, number, shown
from fxprune.passes.errors import PruneError
from fxprune.selection.budgets import Budget
from fxprune.selection.options import Options

Schedule = Callable[[float], float]


def linear(t: float) -> float:
    """The same share in every step.

    >>> [linear(k / 4) for k in range(1, 5)]
    [0.25, 0.5, 0.75, 1.0]
    """
    return t


def cubic(t: float) -> float:
    """Much at first, little at the end (Zhu and Gupta, To Prune, or Not to Prune, arXiv:1710.01878, equation 1).

    >>> [cubic(k / 2) for k in range(1, 3)]
    [0.875, 1.0]
    """
    return 1 - (1 - t) ** 3


SCHEDULES: dict[str, Schedule] = {"linear": linear, "cubic": cubic}
MOST_STEPS = 100_000  # each is a choice that the pruner holds


def shares(schedule: str | Schedule, steps: int) -> list[float]:
    """The share of the whole that is done after each step: ascending, the last one 1.

    >>> shares("cubic", 2)
    [0.875, 1.0]

    Arguments:
        schedule: a name in `SCHEDULES`, or a function from time (0 before the first step, 1 after the last) to the share.
        steps: how many there are.

    Raises: PruneError for a schedule that goes backwards, leaves [0, 1] or does not end at 1.
    """
    steps = number(steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PruneError(f"steps must be a positive integer, not {shown(steps)}", fix="steps=10")
    if steps > MOST_STEPS:
        raise PruneError(f"steps={steps} are more than the {MOST_STEPS:,} that are planned at once", fix="steps=10")
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        near = did_you_mean(schedule, SCHEDULES)
        raise PruneError(f"there is no schedule {shown(schedule)}", fix=f"{near}one of {', '.join(SCHEDULES)}, or a function")
    of: Any = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    if not callable(of):
        raise PruneError(f"schedule must be a name or a function, not {shown(schedule)}", fix="schedule='linear'")
    where = f"schedule {getattr(of, '__name__', type(of).__name__)}"
    found: list[float] = []
    for k in range(1, steps + 1):
        try:
            share = float(of(k / steps))
        except Exception as error:
            what = f"the schedule raises {type(error).__name__} at {k / steps:.3g}: {error}"
            raise PruneError(what, where=where, fix="a function of one number in [0, 1] that returns one") from error
        if not (math.isfinite(share) and 0 <= share <= 1):
            what = f"the schedule gives {share!r} at {k / steps:.3g}, which is no share in [0, 1]"
            raise PruneError(what, where=where, fix="lambda t: t is the linear one")
        if found and share < found[-1]:
            what = (
                f"the schedule goes backwards: from {found[-1]:.6g} at {(k - 1) / steps:.3g} to {share:.6g} at {k / steps:.3g}"
            )
            raise PruneError(what, where=where, fix="what was removed does not come back: return shares that never fall")
        found.append(share)
    if found[-1] != 1:
        what = f"the schedule ends at {found[-1]:.6g}, not at 1"
        raise PruneError(what, where=where, fix="return 1 at 1: all of what is asked for is done after the last step")
    return found


def part_of(options: Options, share: float, original: float) -> Options:
    """Options for a share of what others ask for.

    Arguments:
        options: the whole.
        share: in [0, 1].
        original: what the model costs with nothing removed, in the unit of the budget.
    """
    if share == 1:
        return options
    if options.budget is None:
        ratio = options.ratio
        scaled = {k: v * share for k, v in ratio.items()} if isinstance(ratio, Mapping) else ratio * share
        return dataclasses.replace(options, ratio=scaled)
    limit = options.budget.limit(original)
    budget = Budget(options.budget.kind, (original - (original - limit) * share) / original)
    return dataclasses.replace(options, budget=budget)


def describe_request(options: Options) -> str:
    """What a request asks for, in the words of the arguments."""
    if options.budget is not None:
        amount = options.budget.amount
        return f"{options.budget.kind}={amount!r}" if isinstance(amount, str) else f"{options.budget.kind}={amount:.4g}"
    if isinstance(options.ratio, Mapping):
        return ", ".join(f"{glob}: {ratio:.4g}" for glob, ratio in options.ratio.items())
    return f"ratio={options.ratio:.4g}"
