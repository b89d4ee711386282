"""Scores of all units of a model, by whatever a criterion needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.criteria.aggregation import NORMALISE
from fxprune.criteria.base import Criterion, label
from fxprune.criteria.calibration import GATHER, SAMPLES, prepared, sample_gradients
from fxprune.criteria.parameter_roles import roles
from fxprune.criteria.scorer import Places, Scorer
from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters

PLACES = ("all", "reads", "scales")


def unit_scores(
    model: nn.Module,
    solution: Solution,
    families: Sequence[Family],
    criterion: Criterion,
    data: Any = None,
    loss: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A score for each unit, and whether the criterion says anything of it; both indexed by class, shape (labels,).

    Raises: PruneError where the criterion needs what is not given, returns what is no score, or speaks of no family.
    """
    places, needs = asked(criterion)
    parameters: Mapping[str, Tensor] = named_parameters(model)
    found = None if places == "all" else roles(solution.captures)
    counts: Places | None = None
    if found is not None and places == "reads":
        counts = lambda name, f: (name, f.major_to_minor[-1]) in found.reads  # noqa: E731
    elif found is not None:
        counts = lambda name, f: name in found.scales  # noqa: E731
    scorer = Scorer(parameters, solution.leaves, solution.unit_of.numpy(), criterion, families, counts)
    # what nothing reads by a product is scored by all its places
    other = Scorer(parameters, solution.leaves, scorer.unit_of, criterion, families) if places == "reads" else None

    seen = np.zeros(len(scorer.unit_of), bool)

    def scores(evidence: Mapping[str, Tensor] | None) -> np.ndarray:
        total = scorer(evidence)
        if other is not None:
            total = np.where(scorer.seen, total, other(evidence))
            seen[other.seen] = True
        seen[scorer.seen] = True
        return total

    if not needs:
        total = scores(None)
    else:
        with prepared(model, data, loss, criterion, solution.captures) as source:
            if needs == SAMPLES:
                total, count = np.zeros(len(seen)), 0
                for evidence in sample_gradients(source):
                    total += scores(evidence) ** 2
                    count += 1
                total /= count
            else:
                total = scores(GATHER[needs](source))
    check_finite(total, families, criterion)
    if not any(seen[f.units].any() for f in families):
        raise PruneError(
            f"the criterion {label(criterion)} scores nothing in this model",
            where=type(model).__name__,
            fix="criterion='magnitude'",
        )
    return total, seen


def asked(criterion: Criterion) -> tuple[str, str]:
    """Where a criterion looks and what it needs; raises PruneError for what there is not."""
    places, needs = getattr(criterion, "places", "all"), getattr(criterion, "needs", "")
    for name, value, known in (("places", places, PLACES), ("needs", needs, ("", *GATHER, SAMPLES))):
        if value not in known:
            listed = ", ".join(repr(k) for k in known if k)
            raise PruneError(f"{name} must be one of {listed}, not {value!r}", where=f"criterion {label(criterion)}")
    return places, needs


def check_finite(score: np.ndarray, families: Sequence[Family], criterion: Criterion) -> None:
    """Raise PruneError where a unit that may go has a score that is no number."""
    for family in families:
        if np.isnan(score[family.units]).any():
            raise PruneError(
                f"the criterion {label(criterion)} gives NaN",
                where=f"family {family.name}",
                fix="look for NaN among its parameters (and in the data and the loss, where it reads them)",
            )


def comparable(score: np.ndarray, families: Sequence[Family], criterion: Criterion) -> np.ndarray:
    """Scores for families that compete: each family's own, normalised as the criterion asks; raises PruneError for infinity."""
    name = getattr(criterion, "normalise", "none")
    normalise = NORMALISE[name]
    made = np.zeros_like(score)
    for family in families:
        if name != "none" and not np.isfinite(score[family.units]).all():
            raise PruneError(
                f"the criterion {label(criterion)} gives infinity, which {name!r} cannot make comparable",
                where=f"family {family.name}",
                fix="finite scores, or normalise='none'",
            )
        made[family.units] = normalise(score[family.units])
    return made
