"""What an index written in Python means, item by item."""

from __future__ import annotations

from typing import Any


def slices_of(index: Any, ndim: int) -> list[tuple[int, int, slice]]:
    """The slices of an index, each with the dimension of the tensor and that of what has been taken by then.

    Numbers take dimensions away and None adds some; tensors among the items act after the slices.

    Arguments:
        ndim: of the tensor.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    at = next((i for i, item in enumerate(items) if item is ...), None)
    if at is not None:
        named = sum(item is not None and item is not ... for item in items)
        items[at : at + 1] = [slice(None)] * (ndim - named)
    found, source, dim = [], 0, 0
    for item in items:
        if isinstance(item, slice):
            found.append((source, dim, item))
        source += item is not None
        dim += not isinstance(item, int)
    return found
