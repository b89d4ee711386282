"""Bring lists of records up to date that each name a module, such as `{"module": "layer1", "num_chs": 64}`.

They are about the outputs of these modules: a number of theirs is a width if it is the size of the channels, second or last, of
an output of every one; that of a list of blocks is the output of the last. Where none of the modules is called, it is one if
each has tensors of this size. Numbers of records that name no module, among others that do, are told as those of a tuple are.
Where some are left in doubt, a list decides that a method of the class returns, such as `forward_intermediates` of timm, with a
tensor for each record.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fxprune.passes.ir.module_tree import children_of, walk
from fxprune.same_class.holders import holders, members, put
from fxprune.same_class.sizes import Calls, Shape, Sizes, is_number, is_size_of, joined, nearest_sizes, sizes_below


def update_records(model: nn.Module, made: nn.Module, sizes: Sizes) -> list[str]:
    """Update the numbers in lists of records that each name a module; returns the lists in which some are left in doubt."""
    modules = walk(model)
    paths, counterparts = set(modules.values()), {path: module for module, path in walk(made).items()}
    found: list[tuple[str, str, list[dict[str, Any]], list[str | None], Any]] = []
    for module, path in modules.items():
        if path not in counterparts:
            continue
        places = [("", module, counterparts[path]), *holders(module, counterparts[path])]
        for at, name, value, holder in [(at, n, v, other) for at, mine, other in places for n, v in members(mine).items()]:
            if type(value) is list and value and all(type(record) is dict for record in value):
                owners = [named_module(record, path, paths) for record in value]
                if any(owner is not None for owner in owners) or len(owners) > 1:  # one alone may be about something else
                    found.append((path, joined(at, name), value, owners, holder))
    if not found:
        return []
    before, after = sizes.both()
    shapes = output_shapes(model, before), output_shapes(made, after), sizes.pairs
    stale: list[str] = []
    for path, name, records, owners, holder in found:
        changed = [dict(record) for record in records]
        for key in sorted({key for record in records for key, number in record.items() if type(number) is int}):
            there = [(i, records[i][key]) for i in range(len(records)) if type(records[i].get(key)) is int]
            told = told_by_records(path, [(owners[i], size) for i, size in there], *shapes)
            if not told:  # by those alone whose modules are there: others name stages that were left out
                named = [(i, owner, size) for i, size in there for owner in [owners[i]] if owner is not None]
                there = [(i, size) for i, _, size in named]
                told = told_by_outputs([(owner, size) for _, owner, size in named], *shapes) if there else []
            if any(len(now) != 1 for now in told) and len(there) == len(records):
                told = told_by_lists([size for _, size in there], *sizes.listed(path)) or told
            for (i, _), now in zip(there, told, strict=bool(told)):
                if len(now) == 1:
                    changed[i][key] = min(now)
                elif joined(path, name) not in stale:
                    stale.append(joined(path, name))
        put(holder, name.rpartition(".")[2], changed)
    return stale


def told_by_records(
    path: str,
    numbers: list[tuple[str | None, int]],
    before: dict[str, list[Shape]],
    after: dict[str, list[Shape]],
    pairs: dict[str, tuple[Shape, Shape]],
) -> list[set[int]]:
    """What numbers of records may be now, each with the module that its record names; empty where they are no widths.

    Arguments:
        path: of the module that holds the records.
    """
    known = [(owner, size) for owner, size in numbers if owner is not None]
    by_outputs = told_by_outputs(known, before, after, pairs) if known else []
    if len(known) == len(numbers):
        return by_outputs
    by_tensors = [nearest_sizes(path, size, pairs) for _, size in numbers]
    if not all(by_tensors) or not is_number([size for _, size in numbers]):
        return []
    told = iter(by_outputs or [now for (owner, _), now in zip(numbers, by_tensors, strict=True) if owner is not None])
    return [now if owner is None else next(told) for (owner, _), now in zip(numbers, by_tensors, strict=True)]


def told_by_outputs(
    numbers: list[tuple[str, int]],
    before: dict[str, list[Shape]],
    after: dict[str, list[Shape]],
    pairs: dict[str, tuple[Shape, Shape]],
) -> list[set[int]]:
    """What numbers about modules may be now, by the outputs of these modules; empty where they are no widths."""
    outputs = [(size, before[owner]) for owner, size in numbers if owner in before]
    dims = [d for d in (1, -1) if all(any(is_size_of(size, s, d) for s in was) for size, was in outputs)] or [1, -1]
    if not all(any(is_size_of(size, s, d) for s in was for d in dims) for size, was in outputs):
        return []  # there are outputs without a dimension of this size
    if not outputs and not all(any(sizes_below(owner, size, pairs)) for owner, size in numbers):
        return []  # nor in lists that are never called
    found = []
    for owner, size in numbers:
        both = [*zip(before.get(owner, ()), after.get(owner, ()))]
        told = {now[d] for was, now in both if len(was) == len(now) for d in dims if is_size_of(size, was, d)}
        found.append(told or nearest_sizes(owner, size, pairs))
    return found


def told_by_lists(numbers: list[int], before: dict[str, list[Shape]], after: dict[str, list[Shape]]) -> list[set[int]]:
    """What the numbers of records may be now, by lists of tensors, one for each record; empty where none has these sizes."""
    pairs = [(before[name], after[name], d) for name in before.keys() & after.keys() for d in (1, -1)]
    fitting = [
        (now, d)
        for was, now, d in pairs
        if len(was) == len(now) == len(numbers) and all(is_size_of(n, s, d) for n, s in zip(numbers, was, strict=True))
    ]
    return [{now[i][d] for now, d in fitting} for i in range(len(numbers))] if fitting else []


def named_module(record: dict[str, Any], path: str, paths: set[str]) -> str | None:
    """The one module that a record names, from the module at `path` on."""
    named = {joined(path, text) for text in record.values() if type(text) is str and text} & paths
    return named.pop() if len(named) == 1 else None


def output_shapes(model: nn.Module, calls: Calls) -> dict[str, list[Shape]]:
    """The shapes of the tensors that each module returns at its last call, by path; of a list those of its last module."""
    found = {path: returned for path, (_, returned) in calls.items() if returned}
    for module, path in reversed(walk(model).items()):
        inner = [joined(path, name) for name in children_of(module)]
        if path not in found and inner and inner[-1] in found:
            found[path] = found[inner[-1]]
    return found
