"""Couple: interpret the tapes on labels, solve the ties once, and read off units and families.

Heads take two readings. The first finds which labels are rows of a head (`Ties.coarse`); the second starts with one label
for each row, so that a shared per-dimension parameter (a query norm, a rotary table) no longer ties heads to one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from fxprune.passes.coupling.solver import chained, components
from fxprune.passes.ir.constraints import Constraints, row
from fxprune.passes.ir.labels import Factor, Labels, along, factor
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import find


def leaf_labels(captures: Sequence[CapturedProgram]) -> tuple[dict[str, Labels], int]:
    """A label for every index of every dimension of the model's tensors; returns them and the next free label.

    The weight of a grouped convolution has an input index for each group: its second dimension is labelled group by group.
    """
    groups: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for capture in captures:
        groups.update(grouped_weights(capture))
        shapes.update({v.name: v.shape for v in capture.op_trace.values if v.name is not None})
    shapes = {name: shapes[name] for name in in_order(captures[0], shapes)}
    leaves: dict[str, Labels] = {}
    size = 1
    numbers = np.arange(1 + sum(sum(s) * groups.get(n, 1) for n, s in shapes.items()))  # each line is a piece of this
    for name, shape in shapes.items():
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
                made.append(Factor.line(numbers[size : size + n], d, len(shape), size))
                size += n
        leaves[name] = tuple(made)
    return leaves, size


def in_order(capture: CapturedProgram, names: Iterable[str]) -> list[str]:
    """Names of tensors, module by module as they are met, and as the model has them within each module."""
    owners: dict[str, int] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], len(owners))
    places = {name.removeprefix(capture.prefix): i for i, (name, _) in enumerate(named_tensors(capture.root))}
    return sorted(names, key=lambda name: (owners[name.rpartition(".")[0]], places.get(name, len(places))))


def grouped_weights(capture: CapturedProgram) -> dict[str, int]:
    """Parameters that reach a grouped convolution's weight through ops that keep their first two dimensions."""
    found: dict[str, int] = {}
    for op in capture.op_trace.ops:
        groups_of = find(op.func).groups
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


def composed(leaves: dict[str, Labels], constraints: Constraints) -> dict[str, Labels]:
    """Leaf labels in which a dimension over pairs of channels carries the labels of both."""
    changed = dict(leaves)
    for start, vectors in constraints.composed.items():
        name, dim, _ = constraints.leaf_starts[start]
        ndim = next(f.labels.dim() for f in leaves[name])
        others = tuple(f for f in changed[name] if f.major_to_minor != (dim,))
        changed[name] = others + tuple(along(v, dim, ndim) for v in vectors)
    return changed


def by_head(leaves: dict[str, Labels], constraints: Constraints) -> dict[str, Labels]:
    """Leaf labels with one label for each row of a head. Broadcast ties are not followed: they join heads to one another."""
    aligned = [p for p in constraints.pairs if not p.broadcast]
    unit, _ = components(constraints.size, chained(constraints.coarse) + aligned)
    touched = np.zeros(len(unit), bool)
    for event in constraints.coarse:
        touched[unit[row(event.labels)]] = True
    lines = np.where(touched[unit], unit, np.arange(constraints.size))
    lines[0] = 0
    table = torch.from_numpy(lines)

    def renamed(f: Factor) -> Factor:
        if len(f.major_to_minor) > 1:
            return factor(table[f.labels], f.major_to_minor)
        vector = lines[f.flat]
        return Factor.line(vector, f.major_to_minor[0], f.ndim) if bool((vector != vector[0]).any()) else Factor(f.labels, ())

    # a dimension that is one single head has nothing to remove: it is left without labels, and so kept
    return {name: tuple(g for f in labels if (g := renamed(f)).major_to_minor) for name, labels in leaves.items()}
