"""A linear family: channels that can be rotated among themselves, and what has to be done for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxprune.passes.coupling.equivariance import Runs
from fxprune.passes.coupling.families import Family

Key = tuple[int, int]  # a value, and for the model's own tensors the number of the call that reads it, else -1


class NotLinear(Exception):
    """Why a family cannot be rotated, as what "it" does."""


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """A scale for each channel, and a shift, between a value and another one.

    Attributes:
        source, result: the two values.
        number: of the call.
        kind: `product`, `batch norm`, `norm` (after a norm that is equivariant itself) or `centred norm`.
        tensors: names of the model's tensors that hold it, by role (`weight`, `bias`, `running_mean`, `running_var`).
        module: the layer that does it, of a centred norm.
        eps: of a batch norm.
    """

    source: Key
    result: Key
    number: int
    kind: str
    tensors: Mapping[str, str]
    module: str = ""
    eps: float = 0.0

    @property
    def norms(self) -> bool:
        """Whether what is scaled is normalised first, so that nothing can go into what comes before it."""
        return self.kind in ("norm", "centred norm")

    @property
    def name(self) -> str:
        return self.tensors.get("weight") or self.module or next(iter(self.tensors.values()))


@dataclass(frozen=True, slots=True)
class Member:
    """A dimension of a parameter or buffer that carries a family.

    Attributes:
        name: of the tensor; of a tied one the name under which it is used here.
        dim: the dimension.
        scales: those that go into it, from the one nearest to it.
        centred: whether what it adds to a stream has to be centred.
        reads: whether it is a weight that the family is contracted with, so that shifts go to its bias.
        runs: where rows of the family start along the dimension, and which.
    """

    name: str
    dim: int
    scales: tuple[Scale, ...]
    centred: bool
    reads: bool
    runs: Runs


@dataclass(frozen=True, slots=True)
class LinearFamily:
    """A family that can be rotated.

    Attributes:
        family: of the coupling.
        rows: how many rows it consists of, each with a rotation of its own, as heads are of the dimensions within them.
        size: how many channels a row has.
        whole: whether it is one row, and there is nothing else in any of its dimensions.
        members: dimensions to rotate.
        scales: what has to be put out of the way.
        normed: whether it is normalised anywhere.
        untied: names of parameters that need values of their own, apart from what they are tied to.
    """

    family: Family
    rows: int
    size: int
    whole: bool
    members: tuple[Member, ...]
    scales: tuple[Scale, ...]
    normed: bool
    untied: tuple[str, ...]


class Spaces:
    """Values that are rotated and scaled together: a union-find, with the sign of each value relative to the first one.

    Values of opposite sign meet in a contraction: what scales one divides the other.
    """

    def __init__(self) -> None:
        self.parent: dict[Key, tuple[Key, int]] = {}

    def find(self, key: Key) -> tuple[Key, int]:
        path, sign = [], 1
        while (step := self.parent.setdefault(key, (key, 1)))[0] != key:
            path.append((key, sign))
            key, sign = step[0], sign * step[1]
        for at, before in path:
            self.parent[at] = (key, sign * before)
        return key, sign

    def join(self, a: Key, b: Key, sign: int) -> bool:
        """Put two values together; False where they are together with another sign."""
        (x, p), (y, q) = self.find(a), self.find(b)
        if x == y:
            return p * q == sign
        self.parent[y] = (x, p * q * sign)
        return True


@dataclass(slots=True)
class Space:
    """What happens to the values of one space.

    Attributes:
        leaves: uses of the model's own tensors, each with its sign.
        into, out: scales that lead there, and away.
        exits: where it is read by anything but a scale.
        mixes: whether it is read by more than weights.
        through: the scale that went into its tensors.
    """

    leaves: list[tuple[Key, int]] = field(default_factory=list)
    into: list[Scale] = field(default_factory=list)
    out: list[Scale] = field(default_factory=list)
    exits: list[str] = field(default_factory=list)
    mixes: bool = False
    through: Scale | None = None
