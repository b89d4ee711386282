"""History: what each step of iterative pruning did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from fxprune.reports.formatting import Printable, counted, short, table

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class HistoryStep:
    """One step.

    Attributes:
        number: 1 for the first.
        asked: what was asked for up to here, in the words of the arguments: "ratio=0.25".
        units: how many units of the original are gone after it, and how many might go in all.
        fresh: how many of them went in this step.
        params: parameters before and after.
        macs: multiply-accumulates of one forward of the example inputs, before and after.
        error: the largest relative error against the masked original; None where it was not verified.
    """

    number: int
    asked: str
    units: tuple[int, int]
    fresh: int
    params: tuple[int, int]
    macs: tuple[int, int]
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return dataclasses.asdict(self)


class History(Printable, Sequence[HistoryStep]):
    """The steps so far, in order; printable.

    >>> print(History([HistoryStep(1, "ratio=0.25", (2, 6), 2, (44, 30), (36, 24), None)]))
    1 step
    <BLANKLINE>
    step   units gone         parameters       macs   asked for
    ────────────────────────────────────────────────────────────
    1          2 of 6   44 -> 30 (68.2%)   36 -> 24   ratio=0.25
    """

    def __init__(self, steps: Sequence[HistoryStep] = ()) -> None:
        self._steps = tuple(steps)

    @overload
    def __getitem__(self, index: int) -> HistoryStep: ...

    @overload
    def __getitem__(self, index: slice) -> History: ...

    def __getitem__(self, index: int | slice) -> HistoryStep | History:
        return History(self._steps[index]) if isinstance(index, slice) else self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def __add__(self, step: HistoryStep) -> History:
        return History([*self._steps, step])

    def __repr__(self) -> str:
        return f"History({counted(len(self), 'step')})"

    def tables(self) -> Iterator[RenderableType]:
        first = self._steps[0].params[0] if self._steps else 1
        rows = [
            (
                str(s.number),
                f"{s.units[0]:,} of {s.units[1]:,}",
                f"{short(s.params[0])} -> {short(s.params[1])} ({s.params[1] / max(first, 1):.1%})",
                f"{short(s.macs[0])} -> {short(s.macs[1])}",
                s.asked,
            )
            for s in self
        ]
        yield counted(len(self), "step")
        yield ""
        yield table(("step", "units gone", "parameters", "macs", "asked for"), rows)
