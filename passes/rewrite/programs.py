"""Programs written down: lines that refer to each other by name, for one mode of a model."""

from __future__ import annotations

import builtins
import functools
import json
import keyword
import operator
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.graph import _format_target as written_by_torch

from fxprune.passes.ir.program import IS_GRAD_ENABLED, select_by_mode
from fxprune.passes.ir.pytree import ATOMS

ARITHMETIC = "getitem mul floordiv add sub truediv mod pow neg eq ne lt gt le ge".split()
READS = frozenset(["size", "dim", "numel"])
PURE = frozenset([getattr, "clone", IS_GRAD_ENABLED])
COMPUTES = frozenset(getattr(operator, name) for name in ARITHMETIC)


class Name:
    """The line of that name; immutable. (A frozen dataclass takes three times as long to make, and there are many.)"""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return type(other) is Name and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"Name({self.name!r})"


class Line(NamedTuple):
    """One node of a program; its arguments refer to other lines by `Name`."""

    name: str
    op: str
    target: Any
    args: Any = ()
    kwargs: Any = None
    meta: Any = None

    @property
    def reads_size(self) -> bool:
        return self.op == "call_method" and self.target in READS

    def changed(self, target: Any, change: Callable[[Any], Any]) -> Line:
        """The line with another target, and with what `change` makes of each of its arguments."""
        args, kwargs = (x and fx.node.map_aggregate(x, change) for x in (self.args, self.kwargs))
        return self._replace(target=target, args=args, kwargs=kwargs)


@dataclass(frozen=True, slots=True)
class Program:
    """Lines in the order in which they run. The graph is built when it is asked for."""

    lines: tuple[Line, ...]

    def graph(self) -> fx.Graph:
        graph, made = fx.Graph(), {}
        for name, op, target, args, kwargs, meta in self.lines:
            given = [fx.node.map_aggregate(a, lambda x: made[x.name] if isinstance(x, Name) else x) for a in (args, kwargs)]
            wanted = target.lstrip("*") if op in ("placeholder", "get_attr", "call_module") else name
            made[name] = graph.create_node(op, target, given[0], given[1] or {}, "own" if wanted == "self" else wanted)
            made[name].meta = dict(meta or {})
        names = {line.target for line in self.lines if line.op in ("get_attr", "call_module")}
        reserved = {written_by_torch("self", name): python for name in names if (python := spelled(name))}
        if reserved:
            graph.on_generate_code(lambda before: functools.partial(respelled, reserved))
        return graph

    @classmethod
    def of(cls, graph: fx.Graph) -> Program:
        """A graph, written down."""
        return cls(tuple(written(graph)[0]))

    def __reduce__(self) -> tuple[Any, ...]:  # in Python 3.10 a frozen dataclass with slots has a `__getstate__` of its own
        def by_name(x: Any) -> Any:
            return Function(f"torch:{str(x).rpartition('.')[2]}") if isinstance(x, torch.memory_format) else x

        targets = [Function.of(line.target) if callable(line.target) else line.target for line in self.lines]
        return program_of, (tuple(line.changed(t, by_name) for line, t in zip(self.lines, targets, strict=True)),)


def program_of(named: tuple[Line, ...]) -> Program:
    """A program whose functions and memory formats were given by name."""

    def found(x: Any) -> Any:
        return x.found() if isinstance(x, Function) else x

    return Program(tuple(line.changed(found(line.target), found) for line in named))


def spelled(path: str) -> str | None:
    """Python that reads a member of `self` where torch's would be no Python: a `ModuleDict` may have the key "in"."""
    found, reserved = "self", False
    for name in path.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        reserved = reserved or keyword.iskeyword(name) or not (plain or json.dumps(name) == f'"{name}"')
        found = f"{found}.{name}" if plain else f"getattr({found}, {name!r})"
    return found if reserved else None


def respelled(reserved: Mapping[str, str], body: list[str]) -> list[str]:
    """Lines of Python with other texts in place of the members that they read."""
    longest = "|".join(map(re.escape, sorted(reserved, key=len, reverse=True)))
    member = re.compile(rf"(?<= = )({longest})(?![\w.])")
    return [member.sub(lambda found: reserved[found[1]], line) for line in body]


@dataclass(frozen=True, slots=True)
class Function:
    """A function, or a memory format, by where it is found, as pickle cannot name those that C++ defines."""

    where: str

    @classmethod
    def of(cls, function: Any) -> Any:
        """Its name; itself where none leads to it."""
        name = getattr(function, "__name__", "")
        if getattr(builtins, name, None) is function:
            return cls(f"builtins:{name}")
        try:
            path, _, name = fx.node._get_qualified_name(function).rpartition(".")
            found = cls(f"{path}:{name}")
            return found if found.found() is function else function
        except Exception:  # made in a function, or without a name
            return function

    def found(self) -> Any:
        if self.where.startswith("torch.ops."):
            value: Any = torch.ops
            for name in self.where.replace(":", ".").split(".")[2:]:
                value = getattr(value, name)
            return value
        return pkgutil.resolve_name(self.where)


