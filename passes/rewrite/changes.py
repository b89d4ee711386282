"""The module tree of a pruned model as text, with what changed: `Conv2d(64→32, 128→64, kernel_size=(3, 3))`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby

from torch import nn

from fxprune.passes.ir.module_tree import every_path


def describe(module: nn.Module) -> str:
    """The class of a module and its attributes, as it prints itself, without what is inside it."""
    try:
        extra = " ".join(module.extra_repr().split())
    except Exception:  # it is the user's code, and nothing depends on it
        extra = ""
    return f"{module._get_name()}({extra})"


def changed_descriptions(before: Mapping[str, nn.Module], after: nn.Module) -> dict[str, str]:
    """How modules describe themselves before, by path, where they do otherwise after."""
    now = {path: module for path, module in every_path(after) if path and says_something(module)}
    found = {path: describe(before[path]) for path in now if path in before}
    return {path: text for path, text in found.items() if text != describe(now[path])}


def says_something(module: nn.Module) -> bool:
    """Whether a module may describe itself otherwise once it is pruned."""
    kind = type(module)
    plain = kind.extra_repr is nn.Module.extra_repr and kind._get_name is nn.Module._get_name
    return not plain or "extra_repr" in vars(module)


def with_changes(before: str, after: str) -> str:
    """Two descriptions of one module as one.

    >>> with_changes("Linear(in_features=8, out_features=16, bias=True)", "Linear(in_features=8, out_features=4, bias=True)")
    'Linear(in_features=8, out_features=16→4, bias=True)'
    """
    old, new = (re.split(r"(\d+)", text) for text in (before, after))
    if old[::2] != new[::2]:  # more than numbers changed
        return f"{before} → {after}"
    return "".join(a if a == b else f"{a}→{b}" for a, b in zip(old, new, strict=True))


def tree_text(module: nn.Module, before: Mapping[str, str], path: str = "") -> str:
    """A module tree as PyTorch prints one, with changes; numbered neighbours that read the same share an entry.

    Arguments:
        module: the root.
        before: how modules described themselves before, by path, where they do otherwise now.
        path: that of the root.
    """
    text = describe(module)
    if path in before and text.partition("(")[0] == before[path].partition("(")[0]:  # else it was replaced since
        text = with_changes(before[path], text)
    start = f"{path}." if path else ""
    children = [
        (name, repr(child) if child is None else tree_text(child, before, start + name))
        for name, child in module._modules.items()
    ]
    if not children:
        return text
    lines = [text.removesuffix(")")] if not text.endswith("()") else [text[:-1]]
    for (_, shown), alike in groupby(children, key=lambda item: (item[0].isdigit() or item[0], item[1])):
        names = [name for name, _ in alike]
        label = names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"
        times = f"{len(names)} x " if len(names) > 1 else ""
        lines.append(f"({label}): {times}{shown}".replace("\n", "\n  "))
    return "\n  ".join(lines) + "\n)"
