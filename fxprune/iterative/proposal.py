"""Proposals: what a step would remove, to look at, edit and apply family by family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor, nn

from fxprune.arguments import checked_class, shown
from fxprune.passes.coupling.families import Family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.slices import Slicer
from fxprune.reports.coupling import CoupledFamily
from fxprune.reports.formatting import counted

Made = TypeVar("Made", bound=nn.Module)  # what a step returns

Settle = Callable[[np.ndarray, np.ndarray], tuple[Tensor, Slicer]]


@dataclass(slots=True)
class StepChoice:
    """What a step chose, indexed by unit: shape (labels,).

    Attributes:
        gone: what was removed before.
        wanted: what is removed after it.
        score: importance; infinitely small for what is gone.
        settle: from removed units, and those among them that cannot come back, to what is kept.
    """

    gone: np.ndarray
    wanted: np.ndarray
    score: np.ndarray
    settle: Settle


@checked_class
class Candidate:
    """Families that lose units together: nearly always one.

    Units are numbered as in the original, from 0, in the order of the channels; those gone before keep their numbers.

    Attributes:
        family: the first of the families, as `couple` shows it; `families` are all.
        units: for each family the units that go in this step, unless edited.
        applied: whether they will.
    """

    def __init__(self, choice: StepChoice, group: Sequence[tuple[Family, CoupledFamily]], proposal: Proposal[Any]) -> None:
        self._choice, self._own, self._proposal = choice, [own for own, _ in group], proposal
        self.families = tuple(shown for _, shown in group)
        fresh = choice.wanted & ~choice.gone
        self.units: tuple[list[int], ...] = tuple(np.flatnonzero(fresh[own.units]).tolist() for own in self._own)
        self.applied = False

    @property
    def family(self) -> CoupledFamily:
        return self.families[0]

    @property
    def gone(self) -> tuple[list[int], ...]:
        """For each family the units that went before."""
        return tuple(np.flatnonzero(self._choice.gone[own.units]).tolist() for own in self._own)

    @property
    def scores(self) -> tuple[np.ndarray, ...]:
        """For each family the importance of its units; that of units gone before is NaN."""
        hidden = np.where(self._choice.gone, np.nan, self._choice.score)
        return tuple(hidden[own.units] for own in self._own)

    def __repr__(self) -> str:
        parts = [f"{f.name}: {len(u)} of {counted(f.units, 'unit')}" for f, u in zip(self.families, self.units)]
        return f"Candidate({', '.join(parts)}{', applied' if self.applied else ''})"

    def removed(self) -> np.ndarray:
        """Which units of the model these are, shape (labels,)."""
        found = np.zeros(len(self._choice.gone), bool)
        for own, units in zip(self._own, self.units):
            found[own.units[np.asarray(units, np.int64)]] = True
        return found

    def edit(self, *units: Iterable[int]) -> Candidate:
        """Other units than the proposed ones: one list for each family; raises PruneError for what is no unit."""
        if len(units) != len(self.families):
            what = f"{counted(len(units), 'list')} of units for {counted(len(self.families), 'family')}"
            raise PruneError(what, where=self.family.name, fix="one list for each of candidate.families")
        if not all(isinstance(mine, Iterable) for mine in units):
            what = f"units come in lists, and {shown(next(u for u in units if not isinstance(u, Iterable)))} is none"
            raise PruneError(what, where=self.family.name, fix="candidate.edit([0, 3])")
        listed = [list(mine) for mine in units]
        for family, mine, gone in zip(self.families, listed, self.gone):
            for unit in mine:
                if isinstance(unit, bool) or not isinstance(unit, int | np.integer) or not 0 <= unit < family.units:
                    fix = f"numbers from 0 to {family.units - 1}"
                    raise PruneError(f"{unit!r} is no unit of this family", where=family.name, fix=fix)
                if unit in gone:
                    raise PruneError(
                        f"unit {unit} is gone already", where=family.name, fix="a unit that is not in candidate.gone"
                    )
        self.units, self.applied = tuple(sorted({int(u) for u in mine}) for mine in listed), False
        return self

    def apply(self) -> Candidate:
        """Let the units go in this step; raises PruneError where they cannot go without others."""
        mine = self.removed()
        others = self._proposal.removed(without=self)
        kept, _ = self._choice.settle(others | mine, others)
        back = [[u for u in units if bool(kept[own.units[u]])] for own, units in zip(self._own, self.units)]
        if any(back):
            family, which = next((f, b) for f, b in zip(self.families, back) if b)
            raise PruneError(
                f"{counted(len(which), 'unit')} of this family cannot go alone, the first is {which[0]}: a tensor would be "
                "left empty or with rows of different lengths",
                where=family.name,
                fix="the same number of units in every row, and at least one that stays",
            )
        self.applied = True
        return self

    def skip(self) -> Candidate:
        """Let nothing of it go in this step."""
        self.applied = False
        return self


@checked_class
class Proposal(Generic[Made]):
    """What a step would remove. Iterating gives the candidates; `finish` takes the step with those that were applied.

    Attributes:
        candidates: all families that might lose units, also those that would lose none now.
    """

    def __init__(
        self,
        choice: StepChoice,
        groups: Sequence[Sequence[tuple[Family, CoupledFamily]]],
        build: Callable[[np.ndarray], Made],
    ) -> None:
        self.choice, self.build = choice, build
        self.candidates = [Candidate(choice, group, self) for group in groups]

    def __iter__(self) -> Iterator[Candidate]:
        """Those that lose anything, in the order of the model's parameters."""
        return (c for c in self.candidates if any(c.units))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, family: str) -> Candidate:
        """The candidate with a family of this name."""
        for candidate in self.candidates:
            if isinstance(family, str) and any(own.answers(family) for own in candidate._own):
                return candidate
        names = ", ".join(c.family.name for c in self.candidates[:3])
        raise PruneError(f"no family is called {family!r}", fix=f"a name such as {names}")

    def removed(self, without: Candidate | None = None) -> np.ndarray:
        """What is gone, with all that was applied so far."""
        found = self.choice.gone.copy()
        for candidate in self.candidates:
            if candidate.applied and candidate is not without:
                found |= candidate.removed()
        return found

    def finish(self) -> Made:
        """Take the step with what was applied; the pruned model."""
        return self.build(self.removed())
