"""Frames: one for each module call that is traced through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxprune.passes.ir.pytree import copy_containers


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
