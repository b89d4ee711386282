"""Numbers that a class computes from a width of its configuration and uses beside the shapes, such as a scale of embeddings.

The masked original computes with what the original's width gave; a configuration with a smaller width would change them, so
that none describes the pruned model, although its shapes are those of one. Where that is so, the widths that they are computed
from have to stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fxprune.original_state import at_most
from fxprune.passes.ir.module_tree import named_modules
from fxprune.same_class.configuration import (
    Attributes,
    Experiment,
    build,
    candidates,
    changed,
    differing_dimensions,
    numbers,
    rebuilt,
    shapes,
)

Setting = tuple[Any, str, Any]  # an object, an attribute of it, and a value


def widths_in_constants(
    experiment: Experiment, made: nn.Module, known: Attributes, error_of: Callable[[Any], float], tolerance: float
) -> dict[str, str]:
    """The tensors along whose width a class computes other numbers, with the reason.

    Of a model that is built from a configuration of the right shapes the numbers that follow a width of it are put back, those
    of one name together: the width has to stay where the model is right only with them. Empty where no configuration has
    the shapes, so that keeping a width would not help.

    Arguments: as for `configure`.
    """
    model = experiment.model
    target, plain = shapes(made), build(model, model.config)
    found = ((config, build(model, config)) for config in candidates(experiment, target, known))
    config = next((config for config, fresh in found if fresh is not None and shapes(fresh) == target), None)
    if config is None or plain is None:
        return {}
    now = dict(numbers(config, least=1))
    other = rebuilt(made, config)
    back: dict[tuple[str, ...], list[Setting]] = {}
    for path, value in numbers(model.config):
        if now[path] != value:
            apart = settings(other, built(model, changed(config, {path: value})))
            back[path] = [s for some in apart.values() if error_with(other, some, error_of) < math.inf for s in some]
    if error_with(other, [s for some in back.values() for s in some], error_of) > tolerance:
        return {}
    kept: dict[str, str] = {}
    for path in back:
        if error_with(other, [s for p, some in back.items() if p != path for s in some], error_of) > tolerance:
            why = f"is {'.'.join(path)}, which {type(model).__name__} computes other numbers from that no configuration keeps"
            grown = build(model, changed(model.config, {path: 2 * dict(numbers(model.config))[path]}))
            places = differing_dimensions(plain, grown) if grown is not None else set()
            vectors = {name for name, _ in places if len(target[name]) == 1}
            kept |= dict.fromkeys(sorted(vectors or {name for name, _ in places}), why)
    return kept


def built(model: nn.Module, config: Any) -> Any:
    """A model of the class by a configuration, parameters without contents; None where it does not fit."""
    with torch.random.fork_rng(devices=[]), at_most(len(shapes(model)), on_meta=True):
        try:
            return type(model)(config)
        except Exception:  # a number that does not go with the others
            return None


def settings(model: nn.Module, other: nn.Module | None) -> dict[str, list[Setting]]:
    """By name, what modules of `other` hold otherwise than those of `model`: numbers, buffers not saved, configurations."""
    theirs = dict(named_modules(other)) if other is not None else {}
    found: dict[str, list[Setting]] = {}
    for path, module in named_modules(model):
        there = theirs.get(path)
        if there is None:
            continue
        for name, value in vars(module).items():
            if type(value) in (int, float, tuple) and vars(there).get(name, value) != value:
                found.setdefault(name, []).append((module, name, vars(there)[name]))
        for name in module._non_persistent_buffers_set & there._non_persistent_buffers_set:
            mine, buffer = module._buffers[name], there._buffers[name]
            if mine is None or buffer is None or mine.shape != buffer.shape or buffer.is_meta:
                continue
            if torch.equal(mine, buffer.to(mine)):
                continue
            found.setdefault(name, []).append((module, name, buffer.to(mine)))
        if hasattr(module, "config") and hasattr(there, "config"):
            lost = {p: n for p, n in numbers(there.config) if dict(numbers(module.config, least=1)).get(p, n) != n}
            if lost:
                found.setdefault("config", []).append((module, "config", changed(module.config, lost)))
    return found


def error_with(model: nn.Module, some: Iterable[Setting], error_of: Callable[[Any], float]) -> float:
    """The error of a model with other settings, which it does not keep."""
    some = list(some)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in some]
    try:
        for owner, name, value in some:
            setattr(owner, name, value)
        return error_of(model)
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
