"""Numbers that a class computes from its configuration and that are no sizes, such as the scale of Gemma's embeddings.

A pruned model keeps them as they were. A configuration with a smaller width would change them, so that none describes the
pruned model, although its shapes are those of one. Where that is so, the widths that they are computed from have to stay.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.original_state import at_most
from fxprune.same_class.configuration import Path, Shapes, build, changed, numbers, shapes


def widths_in_constants(model: nn.Module, target: Shapes) -> dict[str, str]:
    """The tensors along whose width a class computes other numbers, with the reason.

    Empty where the pruned model has no configuration's shapes, so that keeping a width would not help.

    Arguments:
        model: the original, of a class that is built from a configuration.
        target: the shapes of the pruned model.
    """
    base = shapes(model)
    values = dict(numbers(model.config))
    follow = {path: dimensions_of(model, path, value, base) for path, value in values.items()}
    found: dict[str, str] = {}
    for path, places in follow.items():
        others = {place for other, more in follow.items() if other != path for place in more}
        ratios = {Fraction(target[n][d], base[n][d]) for n, d in places - others}  # of dimensions that are this number alone
        if len(ratios) > 1:
            return {}
        if ratios - {1} and differ_in_constants(model, path, int(values[path] * ratios.pop())):
            field = ".".join(path)
            why = f"is {field}, which {type(model).__name__} computes other numbers from that no configuration keeps"
            vectors = {n for n, _ in places if len(base[n]) == 1}
            found |= dict.fromkeys(sorted(vectors or {n for n, _ in places}), why)
    return found


def dimensions_of(model: nn.Module, path: Path, value: int, base: Shapes) -> set[tuple[str, int]]:
    """The dimensions of tensors that follow a number of the configuration, by name and position."""
    grown = build(model, changed(model.config, {path: 2 * value}))
    there = shapes(grown) if grown is not None else {}
    if there.keys() != base.keys():  # a number of layers, or one that must not be this
        return set()
    return {(n, d) for n in base for d in range(len(base[n])) if there[n][d] != base[n][d]}


def differ_in_constants(model: nn.Module, path: Path, value: int) -> bool:
    """Whether models of two configurations, which differ in one number, differ in fractions that are not learned."""
    found = []
    for config in (model.config, changed(model.config, {path: value})):
        with torch.random.fork_rng(devices=[]), at_most(len(shapes(model)), on_meta=True):
            try:
                fresh = type(model)(config)
            except Exception:  # a number that does not go with the others
                return False
        found.append(constants(fresh))
    a, b = found
    return any(key in b and same_kind(a[key], b[key]) and not equal(a[key], b[key]) for key in a)


def constants(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The fractions that modules hold as attributes, and the buffers that are not saved, by module path and name."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        found |= {(path, name): value for name, value in vars(module).items() if type(value) is float}
        found |= {(path, name): module._buffers[name] for name in module._non_persistent_buffers_set if name in module._buffers}
    return {key: value for key, value in found.items() if not (isinstance(value, Tensor) and value.is_meta)}


def same_kind(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (not isinstance(a, Tensor) or (a.shape == b.shape and a.is_floating_point()))


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
