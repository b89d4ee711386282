"""What `unify` promises: whatever may be removed of two operands, a pointwise op of what is left is what is left of its result.

Operands and their factors are drawn at random; the constraints that `unify` reports are solved as in coupling, and a choice of
units is made a rectangle as in selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.coupling.solver import solve
from fxprune.passes.ir.constraints import ConstraintBuilder
from fxprune.passes.ir.labels import Factor, Labels, factor
from fxprune.passes.ir.op_trace import OpCall, OpTrace, TensorInfo
from fxprune.passes.ir.propagation_state import PropagationState
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.unify import unify
from fxprune.selection.rectangles import restore_rectangles

Shape = tuple[int, ...]


@dataclass
class Operands:
    """Shapes and labels of two tensors of one rank, and how many labels there are."""

    shapes: tuple[Shape, Shape]
    labels: tuple[Labels, Labels]
    size: int


@st.composite
def operands(draw: st.DrawFn) -> Operands:
    """Every dimension of more than one entry may have labels of its own, be a part of a joint factor, or have none.

    Labels are new ones, or those that the other operand has there; now and then one of them is label 0, which is never removed.
    """
    full = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    shapes: list[Shape] = []
    for _ in range(2):
        shapes.append(tuple(n if draw(st.integers(0, 3)) else 1 for n in full))
    size, found = 1, []
    for shape in shapes:
        made: list[Factor] = []
        dims = [d for d, n in enumerate(shape) if n > 1 and draw(st.integers(0, 4))]
        while dims:
            joint = len(dims) > 1 and draw(st.booleans())
            mine, dims = dims[: 1 + joint], dims[1 + joint :]
            sizes = [n if d in mine else 1 for d, n in enumerate(shape)]
            twin = next((f for f in found[0] if list(f.labels.shape) == sizes), None) if found else None
            if twin is not None and draw(st.integers(0, 3)) == 0:
                made.append(twin)
                continue
            labels = torch.arange(size, size + math.prod(sizes))
            size += len(labels)
            if draw(st.integers(0, 5)) == 0:
                labels[draw(st.integers(0, len(labels) - 1))] = 0
            made.append(factor(labels.reshape(sizes), mine if draw(st.booleans()) else mine[::-1]))
        found.append(tuple(made))
    return Operands((shapes[0], shapes[1]), (found[0], found[1]), size)


def unified(given: Operands) -> tuple[Labels, Solution]:
    """The labels of the result, and the solved constraints, with both operands and the result as tensors of the model."""
    result = tuple(np.broadcast_shapes(*given.shapes))
    values = [TensorInfo(shape, torch.float64, True) for shape in (*given.shapes, result)]
    refs = [TensorRef(i) for i in range(3)]
    op = OpCall(torch.ops.aten.mul.Tensor, (refs[0], refs[1]), {}, refs[2], 0)
    builder = ConstraintBuilder(given.size)
    state = PropagationState(OpTrace(values, [op]), dict(enumerate(given.labels)), builder)
    labels = unify(RuleContext(op, state), given.labels[0], given.shapes[0], given.labels[1], given.shapes[1])
    leaves = {"a": given.labels[0], "b": given.labels[1], "result": labels}
    solution = solve([], leaves, [], builder.collected, builder.size, [])
    solution.shapes = {"a": given.shapes[0], "b": given.shapes[1], "result": result}
    return labels, solution


def removable(solution: Solution) -> np.ndarray:
    """The units that nothing freezes."""
    units = np.unique(solution.unit_of.numpy())
    return units[(solution.frozen[units] < 0) & (units > 0)]


def numbered(shape: Shape, start: int) -> Tensor:
    """Numbers no two products of which are equal, as far as such small tensors go: each tells where it came from."""
    return torch.arange(start, start + math.prod(shape), dtype=torch.float64).sqrt().reshape(shape)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given=operands(), seed=st.integers(0, 1 << 16), share=st.sampled_from([0.2, 0.5, 0.9]))
def test_a_pointwise_op_commutes_with_removal(given: Operands, seed: int, share: float) -> None:
    labels, solution = unified(given)
    rng = np.random.default_rng(seed)
    removed = np.zeros(len(solution.unit_of), bool)
    free = removable(solution)
    removed[free[rng.random(len(free)) < share]] = True
    kept, slicer = restore_rectangles(solution, removed, rng.random(len(removed)), solution.some_stay)
    assert torch.equal(kept, kept[solution.unit_of]) and bool(kept[0])
    a, b = (numbered(shape, 2 + 100 * i) for i, shape in enumerate(given.shapes))
    few = slicer.take(given.labels[0], a) * slicer.take(given.labels[1], b)
    assert torch.equal(few, slicer.take(labels, a * b))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3), at=st.integers(0, 2))
def test_what_both_operands_have_can_go(sizes: list[int], at: int) -> None:
    """The property above would hold of a rule that freezes everything."""
    dim = at % len(sizes)
    n, ndim = sizes[dim], len(sizes)
    a, b = (Factor.vector(np.arange(start, start + n), dim, ndim, start) for start in (1, 1 + n))
    labels, solution = unified(Operands((tuple(sizes), tuple(sizes)), ((a,), (b,)), 1 + 2 * n))
    assert len(removable(solution)) == n and len(labels) == 1
