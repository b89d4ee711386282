"""Nested tuples, lists, dicts, slices and records, traversed, mapped and copied; and the references to tensors in them.

A *record* is an object of a class of a model's own, such as a dataclass, by its attributes; so is what Python or torch have to
hold values together.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.errors import PruneError


class TensorRef:
    """A tensor in an op trace. A recorder creates one for each number, so that they compare by identity."""

    __slots__ = ("id",)

    def __init__(self, number: int) -> None:
        self.id = number

    def __repr__(self) -> str:
        return f"Ref({self.id})"


ATOMS = frozenset([int, float, bool, str, type(None), torch.dtype, torch.device])


NO_RECORDS = (nn.Module, Tensor, type, enum.Enum, BaseException, str, bytes, int, float, tuple, list, dict, types.FunctionType)
LIBRARIES = frozenset(["torch", "numpy", "fxprune", *sys.stdlib_module_names]) - {"__main__"}
HOLDERS = ("collections", "types", "torch.distributions")  # modules whose objects are records all the same
UNSEEN = 4096  # objects that are looked at to find a tensor in what is no record
NO_VALUES = (type, nn.Module, types.ModuleType, types.CodeType, types.FrameType)
entered = threading.local()  # which records are being looked into: one may hold itself


@functools.lru_cache(maxsize=4096)
def fields_of(kind: Any) -> tuple[str, ...] | None:
    """The slots of the objects of a class, if they are records; None where they are not."""
    library = kind.__module__.partition(".")[0] in LIBRARIES and not kind.__module__.startswith(HOLDERS)
    if library or issubclass(kind, NO_RECORDS):
        return None
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    if not found and not kind.__dictoffset__:  # it holds what it holds in C
        return None
    return tuple(name for name in found if not name.startswith("__"))


def attributes_of(x: Any) -> contextlib.AbstractContextManager[dict[str, Any] | None]:
    """What a record holds, by name; None for what is none, or is being looked into already."""
    slots = fields_of(type(x))  # type: ignore[arg-type]
    return NOTHING_HELD if slots is None else looked_into(x, slots)


NOTHING_HELD: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@contextlib.contextmanager
def looked_into(x: Any, slots: tuple[str, ...]) -> Iterator[dict[str, Any] | None]:
    seen = vars(entered).setdefault("seen", set())
    if id(x) in seen or not (slots or hasattr(x, "__dict__")):
        yield None
        return
    seen.add(id(x))
    try:
        yield {name: getattr(x, name) for name in slots if hasattr(x, name)} | getattr(x, "__dict__", {})
    finally:
        seen.discard(id(x))


def record(kind: type, attributes: dict[str, Any]) -> Any:
    """A record of a class with these attributes, made without its constructor, which may check or compute things."""
    try:
        made: Any = object.__new__(kind)
    except TypeError:  # it is made in C
        made = kind.__new__(kind)  # type: ignore[call-overload]
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


def is_record(x: Any) -> bool:
    return fields_of(type(x)) is not None  # type: ignore[arg-type]  # a class is hashable, whatever mypy says


def map_tensors(x: Any, fn: Callable[[Any], Any], kind: type | tuple[type, ...] = Tensor) -> Any:
    """Replace every instance of `kind` inside a nested structure; a record without one is handed back."""
    if isinstance(x, kind):  # (atoms are among what may be replaced: a device is)
        return fn(x)
    if type(x) in ATOMS:
        return x
    if isinstance(x, tuple):
        mapped = [map_tensors(v, fn, kind) for v in x]
        named = hasattr(type(x), "_fields")
        return tuple.__new__(type(x), mapped) if named else tuple(mapped)  # its kind may check what it is given
    if isinstance(x, list):
        return [map_tensors(v, fn, kind) for v in x]
    if isinstance(x, dict):
        return {k: map_tensors(v, fn, kind) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(*(map_tensors(v, fn, kind) for v in (x.start, x.stop, x.step)))
    with attributes_of(x) as held:
        if held and any(collect(v, kind) for v in held.values()):
            return record(type(x), {name: map_tensors(v, fn, kind) for name, v in held.items()})
    return x


def collect(x: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Every instance of `kind` inside a nested structure, in order."""
    if isinstance(x, kind):
        return [x]
    found: list[Any] = []
    try:
        if kind is TensorRef:
            gather_refs(x, found)
        else:
            gather(x, kind, found)
    except RecursionError as error:
        what = "a list or a dict contains itself, or too many others one inside the other"
        raise PruneError(what, fix="inputs, outputs and batches without it") from error
    return found


def inside(x: Any) -> Iterable[Any]:
    """What a container holds; nothing where it is none."""
    if type(x) in SEQUENCES or isinstance(x, SEQUENCES):
        return x
    if isinstance(x, dict):
        return x.values()
    if type(x) is slice:
        return (x.start, x.stop, x.step)
    return held_by(x) if is_record(x) else ()


def held_by(x: Any) -> Iterator[Any]:
    with attributes_of(x) as held:
        yield from (held or {}).values()


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
    """The leaves of a nested structure."""
    if type(x) not in ATOMS and (isinstance(x, (*SEQUENCES, dict, slice)) or is_record(x)):
        for v in inside(x):
            yield from iterate(v)
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


def hidden_tensors(x: Any) -> list[Tensor]:
    """The tensors in a nested structure that only its objects know of, such as an iterator: those that nothing here finds."""
    found: list[Tensor] = []
    pending: list[Any] = [v for v in iterate(x) if type(v) not in ATOMS and not isinstance(v, (Tensor, *NO_VALUES))]
    seen = set(map(id, pending))
    while pending and len(seen) < UNSEEN:
        x = pending.pop()
        for v in (x.__closure__ or ()) if isinstance(x, types.FunctionType) else gc.get_referents(x):
            if id(v) in seen or type(v) in ATOMS or isinstance(v, NO_VALUES):
                continue
            seen.add(id(v))
            if isinstance(v, Tensor):
                found.append(v)
            else:
                pending.append(v)
    return found


def copy_containers(x: Any) -> Any:
    """Copies of the containers that a forward might change."""
    if type(x) is list:
        return [copy_containers(v) for v in x]
    if type(x) is tuple:
        return tuple([copy_containers(v) for v in x])
    if type(x) is dict:
        return {k: copy_containers(v) for k, v in x.items()}
    with attributes_of(x) as held:
        return record(type(x), {name: copy_containers(v) for name, v in held.items()}) if held else x


def without_inference(tensor: Tensor) -> Tensor:
    """A tensor that gradients may be taken with: a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