OWN_MODEL = "_own_model"  # the attribute that holds the model where it was captured as one node
Forwards = dict[str, dict[bool, Program]]  # by module path and mode


@dataclass
class FlatProgram:
    """The pruned program of one mode, with all that says which lines belong to which call of a module.

    Attributes:
        program: its lines.
        numbers: for each line, by name, the number of the captured node that it comes of.
        names: what stands for a captured node, a `Name` or a literal; without an entry nothing does.
        touched: the numbers of captured nodes that the rewrite has changed.
        removed: captured nodes that are gone with residual branches.
    """

    program: Program
    numbers: dict[str, int]
    names: dict[fx.Node, Any] = field(default_factory=dict)
    touched: frozenset[int] = frozenset()
    removed: frozenset[fx.Node] = frozenset()


def written(
    graph: fx.Graph, only: Mapping[fx.Node, bool | None] | None = None, mode: bool = False
) -> tuple[list[Line], dict[fx.Node, Any]]:
    """The program of one mode out of a graph with branches (see `train_eval.py`): its lines, and what nodes became."""
    names: dict[fx.Node, Any] = {}
    lines: list[Line] = []
    for node in graph.nodes:
        if only and only.get(node, mode) != mode:
            continue
        if node.target is select_by_mode:
            chosen = node.args[mode]
            names[node] = names[chosen] if isinstance(chosen, fx.Node) else chosen
        else:
            names[node] = Name(node.name)
            args, kwargs = (fx.node.map_arg(x, names.__getitem__) if x else x for x in (node.args, node.kwargs))
            lines.append(Line(node.name, node.op, node.target, args, kwargs, node.meta))
    return lines, names


def without_dead(lines: Sequence[Line], used: Iterable[str] = ()) -> list[Line]:
    """Lines without the numbers and attribute reads that nothing uses; calls that may write in place stay."""
    kept: list[Line] = []
    wanted = set(used)
    for line in reversed(lines):
        if line.name in wanted or not is_pure(line):
            kept.append(line)
            wanted.update(names_in(line))
    return kept[::-1]


def is_pure(line: Line) -> bool:
    return line.op == "get_attr" or line.target in PURE or line.reads_size or line.target in COMPUTES


def names_in(x: Any) -> list[str]:
    """The names of the lines that an argument, or a line, refers to."""
    found: list[str] = []
    gather_names(x.args if type(x) is Line else (x,), found)
    if type(x) is Line and x.kwargs:
        gather_names(x.kwargs.values(), found)
    return found


def gather_names(values: Iterable[Any], found: list[str]) -> None:
    for x in values:
        kind = type(x)
        if kind is Name:
            found.append(x.name)
        elif kind in ATOMS:
            continue
        elif kind is tuple or kind is list or isinstance(x, tuple | list):
            gather_names(x, found)
        elif isinstance(x, dict):
            gather_names(x.values(), found)
        elif kind is slice:
            gather_names((x.start, x.stop, x.step), found)


def renamed(x: Any, read: Callable[[str], Name]) -> Any:
    if type(x) is Name:
        return read(x.name)
    if type(x) in ATOMS:
        return x
    if isinstance(x, tuple | list):
        return type(x)([read(v.name) if type(v) is Name else v if type(v) in ATOMS else renamed(v, read) for v in x])
    if isinstance(x, dict):
        return {k: renamed(v, read) for k, v in x.items()}
    return slice(*(renamed(v, read) for v in (x.start, x.stop, x.step))) if isinstance(x, slice) else x


def alike(a: Program, b: Program) -> bool:
    """Whether two programs do the same, whatever their lines are called."""
    return a is b or (len(a.lines) == len(b.lines) and numbered(a) == numbered(b))


def numbered(program: Program) -> list[Any]:
    places = {line.name: i for i, line in enumerate(program.lines)}
    place = lambda name: Name(str(places[name]))  # noqa: E731
    return [(line.op, line.target, renamed(line.args, place), renamed(line.kwargs, place)) for line in program.lines]


def on_own_model(program: Program, path: str) -> Program:
    """The program of a model that was captured as one node, the module at `path`: it calls that model's forward."""
    lines: list[Line] = []
    for line in program.lines:
        if line.op == "call_module" and line.target == path:
            lines.append(Line(OWN_MODEL, "get_attr", OWN_MODEL))
            line = line._replace(op="call_method", target="forward", args=(Name(OWN_MODEL), *line.args))
        lines.append(line)
    return Program(tuple(lines))
