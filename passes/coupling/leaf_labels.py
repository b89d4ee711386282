"""Labels of the model's own tensors: one for each index of each dimension, then one for each head, or several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.coupling.components import Components
from fxprune.passes.coupling.solver import chain
from fxprune.passes.ir.constraints import ConstraintBuilder, LabelArray
from fxprune.passes.ir.labels import NONE, Factor, Labels, along, factor
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.propagation_state import LeafDim
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import spec_of


def is_constant(name: str) -> bool:
    """Whether a tensor of a captured program is not the model's own, but was made by its code while it was captured."""
    return name.startswith("_tensor_constant")


def leaf_labels(captures: Sequence[CapturedProgram]) -> tuple[dict[str, Labels], int]:
    """A label for every index of every dimension of the model's tensors, and of the constants of its program after those.

    Returns them and the next free label.

    The weight of a grouped convolution has an input index for each group: its second dimension is labelled group by group.
    """
    groups: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for capture in captures:
        groups.update(grouped_weights(capture))
        shapes.update({v.name: v.shape for v in capture.op_trace.values if v.name is not None})
    shapes = {name: shapes[name] for name in in_order(captures[0], shapes)}
    leaves: dict[str, Labels] = dict.fromkeys(shapes, NONE)
    size = 1
    numbers = np.arange(1 + sum(sum(s) * groups.get(n, 1) for n, s in shapes.items()))  # each line is a piece of this
    constants = [name for name in shapes if is_constant(name)]
    for name in [*(n for n in shapes if n not in constants), *constants] if constants else shapes:
        shape = shapes[name]
        made: list[Factor] = []
        for d, n in enumerate(shape):
            if n < 2:  # nothing to remove; some models have tables of no entries
                continue
            if d == 1 and name in groups:
                g = groups[name]
                vectors = torch.arange(size, size + g * n).view(g, 1, n).expand(g, shape[0] // g, n)
                made.append(Factor(vectors.reshape(shape[0], n, *[1] * (len(shape) - 2)), (0, 1)))
                size += g * n
            else:
                made.append(Factor.vector(numbers[size : size + n], d, len(shape), size))
                size += n
        leaves[name] = tuple(made)
    return leaves, size


def in_order(capture: CapturedProgram, names: Iterable[str]) -> list[str]:
    """Names of tensors, module by module as they are met, and as the model has them within each module."""
    owners: dict[str, int] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], len(owners))
    places = {name: i for i, name in enumerate(capture.tensor_names)}
    return sorted(names, key=lambda name: (owners[name.rpartition(".")[0]], places.get(name, len(places))))


def grouped_weights(capture: CapturedProgram) -> dict[str, int]:
    """Parameters that reach a grouped convolution's weight through ops that keep their first two dimensions."""
    found: dict[str, int] = {}
    for op in capture.op_trace.ops:
        groups_of = spec_of(op).groups
        if groups_of is None:
            continue
        weight, groups = groups_of(OpView(op, capture.op_trace))
        shape = capture.op_trace.shape(weight)
        if groups == 1 or shape[1] == 1:
            continue
        pending, seen = [weight.id], set()
        while pending:
            current = pending.pop()
            value = capture.op_trace.values[current]
            if current in seen or value.shape[:2] != shape[:2]:
                continue
            seen.add(current)
            maker = capture.op_trace.maker(current)
            if value.name is not None:
                found[value.name] = groups
            elif maker is not None:
                pending += [r.id for r in collect((maker.args, maker.kwargs), TensorRef)]
    return found


