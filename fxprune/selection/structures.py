"""Families that play the same part: found by the ops that read them, and by the numbers of a configuration that they follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from torch import nn

from fxprune.passes.coupling.choices import check_choices
from fxprune.passes.coupling.components import smallest_connected
from fxprune.passes.coupling.families import Family, families, freeze_families
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.ir.module_tree import named_parameters, named_tensors
from fxprune.passes.ir.pytree import TensorRef, collect

Followers = Mapping[str, Collection[tuple[str, int]]]


def describe_structures(found: Sequence[Family], solution: Solution) -> list[tuple[object, ...]]:
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
    structures: list[tuple[object, ...]] = []
    for family in found:
        lines = sorted(
            (tuple(sorted(set(uses.get(name, [])))), dim, tuple(n > 1 for n in shapes.get(name, ())))
            for name, dim in family.members
        )
        structures.append(tuple(lines))
    return structures


def narrow(solution: Solution, options: CouplingOptions, model: nn.Module, followers: Callable[[], Followers]) -> None:
    """Freeze what options say of families rather than of tensors; raises PruneError where they ask for what is not there."""
    tensors = {name for name, _ in named_tensors(model)} if options.frozen else set()
    named = {text: why for text, why in options.frozen.items() if text not in tensors}
    if named:
        freeze_families(solution, named, set(named_parameters(model)))
    if options.uniform:
        keep_uniform(solution, set(named_parameters(model)), followers())
    check_choices(solution, options, type(model).__name__)


def keep_uniform(solution: Solution, parameters: set[str], followers: Followers) -> None:
    """Have families of one structure and size, and those that one number of a configuration sizes, keep the same share.

    Where one of them stays whole, all do.

    Arguments:
        solution: the coupling; changed.
        parameters: the names that are learned.
        followers: for each number of a configuration the dimensions of tensors that follow it, by name and position; empty
            for a model without one.
    """
    found = families(solution, parameters)
    held = {i: f"as {f.name} does, which {f.kept_whole}" for i, f in enumerate(found) if f.kept_whole}
    edges = [*same_structure(found, solution), *same_number(found, followers, held)]
    ends = np.array(edges, np.int64).reshape(-1, 2)
    unsaid = len(found) + len(followers)
    root = smallest_connected(np.arange(unsaid + 1), ends[:, 0], ends[:, 1])
    told = sorted(held, key=lambda i: (i == unsaid, -i))  # of several reasons: that no number counts it, else a family's
    reasons = {int(root[i]): held[i] for i in told}
    for first in np.unique(root[: len(found)]).tolist():
        mine = [found[i] for i in np.flatnonzero(root[: len(found)] == first)]
        if first not in reasons and len(mine) > 1:
            entries = math.lcm(*(len(f.units) for f in mine))  # each unit as often as gives all rows this length
            solution.equal_rows.append(np.stack([np.repeat(f.units, entries // len(f.units)) for f in mine]))
        elif first in reasons:
            for family in mine:
                if not family.frozen:
                    solution.frozen[family.units] = len(solution.reasons)
            solution.reasons.append(f"must stay whole for uniform=True, {reasons[first]}")


def same_structure(found: Sequence[Family], solution: Solution) -> list[tuple[int, int]]:
    """Pairs of positions: of each family but the first one of a structure and size, and of that one."""
    first: dict[object, int] = {}
    keys = zip(describe_structures(found, solution), found, strict=True)
    pairs = [(first.setdefault((structure, len(f.units), f.width), i), i) for i, (structure, f) in enumerate(keys)]
    return [pair for pair in pairs if pair[0] != pair[1]]


def same_number(found: Sequence[Family], followers: Followers, held: dict[int, str]) -> list[tuple[int, int]]:
    """Pairs of positions: of each family, and of a number that may change, which counts it; numbers stand behind families.

    Where a dimension follows several numbers and some of them cannot change, it follows the others. Behind the numbers stands
    one for what no number says.

    Arguments:
        found: all families.
        followers: see `keep_uniform`.
        held: why positions stay whole; what stays for the configuration is added.
    """
    if not followers:
        return []
    there: dict[tuple[str, int], list[int]] = {}
    for i, family in enumerate(found):
        for place in family.members:
            there.setdefault(place, []).append(i)
    numbers: dict[tuple[str, int], list[int]] = {place: [] for place in there}
    for k, (name, places) in enumerate(followers.items(), len(found)):
        for place in places:
            numbers.setdefault(place, []).append(k)
        stays = next((p for p in places if not there.get(p) or any(i in held for i in there[p])), None)
        if stays is not None:
            held[k] = f"as {stays[0]}:{stays[1]} does, which {name} of the configuration counts, too"
    unsaid = len(found) + len(followers)
    held[unsaid] = "since no number of the configuration counts it"
    pairs = []
    for place, mine in there.items():
        known = numbers[place] or [unsaid]
        pairs += [(i, k) for i in mine for k in [k for k in known if k not in held] or known]
    return pairs
