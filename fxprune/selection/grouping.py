"""Ranking: which families compete with one another, and in what order units go.

A pool (see `select.py`) can lose its units in steps that leave every tensor a rectangle. A *ladder* lists these steps, lowest
scores first. Ladders that compete are merged by the price of their steps into one sequence, and a choice is how far each
ladder is climbed. Budgets are met in the same way: by how many steps of a sequence are taken.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fxprune.options import Ratio, Scopes
from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.selection.pools import Pool


def grouped(pools: Sequence[Pool], key: Callable[[Pool], object]) -> list[list[Pool]]:
    """Pools of one key together, in the order in which keys are met."""
    found: dict[object, list[Pool]] = {}
    for pool in pools:
        found.setdefault(key(pool), []).append(pool)
    return list(found.values())


def structures(free: Sequence[Family], solution: Solution) -> list[tuple[object, ...]]:
    """The structure of each family, whatever its size: how often each kind of op meets it, in which argument and dimension.

    Families of one structure are isomorphic (Fang et al., arXiv:2407.04616).
    """
    uses: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for capture in solution.captures[:1]:
        made_of = {i: v.name for i, v in enumerate(capture.op_trace.values) if v.name is not None}
        shapes.update({v.name: v.shape for v in capture.op_trace.values if v.name is not None})
        for op in capture.op_trace.ops:
            refs = collect((op.args, op.kwargs), TensorRef)
            mine = [(k, made_of[r.id]) for k, r in enumerate(refs) if r.id in made_of]
            if mine and not any(capture.op_trace.values[r.id].from_input for r in refs):
                for ref in collect(op.outs, TensorRef):
                    made_of.setdefault(ref.id, mine[0][1])  # a view, or a cast, of a parameter
            for k, name in mine:
                uses.setdefault(name, []).append(f"{op.func._schema.name}:{k}")
    found: list[tuple[object, ...]] = []
    for family in free:
        lines = sorted(
            (tuple(sorted(set(uses.get(name, [])))), dim, tuple(n > 1 for n in shapes.get(name, ())))
            for name, dim in family.members
        )
        found.append(tuple(lines))
    return found


def ratios_of(free: Sequence[Family], ratio: Ratio, solution: Solution, scopes: Scopes | None = None) -> list[float]:
    """The share to remove from each family: what the first glob says that names a module which writes or scales it.

    The name of a scope counts as a glob that its families match.
    """
    if not isinstance(ratio, Mapping):
        return [float(ratio)] * len(free)
    named = scopes_of(free, scopes, solution)
    return [
        next((float(r) for glob, r in ratio.items() if glob == scope or any(matches(m, glob) for m in modules)), 0.0)
        for scope, modules in zip(named, owners(free, solution), strict=True)
    ]


def scopes_of(free: Sequence[Family], scopes: Scopes | None, solution: Solution) -> list[str | None]:
    """The scope of each family: the first one with a glob that names a module which writes or scales it."""
    if scopes is None:
        return [None] * len(free)
    globs = {name: [g] if isinstance(g, str) else list(g) for name, g in scopes.items()}
    return [
        next((name for name, listed in globs.items() if any(matches(m, glob) for m in modules for glob in listed)), None)
        for modules in owners(free, solution)
    ]


def owners(free: Sequence[Family], solution: Solution) -> list[set[str]]:
    """The modules that write or scale each family."""
    found = emitters(solution)
    every = []
    for family in free:
        holding = {name.rpartition(".")[0] for name, _ in family.members}
        every.append(holding & found.get(int(family.units[0]), set()) or holding)
    return every


def emitters(solution: Solution) -> dict[int, set[str]]:
    """For each class, the modules in whose results it occurs; one that only reads it is not among them."""
    unit = solution.unit_of.numpy()
    found: dict[int, set[str]] = {}
    for capture, values in zip(solution.captures, solution.values, strict=True):
        for node, result in capture.results.items():
            if node.op == "call_module":
                for f in (f for ref in collect(result, TensorRef) for f in values.get(ref.id, ())):
                    for c in np.unique(unit[f.compressed]).tolist():
                        found.setdefault(c, set()).add(str(node.target).removeprefix(capture.prefix))
    return found


def matches(module: str, glob: str) -> bool:
    """Whether a glob names a module or one it lies in."""
    parts = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), glob) for i in range(len(parts)))
