"""Bring attributes up to date that say a width and that no forward reads, such as `num_features` of a backbone.

Which dimension such a number counts is found by its value: those of the tensors nearest to its module that had this size in the
original. Where they have one size now, that is the attribute's; where they have several, it cannot be told.

A list of records that each name a module (`{"module": "layer1", "num_chs": 64}`) is about the outputs of these modules: a
number of theirs is a width if it is the size of the channels, second or last, of an output of every one. Where none of the
modules is called, as lists of blocks are not, it is one if each has tensors of this size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fxprune.passes.ir.module_tree import named_tensors, walk
from fxprune.passes.ir.pytree import collect

Shape = tuple[int, ...]
Changes = tuple[nn.Module, dict[str, tuple[int, int]]]  # what numbers of a module were, and would be


def update_attributes(
    model: nn.Module, made: nn.Module, is_exact: Callable[[], bool], run: Callable[[nn.Module], Any], *, built: bool
) -> list[str]:
    """Update the whole numbers on the modules of `made` that still have the original's value; returns those left in doubt.

    Arguments:
        model: the original.
        made: the pruned model of its class.
        is_exact: whether `made` computes what it has to; what changes that is taken back.
        run: calls a model on the example inputs.
        built: whether the numbers are already those of a model built from the pruned configuration.
    """
    return ([] if built else numbers_left(model, made, is_exact)) + update_records(model, made, run)


def numbers_left(model: nn.Module, made: nn.Module, is_exact: Callable[[], bool]) -> list[str]:
    pairs = shape_pairs(model, made)
    modules = {path: module for module, path in walk(made).items()}
    stale: list[str] = []
    changes: list[Changes] = []
    for module, path in walk(model).items():
        counterpart = modules.get(path)
        if counterpart is None or type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")):
            continue
        changed: dict[str, tuple[int, int]] = {}  # from, to
        for name, value in list(vars(module).items()):
            if type(value) is not int or value < 2 or name.startswith("_") or vars(counterpart).get(name) != value:
                continue
            sizes = nearest_sizes(path, value, pairs)
            if len(sizes) > 1:
                stale.append(joined(path, name))
            elif sizes - {value}:
                changed[name] = (value, sizes.pop())
        if changed:
            changes.append((counterpart, changed))
    assign_exact(changes, is_exact)
    return stale


def shape_pairs(model: nn.Module, made: nn.Module) -> dict[str, tuple[Shape, Shape]]:
    """The shapes of every tensor that both models hold, in the one and in the other."""
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
    return {name: (shapes[name], tuple(t.shape)) for name, t in named_tensors(made) if name in shapes}


def assign_exact(changes: list[Changes], is_exact: Callable[[], bool]) -> None:
    """Make those of some changes with which the model stays exact; those of a module together, if that does.

    All are tried at once, and halves of those that do not fit, so that a model is run as often as some are wrong.
    """
    if not changes:
        return
    for module, changed in changes:
        assign(module, {name: now for name, (_, now) in changed.items()})
    if is_exact():
        return
    for module, changed in changes:
        assign(module, {name: was for name, (was, _) in changed.items()})
    if len(changes) == 1:
        (module, changed), *_ = changes
        changes = [(module, {name: pair}) for name, pair in changed.items()]
    if len(changes) > 1:
        half = len(changes) // 2
        assign_exact(changes[:half], is_exact)
        assign_exact(changes[half:], is_exact)


def assign(module: nn.Module, values: dict[str, Any]) -> None:
    for name, value in values.items():
        object.__setattr__(module, name, value)


def nearest_sizes(path: str, size: int, pairs: dict[str, tuple[Shape, Shape]]) -> set[int]:
    """What has become of the dimensions of a size, of those tensors in a module that lie the least deep in it.

    One level deeper counts what has kept the size: it may be meant as well.
    """
    found: dict[int, set[int]] = {}
    for depth, now in sizes_below(path, size, pairs):
        found.setdefault(depth, set()).add(now)
    nearest = min(found, default=0)
    return found.get(nearest, set()) | found.get(nearest + 1, set()) & {size}


def sizes_below(path: str, size: int, pairs: dict[str, tuple[Shape, Shape]]) -> Iterator[tuple[int, int]]:
    start = f"{path}." if path else ""
    for name, (before, after) in pairs.items():
        if name.startswith(start) and len(before) == len(after):
            depth = name[len(start) :].count(".")
            yield from ((depth, now) for was, now in zip(before, after, strict=True) if was == size)


# -- records that name modules ------------------------------------------------------------------------------------------


def update_records(model: nn.Module, made: nn.Module, run: Callable[[nn.Module], Any]) -> list[str]:
    """Update the numbers in lists of records that each name a module; returns the lists in which some are left in doubt."""
    modules = walk(model)
    paths, counterparts = set(modules.values()), {path: module for module, path in walk(made).items()}
    found: list[tuple[str, str, list[dict[str, Any]], list[str]]] = []
    for module, path in modules.items():
        for name, value in vars(module).items():
            if path in counterparts and type(value) is list and value and all(type(record) is dict for record in value):
                owners = [owner for record in value for owner in [named_module(record, path, paths)] if owner is not None]
                if len(owners) == len(value):
                    found.append((path, name, value, owners))
    if not found:
        return []
    before, after, pairs = output_shapes(model, run), output_shapes(made, run), shape_pairs(model, made)
    stale: list[str] = []
    for path, name, records, owners in found:
        changed = [dict(record) for record in records]
        for key in sorted({key for record in records for key, number in record.items() if type(number) is int}):
            there = [(i, owner, records[i][key]) for i, owner in enumerate(owners) if type(records[i].get(key)) is int]
            outputs = [(size, before[owner]) for _, owner, size in there if owner in before]
            dims = [d for d in (1, -1) if all(any(is_size_of(size, s, d) for s in was) for size, was in outputs)] or [1, -1]
            if not all(any(is_size_of(size, s, d) for s in was for d in dims) for size, was in outputs):
                continue  # not a width: there are outputs without a dimension of this size
            if not outputs and not all(any(sizes_below(owner, size, pairs)) for _, owner, size in there):
                continue  # nor in lists that are never called
            for i, owner, size in there:
                both = [*zip(before.get(owner, ()), after.get(owner, ()))]
                told = {now[d] for was, now in both if len(was) == len(now) for d in dims if is_size_of(size, was, d)}
                sizes = told or nearest_sizes(owner, size, pairs)
                if len(sizes) == 1:
                    changed[i][key] = sizes.pop()
                elif joined(path, name) not in stale:
                    stale.append(joined(path, name))
        assign(counterparts[path], {name: changed})
    return stale


def named_module(record: dict[str, Any], path: str, paths: set[str]) -> str | None:
    """The one module that a record names, from the module at `path` on."""
    named = {joined(path, text) for text in record.values() if type(text) is str and text} & paths
    return named.pop() if len(named) == 1 else None


def is_size_of(size: int, shape: Shape, dim: int) -> bool:
    return len(shape) > 1 and shape[dim] == size


def output_shapes(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, list[Shape]]:
    """The shapes of the tensors that each module returns at its last call, by path."""
    found: dict[str, list[Shape]] = {}

    def noted(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            if returned := collect(out, Tensor):
                found[path] = [tuple(t.shape) for t in returned]

        return note

    with contextlib.ExitStack() as stack:
        for module, path in walk(model).items():
            stack.callback(module.register_forward_hook(noted(path)).remove)
        run(model)
    return found


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
