"""From a model to its coupling: labels for every value of the captured programs, and the units that removal acts on.

(1) Heads: a first propagation finds which labels are rows of a head. The next ones start with one label for each row, so that a
    parameter that the heads share (a query norm, a rotary table) does not tie them to one another.
(2) Compositions: a dimension of the model's own tensors that belongs to pairs of channels (it meets an outer product) gets the
    labels of both, and labels are propagated again, until no such dimension is left.
(3) The constraints that were met are solved.
(4) Where a factor over few long lines met an operand that varies along these alone, each line is one unit. If more can be
    removed where the lines that lie across them are units instead, and that operand stays whole, they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.passes.capture.capture import capture_program
from fxprune.passes.capture.programs import NOT_FOLLOWED, REPORT, programs, trained
from fxprune.passes.coupling.choices import find_experts
from fxprune.passes.coupling.leaf_labels import LeafLabels
from fxprune.passes.coupling.propagation import Program, Propagated, propagate
from fxprune.passes.coupling.shuffles import gather_regions
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.coupling.solver import solve
from fxprune.passes.errors import NeedsValues, PruneError, surface, told
from fxprune.passes.ir.constraints import Constraints, LabelArray
from fxprune.passes.ir.labels import NONE, Factor, Labels, along
from fxprune.passes.ir.module_tree import named_parameters, on_meta, private_copy
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ir.quiet import gc_paused, own_random_state, unobserved
from fxprune.passes.ops.registry import spec_of

MOST_COMPOSED = 1000  # dimensions, after which no others are composed


def couple_channels(
    captures: Sequence[CapturedProgram], coupling_options: CouplingOptions, frozen_modules: Mapping[str, str] | None = None
) -> Solution:
    """Labels for every value of the captured programs, with constraints solved.

    Arguments:
        captures: programs of the same model (evaluation, and training where it differs).
        coupling_options: what may go and what may not.
        frozen_modules: paths of modules nothing of which is removed, nor of what they read and return, with the reason.
    """
    programs = [Program(capture, i) for i, capture in enumerate(captures)]
    leaves = label_heads(programs, LeafLabels.initial(captures), coupling_options)  # (1)
    solution, across = solved(programs, leaves, coupling_options, frozen_modules)
    if across:  # (4)
        other, _ = solved(programs, leaves.by_line(across), coupling_options, frozen_modules)
        return max(solution, other, key=removable)
    return solution


def solved(
    programs: Sequence[Program],
    leaves: LeafLabels,
    coupling_options: CouplingOptions,
    frozen_modules: Mapping[str, str] | None,
) -> tuple[Solution, list[Tensor]]:
    """What comes of leaf labels, and the lines that lie across those that became one unit each."""
    captures = [program.capture for program in programs]
    leaves, found = label_compositions(programs, leaves, coupling_options)  # (2)
    constraints, values = found.constraints.collected, found.values
    for name, reason in coupling_options.frozen.items():
        constraints.frozen += [LabelArray(f.labels, -1, reason) for f in leaves.of.get(name, NONE)]
    for program, labels in zip(programs, values, strict=True):
        for path, reason in (frozen_modules or {}).items():
            freeze_module(program, labels, path, reason, constraints)
    regions = [gather_regions(c, v) for c, v in zip(captures, values, strict=True)]
    inside = {p.node(p.capture.index[node]) for p, region in zip(programs, regions, strict=True) for node in region}
    constraints.same_columns = [e for e in constraints.same_columns if e.node not in inside]
    constraints.equal_rows = [e for e in constraints.equal_rows if e.node not in inside]
    solution = solve(captures, leaves.of, values, constraints, found.constraints.size, regions, found.picks)  # (3)
    if any(found.asked):
        find_experts(solution, found.asked)
    return solution, found.across


def removable(solution: Solution) -> float:
    """How much can be removed: elements of tensors, times the share of a dimension's units that may go, for all dimensions."""
    units, total = solution.unit_of.numpy(), 0.0
    for name, labels in solution.leaves.items():
        for f in labels:
            its = np.unique(units[f.flat])
            free = int(((its > 0) & (solution.frozen[its] < 0)).sum())
            total += math.prod(solution.shapes[name]) * max(0, free - 1) / len(its)
    return total


def label_heads(programs: Sequence[Program], leaves: LeafLabels, options: CouplingOptions) -> LeafLabels:
    """Leaf labels with one label for each row of a head, if heads go whole and there are any."""
    if not options.heads or not any(spec_of(op).heads for p in programs for op in p.capture.op_trace.ops):
        return leaves
    found = propagate(programs, leaves, options, seeking_heads=True).constraints
    return leaves.by_head(found) if any(len(e.labels[0]) > 1 for e in found.collected.head_rows) else leaves


