"""The report: what pruning took from a model, what it left, and why."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from fxprune.arguments import checked_class
from fxprune.reports.changes import FamilyChange, ModuleChange
from fxprune.reports.coupling_graph import Link
from fxprune.reports.files import as_path, replacing
from fxprune.reports.formatting import Printable, counted, plain_data, short, table
from fxprune.reports.page import in_frame, render
from fxprune.reports.ratios import RatioCosts
from fxprune.reports.sensitivity import Sensitivity
from fxprune.reports.sweep import Sweep
from fxprune.selection.latency import FRIENDLY, Latency
from fxprune.verification import Verification

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


SHRUNK_SHOWN, WHOLE_SHOWN, HELD_SHOWN, UNUSED_SHOWN = 15, 10, 3, 5
# Where every family keeps half of its units a layer keeps a quarter of its weights; with the first and the
# last layer, which keep more, about a third. Above that ratio of the two, something needs an explanation.
UNREMARKABLE = 4 / 3
WORTH_NAMING = 0.02
UNEVEN = 0.25  # of the parameters that are left


@checked_class
@dataclass(frozen=True)
class Report(Printable):
    """What pruning did to a model; printable.

    Attributes:
        model: the name of its class.
        parameters: how many before and after.
        macs: multiply-accumulates of one forward before and after, if example inputs were given.
        changes: what became of each family, the one with most parameters left first.
        capture: how the model was captured.
        verification: the comparison that `prune` made, if it made one.
        latency: what was measured: by `prune`, if its budget was one of latency, or for the report.
        bytes: of parameters and buffers, before and after.
        modules: what became of every module, the model itself first.
        ratios: what `prune` would leave at other ratios.
        call: the call of `prune` that does, with `{ratio}` in place of one.
        links: what ties the layers of a family to one another.
        sensitivity: of the model's families, if it was given.
        chosen: what `prune` chose where nothing was asked for, and why.
        unused: the modules of tensors that a run on the example inputs does not use, which stay as they are.
        branches: the residual branches that were removed, by name.
        repaired: what repair came to, if there was one.
        sweep: of the model, if it was given.
    """

    model: str
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    changes: tuple[FamilyChange, ...]
    capture: str
    verification: Verification | None
    latency: Latency | None = None
    bytes: tuple[int, int] = (0, 0)
    modules: tuple[ModuleChange, ...] = ()
    ratios: tuple[RatioCosts, ...] = ()
    call: str = ""
    links: tuple[Link, ...] = ()
    sensitivity: Sensitivity | None = None
    chosen: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    repaired: str = ""
    sweep: Sweep | None = None

    def __repr__(self) -> str:
        """A few lines; `print` shows the tables, too."""
        return "\n".join(self.sentences())

    def _repr_html_(self) -> str:
        """The page, in a frame of its own, for notebooks."""
        return in_frame(self.model, render(self))

    def to_html(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing else: no network, no other file.

        Raises: PruneError where it cannot be written; what was there before is still there then.
        """
        with replacing(as_path(path)) as unfinished:
            unfinished.write_text(render(self), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data: all attributes, and for each family why it shrank no further."""
        changes = [{**plain_data(c), "reason": c.reason} for c in self.changes]
        sweep = None if self.sweep is None else self.sweep.to_dict()
        return {**plain_data(replace(self, sweep=None)), "changes": changes, "sweep": sweep}

    @property
    def share(self) -> float:
        """The share of the parameters that is left."""
        return self.parameters[1] / max(self.parameters[0], 1)

    @property
    def shrunk(self) -> list[FamilyChange]:
        return [c for c in self.changes if c.kept < c.family.units]

    @property
    def whole(self) -> list[FamilyChange]:
        return [c for c in self.changes if c.kept == c.family.units]

    @property
    def usual(self) -> float:
        """The share of its units that a family that shrank keeps: the median."""
        return statistics.median(c.kept / c.family.units for c in self.shrunk) if self.shrunk else 1.0

    def held(self) -> list[FamilyChange]:
        """The families to blame where more is left than the usual share explains, else none."""
        if self.share <= UNREMARKABLE * self.usual**2:
            return []
        fuller = [c for c in self.changes if c.kept / c.family.units > self.usual + 0.05]
        large = [c for c in fuller if c.left > WORTH_NAMING * self.parameters[1]]
        return (large or fuller)[:HELD_SHOWN]

    def uneven(self) -> list[FamilyChange]:
        """The families that had a count of channels which hardware likes and have none now, if they are much of the model."""
        fits = lambda c, units: units * c.family.width % FRIENDLY == 0  # noqa: E731
        found = [c for c in self.shrunk if fits(c, c.family.units) and not fits(c, c.kept)]
        return found if sum(c.left for c in found) > UNEVEN * self.parameters[1] else []

    def speed(self) -> Iterator[str]:
        """What was measured, and what speaks against a gain."""
        if self.latency is not None:
            yield f"latency: {self.latency}"
        uneven = self.uneven()
        if uneven:
            have = "has" if len(uneven) == 1 else "have"
            yield f"{counted(len(uneven), 'family')} {have} a count of channels that is no multiple of {FRIENDLY}, for which"
            yield f"  kernels are written: the model may be no faster, or slower; round_to={FRIENDLY} keeps to multiples"

    def sentences(self) -> Iterator[str]:
        before, after = self.parameters
        yield f"{self.model}: {short(before)} parameters, {short(after)} left ({self.share:.0%})"
        if self.macs is not None:
            was, now = self.macs
            yield f"{short(was)} multiply-accumulates, {short(now)} left ({now / max(was, 1):.0%})"
        families = f"{len(self.shrunk)} of {counted(len(self.changes), 'family')}"
        yield f"{families} shrank" + (f", to {self.usual:.0%} of their units in the median" if self.shrunk else "")
        if self.branches:
            yield f"without the residual branches of {', '.join(self.branches)}"
        held = self.held()
        if held:
            yield f"that leaves more than usual, because of {'these' if len(held) > 1 else 'this'}:"
            yield from (f"  {short(c.left)} left with {c.family.name}, which {c.reason}" for c in held)
        if self.unused:
            more = f" and {len(self.unused) - UNUSED_SHOWN} more" if len(self.unused) > UNUSED_SHOWN else ""
            yield f"not used on the example inputs, and so left as they are: {', '.join(self.unused[:UNUSED_SHOWN])}{more}"
        yield from self.speed()
        yield from (f"chosen: {text}" for text in self.chosen)
        yield f"captured: {self.capture}"
        unknown = "not compared with the original: prune(..., verify=True) or fxprune.verify does it"
        yield str(self.verification or unknown)
        if self.repaired:
            yield self.repaired

    def tables(self) -> Iterator[RenderableType]:
        """The sentences, the families that shrank and those that did not, as rich renders them."""
        yield from map(Text, self.sentences())
        if self.shrunk:
            yield ""
            yield shrunk_table(self.shrunk)
        if self.whole:
            yield ""
            yield whole_table(self.whole)


def shrunk_table(shrunk: Sequence[FamilyChange]) -> Table:
    rows = [
        (c.family.name, c.family.role, f"{c.family.units:,}", f"{c.kept:,}", short(c.left), c.family.spans(2))
        for c in shrunk[:SHRUNK_SHOWN]
    ]
    rest = shrunk[SHRUNK_SHOWN:]
    if rest:
        units, kept = sum(c.family.units for c in rest), sum(c.kept for c in rest)
        rows.append((f"and {len(rest)} more", "", f"{units:,}", f"{kept:,}", "", ""))
    return table(("shrank", "role", "units", "left", "parameters left", "spans"), rows)


def whole_table(whole: Sequence[FamilyChange]) -> Table:
    rows = [(c.family.name, c.family.role, f"{c.family.units:,}", short(c.left), c.reason) for c in whole[:WHOLE_SHOWN]]
    if len(whole) > WHOLE_SHOWN:
        rows.append((f"and {len(whole) - WHOLE_SHOWN} more", "", "", "", ""))
    return table(("stayed whole", "role", "units", "parameters left", "because it"), rows)
