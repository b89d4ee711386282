"""How the scores of one unit in several layers become one, and how families that compete are made comparable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from fxprune.criteria.aggregation import NORMALISE, REDUCE
from fxprune.passes.errors import PruneError


@dataclass(frozen=True, kw_only=True)
class CriterionOptions:
    """What every criterion can be asked for.

    Attributes:
        reduce: how the scores of a unit in the layers it spans are put together: one of `REDUCE`.
        normalise: what is done to the scores of a family before families compete: one of `NORMALISE`.
    """

    reduce: str = "sum"
    normalise: str = "none"

    needs: ClassVar[str] = ""
    places: ClassVar[str] = "all"
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)


def check_options(criterion: object) -> None:
    """Raise PruneError where a criterion names a reduction or a normaliser that does not exist."""
    for option, table in (("reduce", REDUCE), ("normalise", NORMALISE)):
        asked = getattr(criterion, option, "sum" if option == "reduce" else "none")
        if asked not in table:
            raise PruneError(
                f"{option} must be one of {', '.join(table)}, not {asked!r}",
                where=f"criterion {label(criterion)}",
                fix=f"{option}={next(iter(table))!r}",
            )


def label(criterion: object) -> str:
    """What a criterion is called in messages."""
    return getattr(criterion, "__name__", type(criterion).__name__)


Criterion = Callable[..., Any]
