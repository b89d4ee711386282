"""Families: units that live in the same dimensions of the same parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fxprune.passes.coupling.solution import Solution

KERNEL = "is a kernel's spatial dimension"
WORD = 1 << 64


@dataclass(frozen=True, slots=True)
class Family:
    """Coupled layers: what a user prunes together.

    Attributes:
        name: the first parameter it spans, and the dimension.
        units: the units it consists of, ascending.
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
    unit = solution.unit_of.numpy()
    places: list[tuple[str, int]] = []
    spans: list[np.ndarray] = []
    for name, labels in solution.leaves.items():
        for f in labels:
            places.append((name, f.major_to_minor[-1]))
            spans.append(f.lookup(unit))
    if not places:
        return []
    # units with equal signatures (a sum of random numbers, one for each place) live in the same places
    marks: list[int] = np.random.default_rng(0).integers(1, 1 << 62, size=len(places)).tolist()
    signature = np.zeros(len(unit), np.uint64)
    learned = np.zeros(len(unit), bool)
    blocks_of = occurrences(spans, len(unit))
    for some, where in blocks_of:
        signature[some] += np.uint64(sum([marks[i] for i in where]) % WORD)
        if any(places[i][0] in parameters for i in where):
            learned[some] = True
    units = np.flatnonzero(learned)
    # frozen units of one signature may have different reasons: they are told apart
    told = signature[units] + (solution.frozen[units].astype(np.int64) + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    _, first, group = np.unique(told, return_index=True, return_inverse=True)
    group_of = np.full(len(unit), -1)
    group_of[units] = group
    leader = np.zeros(len(unit), bool)
    leader[units[first]] = True
    members: list[list[int]] = [[] for _ in first]
    for some, where in blocks_of:
        for g in group_of[some][leader[some]].tolist():
            members[g] += where
    members = [sorted(m) for m in members]
    order = np.argsort(group, kind="stable")
    blocks = np.split(units[order], np.cumsum(np.bincount(group, minlength=len(first)))[:-1])
    found: list[tuple[int, Family]] = []
    for g, block in enumerate(blocks):
        if not len(block):
            continue
        reason = int(solution.frozen[block[0]])
        why = solution.reasons[reason] if reason >= 0 else None
        if why is not None and why.startswith(KERNEL):
            continue
        spanned = [places[i] for i in members[g]]
        width = int((group_of[spans[members[g][0]]] == g).sum()) // len(block)
        named = next((m for m in spanned if m[0] in parameters), spanned[0])
        found.append((members[g][0], Family(f"{named[0]}:{named[1]}", block, tuple(spanned), max(1, width), why)))
    return [family for _, family in sorted(found, key=lambda item: item[0])]


def occurrences(spans: list[np.ndarray], count: int) -> list[tuple[slice | np.ndarray, list[int]]]:
    """Which of `count` units occur where: sets of units, each with the numbers of the places that hold just these.

    A unit may be in several sets.
    """
    found: dict[object, tuple[slice | np.ndarray, list[int]]] = {}
    mark = np.zeros(count, bool)
    every = np.arange(count)
    for i, span in enumerate(spans):
        if not len(span):
            continue
        start, end = int(span[0]), int(span[-1]) + 1
        if end - start == len(span) and span.tobytes() == every[start:end].tobytes():
            found.setdefault((start, end), (slice(start, end), []))[1].append(i)
        else:
            if not bool((span[1:] > span[:-1]).all()):
                mark[span] = True
                span = np.flatnonzero(mark)
                mark[span] = False
            found[i] = span, [i]
    return list(found.values())
