"""Nested tuples, lists, dicts and slices, traversed, mapped and copied; and the references to tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class TensorRef:
    """A tensor in an op trace. A recorder creates one for each number, so that they compare by identity."""

    __slots__ = ("id",)

    def __init__(self, number: int) -> None:
        self.id = number

    def __repr__(self) -> str:
        return f"Ref({self.id})"


ATOMS = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device])


def map_tensors(x: Any, fn: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Any:
    """Replace every instance of `kind` inside nested tuples, lists, dicts and slices."""
    if isinstance(x, kind):  # (atoms are among what may be replaced: a device is)
        return fn(x)
    if type(x) in ATOMS:
        return x
    if isinstance(x, tuple):
        mapped = [map_tensors(v, fn, kind) for v in x]
        return tuple.__new__(type(x), mapped) if hasattr(x, "_fields") else tuple(mapped)  # its kind may check what it is given
    if isinstance(x, list):
        return [map_tensors(v, fn, kind) for v in x]
    if isinstance(x, dict):
        return {k: map_tensors(v, fn, kind) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(*(map_tensors(v, fn, kind) for v in (x.start, x.stop, x.step)))
    return x


def collect(x: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Every instance of `kind` inside a nested structure, in order."""
    if isinstance(x, kind):
        return [x]
    found: list[Any] = []
    if kind is TensorRef:
        gather_refs(x, found)
    else:
        gather(x, kind, found)
    return found


def inside(x: Any) -> Iterable[Any]:
    """What a container holds; nothing where it is none."""
    if type(x) in SEQUENCES or isinstance(x, SEQUENCES):
        return x
    if isinstance(x, dict):
        return x.values()
    return (x.start, x.stop, x.step) if type(x) is slice else ()


def gather(x: Any, kind: type | tuple[type, ...], found: list[Any]) -> None:
    for v in inside(x):
        if isinstance(v, kind):
            found.append(v)
        elif type(v) not in ATOMS:
            gather(v, kind, found)


def gather_refs(x: Any, found: list[TensorRef]) -> None:
    """The same for references, which is what nearly all that is gathered is."""
    for v in x if type(x) in SEQUENCES else inside(x):
        if type(v) is TensorRef:
            found.append(v)
        elif type(v) not in ATOMS:
            gather_refs(v, found)


SEQUENCES = (tuple, list)


def iterate(x: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists, dicts and slices."""
    if type(x) in ATOMS:
        yield x
    elif isinstance(x, tuple | list):
        for v in x:
            yield from iterate(v)
    elif isinstance(x, dict):
        for v in x.values():
            yield from iterate(v)
    elif isinstance(x, slice):
        yield from iterate((x.start, x.stop, x.step))
    else:
        yield x


def like_dict(value: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Items in a dict of the same kind: one whose items are attributes too is made from keywords."""
    if type(value) is dict:
        return items
    try:
        return type(value)(**items)
    except Exception:  # a kind with arguments of its own
        return items


def tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [v for v in iterate(x) if isinstance(v, Tensor)]


def has_tensor(x: Any) -> bool:
    if type(x) in (tuple, list):
        return any(isinstance(v, Tensor) or (type(v) not in ATOMS and has_tensor(v)) for v in x)
    return isinstance(x, Tensor) or any(isinstance(v, Tensor) for v in iterate(x))


def copy_containers(x: Any) -> Any:
    """Copies of the containers that a forward might change."""
    if type(x) is list:
        return [copy_containers(v) for v in x]
    if type(x) is tuple:
        return tuple([copy_containers(v) for v in x])
    return {k: copy_containers(v) for k, v in x.items()} if type(x) is dict else x
