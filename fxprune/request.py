"""Requests: what to remove, checked as far as they can be without looking at the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxprune.budget import FIX, Budget, budget_of
from fxprune.criteria import find
from fxprune.criteria.scoring import Criterion
from fxprune.criteria.units import asked
from fxprune.errors import PruneError

Ratio = float | Mapping[str, float]
Scopes = Mapping[str, str | Sequence[str]]
HALF = float("0.5")  # the default ratio; this very object says that none was asked for
RANKINGS = ("local", "global", "isomorphic")


@dataclass(slots=True)
class Request:
    """What to remove, as the arguments of `prune` say it."""

    ratio: Ratio
    budgets: Mapping[str, float | str | None]
    criterion: str | Criterion
    ranking: str
    scopes: Scopes | None
    floor: float | None
    round_to: int
    data: Any
    loss: Any
    budget: Budget | None = field(init=False, default=None)

    def check(self) -> None:
        """Raise PruneError for what means nothing, whatever the model; sets `budget`."""
        self.budget = budget_of(self.budgets)
        if self.budget is not None and self.ratio is not HALF:
            raise PruneError(f"ratio and {self.budget.kind} are both given", fix=FIX)
        if self.ranking not in RANKINGS:
            raise PruneError(f"ranking must be one of {', '.join(RANKINGS)}, not {self.ranking!r}", fix="ranking='local'")
        if self.floor is not None:
            number = isinstance(self.floor, int | float) and not isinstance(self.floor, bool)
            if not number or not math.isfinite(self.floor) or not 0 <= self.floor <= 1:
                raise PruneError(f"floor must be a number in [0, 1], not {self.floor!r}", fix="floor=0.1 keeps a tenth")
        if self.scopes is not None and not (isinstance(self.scopes, Mapping) and self.scopes):
            what = f"scopes must name globs, not {self.scopes!r}"
            raise PruneError(what, fix="scopes={'early': ['layer1', 'layer2']}")
        asked(find(self.criterion))

    @property
    def competes(self) -> bool:
        return self.ranking != "local" or self.scopes is not None or self.budget is not None

    @property
    def reads_weights(self) -> bool:
        """Whether choosing looks at the values of parameters."""
        return not hasattr(find(self.criterion), "units")

    @property
    def runs_the_model(self) -> bool:
        """Whether choosing takes forwards of the model, on data or by the clock."""
        return self.data is not None or (self.budget is not None and self.budget.kind == "latency")