def label_compositions(
    programs: Sequence[Program], leaves: LeafLabels, options: CouplingOptions
) -> tuple[LeafLabels, Propagated]:
    """Leaf labels in which composed dimensions carry several, and what comes of their propagation."""
    dims = leaves.dims()
    count = 0
    while True:
        found = propagate(programs, leaves, options, leaf_dims=dims if count <= MOST_COMPOSED else {})
        if not found.composed:
            return leaves, found
        leaves = leaves.with_composed(found.composed, dims, found.constraints)
        dims = {start: dim for start, dim in dims.items() if start not in found.composed}
        count += len(found.composed)


def freeze_module(program: Program, labels: Mapping[int, Labels], path: str, why: str, constraints: Constraints) -> None:
    """Freeze what a module holds, reads and returns."""
    capture = program.capture
    calls = [node for node, its in capture.unseen.items() if its == path]
    frozen: list[tuple[int, TensorRef]] = []
    for node in calls:
        refs = collect([capture.results[n] for n in (*node.all_input_nodes, node)], TensorRef)
        frozen += [(program.node(capture.index[node]), ref) for ref in refs]
    for i, value in enumerate(capture.op_trace.values):
        if calls and value.name is not None and f"{capture.prefix}{value.name}".startswith(f"{path}."):
            frozen.append((program.node(capture.index[calls[0]]), TensorRef(i)))
    for at, ref in frozen:
        constraints.frozen += [LabelArray(f.labels, at, why) for f in labels.get(ref.id, NONE)]


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    coupling_options: CouplingOptions,
    frozen_modules: Mapping[str, str] | None = None,
) -> Solution:
    """Trace and couple: in evaluation mode, and in training mode too where the program asks which one it is in."""
    with unobserved(model), gc_paused():
        try:
            found = programs(model, args, kwargs, on_meta)
        except Exception as error:  # the program reads values, or runs code that knows nothing of meta tensors
            surface(error)
            found = None
        if found is not None:
            coupling_options.check([name for capture in found for name, _ in capture.outputs])
            try:
                return with_unread(model, args, kwargs, couple_channels(found, coupling_options, frozen_modules))
            except NeedsValues:  # the contents of a constant
                pass
            except Exception as error:
                surface(error, ours=True)
        found = programs(model, args, kwargs, None)
        coupling_options.check([name for capture in found for name, _ in capture.outputs])
        try:
            return with_unread(model, args, kwargs, couple_channels(found, coupling_options, frozen_modules))
        except PruneError:
            raise
        except Exception as error:
            surface(error, ours=True)
            raise PruneError(
                f"{NOT_FOLLOWED} {told(error)}",
                where=type(model).__name__,
                fix=REPORT,
            ) from error


def with_unread(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], solution: Solution) -> Solution:
    """The same, where parameters that only the model's own forward reads, in training, are cut with what it combines them with.

    Training is captured as one module for that, whose program is not used.
    """
    if not solution.captures[0].is_untrained:
        return solution
    unread = {name: p for name, p in named_parameters(model).items() if name not in solution.leaves and p.dim()}
    if not unread:
        return solution
    try:
        with own_random_state():
            whole = couple_channels(
                [capture_program(trained(private_copy(model)), args, kwargs, whole="stays of its class")], CouplingOptions()
            )
    except Exception as error:  # it cannot be run in training
        surface(error)
        return solution
    known: dict[tuple[int, ...], Factor] = {}
    for name, labels in solution.leaves.items():
        there = dict(lines(whole, name))
        known |= {there[dim]: f for f in labels for dim in f.major_to_minor if len(f.dims) == 1 and dim in there}
    for name, parameter in unread.items():
        found = [along(known[units].labels, dim, parameter.dim()) for dim, units in lines(whole, name) if units in known]
        if found:
            solution.leaves[name], solution.shapes[name] = tuple(found), tuple(parameter.shape)
    return solution


def lines(solution: Solution, name: str) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The dimensions of a tensor that are not frozen, with the units along each."""
    for f in solution.leaves.get(name, NONE):
        units = tuple(solution.unit_of[f.labels].flatten().tolist())
        if len(f.dims) == 1 and 0 not in units:
            yield f.major_to_minor[0], units


def describe_capture(solution: Solution) -> str:
    """How the model was captured, in a phrase."""
    opaque, note = solution.captures[0].opaque, solution.captures[0].note
    how = "opaque: " + ", ".join(f"{path or 'the root'} ({why})" for path, why in opaque.items()) if opaque else "symbolic"
    return f"{how}; {note}" if note else how
