"""What a step of a random program is, and how it becomes lines of a ``forward``.

A step names an op, the values it reads and plain arguments. Channel counts are not among them: they are read
off the values, so that steps can be taken out of a program and the rest still fits.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import parts

# What the lines of a program may name.
PARTS: dict[str, Any] = {
    kind.__name__: kind for kind in (parts.Chosen, parts.Either, parts.Reads, parts.Regroups, parts.Remembers, parts.Returns)
} | {name: getattr(parts, name) for name in ("scripted_swish", "remembered_slope", "remembered_ramp")}
SCOPE: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math, **PARTS}

Pick = Callable[[random.Random, "Value"], Any]

# Where the channels of a value are.
AXES = {"vector": 1, "tokens": 2, "line": 1, "map": 1, "volume": 1}
RANKS = {"vector": 2, "tokens": 3, "line": 3, "map": 4, "volume": 5}
SPATIAL = "line map volume"
ANY = "vector tokens line map volume"


@dataclass(frozen=True)
class Step:
    """``name = op(*inputs, **args)``; the arguments are numbers, strings, booleans and lists of numbers."""

    name: str
    op: str
    inputs: tuple[str, ...]
    args: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} = {self.op}({', '.join([*self.inputs, *(f'{k}={v!r}' for k, v in self.args.items())])})"


@dataclass(frozen=True)
class Value:
    """A tensor of the program, and what a step may know of it."""

    name: str
    kind: str
    tensor: Tensor
    owned: bool  # writing into it changes no input and no parameter

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def axis(self) -> int:
        return AXES[self.kind]

    @property
    def c(self) -> int:
        return self.tensor.shape[self.axis]

    @property
    def rank(self) -> int:
        return self.tensor.dim()

    @property
    def space(self) -> tuple[int, ...]:
        """The sizes of everything but the channels."""
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def after(self) -> int:
        """How many dimensions follow the channels."""
        return self.rank - 1 - self.axis

    def at(self, index: str) -> str:
        """``x[:, index]``, or where channels come last ``x[..., index]``."""
        return f"{self.name}[..., {index}]" if self.kind == "tokens" else f"{self.name}[:, {index}]"

    def lift(self, *sizes: int) -> str:
        """The shape of a parameter that lies along the channels."""
        return ", ".join(str(n) for n in (*sizes, *[1] * self.after))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Op:
    """How a step is chosen and written.

    Attributes:
        kinds: of its first input.
        write: adds lines and returns an expression, or the kind of the result and an expression.
        picks: an argument each.
        other: whether a value can be the second input, given the first; None where there is none.
        weight: how often it is drawn.
    """

    name: str
    kinds: frozenset[str]
    write: Callable[..., str | tuple[str, str]]
    picks: Mapping[str, Pick]
    other: Callable[[Value, Value], bool] | None
    weight: float


OPS: dict[str, Op] = {}


def op(
    kinds: str, *, other: Callable[[Value, Value], bool] | None = None, weight: float = 1.0, **picks: Pick
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a step under the name of the function that writes it."""

    def register(write: Callable[..., Any]) -> Callable[..., Any]:
        name = write.__name__.strip("_")
        if name in OPS:
            raise ValueError(f"two steps are called {name}")
        OPS[name] = Op(name, frozenset(kinds.split()), write, picks, other, weight)
        return write

    return register


