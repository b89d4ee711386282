"""Bring attributes up to date that say a width and that no forward reads, such as `num_features` of a backbone.

Which dimension such a number counts is found by its value: those of the tensors nearest to its module that had this size in the
original. Where they have one size now, that is the attribute's; where they have several, it cannot be told. The same goes for
the numbers of a tuple or list, and for what is the sum of such a one.

A list of records that each name a module (`{"module": "layer1", "num_chs": 64}`) is about the outputs of these modules: a
number of theirs is a width if it is the size of the channels, second or last, of an output of every one; that of a list of
blocks is the output of the last. Where none of the modules is called, it is one if each has tensors of this size. Numbers of
records that name no module, among others that do, are told as those of a tuple are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fxprune.passes.ir.module_tree import children_of, named_tensors, walk
from fxprune.passes.ir.pytree import ATOMS, collect
from fxprune.same_class.holders import fields_of, holders, members, put

Shape = tuple[int, ...]
Number = Any  # a whole number, or a tuple or list of them
Changes = tuple[Any, dict[str, tuple[Number, Number]]]  # what numbers of a module, or of what it holds, were, and would be


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
    left = [] if built else [*numbers_left(model, made, is_exact), *numbers_held(model, made, is_exact)]
    return left + update_records(model, made, run)


def numbers_left(model: nn.Module, made: nn.Module, is_exact: Callable[[], bool]) -> list[str]:
    pairs = shape_pairs(model, made)
    modules = {path: module for module, path in walk(made).items()}
    stale: list[str] = []
    changes: list[Changes] = []
    for module, path in walk(model).items():
        counterpart = modules.get(path)
        if counterpart is None or type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")):
            continue
        changed: dict[str, tuple[Number, Number]] = {}  # from, to
        sums: dict[int, int] = {}
        for name, value in sorted(vars(module).items(), key=lambda item: type(item[1]) is int):  # sums after what they are of
            if name.startswith("_") or not is_number(value) or vars(counterpart).get(name) != value:
                continue
            found = [nearest_sizes(path, size, pairs) for size in ((value,) if type(value) is int else value)]
            if not all(found):
                if type(value) is int and value in sums:
                    changed[name] = (value, sums[value])
            elif any(len(sizes) > 1 for sizes in found):
                stale.append(joined(path, name))
            elif (now := [sizes.pop() for sizes in found]) != list(value if type(value) is not int else (value,)):
                changed[name] = (value, now[0] if type(value) is int else type(value)(now))
                if type(value) is not int:
                    sums[sum(value)] = sum(now)
        if changed:
            changes.append((counterpart, changed))
    assign_exact(changes, is_exact)
    return stale


def numbers_held(model: nn.Module, made: nn.Module, is_exact: Callable[[], bool]) -> list[str]:
    """The same for numbers in dicts, data classes and the like, and for named tuples, that modules hold."""
    pairs, modules = shape_pairs(model, made), {path: module for module, path in walk(made).items()}
    found: dict[tuple[int, str], tuple[Any, str, Any, list[Any]]] = {}  # by place: where, what it is, and what it would be
    for module, path in walk(model).items():
        counterpart = modules.get(path)
        if counterpart is None or type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")):
            continue
        own = {name: value for name, value in vars(module).items() if fields_of(value)}
        for at, mine, holder in (("", own, counterpart), *holders(module, counterpart)):
            theirs = members(holder)
            told = {name: number_now(path, value, pairs) for name, value in members(mine).items() if name[:1] != "_"}
            widths = {name: now for name, now in told.items() if now != [] and theirs.get(name) == members(mine)[name]}
            others = sum(type(value) is int and value > 1 and told.get(name) == [] for name, value in members(mine).items())
            for name, now in widths.items():
                answer = now if len(widths) >= others else None  # most are no sizes: settings of something else, it may be
                place = found.setdefault((id(holder), name), (holder, joined(path, joined(at, name)), theirs[name], []))
                place[3].append(answer if answer is not None or now != [theirs[name]] else now)
    stale: list[str] = []
    changes: list[Changes] = []
    for (_, name), (holder, at, value, every) in found.items():
        if None in every or any(now != every[0] for now in every):
            stale.append(at)
        elif every[0] != [value]:
            changes.append((holder, {name: (value, every[0][0])}))
    assign_exact(changes, is_exact)
    return stale


def number_now(path: str, value: Any, pairs: dict[str, tuple[Shape, Shape]]) -> list[Any] | None:
    """What a number, or several, of a module would be now, in a list; an empty one for no width, None where in doubt."""
    fields = fields_of(value)
    plain = tuple(value) if fields else value
    named = bool(fields) and all(type(n) in ATOMS for n in plain) and any(type(n) is int and n > 1 for n in plain)
    if not (is_number(plain) or named):
        return []
    several = plain if type(plain) is not int else (plain,)
    told = [nearest_sizes(path, n, pairs) if type(n) is int and n > 1 else set[int]() for n in several]
    if not all(told) and not fields:
        return []
    if any(len(sizes) > 1 for sizes in told):
        return None
    now = [sizes.pop() if sizes else n for sizes, n in zip(told, several, strict=True)]
    if fields:
        return [value._replace(**dict(zip(fields, now, strict=True)))]
    return [now[0] if type(value) is int else type(value)(now)]


def is_number(value: Any) -> bool:
    """Whether a value may be a width: a whole number above one, or several that differ, which the sides of an image do not."""
    some = value if type(value) in (tuple, list) else (value,)
    return all(type(n) is int and n > 1 for n in some) and (some is not value or len(set(some)) > 1)


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


def assign(holder: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        put(holder, name, value)


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


# -- records that name modules ------------------------------------------------------------------------------------------


def update_records(model: nn.Module, made: nn.Module, run: Callable[[nn.Module], Any]) -> list[str]:
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
    shapes = output_shapes(model, run), output_shapes(made, run), shape_pairs(model, made)
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
            for (i, _), sizes in zip(there, told, strict=bool(told)):
                if len(sizes) == 1:
                    changed[i][key] = min(sizes)
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


def named_module(record: dict[str, Any], path: str, paths: set[str]) -> str | None:
    """The one module that a record names, from the module at `path` on."""
    named = {joined(path, text) for text in record.values() if type(text) is str and text} & paths
    return named.pop() if len(named) == 1 else None


def is_size_of(size: int, shape: Shape, dim: int) -> bool:
    return len(shape) > 1 and shape[dim] == size


def output_shapes(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, list[Shape]]:
    """The shapes of the tensors that each module returns at its last call, by path; of a list those of its last module."""
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
    for module, path in reversed(walk(model).items()):
        inner = [joined(path, name) for name in children_of(module)]
        if path not in found and inner and inner[-1] in found:
            found[path] = found[inner[-1]]
    return found


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
