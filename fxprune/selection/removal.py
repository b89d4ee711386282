"""Removal by index: the units that exactly the given channels are, or the reason why these cannot go alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import NotARectangle, PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.rewrite.rewrite import tensor_cuts
from fxprune.selection.indices import listed, spelled
from fxprune.selection.places import Place, find_place, where_units_are
from fxprune.selection.rectangles import check_activations, find_nonempty_sets


def check_indices(place: Place, indices: Sequence[int]) -> None:
    """Raise PruneError for indices that a place does not have."""
    if indices[-1] >= place.size:
        what = f"{place.some([indices[-1]])} is none: it has {place.size}"
        raise PruneError(what, fix=f"indices from 0 to {place.size - 1}")


def select_given(model: nn.Module, solution: Solution, remove: Mapping[Any, Sequence[int]]) -> tuple[Tensor, Slicer]:
    """Which labels stay where exactly the given channels go, with all that is coupled to them.

    Arguments:
        remove: for each layer, tensor or family its indices; see `find_place`.

    Raises: PruneError where no choice of units is exactly that, or the units cannot go, or not alone.
    """
    found = families(solution, set(named_parameters(model)))
    asked = [(find_place(model, solution, found, key, "remove"), indices) for key, indices in remove.items()]
    removed = np.zeros(len(solution.unit_of), bool)
    for place, indices in asked:
        removed[exact_units(solution, place, indices)] = True
    for place, indices in asked:
        also = np.setdiff1d(np.flatnonzero(removed[place.units].any(0)), indices).tolist()
        if also:
            what = f"{place.some(also)} would go too, with what remove names elsewhere"
            raise PruneError(what, fix=f"remove={{{place.name!r}: {listed([*indices, *also])}, ...}}")
    return kept_without(solution, removed)


def exact_units(solution: Solution, place: Place, indices: Sequence[int]) -> np.ndarray:
    """The units that lie at these indices of a place and at no others; raises PruneError where that leaves an index out."""
    check_indices(place, indices)
    wanted = np.zeros(place.size, bool)
    wanted[list(indices)] = True
    if wanted.all():
        raise PruneError(f"remove names all of {place.name}: {spelled(indices)}", fix="leave one at least")
    inside = np.setdiff1d(place.units[:, wanted], place.units[:, ~wanted])
    stays = [i for i in indices if (solution.frozen[place.units[:, i]] >= 0).all()]
    if stays:
        why = solution.reasons[int(solution.frozen[place.units[0, stays[0]]])]
        what = f"{place.some(stays)} cannot go: {'it' if len(stays) == 1 else 'the first of them'} {why}"
        raise PruneError(what, fix="another layer; print(fxprune.couple(model, example_inputs)) shows what may go")
    missed = [i for i in indices if not np.isin(place.units[:, i], inside).any()]
    if missed:
        mine = place.units[:, missed[0]]
        others = np.flatnonzero(np.isin(place.units, mine[solution.frozen[mine] < 0][:1]).any(0))
        also = np.setdiff1d(others, indices).tolist()
        raise PruneError(
            f"{place.some(missed[:1])} cannot go without {spelled(also, 6)} of it: they are one unit",
            fix=f"remove={{{place.name!r}: {listed(others.tolist())}}}; couple(...).group(...) shows why",
        )
    return inside[solution.frozen[inside] < 0]


def kept_without(solution: Solution, removed: np.ndarray) -> tuple[Tensor, Slicer]:
    """Which labels stay without the units `removed`, shape (labels,); raises PruneError where others would have to go, too."""
    for units in find_nonempty_sets(solution):
        if removed[units].all():
            raise PruneError(f"nothing would be left of {where_units_are(solution, units)}", fix="leave one of these at least")
    for units, count in solution.at_least:
        left = int((~removed[units]).sum())
        if left < count:
            what = f"{count} of {where_units_are(solution, units)} are chosen at a time, and {left} would be left"
            raise PruneError(what, fix=f"leave {count} of these at least")
    why = why_uneven(solution, removed)
    if why is not None:
        raise why
    kept = torch.from_numpy(~removed[solution.unit_of.numpy()])
    slicer = Slicer(kept)
    try:
        tensor_cuts(solution, kept, slicer)
        check_activations(solution, slicer)
    except NotARectangle as error:
        units = solution.unit_of.numpy()[error.labels.numpy().reshape(-1)]
        left = where_units_are(solution, units[removed[units]])
        raise PruneError(
            f"{left} cannot go alone: what is left would be no full tensor", fix="the same channels of every row or head"
        ) from error
    return kept, slicer


def why_uneven(solution: Solution, removed: np.ndarray) -> PruneError | None:
    """The error where rows that must keep equally many entries would not; None where there is none."""
    for matrix in solution.equal_rows:
        lost = removed[matrix].sum(1)
        most = int(lost.max())
        if (lost == most).all():
            continue
        first, short = matrix[int(lost.argmax())], int(lost.argmin())
        row, missing = matrix[short], most - int(lost[short])
        free = row[~removed[row] & (solution.frozen[row] < 0)]
        named = where_units_are(solution, first[removed[first]])
        if not len(free):
            return PruneError(f"{named} cannot go: other rows of the same tensor can lose none", fix="another layer")
        return PruneError(
            f"{named} cannot go alone: each of {len(matrix)} rows loses equally many",
            fix=f"name {missing} more of {where_units_are(solution, free)}"
            + (", and so on" if (lost < most).sum() > 1 else ""),
        )
    return None
