"""What a sweep or a search found: points, each a pruned model with what it costs and how good it is, and their fronts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from fxprune.arguments import checked_class
from fxprune.passes.errors import PruneError
from fxprune.reports.files import as_path, replacing
from fxprune.reports.formatting import Printable, as_text, counted, short, table
from fxprune.reports.page import embedded_svg, in_frame, render_sweep
from fxprune.reports.scatter import Scatter, draw
from fxprune.selection.argument_checks import check_word
from fxprune.selection.budgets import KINDS

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 80
Cost = Literal["macs", "latency", "parameters", "bytes"]
COSTS: tuple[Cost, ...] = ("macs", "latency", "parameters", "bytes")
TITLES = {"macs": "MACs", "latency": "latency", "parameters": "parameters", "bytes": "memory"}
ALONE = ("plan", "how", "make")  # what stays in this process


@checked_class
@dataclass(frozen=True, repr=False)
class Point:
    """One pruned model of a sweep.

    Attributes:
        number: its place in the sweep, from 1 on; 0 is the original.
        asked: what it was asked for by: the budget, the criterion, the ranking, and what else was varied.
        value: what `evaluate` returned for it; None where it failed.
        parameters, macs, bytes: what is left of the model: `bytes` are those of parameters and buffers.
        seconds: of one forward of the example inputs, measured; None where nothing was.
        latency: these seconds as a share of the original's, measured in turns with it.
        error: the relative error of its output on the samples that repair held out; None where nothing was repaired.
        failed: why there is no such model, or "".
        plan: which indices stay; None where it failed.
        how: the keyword arguments of `prune` for it.
        make: prunes and repairs again; see `model`.
    """

    number: int
    asked: dict[str, Any]
    value: float | None = None
    parameters: int = 0
    macs: int = 0
    bytes: int = 0
    seconds: float | None = None
    latency: float | None = None
    error: float | None = None
    failed: str = ""
    plan: Any = field(default=None, compare=False)
    how: Mapping[str, Any] = field(default_factory=dict, compare=False)
    make: Callable[[Point], Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        left = (
            f"{self.value:.4g}, {short(self.parameters)} parameters, {short(self.macs)} MACs" if self.value is not None else ""
        )
        return f"Point({self.number}, {self.label}: {left or f'failed: {self.failed}'})"

    @property
    def label(self) -> str:
        """What it was asked for, as one line."""
        if not self.number:
            return "original"
        words = dict(self.asked)
        who = "/".join(str(words.pop(name)) for name in ("criterion", "ranking") if name in words)
        return " ".join([*(f"{name}={value}" for name, value in words.items()), *([who] if who else [])])

    def model(self) -> Any:
        """The pruned model itself, made again by its plan and repaired again; raises PruneError where there is none."""
        if self.make is None or self.plan is None:
            raise PruneError(
                f"point {self.number} is no pruned model: {self.failed or 'it is the original'}", fix="another point"
            )
        return self.make(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, without the plan."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ALONE}


@checked_class
@dataclass(frozen=True, repr=False)
class Sweep(Printable):
    """Points of one model; printable.

    Attributes:
        model: the name of its class.
        original: the unpruned model.
        points: in the order in which they were asked for.
    """

    model: str
    original: Point
    points: tuple[Point, ...]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return as_text(self, WIDTH)

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __getitem__(self, number: int) -> Point:
        """A point by its number, from 1 on."""
        found = next((p for p in self.points if p.number == number), None)
        if found is None:
            raise IndexError(f"there is no point {number!r}: they are numbered from 1 to {len(self.points)}")
        return found

    @property
    def done(self) -> list[Point]:
        """The points that did not fail."""
        return [p for p in self.points if p.value is not None]

    def front(self, by: Cost = "macs") -> tuple[Point, ...]:
        """The points that no other one is better than at the same cost or less, by ascending cost.

        Arguments:
            by: the cost: `macs`, `latency`, `parameters` or `bytes`.
        """
        check_word("by", by, COSTS)
        return tuple(pareto([p for p in self.done if getattr(p, by) is not None], lambda p: getattr(p, by)))

    def plot(self, path: str | Path) -> None:
        """Write the values over multiply-accumulates and over latency to an SVG file that needs nothing else."""
        with replacing(as_path(path)) as unfinished:
            unfinished.write_text(embedded_svg([draw(s) for s in self.scatters()]), encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing else. Raises PruneError where it cannot be written."""
        with replacing(as_path(path)) as unfinished:
            unfinished.write_text(render_sweep(self), encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page, in a frame of its own, for notebooks."""
        return in_frame(self.model, render_sweep(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, without plans; for each point the costs by which it is on the front."""
        return {"model": self.model, "original": self.original.to_dict(), "points": [*self.rows()]}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The points as data, each with the costs by which it is on the front."""
        fronts = {by: {p.number for p in self.front(by)} for by in COSTS}
        for point in self.points:
            yield {**point.to_dict(), "front": [by for by in COSTS if point.number in fronts[by]]}

    def scatters(self) -> Iterator[Scatter]:
        """What is drawn: values over each cost that is known."""
        for by in ("macs", "latency"):
            if self.done and all(getattr(p, by) is not None for p in (self.original, *self.done)):
                whole = getattr(self.original, by) or 1
                spots = [(getattr(p, by) / whole, p.value, self.told(p), p.number) for p in self.done if p.value is not None]
                yield Scatter(
                    f"share of the original's {TITLES[by]}", spots, [p.number for p in self.front(by)], self.original.value
                )

    def told(self, point: Point) -> str:
        """A point in a line."""
        return f"{point.number or 'unpruned'}: {point.label}, {point.value:.4g}" if point.value is not None else point.label

    def cells(self, point: Point) -> tuple[str, ...]:
        """What a row of the table holds, without the front."""
        value = "" if point.value is None else f"{point.value:.4g}"
        time = "" if point.seconds is None else KINDS["latency"].format(point.seconds).removesuffix(" ms")
        return value, short(point.parameters), short(point.macs), time

    def tables(self) -> Iterator[RenderableType]:
        """A headline, a row for each point, and below why some failed, as rich renders them."""
        failed = [p for p in self.points if p.failed]
        lost = f", {len(failed)} of which failed" if failed else ""
        yield Text(f"{self.model}: {counted(len(self.points), 'point')}{lost}")
        yield ""
        fronts = {by: {p.number for p in self.front(by)} for by in ("macs", "latency")}
        rows = [("", "unpruned", *self.cells(self.original), "")]
        for p in self.done:
            on = " ".join(TITLES[by] for by, numbers in fronts.items() if p.number in numbers)
            rows.append((str(p.number), p.label, *self.cells(p), on))
        titles = ("", "asked for", "value", "params", "MACs", "ms", "on the front of")
        yield wide_table(titles, rows)
        for p in failed:
            yield Text(f"{p.number} {p.label} failed: {p.failed}")


def wide_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table whose second column may fold, too."""
    made = table(titles, rows)
    made.columns[1].justify, made.columns[1].no_wrap, made.columns[1].overflow = "left", False, "fold"
    return made


def pareto(points: Sequence[Point], cost: Callable[[Point], float]) -> Iterator[Point]:
    """The points with no other one that costs no more and is no worse, and better by one of the two; ascending."""
    best: float | None = None
    for point in sorted(points, key=lambda p: (cost(p), -(p.value or 0.0))):
        assert point.value is not None
        if best is None or point.value > best:
            best = point.value
            yield point


@checked_class
@dataclass(frozen=True, repr=False)
class Search(Sweep):
    """What a search found: the point that it began with, and all that it tried.

    Attributes:
        points: the point that it began with, and all others in the order in which they were tried.
    """

    @property
    def start(self) -> Point:
        return self.points[0]

    @property
    def best(self) -> Point:
        """The point of the highest value; of equals the one that was found first."""
        return max(self.done, key=lambda p: p.value or 0.0)

    def tables(self) -> Iterator[RenderableType]:
        yield Text(
            f"{self.start.label}: {self.start.value:.4g} at the start, {self.best.value:.4g} at point {self.best.number}"
        )
        yield from super().tables()
