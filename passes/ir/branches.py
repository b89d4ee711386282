"""Residual branches of a model, and what goes of its programs where some of them are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True, eq=False)
class Branch:
    """A residual branch, or several that go together.

    Attributes:
        name: the innermost module that all its parameters are in, or the largest that is all its own where others are in there.
        tensors: names of the model's tensors that run for its sake alone; no two branches have the same.
        cuts: its additions, in the programs and modes that run it, and the other operand of each.
        parameters: those of the tensors that are learned.
        parts: the branches that it is made of, where it is several.
    """

    name: str
    tensors: frozenset[str]
    cuts: Mapping[fx.Node, fx.Node]
    parameters: frozenset[str]
    parts: tuple[Branch, ...] = ()


@dataclass(frozen=True, eq=False)
class Removed:
    """What goes with some branches, all of them together.

    Attributes:
        branches: the branches.
        tensors: names of the model's tensors that nothing reads any more.
        modules: paths of modules that go, but for those within them.
        nodes: nodes of the captured programs that go.
        streams: additions, with the operand that stands for each, and whether it must be copied.
    """

    branches: tuple[Branch, ...] = ()
    tensors: frozenset[str] = frozenset()
    modules: tuple[str, ...] = ()
    nodes: frozenset[fx.Node] = frozenset()
    streams: Mapping[fx.Node, tuple[fx.Node, bool]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.branches)


NOTHING = Removed()
