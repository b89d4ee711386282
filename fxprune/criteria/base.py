"""The protocol of a criterion, and the options that every criterion of this package takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from fxprune.arguments import shown
from fxprune.criteria.aggregation import NORMALISE, REDUCE
from fxprune.passes.errors import PruneError

Criterion = Callable[..., Any]
METHODS = ("score_dims", "score_units", "score_families", "finish_layer")
PLACES = ("all", "reads", "scales")


@dataclass(frozen=True, kw_only=True)
class CriterionOptions:
    """Options of every criterion.

    Attributes:
        reduce: how the scores of a unit in its layers are combined: a name in `REDUCE`.
        normalise: how the scores of a family are normalised before families compete: a name in `NORMALISE`.
    """

    reduce: str = "sum"
    normalise: str = "none"

    needs: ClassVar[str] = ""
    places: ClassVar[str] = "all"
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        describe(self)


@dataclass(frozen=True, slots=True)
class CriterionSpec:
    """A criterion with every part of the protocol filled in; `fxprune.criteria` documents the parts."""

    name: str
    score_elements: Criterion
    score_dims: Callable[..., Any] | None
    score_units: Callable[[int], Any] | None
    score_families: Callable[..., Any] | None
    finish_layer: Callable[..., Any] | None
    elementwise: bool
    needs: str
    places: str
    reduce: str
    normalise: str

    @property
    def runs(self) -> bool:
        """Whether it may look at the model as it runs."""
        return bool(self.needs) or self.score_families is not None


def describe(criterion: Any) -> CriterionSpec:
    """The parts of the protocol that a criterion has, and the defaults of the others.

    Raises: PruneError for an option, a place or a method that does not exist.
    """
    name = label(criterion)
    options = {
        "reduce": (getattr(criterion, "reduce", "sum"), tuple(REDUCE)),
        "normalise": (getattr(criterion, "normalise", "none"), tuple(NORMALISE)),
    }
    for option, (value, known) in options.items():
        if value not in known:
            raise PruneError(
                f"{option} must be one of {', '.join(known)}, not {shown(value)}",
                where=f"criterion {name}",
                fix=f"{option}={known[0]!r}",
            )
    methods = {method: getattr(criterion, method, None) for method in METHODS}
    for method, function in methods.items():
        if function is not None and not callable(function):
            raise PruneError(f"{method} must be a method, not {shown(function)}", where=f"criterion {name}")
    places = getattr(criterion, "places", "all")
    check_name("places", places, PLACES, name)
    return CriterionSpec(
        name,
        criterion,
        **methods,
        elementwise=bool(getattr(criterion, "elementwise", False)),
        needs=getattr(criterion, "needs", ""),
        places=places,
        reduce=options["reduce"][0],
        normalise=options["normalise"][0],
    )


def check_name(attribute: str, value: object, known: tuple[str, ...], criterion: str) -> None:
    """Raise PruneError where an attribute of a criterion is not one of the known names."""
    if value not in known:
        listed = ", ".join(repr(k) for k in known if k)
        raise PruneError(f"{attribute} must be one of {listed}, not {shown(value)}", where=f"criterion {criterion}")


def label(criterion: object) -> str:
    """The name of a criterion in messages."""
    return getattr(criterion, "__name__", type(criterion).__name__)
