"""Budgets: how much of a model may stay. Each kind of budget is one class, listed in `KINDS`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxprune.arguments import did_you_mean, is_number, number, shown
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.costs import Costs

COUNTS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
LARGEST = 1e300  # of all numbers that an amount can be
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


class BudgetKind:
    """What a budget limits, computed from the shapes that a choice of units leaves: nothing is pruned on the way.

    An amount is a share of the original (a float up to 1) or absolute: a number, or a text with a unit.

    Attributes:
        name: of the argument of `prune`.
        unit: of an absolute amount.
        units: those of a text, and how much each is.
        measured: whether it is measured on the pruned model instead of computed.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    units: ClassVar[Mapping[str, float]] = COUNTS
    verb: ClassVar[str] = "has"
    measured: ClassVar[bool] = False

    def check(self, amount: Any) -> float | str:
        """An amount as a number of Python's, or the text that it is; raises PruneError for what is none."""
        found = number(amount)
        if isinstance(found, str) and parse_amount(found, self.units) is not None:
            return found
        if isinstance(found, str):
            fix = f"{self.name}=0.5 keeps half of the original; an absolute text ends in {', '.join(self.units)}"
            what = f"{self.name} must be a positive number, or one with a unit, not {shown(amount)}"
            raise PruneError(what, fix=fix)
        if not is_number(found) or not 0 < found < LARGEST:
            raise PruneError(
                f"{self.name} must be a positive number, not {shown(amount)}",
                fix=f"{self.name}=0.5 keeps half of the original; a number above 1 is absolute",
            )
        return found

    def absolute(self, amount: float | str) -> float:
        """An absolute amount as a number."""
        return (parse_amount(amount, self.units) or 0.0) if isinstance(amount, str) else float(amount)

    def cost(self, costs: Costs, slicer: Slicer) -> float:
        """The cost of what is left of the model."""
        raise NotImplementedError

    def format(self, cost: float) -> str:
        """A cost with its unit."""
        return f"{self.number(cost)} {self.unit}"

    def number(self, cost: float) -> str:
        return f"{cost:,}"

    def argument(self, cost: float) -> str:
        """A cost as it can be passed to `prune`."""
        return f"{cost}"


class Params(BudgetKind):
    """Elements of all parameters."""

    name, unit = "params", "parameters"

    def cost(self, costs: Costs, slicer: Slicer) -> float:
        return costs.of(slicer, "params")


class Macs(BudgetKind):
    """Multiply-accumulates of one forward of the example inputs in evaluation mode."""

    name, unit = "macs", "multiply-accumulates"

    def cost(self, costs: Costs, slicer: Slicer) -> float:
        return costs.of(slicer, "macs")


class Memory(BudgetKind):
    """Bytes of all parameters and buffers."""

    name, unit, units = "memory", "bytes", BYTES

    def cost(self, costs: Costs, slicer: Slicer) -> float:
        return costs.of(slicer, "memory")


class LatencyKind(BudgetKind):
    """Seconds of one forward of the example inputs on the model's device; measured, see `latency.py`."""

    name, unit, units, verb, measured = "latency", "s", SECONDS, "takes", True

    def check(self, amount: Any) -> float | str:
        found = number(amount)
        timed = isinstance(found, str) and parse_amount(found, SECONDS) is not None
        if timed or (isinstance(found, float) and 1e-9 <= found <= 1):
            return found
        if is_number(found) and 1 <= found < LARGEST:
            what = f"latency={shown(amount)} has no unit"
            raise PruneError(what, fix=f"latency='{found:g}ms' or '{found:g}s'; a share is a float up to 1")
        raise PruneError(
            f"latency must be a share up to 1, or a time, not {shown(amount)}",
            fix="latency=0.5 keeps half of the original's; latency='20ms' is absolute",
        )

    def format(self, cost: float) -> str:
        return f"{cost:.3g} s" if cost >= 1 else f"{cost * 1e3:.3g} ms"

    def number(self, cost: float) -> str:
        return self.format(cost)

    def argument(self, cost: float) -> str:
        return f"'{cost * 1e3:.3g}ms'"


KINDS: dict[str, BudgetKind] = {kind.name: kind for kind in (Params(), Macs(), Memory(), LatencyKind())}


