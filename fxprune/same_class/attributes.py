"""Bring attributes up to date that say a width and that no forward reads, such as `num_features` of a backbone.

Which dimension such a number counts is found by its value: those of the tensors nearest to its module that had this size in the
original. Where they have one size now, that is the attribute's; where they have several, it cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fxprune.passes.ir.module_tree import named_tensors, walk

Shape = tuple[int, ...]


def update_attributes(model: nn.Module, made: nn.Module, is_exact: Callable[[], bool]) -> list[str]:
    """Update the whole numbers on the modules of `made` that still have the original's value; returns those left in doubt.

    Arguments:
        model: the original.
        made: the pruned model of its class.
        is_exact: whether `made` computes what it has to; what changes that is taken back.
    """
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
    pairs = {name: (shapes[name], tuple(t.shape)) for name, t in named_tensors(made) if name in shapes}
    modules = {path: module for module, path in walk(made).items()}
    stale: list[str] = []
    for module, path in walk(model).items():
        counterpart = modules.get(path)
        if counterpart is None or type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")):
            continue
        changed: dict[str, tuple[int, int]] = {}
        for name, value in list(vars(module).items()):
            if type(value) is not int or value < 2 or name.startswith("_") or vars(counterpart).get(name) != value:
                continue
            sizes = nearest_sizes(path, value, pairs)
            if len(sizes) > 1:
                stale.append(f"{path}.{name}" if path else name)
            elif sizes - {value}:
                changed[name] = (value, sizes.pop())
        if changed:
            assign(counterpart, {name: now for name, (_, now) in changed.items()})
            if not is_exact():
                assign(counterpart, {name: was for name, (was, _) in changed.items()})
    return stale


def assign(module: nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        object.__setattr__(module, name, value)


def nearest_sizes(path: str, size: int, pairs: dict[str, tuple[Shape, Shape]]) -> set[int]:
    """What has become of the dimensions of a size, of those tensors in a module that lie the least deep in it."""
    found: dict[int, set[int]] = {}
    for depth, now in sizes_below(path, size, pairs):
        found.setdefault(depth, set()).add(now)
    return found[min(found)] if found else set()


def sizes_below(path: str, size: int, pairs: dict[str, tuple[Shape, Shape]]) -> Iterator[tuple[int, int]]:
    start = f"{path}." if path else ""
    for name, (before, after) in pairs.items():
        if name.startswith(start) and len(before) == len(after):
            depth = name[len(start) :].count(".")
            yield from ((depth, now) for was, now in zip(before, after, strict=True) if was == size)
