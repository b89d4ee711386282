"""Indices as users give them, and as they are printed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.passes.errors import PruneError

EXAMPLE = "remove={'layer1.conv1': [2, 6, 9]}"


def parse_remove(remove: Any) -> dict[Any, tuple[int, ...]] | None:
    """What `remove` says, with its indices as ascending integers; raises PruneError for what is none."""
    if remove is None:
        return None
    if not isinstance(remove, Mapping):
        raise PruneError(f"remove must be a mapping from layers to indices, not {type(remove).__name__}", fix=EXAMPLE)
    if not remove:
        raise PruneError("remove is an empty mapping, which removes nothing", fix=EXAMPLE)
    return {key: parse_indices(indices, "remove", key) for key, indices in remove.items()}


def parse_indices(indices: Any, argument: str, key: Any) -> tuple[int, ...]:
    """Indices that were given for a layer, ascending; raises PruneError for what are none."""
    example = EXAMPLE if argument == "remove" else f"{argument}=[2, 6, 9]"
    where = key if isinstance(key, str) else getattr(key, "name", type(key).__name__)
    if isinstance(indices, Tensor | np.ndarray):
        indices = indices.tolist()
    if not isinstance(indices, Sequence | set | frozenset) or isinstance(indices, str):
        raise PruneError(f"{argument} needs a list of indices, not {indices!r}", where=where, fix=example)
    found = []
    for given in indices:
        try:
            if isinstance(given, bool | np.bool_):
                raise TypeError
            found.append(operator.index(given))
        except TypeError:
            fix = "mask.nonzero().flatten().tolist() makes indices of a mask" if isinstance(given, bool | np.bool_) else example
            raise PruneError(f"{argument} holds {given!r}, which is no index", where=where, fix=fix) from None
    if not found:
        raise PruneError(
            f"{argument} names no index",
            where=where,
            fix=f"leave {where!r} out, or {example}" if argument == "remove" else example,
        )
    negative = [i for i in found if i < 0]
    if negative:
        raise PruneError(f"{argument} holds the index {negative[0]}, and indices count from 0", where=where, fix=example)
    twice = sorted({i for i in found if found.count(i) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise PruneError(f"{argument} names {spelled(twice, 6)} twice", where=where, fix="each index once")
    return tuple(sorted(found))


def spelled(indices: Iterable[int], most: int | None = None) -> str:
    """Ascending indices with runs put together, the first `most` runs of them.

    >>> spelled([0, 1, 2, 3, 7, 9, 10])
    '0-3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    texts = []
    for start, end in runs:
        texts += [f"{start}-{end}"] if end > start + 1 else [str(i) for i in range(start, end + 1)]
    hidden = len(texts) - most if most is not None and len(texts) > most + 1 else 0
    return ", ".join(texts[: len(texts) - hidden]) + (f" and {hidden} more" if hidden else "")


def listed(indices: Iterable[int]) -> str:
    """Ascending indices as Python would read them.

    >>> listed([0, 1, 2, 3, 7])
    '[*range(0, 4), 7]'
    """
    parts = []
    for text in spelled(indices).split(", "):
        start, dash, end = text.partition("-")
        parts.append(f"*range({start}, {int(end) + 1})" if dash else text)
    return f"[{', '.join(parts)}]"