class Writer:
    """The lines of a program so far, run as they are written so that every shape is known."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.lines: list[str] = []
        self.values: dict[str, Value] = {}
        self.layers: dict[str, tuple[str, str, int]] = {}  # step -> its first layer, the kind and channels it takes
        self.zeroing = True  # whether zeroing parameters is a reference for the program
        self.module = nn.Module()
        self.scope: dict[str, Any] = SCOPE | {"self": self.module}
        self.step = ""

    def put(self, name: str, kind: str, tensor: Tensor) -> None:
        """A model input."""
        self.scope[name] = tensor.clone()
        self.values[name] = Value(name, kind, self.scope[name], False)

    def add(self, step: Step) -> Value:
        """Write and run one step; raises whatever its lines raise, or ValueError where it does not fit."""
        chosen, inputs = OPS[step.op], [self.values[name] for name in step.inputs]
        if inputs[0].kind not in chosen.kinds:
            raise ValueError(f"{step.op} takes no {inputs[0].kind}")
        if chosen.other is not None and not chosen.other(*inputs):
            raise ValueError(f"{step.op} cannot take {inputs[1].shape} with {inputs[0].shape}")
        self.step = step.name
        written = chosen.write(self, *inputs, **step.args)
        kind, expression = (inputs[0].kind, written) if isinstance(written, str) else written
        self.line(f"{step.name} = {expression}")
        result = self.scope[step.name]
        if result.dim() != RANKS[kind] or not 0 < result.numel() <= 20_000 or not bool(result.isfinite().all()):
            raise ValueError(f"{step.op} gives {tuple(result.shape)}")
        given = [v.tensor for n, v in self.values.items() if n.startswith("x")] + [*self.module.parameters()]
        shared = {t.untyped_storage().data_ptr() for t in [*given, *self.module.buffers()]}
        value = Value(step.name, kind, result, result.untyped_storage().data_ptr() not in shared)
        self.values[step.name] = value
        return value

    def line(self, text: str) -> None:
        with torch.no_grad():
            exec(text, self.scope)
        self.lines.append(text)

    def make(self, target: str, expression: str) -> str:
        """An attribute made in ``__init__``; what is returned is how ``forward`` calls it."""
        text = f"self.{target} = {expression}"
        exec(text, self.scope)
        self.module.double().eval()
        self.made.append(text)
        return f"self.{target}"

    def own(self, prefix: str) -> str:
        """A name for an attribute of this step, such as ``conv7`` or, the second time, ``conv7b``."""
        base = prefix + self.step.lstrip("v")
        return next(n for n in (base, *(base + c for c in "bcdefghijklm")) if not hasattr(self.module, n))

    def layer(self, expression: str, takes: Value | None = None) -> str:
        """A module; where it may be called again, ``takes`` is what it is called on."""
        kind = expression.removeprefix("nn.").partition("(")[0].lower()
        made = self.make(self.own(kind.rstrip("123d")), expression)
        if takes is not None:
            self.layers[self.step] = (made, takes.kind, takes.c)
        return made

    def parameter(self, sizes: str) -> str:
        return self.make(self.own("p"), f"nn.Parameter(torch.ones({sizes}))")

    def buffer(self, expression: str) -> str:
        return self.make(self.own("b"), f"nn.Buffer({expression})")

    def sees(self) -> None:
        """Say that removed channels would enter a statistic, so that zeroing parameters is no reference."""
        self.zeroing = False

    @torch.no_grad()
    def sums(self, x: Value) -> None:
        """Say that channels of ``x`` are summed, which removed ones enter unless they are zero where parameters are."""
        module = copy.deepcopy(self.module)
        for parameter in module.parameters():
            parameter.zero_()
        scope = SCOPE | {"self": module} | {n: v.tensor.clone() for n, v in self.values.items() if n.startswith("x")}
        for text in self.lines:
            exec(text, scope)
        if scope[x.name].count_nonzero():
            self.sees()


# -- arguments ---------------------------------------------------------------------------------------------------------


def one_of(*choices: Any) -> Pick:
    return lambda rng, x: rng.choice(choices)


def width(rng: random.Random, x: Value) -> int:
    return rng.choice((4, 5, 6, 7, 8, 9, 10, 12, 12, 14, 15, 16, 18, 20, 24))


def divisor(rng: random.Random, x: Value) -> int:
    """Of the channels, 1 as often as not."""
    return rng.choice([1, rng.choice([g for g in range(1, x.c + 1) if x.c % g == 0])])


def proper_divisor(rng: random.Random, x: Value) -> int:
    """Neither 1 nor all, if there is one."""
    return rng.choice([g for g in range(2, x.c) if x.c % g == 0] or [x.c])


def coin(rng: random.Random, x: Value) -> bool:
    return rng.random() < 0.5


def rarely(rng: random.Random, x: Value) -> bool:
    return rng.random() < 0.2


def channel(rng: random.Random, x: Value) -> int:
    return rng.randrange(x.c)


def cuts(rng: random.Random, x: Value) -> list[int]:
    """Sizes of two to four pieces that make up the channels."""
    points = sorted(rng.sample(range(1, x.c), min(rng.choice((1, 1, 2, 3)), x.c - 1)))
    return [b - a for a, b in zip([0, *points], [*points, x.c])]


def some_channels(rng: random.Random, x: Value) -> list[int]:
    """A permutation, a subset, or a choice with repetitions."""
    n = rng.randint(max(1, x.c // 2), x.c)
    return rng.choice([rng.sample(range(x.c), x.c), rng.sample(range(x.c), n), sorted(rng.choices(range(x.c), k=n))])


# -- second inputs -----------------------------------------------------------------------------------------------------


def alike(x: Value, y: Value) -> bool:
    return x.kind == y.kind and x.shape == y.shape


def beside(x: Value, y: Value) -> bool:
    """Equal but for the channels."""
    return x.kind == y.kind and x.space == y.space


def same_batch(x: Value, y: Value) -> bool:
    return x.shape[0] == y.shape[0]


def sequence(x: Value, y: Value) -> bool:
    return y.kind == "tokens" and same_batch(x, y)


def product(values: Sequence[int]) -> int:
    return math.prod(values)
