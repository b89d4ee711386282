"""Match families with the globs of ratios and scopes, and tell which families have the same structure."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np

from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.selection.options import Ratio, Scopes


def describe_structures(free: Sequence[Family], solution: Solution) -> list[tuple[object, ...]]:
    """The structure of each family, whatever its size: the ops that read each layer, as which argument, and the dimension.

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


def match_ratios(free: Sequence[Family], ratio: Ratio, solution: Solution, scopes: Scopes | None = None) -> list[float]:
    """The share to remove from each family: that of the first glob that matches a module which writes or scales it.

    The name of a scope is a glob that its families match.
    """
    if not isinstance(ratio, Mapping):
        return [float(ratio)] * len(free)
    named = match_scopes(free, scopes, solution)
    return [
        next((float(r) for glob, r in ratio.items() if glob == scope or any(matches(m, glob) for m in modules)), 0.0)
        for scope, modules in zip(named, find_owners(free, solution), strict=True)
    ]


def match_scopes(free: Sequence[Family], scopes: Scopes | None, solution: Solution) -> list[str | None]:
    """The scope of each family: the first one with a glob that matches a module which writes or scales it."""
    if scopes is None:
        return [None] * len(free)
    globs = {name: [g] if isinstance(g, str) else list(g) for name, g in scopes.items()}
    return [
        next((name for name, listed in globs.items() if any(matches(m, glob) for m in modules for glob in listed)), None)
        for modules in find_owners(free, solution)
    ]


def find_owners(free: Sequence[Family], solution: Solution) -> list[set[str]]:
    """The modules that write or scale each family."""
    found = find_emitters(solution)
    every = []
    for family in free:
        holding = {name.rpartition(".")[0] for name, _ in family.members}
        every.append(holding & found.get(int(family.units[0]), set()) or holding)
    return every


def find_emitters(solution: Solution) -> dict[int, set[str]]:
    """For each class, the modules in whose results it occurs; a module that only reads a class is not among them."""
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
    """Whether a glob matches a module or one that contains it."""
    parts = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), glob) for i in range(len(parts)))
