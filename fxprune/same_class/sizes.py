"""What has become of the sizes of a model's dimensions, and which numbers may be widths."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.errors import surface
from fxprune.passes.ir.module_tree import named_tensors, walk, with_outer
from fxprune.passes.ir.pytree import collect

SEQUENCES = (tuple, list, torch.Size)
Shape = tuple[int, ...]
Calls = dict[str, tuple[list[Shape], list[Shape]]]  # what modules take and return, by path


class Sizes:
    """What has become of the sizes of a model's dimensions.

    Arguments: as for `update_attributes`.
    """

    def __init__(self, model: nn.Module, made: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        self.pairs = shape_pairs(model, made)
        self.both = functools.cache(lambda: (call_shapes(model, run), call_shapes(made, run)))
        self.inside = functools.cache(lambda: handed_on(*self.both()))
        self.listed = functools.cache(lambda path: (listed_shapes(model, path, run), listed_shapes(made, path, run)))

    def now(self, path: str, size: int) -> set[int]:
        """What the dimensions of a size that a module may count are now."""
        found = nearest_sizes(path, size, self.pairs)
        if len(found) < 2:
            return found
        told = {now[d] for was, now in self.inside().get(path, ()) for d in (1, -1) if is_size_of(size, was, d)}
        return told if len(told) == 1 else found


def shape_pairs(model: nn.Module, made: nn.Module) -> dict[str, tuple[Shape, Shape]]:
    """The shapes of every tensor that both models hold, in the one and in the other."""
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
    return {name: (shapes[name], tuple(t.shape)) for name, t in named_tensors(made) if name in shapes}


def nearest_sizes(path: str, size: int, pairs: dict[str, tuple[Shape, Shape]]) -> set[int]:
    """What has become of the dimensions of a size, of those tensors in a module that lie the least deep in it.

    One level deeper counts a tensor that has kept the size: it may be meant as well.
    """
    found: dict[int, list[set[int]]] = {}
    for depth, now in sizes_below(path, size, pairs):
        found.setdefault(depth, []).append(now)
    nearest = min(found, default=0)
    kept = [now for now in found.get(nearest + 1, []) if now == {size}]
    return set().union(*found.get(nearest, []), *kept)


def sizes_below(path: str, size: int, pairs: dict[str, tuple[Shape, Shape]]) -> Iterator[tuple[int, set[int]]]:
    """How deep in a module each tensor lies that had dimensions of a size, and what has become of them."""
    start = f"{path}." if path else ""
    for name, (before, after) in pairs.items():
        if name.startswith(start) and len(before) == len(after) and size in before:
            now = {n for was, n in zip(before, after, strict=True) if was == size}
            yield name[len(start) :].count("."), now


def call_shapes(model: nn.Module, run: Callable[[nn.Module], Any]) -> Calls:
    """The shapes of the tensors that each module takes and returns at its last call, by path."""
    found: Calls = {}

    def noted(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given, returned = ([tuple(t.shape) for t in collect(some, Tensor)] for some in ((args, kwargs), out))
            found[path] = given, returned

        return note

    with contextlib.ExitStack() as stack:
        for module, path in walk(model).items():
            stack.callback(module.register_forward_hook(noted(path), with_kwargs=True).remove)
        run(model)
    return found


def listed_shapes(model: nn.Module, path: str, run: Callable[[nn.Module], Any]) -> dict[str, list[Shape]]:
    """The shapes in lists of tensors that a module's forward returns, or its methods `forward_...` where they take the same."""
    found: dict[str, list[Shape]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        for name in ["forward", *(name for name in dir(type(module)) if name.startswith("forward_"))]:
            try:
                returned = out if name == "forward" else getattr(module, name)(*args, **kwargs)
            except Exception as error:  # it takes something else
                surface(error)
                continue
            for some in (returned, *(returned if type(returned) is tuple else ())):
                if type(some) in (tuple, list) and all(isinstance(t, Tensor) for t in some):
                    found[name] = [tuple(t.shape) for t in some]

    handle = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        run(model)
    finally:
        handle.remove()
    return found


def handed_on(before: Calls, after: Calls) -> dict[str, list[tuple[Shape, Shape]]]:
    """By module, the shapes of what it and the modules that it calls take and return, in the original and now.

    What calls a module is the next one outside of it that is called itself, as a list of modules is not.
    """
    found: dict[str, list[tuple[Shape, Shape]]] = {}
    for path in before.keys() & after.keys():
        caller = next((outer for outer in reversed(with_outer(path)[:-1]) if outer in before), "")
        for was, now in zip(before[path], after[path], strict=True):
            for place in {path, caller}:
                found.setdefault(place, []).extend((a, b) for a, b in zip(was, now) if len(a) == len(b))
    return found


def is_number(value: Any) -> bool:
    """Whether a value may be a width: a whole number above one, or several that differ, which the sides of an image do not."""
    if type(value) in (tuple, list) and value and all(type(part) in SEQUENCES for part in value):
        return any(map(is_number, value))
    some = value if type(value) in SEQUENCES else (value,)
    return all(is_whole(n) and n > 1 for n in some) and (some is not value or len(set(some)) > 1)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of Python's or NumPy's, and no truth value."""
    return type(value) is int or isinstance(value, np.integer)


def is_size_of(size: int, shape: Shape, dim: int) -> bool:
    return len(shape) > 1 and shape[dim] == size


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