def list_arguments() -> str:
    """The arguments of `prune` that say how much to remove, of which one may be given."""
    *first, last = ["ratio", *KINDS]
    return f"one of {', '.join(first)} and {last}"


@dataclass(frozen=True, slots=True)
class Budget:
    """What may stay: `kind` is a key of `KINDS`; `amount` a share of the original, or absolute.

    >>> Budget("params", 0.5).of(100), Budget("params", 30).of(100), Budget("latency", "20ms").of(0.05)
    (50.0, 30.0, 0.02)
    """

    kind: str
    amount: float | str

    def of(self, original: float) -> float:
        """The largest cost that is within the budget."""
        return float(self.amount * original) if self.relative else KINDS[self.kind].absolute(self.amount)  # type: ignore[operator]

    @property
    def relative(self) -> bool:
        """Whether it is a share of the original."""
        return isinstance(self.amount, float) and self.amount <= 1

    @property
    def measured(self) -> bool:
        """Whether it limits something that is measured."""
        return KINDS[self.kind].measured

    def cost(self, costs: Costs, slicer: Slicer | None = None) -> float:
        """The cost of what a slicer leaves; by default that of the original."""
        if slicer is None:
            slicer = Slicer(torch.ones(len(costs.solution.unit_of), dtype=torch.bool))
        return KINDS[self.kind].cost(costs, slicer)

    def limit(self, original: float) -> float:
        """The largest cost that is within the budget; raises PruneError for a budget above the original."""
        if self.of(original) <= original:
            return self.of(original)
        kind = KINDS[self.kind]
        raise PruneError(
            f"{self.kind}={self.amount!r} is above the original, which {kind.verb} {kind.format(original)}",
            fix=f"{self.kind}=0.5 keeps half; an absolute amount is at most {kind.argument(original)}",
        )

    def unreachable(self, least: float, original: float) -> PruneError:
        """The error for a budget below the least cost that there can be."""
        kind, share = KINDS[self.kind], math.ceil(least / original * 1000) / 1000
        return PruneError(
            f"{self.kind}={self.amount!r} cannot be met: the least that can is {kind.number(least)} of {kind.format(original)}",
            fix=f"{self.kind}={share} or more, a lower floor, or freeze less",
        )


def parse_amount(text: str, units: Mapping[str, float]) -> float | None:
    """What a text such as "20ms", "1.5 s" or "2G" comes to, by the units; None for what is no amount above zero.

    >>> parse_amount("20ms", SECONDS), parse_amount("1.5 s", SECONDS), parse_amount("soon", SECONDS)
    (0.02, 1.5, None)
    >>> parse_amount("2G", COUNTS), parse_amount("100kB", BYTES), parse_amount("100 KiB", BYTES), parse_amount("2g", COUNTS)
    (2000000000.0, 100000.0, 102400.0, None)
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?([A-Za-z]+)", text.strip(), re.ASCII)
    return float(found[1]) * units[found[2]] or None if found and found[2] in units else None


def parse_budget(given: Mapping[str, float | str | None], named: Mapping[str, float | str] | None = None) -> Budget | None:
    """The budget that is asked for, if any.

    Arguments:
        given: amounts by kind, as arguments of their own.
        named: likewise, as the argument `budget`.

    Raises: PruneError for several budgets, and for what is no kind or no amount.
    """
    if named is not None and not isinstance(named, Mapping):
        raise PruneError(f"budget must be a mapping from a kind to an amount, not {shown(named)}", fix="budget={'params': 0.5}")
    if named is not None and not named:
        raise PruneError("budget is an empty mapping, which says nothing", fix="budget={'params': 0.5}")
    asked = [(kind, amount) for kind, amount in given.items() if amount is not None] + list((named or {}).items())
    if len(asked) > 1:
        raise PruneError(f"{' and '.join(kind for kind, _ in asked)} are both given", fix=list_arguments())
    for kind, amount in asked:
        if kind not in KINDS:
            fix = f"{did_you_mean(kind, KINDS)}one of {', '.join(KINDS)}"
            raise PruneError(f"there is no budget of {shown(kind)}", fix=fix)
        return Budget(kind, KINDS[kind].check(amount))
    return None
