"""Bring attributes up to date that say a width and that no forward reads, such as `num_features` of a backbone.

Which dimension such a number counts is found by its value: those of the tensors nearest to its module that had this size in the
original. Where they have one size now, that is the attribute's; where they have several, it is that of the channels that the
module takes and returns and those inside hand to one another, if they have one; else it cannot be told. The same goes for the
numbers of a tuple or list, of those in a list, and for what is the sum of such a one.

Lists of records that each name a module are in `records.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.passes.ir.module_tree import walk
from fxprune.passes.ir.pytree import ATOMS
from fxprune.same_class.holders import fields_of, holders, members, put
from fxprune.same_class.made_with import sizes_of_layers
from fxprune.same_class.records import update_records
from fxprune.same_class.sizes import SEQUENCES, Sizes, is_number, is_whole, joined

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
    sizes = Sizes(model, made, run)
    left = [] if built else [*numbers_left(model, made, is_exact, sizes), *numbers_held(model, made, is_exact, sizes)]
    return left + update_records(model, made, sizes)


def numbers_left(model: nn.Module, made: nn.Module, is_exact: Callable[[], bool], sizes: Sizes) -> list[str]:
    modules = {path: module for module, path in walk(made).items()}
    stale: list[str] = []
    changes: list[Changes] = []
    for module, path in walk(model).items():
        counterpart = modules.get(path)
        if counterpart is None or type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")):
            continue
        changed: dict[str, tuple[Number, Number]] = {}  # from, to
        sums: dict[int, int] = {}
        for name, value in sorted(vars(module).items(), key=lambda item: is_whole(item[1])):  # sums after what they are of
            if name.startswith("_") or fields_of(value) or not is_number(value) or vars(counterpart).get(name) != value:
                continue
            now = number_now(path, value, sizes)
            if now is None and is_whole(value) and len(told := sizes_of_layers(module, counterpart, name)) == 1:
                now = [type(value)(told.pop())]
            if now is None:
                stale.append(joined(path, name))
            elif now and now != [value]:
                changed[name] = (value, now[0])
                if not is_whole(value) and all(map(is_whole, value)):
                    sums[sum(value)] = sum(now[0])
            elif not now and is_whole(value) and value in sums:
                changed[name] = (value, type(value)(sums[value]))
        if changed:
            changes.append((counterpart, changed))
    assign_exact(changes, is_exact)
    return stale


def numbers_held(model: nn.Module, made: nn.Module, is_exact: Callable[[], bool], sizes: Sizes) -> list[str]:
    """The same for numbers in dicts, data classes and the like, and for named tuples, that modules hold."""
    modules = {path: module for module, path in walk(made).items()}
    found: dict[tuple[int, str], tuple[Any, str, Any, list[Any]]] = {}  # by place: where, what it is, and what it would be
    for module, path in walk(model).items():
        counterpart = modules.get(path)
        if counterpart is None or type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")):
            continue
        own = {name: value for name, value in vars(module).items() if fields_of(value)}
        for at, mine, holder in (("", own, counterpart), *holders(module, counterpart)):
            theirs = members(holder)
            told = {name: number_now(path, value, sizes) for name, value in members(mine).items() if name[:1] != "_"}
            widths = {name: now for name, now in told.items() if now != [] and theirs.get(name) == members(mine)[name]}
            others = sum(is_whole(value) and value > 1 and told.get(name) == [] for name, value in members(mine).items())
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


def number_now(path: str, value: Any, sizes: Sizes) -> list[Any] | None:
    """What a number, or several, of a module would be now, in a list; an empty one for no width, None where in doubt."""
    if type(value) in (tuple, list) and value and all(type(part) in SEQUENCES for part in value):
        each = [number_now(path, part, sizes) for part in value]
        if None in each or not any(each):
            return None if None in each else []
        return [type(value)(now[0] if now else part for now, part in zip(each, value, strict=True))]
    fields = fields_of(value)
    plain = tuple(value) if fields else value
    named = bool(fields) and all(type(n) in ATOMS for n in plain) and any(type(n) is int and n > 1 for n in plain)
    if not (is_number(plain) or named):
        return []
    several = (plain,) if is_whole(plain) else plain
    told = [sizes.now(path, int(n)) if is_whole(n) and n > 1 else set[int]() for n in several]
    if not all(told) and not fields:
        return []
    if any(len(found) > 1 for found in told):
        return None
    now = [type(n)(found.pop()) if found else n for found, n in zip(told, several, strict=True)]
    if fields:
        return [value._replace(**dict(zip(fields, now, strict=True)))]
    return [now[0] if is_whole(value) else type(value)(now)]


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