@dataclass(frozen=True, slots=True)
class LeafLabels:
    """The labels of the model's own tensors and of the constants of its program, by name.

    Attributes:
        of: the labels.
        size: the next free label.
        first_constant: the first label that `leaf_labels` gave to a constant; those of the model's own tensors are below.
    """

    of: dict[str, Labels]
    size: int
    first_constant: int

    @classmethod
    def initial(cls, captures: Sequence[CapturedProgram]) -> LeafLabels:
        of, size = leaf_labels(captures)
        constants = [int(f.flat.min()) for name, labels in of.items() if is_constant(name) for f in labels]
        return cls(of, size, min(constants, default=size))

    def composed_labels(self) -> np.ndarray:
        """The labels in dimensions of the model's own tensors that are not among their first ones."""
        own = [f.flat for name, labels in self.of.items() for f in labels if f.start is None and not is_constant(name)]
        return np.concatenate([np.zeros(0, np.int64), *(flat[flat >= self.first_constant] for flat in own)])

    def dims(self) -> dict[int, LeafDim]:
        """Dimensions that have a consecutive run of labels to themselves, by the first of them: tensor, dimension and size."""
        found: dict[int, LeafDim] = {}
        for name, labels in self.of.items():
            for f in labels:
                flat = f.flat
                start = f.start
                if start is None and len(f.major_to_minor) == 1 and flat[-1] - flat[0] == len(flat) - 1:
                    start = int(flat[0])
                if start is not None:
                    found[start] = (name, f.major_to_minor[0], len(flat))
        return found

    def with_composed(
        self, composed: Mapping[int, tuple[Tensor, ...]], dims: Mapping[int, LeafDim], made: ConstraintBuilder
    ) -> LeafLabels:
        """The same, where dimensions over pairs of channels carry the labels of both.

        Copies and constants keep their labels to themselves: such a dimension gets others, which are tied to them.
        """
        of = dict(self.of)
        mine = np.unique(np.concatenate([v.numpy() for vectors in composed.values() for v in vectors]))
        mine = mine[(mine >= self.first_constant) & ~made.determined.holds(mine)]
        renamed = np.arange(made.size)
        renamed[mine] = made.size + np.arange(len(mine))
        for start, vectors in composed.items():
            name, dim, _ = dims[start]
            ndim = next(f.labels.dim() for f in self.of[name])
            others = tuple(f for f in of[name] if f.major_to_minor != (dim,))
            of[name] = others + tuple(along(torch.from_numpy(renamed[v.numpy()]), dim, ndim) for v in vectors)
        return LeafLabels(of, made.size + len(mine), self.first_constant)

    def by_line(self, lines: Sequence[Tensor]) -> LeafLabels:
        """The same, with one label for each row of some matrices of labels."""
        units = Components(max(self.size, *(int(m.max()) + 1 for m in lines)))
        units.add(chain([LabelArray(m, -1) for m in lines]))
        own = units.unit_of[: self.size]
        table = np.where(own < self.size, own, np.arange(self.size))
        of = {name: tuple(renamed(f, table, np.zeros(self.size, bool)) for f in labels) for name, labels in self.of.items()}
        return LeafLabels(of, self.size, self.first_constant)

    def by_head(self, made: ConstraintBuilder) -> LeafLabels:
        """The same, with one label for each row of a head. Broadcast ties are not followed: they join heads to one another."""
        head_rows = made.collected.head_rows
        units = Components(made.size)
        units.add(chain(head_rows) + [tie for tie in made.collected.ties if not tie.broadcast])
        touched = np.zeros(made.size, bool)
        for event in head_rows:
            touched[units.unit_of[event.flat]] = True
        table = np.where(touched[units.unit_of], units.unit_of, np.arange(made.size))
        table[0] = 0
        rows = np.zeros(made.size, bool)
        rows[np.concatenate([event.flat for event in head_rows])] = True
        of = {name: tuple(g for f in labels if (g := renamed(f, table, rows)).dims) for name, labels in self.of.items()}
        return LeafLabels(of, self.size, self.first_constant)


def renamed(f: Factor, table: np.ndarray, rows: np.ndarray) -> Factor:
    """A factor with other labels, by a table.

    A dimension that is one single head, or heads that all go together, has nothing to remove: it is left without labels, and
    so kept. One that is only tied to such heads keeps its own: it may have channels of something else as well.

    Arguments:
        rows: whether a label is in a row of a head itself.
    """
    if len(f.dims) > 1:
        return factor(torch.from_numpy(table)[f.labels], f.major_to_minor)
    labels = f.lookup(table)
    if np.array_equal(labels, f.flat):
        return f
    if bool((labels != labels[0]).any()):
        return Factor.vector(labels, f.major_to_minor[0], f.ndim)
    return Factor(f.labels, ()) if rows[f.flat].any() else f
