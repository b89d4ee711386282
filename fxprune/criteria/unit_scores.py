"""Score all units of a model, with the evidence that a criterion needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.criteria.aggregation import NORMALISE
from fxprune.criteria.base import Criterion, CriterionSpec, describe
from fxprune.criteria.calibrated import Calibration
from fxprune.criteria.calibration import GATHER, LOSS_TERMS, SAMPLES, Target, check_source, prepare_source, sample_gradients
from fxprune.criteria.catalog import resolve
from fxprune.criteria.parameter_roles import roles
from fxprune.criteria.scorer import Places, Read, Scorer
from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ops.registry import spec_of


def score_units(
    model: nn.Module,
    solution: Solution,
    families: Sequence[Family],
    criterion: str | Criterion,
    data: Any = None,
    loss: Any = None,
    read: Read | None = None,
    target: Target = Target(),  # noqa: B008 - it is frozen
) -> tuple[np.ndarray, np.ndarray]:
    """The score of each unit, and whether the criterion scored it; both indexed by unit, shape (labels,).

    `read` finds the values of a parameter by its name, if they are not those in the model; `target` is what scores are for.

    Raises: PruneError where data or a loss is missing, or the criterion returns no scores, or scores no family.
    """
    check_source(data, loss)
    spec = resolve(criterion)
    if spec.score_families is not None:
        with prepare_source(model, data, loss, spec.name, solution) as source:
            source.target = target
            total, seen = spec.score_families(source, families)
        check_finite(total, families, spec)
        return total, seen
    scorers = make_scorers(named_parameters(model), solution, families, spec, read)
    seen = np.zeros(len(scorers[0].unit_of), bool)

    def score(evidence: Mapping[str, Tensor] | None) -> np.ndarray:
        total = scorers[0](evidence)
        for other in scorers[1:]:
            total = np.where(scorers[0].seen, total, other(evidence))
        for scorer in scorers:
            seen[scorer.seen] = True
        return total

    if isinstance(criterion, Calibration):
        parameters = named_parameters(model)
        criterion.check({name: p.shape for name, p in parameters.items()})
        check_granularity(criterion, spec, solution, target)
        total = score({name: t.to(parameters[name].device) for name, t in criterion.evidence.items()})
    elif not spec.needs:
        total = score(None)
    else:
        with prepare_source(model, data, loss, spec.name, solution) as source:
            if spec.needs == SAMPLES:
                total, count = np.zeros(len(seen)), 0
                for evidence in sample_gradients(source):
                    total += score(evidence) ** 2
                    count += 1
                total /= count
            else:
                total = score(GATHER[spec.needs](source))
    check_finite(total, families, spec)
    if not any(seen[f.units].any() for f in families):
        raise PruneError(
            f"the criterion {spec.name} scores nothing in this model", where=type(model).__name__, fix="criterion='magnitude'"
        )
    return total, seen


def check_granularity(seen: Calibration, spec: CriterionSpec, solution: Solution, target: Target) -> None:
    """Raise PruneError where losses were summed over heads, and dimensions are to go, or the other way round."""
    if describe(seen.inner).needs != LOSS_TERMS or seen.attention is None:
        return
    asked = CouplingOptions(target.heads).attention
    if seen.attention != asked and any(spec_of(op).heads for capture in solution.captures for op in capture.op_trace.ops):
        what = f"the calibration was gathered for attention={seen.attention!r}, and attention={asked!r} is asked for"
        raise PruneError(what, fix=f"fxprune.calibrate(..., attention={asked!r})")


def make_scorers(
    parameters: Mapping[str, Tensor],
    solution: Solution,
    families: Sequence[Family],
    criterion: CriterionSpec,
    read: Read | None = None,
) -> list[Scorer]:
    """A scorer of the places where the criterion looks; with `reads` a second one, for units that no product reads."""
    unit = solution.unit_of.numpy()
    counts: Places | None = None
    if criterion.places != "all":
        found = roles(solution.captures)
        if criterion.places == "reads":
            counts = lambda name, f: (name, f.major_to_minor[-1]) in found.reads  # noqa: E731
        else:
            counts = lambda name, f: name in found.scales  # noqa: E731
    scorers = [Scorer(parameters, solution.leaves, unit, criterion, families, counts, read)]
    if criterion.places == "reads":
        scorers.append(Scorer(parameters, solution.leaves, unit, criterion, families, None, read))
    return scorers


def check_finite(score: np.ndarray, families: Sequence[Family], criterion: CriterionSpec) -> None:
    """Raise PruneError where the score of a unit that may be removed is NaN."""
    for family in families:
        if np.isnan(score[family.units]).any():
            raise PruneError(
                f"the criterion {criterion.name} gives NaN",
                where=f"family {family.name}",
                fix="look for NaN among its parameters (and in the data and the loss, where it reads them)",
            )


def normalise_scores(score: np.ndarray, families: Sequence[Family], criterion: Criterion) -> np.ndarray:
    """Scores that families can compete by: those of each family, normalised as the criterion asks.

    Raises: PruneError for infinite scores.
    """
    spec = describe(criterion)
    normalise = NORMALISE[spec.normalise]
    made = np.zeros_like(score)
    for family in families:
        if spec.normalise != "none" and not np.isfinite(score[family.units]).all():
            raise PruneError(
                f"the criterion {spec.name} gives infinity, which {spec.normalise!r} cannot make comparable",
                where=f"family {family.name}",
                fix="finite scores, or normalise='none'",
            )
        made[family.units] = normalise(score[family.units])
    return made
