"""What a program returns: its tensors, by name, and what is no output but state of the model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import fx

from fxprune.passes.ir.pytree import HOLDERS, TensorRef, attributes_of

ONLY_OUTPUT = "output"  # the name of the one tensor that a model returns


def is_state(kind: Any) -> bool:
    """Whether objects of a class that lie in a result, such as caches, are state of the model's, and follow its widths.

    Objects that hand values on and no more are dataclasses, those that Python and torch have for it, and the result itself.
    """
    if not isinstance(kind, type) or is_dataclass(kind) or kind.__module__.startswith(HOLDERS):
        return False
    return not issubclass(kind, dict | tuple)


def named_outputs(returned: Any, results: Mapping[fx.Node, Any], path: str = "") -> Iterator[tuple[str, TensorRef]]:
    """Every tensor that a program returns, by where it stands: keys, fields and positions, with dots in between.

    Arguments:
        returned: the argument of the output node.
        results: what each node evaluated to, tensors as references.
        path: where `returned` stands itself.
    """
    if isinstance(returned, TensorRef):
        yield path or ONLY_OUTPUT, returned
        return
    if isinstance(returned, fx.Node):
        target = returned.target
        fields = getattr(target, "_fields", None) if returned.op == "call_function" else None
        inner = dict(zip(fields, returned.args, strict=True)) if fields else results[returned]
        if not (path and is_state(getattr(target, "cls", None))):
            yield from named_outputs(inner, results, path)
        return
    if isinstance(returned, dict):
        items = [(str(key), value) for key, value in returned.items()]
    elif isinstance(returned, tuple | list):
        names = getattr(returned, "_fields", range(len(returned)))
        items = [(str(name), value) for name, value in zip(names, returned, strict=True)]
    elif path and is_state(type(returned)):
        return
    else:
        with attributes_of(returned) as held:
            items = list((held or {}).items())
    for name, value in items:
        yield from named_outputs(value, results, f"{path}.{name}" if path else name)
