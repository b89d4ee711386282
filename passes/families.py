"""Families: units that live in the same dimensions of the same parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.passes.couple import Solution

KERNEL = "is a kernel's spatial dimension"


@dataclass(frozen=True, slots=True)
class Family:
    """Coupled layers: what a user prunes together.

    Attributes:
        name: the first parameter it spans, and the dimension.
        units: the classes it consists of, ascending.
        members: (parameter or buffer, dimension) for everything it spans.
        width: how many indices of its first member one unit takes up.
        frozen: the reason it is kept whole, or None.
    """

    name: str
    units: np.ndarray
    members: tuple[tuple[str, int], ...]
    width: int
    frozen: str | None


def families(solution: Solution, parameters: set[str]) -> list[Family]:
    """Every family of a solution, in the order of the model's parameters; `parameters` are the names that are learned.

    What only buffers and constants carry is left out, and so are the spatial dimensions of kernels.
    """
    unit = solution.unit.numpy()
    places: list[tuple[str, int]] = []
    spans: list[np.ndarray] = []
    for name, labels in solution.leaves.items():
        for f in labels:
            places.append((name, f.nest[-1]))
            spans.append(f.labels.reshape(-1).numpy())
    if not places:
        return []
    lengths = [len(s) for s in spans]
    keys = np.repeat(np.arange(len(places)) * len(unit), lengths) + unit[np.concatenate(spans)]
    found_keys, counts = np.unique(keys, return_counts=True)
    which, classes = np.divmod(found_keys, len(unit))
    rng = np.random.default_rng(0)
    marks = rng.integers(1, 1 << 62, size=len(places)).astype(np.uint64)
    signature = np.zeros(len(unit), np.uint64)
    np.add.at(signature, classes, marks[which])
    learned = np.zeros(len(unit), bool)
    learned[classes[np.isin(which, [i for i, (name, _) in enumerate(places) if name in parameters])]] = True
    # frozen units of one signature may have different reasons: they are told apart
    signature += (solution.frozen.astype(np.int64) + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    order = np.lexsort((which, signature[classes]))
    starts = np.flatnonzero(np.r_[True, np.diff(signature[classes][order]) != 0])
    found = []
    for block in np.split(order, starts[1:]):
        units = np.unique(classes[block])
        if not learned[units[0]]:
            continue
        reason = int(solution.frozen[units[0]])
        why = solution.reasons[reason] if reason >= 0 else None
        if why is not None and why.startswith(KERNEL):
            continue
        members = tuple(places[i] for i in dict.fromkeys(which[block]))
        first = block[which[block] == which[block[0]]]
        width = int(counts[first].sum() // len(units))
        named = next((m for m in members if m[0] in parameters), members[0])
        found.append(Family(f"{named[0]}:{named[1]}", units, members, max(1, width), why))
    rank = {place: i for i, place in enumerate(places)}
    return sorted(found, key=lambda f: rank[f.members[0]])
