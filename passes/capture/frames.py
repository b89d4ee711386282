"""Frames: one for each module call that is traced through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.capture.patches import creating
from fxprune.passes.capture.proxy import PROXIES, Items
from fxprune.passes.ir.program import UNKNOWN, Built, ModelTensor, TracedCall
from fxprune.passes.ir.pytree import ATOMS, attributes_of, copy_containers


@dataclass(slots=True, eq=False)
class Frame:
    """One module call that is being traced through.

    Attributes:
        path: of the module; empty for the root.
        module: which is called.
        args, kwargs: what it was called with, containers copied, so that it can be called once more.
        begin: the number of its first node.
        first_op: the number of its first dispatcher call.
        plain: whether it may be that there is nothing to rewrite in it (see `plain_modules.py`).
        asked: whether its forward has asked for the mode.
        reads: the sizes that its forward has read, and the numbers it has computed.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    begin: int = 0
    first_op: int = 0
    plain: bool = False
    asked: bool = False
    reads: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.args, self.kwargs = copy_containers(self.args), copy_containers(self.kwargs)

    def finished(self, out: Any, end: int, names: Mapping[int, str]) -> TracedCall:
        """The call as it was traced; `names` are those of the model's tensors, by identity."""
        args = tuple([structure(a, names) for a in self.args])
        kwargs = {k: structure(v, names) for k, v in self.kwargs.items()}
        return TracedCall(self.path, args, kwargs, structure(out, names), self.begin, end)


def structure(x: Any, names: Mapping[int, str]) -> Any:
    """A value of a forward without proxies (see `TracedCall`)."""
    kind = type(x)
    if kind in PROXIES:
        return x.node
    if kind in ATOMS:
        return x
    if isinstance(x, Tensor):
        return ModelTensor(names[id(x)]) if id(x) in names else UNKNOWN
    if isinstance(x, tuple):
        items = [structure(v, names) for v in x]
        own = type(x.value) if isinstance(x, Items) else kind
        if hasattr(own, "_fields"):
            return Built(own, dict(enumerate(items)), by_position=True)
        return tuple(items) if own in (tuple, torch.Size) or own.__module__.startswith("torch.return_types") else UNKNOWN
    if kind is list:
        return [structure(v, names) for v in x]
    if isinstance(x, dict):
        parts = {k: structure(v, names) for k, v in x.items()}
        if kind is dict or not all(isinstance(k, str) for k in parts):
            return parts if kind is dict else UNKNOWN
        return Built(kind, parts)
    with attributes_of(x) as held:
        if held is None:
            return UNKNOWN
        return Built(creating(kind), {k: structure(v, names) for k, v in held.items()}, by_attribute=True)
