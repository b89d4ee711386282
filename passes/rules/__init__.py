"""Rules: for each dispatcher op, the labels of its results from the labels of its arguments.

A rule is a function of a `Call` that returns the labels of the result (a list of them for several results) and reports
ties through `call.ties`. `@rule("aten::flip")` files it; `find(op)` answers which rule an op has. Ops that torch itself
tags as pointwise need no entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.labels import NONE, Factor, Labels, along, factor
from fxprune.passes.tape import NeedsValues, Op, Ref, Tape
from fxprune.passes.ties import Ties

Rule = Callable[["Call"], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """File a rule under the schema names of the ops it serves; a trailing `*` matches any ending."""

    def file(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return file


SIGNATURES: dict[Any, tuple[list[str], dict[str, Any]]] = {}


def signature(func: Any) -> tuple[list[str], dict[str, Any]]:
    """The names of an op's arguments, and the values of those that have a default."""
    found = SIGNATURES.get(func)
    if found is None:
        arguments = func._schema.arguments
        found = [a.name for a in arguments], {a.name: a.default_value for a in arguments if a.has_default_value()}
        SIGNATURES[func] = found
    return found


class Renamed:
    """An op that goes by another one's name."""

    def __init__(self, func: Any, name: str) -> None:
        self.func = func
        self._schema = SimpleNamespace(name=name, arguments=func._schema.arguments, returns=func._schema.returns)
        self._overloadname = "default"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


RENAMED: dict[tuple[Any, str], Renamed] = {}


class Call:
    """One op on the tape as a rule sees it: arguments by name, labels and shapes of tensors, and where to report."""

    def __init__(
        self,
        op: Op,
        tape: Tape,
        labels: dict[int, Labels],
        ties: Ties,
        heads: bool,
        uses: set[int],
        varying: set[int] | None = None,
    ) -> None:
        self.op, self.tape, self.known, self.ties, self.heads, self.uses = op, tape, labels, ties, heads, uses
        self.varying = varying or ()  # values whose contents change with the sizes of the inputs
        self.inputs: list[Ref] = op.inputs
        self.outputs: list[Ref] = op.outputs

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        names, defaults = signature(self.op.func)
        return {**defaults, **dict(zip(names, self.op.args, strict=False)), **self.op.kwargs}

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.named.get(name, default)

    def under(self, name: str) -> Call:
        """The same call as one of another op, which has the same arguments."""
        op = self.op
        func = RENAMED.setdefault((op.func, name), Renamed(op.func, name))
        same = Op(func, op.args, op.kwargs, op.outs, op.node)
        return Call(same, self.tape, self.known, self.ties, self.heads, self.uses, self.varying or None)

    @property
    def first(self) -> Ref:
        return self.inputs[0]

    def labels(self, ref: Ref) -> Labels:
        return self.known.get(ref.id, NONE)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.tape.values[ref.id].shape

    def data(self, ref: Ref) -> Tensor | None:
        """The contents of a tensor of indices, if they are the same for every input."""
        value = self.tape.values[ref.id]
        if ref.id in self.varying:
            return None
        if value.data is None and value.on_meta and not value.from_input:
            raise NeedsValues  # a constant whose contents were not computed
        return value.data

    def used(self, ref: Ref) -> bool:
        """Whether a later call reads a value; `uses` is empty where calls are looked at one by one, and nobody knows."""
        return ref.id in self.uses

    def dim(self, index: int, ndim: int) -> int:
        return index % max(ndim, 1)

    def dims(self, indices: Any, ndim: int) -> tuple[int, ...]:
        """A dim argument as a tuple of non-negative dims; None or an empty list means all of them."""
        if indices is None or (isinstance(indices, Sequence) and not len(indices)):
            return tuple(range(ndim))
        return tuple(self.dim(i, ndim) for i in ([indices] if isinstance(indices, int) else indices))

    # -- building blocks ----------------------------------------------------------------------------------------------

    def fresh(self, size: int, dim: int, ndim: int) -> Factor:
        """New labels along one dimension whose entries are all alike, so that any number of them may go."""
        return along(self.ties.fresh(size), dim, ndim)

    def settle(self, f: Factor, why: str = "a single channel is taken out by a constant index") -> Labels:
        """A compressed factor, or nothing where it no longer varies (what it said is then frozen)."""
        if f.nest:
            return (f,)
        if bool((f.labels != 0).any()):
            self.ties.freeze(f.labels, why)
        return NONE

    def freeze(self, labels: Labels, why: str) -> None:
        for f in labels:
            self.ties.freeze(f.labels, why)

    def freeze_dims(self, labels: Labels, dims: Sequence[int], why: str) -> Labels:
        """Freeze the factors that vary along any of `dims`; the others pass."""
        passed, among = [], frozenset(dims)
        for f in labels:
            if f.dims & among:
                self.ties.freeze(f.flat, why)
            else:
                passed.append(f)
        return tuple(passed)

    def equal_rows(self, labels: Labels) -> Labels:
        """Report that joint factors made here must stay rectangles."""
        for f in labels:
            self.ties.keep_rows_equal(f)
        return labels

    def collapse(self, f: Factor, dims: Sequence[int]) -> Labels:
        """Tie the factor's labels together along `dims`, so that it no longer varies there."""
        flat = f.labels
        for d in dims:
            flat = flat.narrow(d, 0, 1)
        if flat.shape == f.labels.shape:
            return (f,)
        self.ties.tie(f.labels, flat, broadcast=True)
        return self.settle(factor(flat, f.nest), "all entries of a dimension are mixed with one another")


FOUND: dict[Any, tuple[int, Rule | None]] = {}


def find(func: Any) -> Rule | None:
    """The rule of a dispatcher op, or None: it is then unknown."""
    count, found = FOUND.get(func, (-1, None))
    if count != len(RULES):  # a rule was filed since
        found = search(func)
        FOUND[func] = (len(RULES), found)
    return found


def search(func: Any) -> Rule | None:
    from fxprune.passes.rules import pointwise

    found = named(func._schema.name)
    if found is None and torch.Tag.pointwise in func.tags:
        found = pointwise.pointwise
    return found


def named(name: str) -> Rule | None:
    """The rule filed for a schema name: its own, that of its plain form, or one for names that begin alike."""
    found = RULES.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = RULES.get(name[:-1])
    if found is None:
        found = next((r for key, r in RULES.items() if key.endswith("*") and name.startswith(key[:-1])), None)
    return found


def load() -> None:
    """Import every rule file once."""
    from fxprune.passes.rules import (  # noqa: F401
        contraction,
        create,
        index,
        join,
        movement,
        norm,
        pointwise,
        reduction,
        spatial,
        view,
    )
