"""What a module keeps its numbers in, besides attributes: dicts, data classes, namespaces, named tuples, plain objects.

The numbers in them are brought up to date as those that are attributes are (see `attributes.py`). What several modules share
is changed where all of them agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

DEEPEST = 2  # dicts within dicts


def holders(module: nn.Module, counterpart: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """What a module holds that holds values by name: its path from the module, that of the module, and its counterpart.

    What both modules share, or what is of another kind in the counterpart, is left out.
    """
    pending = [(name, value, vars(counterpart).get(name), 1) for name, value in vars(module).items() if name[0] != "_"]
    while pending:
        path, value, other, depth = pending.pop()
        if type(other) is not type(value) or other is value or not is_holder(value):
            continue
        yield path, value, other
        if depth < DEEPEST:
            theirs = members(other)
            pending += [(f"{path}.{key}", inner, theirs.get(key), depth + 1) for key, inner in members(value).items()]


def is_holder(value: Any) -> bool:
    """Whether values are kept in an object by name, and can be replaced there; configurations of a library are none."""
    kind = type(value)
    if kind in (dict, OrderedDict, types.SimpleNamespace, argparse.Namespace):
        return True
    if isinstance(value, nn.Module | Tensor | type) or hasattr(value, "to_dict") or not hasattr(value, "__dict__"):
        return False
    if kind.__module__.startswith("torch.") or callable(value):
        return False
    return dataclasses.is_dataclass(value) or kind.__mro__[1:] == (object,)


def members(holder: Any) -> Mapping[str, Any]:
    found = holder if isinstance(holder, dict) else vars(holder)
    return {key: value for key, value in found.items() if isinstance(key, str)}


def put(holder: Any, name: str, value: Any) -> None:
    """Replace a value by name, in a frozen object, too."""
    if isinstance(holder, dict):
        holder[name] = value
    else:
        object.__setattr__(holder, name, value)


def fields_of(value: Any) -> tuple[str, ...]:
    """The names of the fields of a named tuple; none of anything else."""
    names = getattr(value, "_fields", ())
    return tuple(names) if isinstance(value, tuple) and hasattr(value, "_replace") else ()
