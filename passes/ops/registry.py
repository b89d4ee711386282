"""Rules: for each dispatcher op, the labels of its results from the labels of its arguments.

A rule is a function of a `Call` that returns the labels of the result (a list of them for several results) and reports
ties through `call.constraints`. `@rule("aten::flip")` files it; `find(op)` answers which rule an op has. Ops that torch itself
tags as pointwise need no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Rule = Callable[[Any], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """File a rule under the schema names of the ops it serves; a trailing `*` matches any ending."""

    def file(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return file


FOUND: dict[Any, tuple[int, Rule | None]] = {}


def find(func: Any) -> Rule | None:
    """The rule of a dispatcher op, or None: it is then unknown."""
    count, found = FOUND.get(func, (-1, None))
    if count != len(RULES):  # a rule was filed since
        found = search(func)
        FOUND[func] = (len(RULES), found)
    return found


def search(func: Any) -> Rule | None:
    from fxprune.passes.ops import pointwise

    found = named(func._schema.name)
    if found is None and torch.Tag.pointwise in func.tags:
        found = pointwise.pointwise
    return found


def named(name: str) -> Rule | None:
    """The rule filed for a schema name: its own, that of its plain form, or one for names that begin alike."""
    found = RULES.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = RULES.get(name[:-1])
    if found is None:
        found = next((r for key, r in RULES.items() if key.endswith("*") and name.startswith(key[:-1])), None)
    return found


def load() -> None:
    """Import every file of rules once."""
    from fxprune.passes.ops import (  # noqa: F401
        attention,
        concat,
        convolution,
        creation,
        index_rewrite,
        indexing,
        matmul,
        movement,
        normalization,
        pointwise,
        pooling,
        reduction,
        view,
    )


Handler = Callable[[Any, fx.Node], fx.Node | None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def file(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return file


Masked = Callable[[Any, Any, Any, Any], Any]
MASKED: dict[str, Masked] = {}


def masked(*names: str) -> Callable[[Masked], Masked]:
    def file(function: Masked) -> Masked:
        for name in names:
            MASKED[f"aten::{name}"] = function
        return function

    return file


def masked_form(name: str) -> Masked | None:
    """What an op computes of kept elements, where that is not what it computes anyway."""
    begins = (m for k, m in MASKED.items() if k.endswith("*") and name.startswith(k[:-1]))
    return MASKED.get(name) or next(begins, None)
