"""Dataclasses of plain values as JSON, and back, field by field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from fxprune.passes.errors import PruneError


def plain_record(record: Any) -> dict[str, Any]:
    """A dataclass of plain values as JSON-ready data."""
    return dataclasses.asdict(record)


def parse_record(kind: Any, data: Any) -> Any:
    """What `plain_record` was given: a value of a dataclass, or of a type that its fields have.

    >>> parse_record(tuple[int, ...], [1, 2])
    (1, 2)

    Raises: PruneError for data of another kind.
    """
    inside = typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(data, Mapping):
        hints = typing.get_type_hints(kind)
        if data.keys() == {field.name for field in dataclasses.fields(kind)}:
            made: Any = kind
            return made(**{name: parse_record(hints[name], value) for name, value in data.items()})
    elif typing.get_origin(kind) in (types.UnionType, typing.Union):
        for one in inside:
            try:
                return parse_record(one, data)
            except PruneError:
                continue
    elif typing.get_origin(kind) is tuple and isinstance(data, list | tuple):
        kinds = inside[:1] * len(data) if inside[-1] is Ellipsis else inside
        if len(kinds) == len(data):
            return tuple(parse_record(one, value) for one, value in zip(kinds, data))
    elif kind is float and type(data) in (int, float):
        return float(data)
    elif type(data) is kind:
        return data
    raise PruneError(f"this is no {getattr(kind, '__name__', kind)}: {str(data)[:40]!r}", fix="what fxprune wrote")
