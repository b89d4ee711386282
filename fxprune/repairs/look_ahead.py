"""What a layer's result becomes before an activation or a second reader sees it: that is what repair has to get right.

Behind a product stand a normalisation with running statistics, the sum with a residual stream, and often an activation that
is constant below or above a bound. Where what is added is known already, the layer can make up for the errors in it; and
where the original is beyond the bound, any result beyond it will do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxprune.passes.ops.call import OpView

EVEN = 1e-3  # by which slopes of one channel differ, as a share of it, where they are measured to be the same
Line = tuple[Tensor, Tensor]  # numbers by channel: to multiply by, and to add
UNBOUNDED = -math.inf, math.inf
PRECISE = (torch.float32, torch.float64)  # in others the difference of two results says little about a slope
FLAT = 1e-6  # a slope, as a share of the largest, at which a channel is as good as not read


class Steps(Protocol):
    """A program on its way through a batch: the values that later nodes read, and how a node is run."""

    env: dict[fx.Node, Any]

    def run_node(self, node: fx.Node) -> Any: ...

    def step_on_copies(self, node: fx.Node) -> Any: ...


@dataclass(frozen=True, slots=True)
class Path:
    """The nodes from a product to where its result is read, along which it is scaled channel by channel, and added to.

    Attributes:
        nodes: that of the product first.
        kinds: the ops of each of the others.
        bounds: beyond which the reader does not tell results apart.
        written, writing: as of the trace.
        alone: whether nothing is read along it but tensors of the model's own.
    """

    nodes: tuple[fx.Node, ...] = ()
    kinds: tuple[tuple[str, ...], ...] = ()
    bounds: tuple[float, float] = UNBOUNDED
    written: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    writing: Collection[fx.Node] = ()
    alone: bool = False

    @property
    def is_bounded(self) -> bool:
        return self.bounds != UNBOUNDED

    def fits(self, other: Path) -> bool:
        """Whether two programs do the same along their paths, and anything at all."""
        same = (self.kinds, self.bounds, self.alone) == (other.kinds, other.bounds, other.alone)
        return same and (bool(self.kinds) or self.is_bounded)

    def follow(self, program: Steps, value: Tensor) -> Tensor:
        """What a result of the product becomes in a program that has run up to it."""
        env, first = program.env, self.nodes[0]
        before = dict(env)
        try:
            env[first] = value
            for node in self.nodes[1:]:
                run = program.step_on_copies if node in self.writing else program.run_node
                env[node] = env[self.written.get(node, node)] = run(node)
            found: Tensor = env[self.nodes[-1]]
            return found
        finally:
            env.clear()
            env.update(before)

    def slope(self, program: Steps, value: Tensor, ahead: Tensor) -> Tensor:
        """By how much what a result becomes, which is `ahead`, grows with it; 1 where it hardly does."""
        step = value.abs().amax().clamp(min=1)
        return divisor((self.follow(program, value + step) - ahead) / step)

    def line(self, program: Steps, value: Tensor, dim: int) -> Line | None:
        """By channel the number that a result is multiplied by and the one that is added; None where there are none."""
        if not self.alone:
            return None
        sample = value[:1]
        step = sample.abs().amax().clamp(min=1)
        offset, moved = (self.follow(program, torch.full_like(sample, float(x))) for x in (0, step))
        if offset.shape != sample.shape or not bool(moved.isfinite().all()):
            return None
        slope, rest = (moved - offset) / step, [d for d in range(value.dim()) if d != dim % value.dim()]
        for t in (slope, offset):
            if bool((t.amax(rest) - t.amin(rest) > EVEN * t.abs().amax(rest) + FLAT * t.abs().amax()).any()):
                return None
        return slope.mean(rest), offset.mean(rest)

    def beyond(self, wanted: Tensor, found: Tensor) -> Tensor:
        """Of all values that the reader does not tell from those that are wanted, the nearest to those that were found."""
        low, high = self.bounds
        wanted = torch.where(wanted <= low, found.clamp(max=low), wanted) if low > -math.inf else wanted
        return torch.where(wanted >= high, found.clamp(min=high), wanted) if high < math.inf else wanted


@dataclass(slots=True)
class Trace:
    """What the nodes of a program did in one run.

    Attributes:
        ops: the calls of each.
        shapes: of those that return a tensor.
        writing: those that write to an argument.
        written: of those that return it, the node whose value that is.
    """

    ops: dict[fx.Node, list[OpView]] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    writing: set[fx.Node] = field(default_factory=set)
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def note_write(self, node: fx.Node, value: object, env: Mapping[fx.Node, object]) -> None:
        """Note what a node wrote to and returned; `env` are the values that later nodes read."""
        self.writing.add(node)
        for other in node.all_input_nodes:
            if env.get(other) is value:
                self.written[node] = other

    def readers(self, node: fx.Node, nodes: Mapping[fx.Node, int]) -> list[fx.Node]:
        """Which read the result of a node, by whatever name."""
        other = self.written.get(node)
        return [*node.users, *(user for user in (other.users if other else ()) if nodes[user] > nodes[node])]

    def path(self, start: fx.Node, nodes: Mapping[fx.Node, int]) -> Path:
        """The path of a product whose result is that of a node; `nodes` are all, with their positions."""
        found, kinds, others = [start], list[tuple[str, ...]](), set[str]()

        def so_far(bounds: tuple[float, float] = UNBOUNDED) -> Path:
            return Path(tuple(found), tuple(kinds), bounds, self.written, self.writing, others <= {"get_attr"})

        while len(readers := self.readers(found[-1], nodes)) == 1:
            node, same = readers[0], (found[-1], self.written.get(found[-1]))
            read = [other for other in node.all_input_nodes if other not in same]
            if not all(nodes[other] < nodes[start] for other in read) or node.op == "output":
                break
            if self.shapes.get(node) != self.shapes[start]:
                break
            calls = self.ops[node]
            if (bounds := bounds_of(calls)) is not None:
                return so_far(bounds)
            if not all(scales_channels(call) for call in calls):
                break
            found.append(node)
            kinds.append(names(calls))
            others |= {other.op for other in read}
        return so_far()


def divisor(slope: Tensor) -> Tensor:
    """A slope by which a difference can be divided."""
    return torch.where(slope.abs() > FLAT * slope.abs().amax(), slope, 1)


def by_channel(slope: Tensor, dim: int) -> Tensor:
    """A slope, by channel only where it is the same for all entries of each."""
    rest = [d for d in range(slope.dim()) if d != dim % slope.dim()]
    if not rest:
        return slope
    low, high = slope.amin(rest, keepdim=True), slope.amax(rest, keepdim=True)
    even = high - low <= EVEN * torch.minimum(low.abs(), high.abs())
    return slope.mean(rest, keepdim=True) if bool(even.all()) else slope


def names(calls: Sequence[OpView]) -> tuple[str, ...]:
    return tuple(name(call) for call in calls)


def name(call: OpView) -> str:
    """Of an op, whether or not it writes to its argument."""
    return str(call.op.func._schema.name).removeprefix("aten::").rstrip("_")


def bounds_of(calls: Sequence[OpView]) -> tuple[float, float] | None:
    """Of a node that is an activation with one."""
    if len(calls) == 1 and name(calls[0]) == "relu":
        return 0.0, math.inf
    if len(calls) == 1 and name(calls[0]) == "hardtanh":
        return float(calls[0]["min_val"]), float(calls[0]["max_val"])
    return None


def scales_channels(call: OpView) -> bool:
    """Whether each channel of the result is one of an argument, times a number, and plus what does not depend on it."""
    if not call.inputs or (call.get("running_mean") is not None and not call.get("training", False)):
        return True
    own = [call.op_trace.values[ref.id].name is not None for ref in call.inputs]
    return name(call) == "add" or (name(call) == "mul" and any(own))
