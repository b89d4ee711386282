"""The criteria by name."""

from __future__ import annotations

from fxprune.criteria import activation, gradient, weight
from fxprune.criteria.base import Criterion, CriterionSpec, check_name, describe
from fxprune.criteria.calibration import GATHER, SAMPLES
from fxprune.passes.errors import PruneError

CRITERIA: dict[str, Criterion] = {**weight.CRITERIA, **gradient.CRITERIA, **activation.CRITERIA}


def find(criterion: str | Criterion) -> Criterion:
    """The criterion of a given name, or the callable itself; raises PruneError for anything else."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise PruneError(f"there is no criterion {criterion!r}", fix=f"one of {', '.join(sorted(CRITERIA))}")
        return CRITERIA[criterion]
    if isinstance(criterion, type) or not callable(criterion):
        what = f"criterion must be a name or a callable, not {criterion!r}"
        raise PruneError(what, fix="criterion='magnitude', or a function of a parameter")
    return criterion


def resolve(criterion: str | Criterion) -> CriterionSpec:
    """The description of a criterion; raises PruneError for a name or an attribute that does not exist."""
    spec = describe(find(criterion))
    check_name("needs", spec.needs, ("", *GATHER, SAMPLES), spec.name)
    return spec
