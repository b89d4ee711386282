"""What is chosen by value in a coupled model, as experts are: which units it is, and whether they, or they alone, may go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxprune.passes.coupling.listed_experts import Asked, ListedExperts
from fxprune.passes.coupling.picks import ELSEWHERE
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ops.creation import SHARED


def chosen_units(solution: Solution) -> np.ndarray:
    """The units of all that is chosen by value and that is the model's own: of its experts."""
    owned = max((f.largest for labels in solution.leaves.values() for f in labels), default=0)
    found = {id(labels): labels for picks in solution.picks for labels in picks.values()}
    units = solution.unit_of.numpy()
    chosen = [units[labels[(labels > 0) & (labels <= owned)]] for labels in found.values()]
    return np.unique(np.concatenate([*chosen, np.zeros(0, np.int64)]))


def find_experts(solution: Solution, asked: Sequence[Asked]) -> None:
    """Note what goes with single numbers of a choice, and freeze those of which more is made."""
    solution.experts = ListedExperts(solution.captures, asked, solution.unit_of.numpy())
    unclear = np.array(sorted(solution.experts.unclear), np.int64)
    solution.frozen[unclear[solution.frozen[unclear] < 0]] = len(solution.reasons)
    solution.reasons.append(ELSEWHERE)


def keep_the_rest(solution: Solution) -> None:
    """Freeze all but what is chosen by value."""
    rest = np.setdiff1d(np.flatnonzero(solution.frozen < 0), chosen_units(solution))
    solution.frozen[rest] = len(solution.reasons)
    solution.reasons.append("is no expert, and nothing else may go by experts='only'")


def check_choices(solution: Solution, options: CouplingOptions, where: str) -> None:
    """Keep all but experts where they alone may go; raise PruneError where query heads are to go, and none share keys."""
    if options.choices == "only":
        keep_the_rest(solution)
    if options.heads == "queries" and not any(reason.startswith(SHARED) for reason in solution.reasons):
        what = "attention='queries' removes query heads that share keys and values, and each has its own"
        raise PruneError(
            what, where=where, fix="attention='heads' removes whole heads, attention='dims' dimensions within them"
        )


def require_experts(solution: Solution, where: str) -> None:
    """Raise PruneError where a model has no experts that could go."""
    units = chosen_units(solution)
    if not len(units):
        what = "experts are asked for, and the model has none: nothing is chosen by value and indexes parameters"
        raise PruneError(what, where=where, fix="experts=False")
    if (solution.frozen[units] >= 0).all():
        why = solution.reasons[int(solution.frozen[units[0]])]
        raise PruneError(f"no expert of the model can go: the first one {why}", where=where, fix="experts=False")
