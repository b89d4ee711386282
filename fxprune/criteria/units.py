"""Scores of all units of a model, by whatever a criterion needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.criteria.combine import label
from fxprune.criteria.evidence import GATHER, SAMPLES, prepared, sample_gradients
from fxprune.criteria.roles import roles
from fxprune.criteria.scoring import Criterion, Places, Scorer, check_finite
from fxprune.errors import PruneError
from fxprune.passes.couple import Solution
from fxprune.passes.families import Family
from fxprune.passes.tree import named_parameters

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
        counts = lambda name, f: (name, f.nest[-1]) in found.reads  # noqa: E731
    elif found is not None:
        counts = lambda name, f: name in found.scales  # noqa: E731
    scorer = Scorer(parameters, solution.leaves, solution.unit.numpy(), criterion, families, counts)
    # what nothing reads by a product is scored by all its places
    other = Scorer(parameters, solution.leaves, scorer.unit, criterion, families) if places == "reads" else None

    seen = np.zeros(len(scorer.unit), bool)

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
