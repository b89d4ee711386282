"""Couple: interpret the tapes on labels, solve the ties once, and read off units and families.

Heads take two readings. The first finds which labels are rows of a head (`Ties.coarse`); the second starts with one label
for each row, so that a shared per-dimension parameter (a query norm, a rotary table) no longer ties heads to one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxprune.passes.coupling.leaf_labels import by_head, composed, leaf_labels
from fxprune.passes.coupling.propagation import Script, number, read
from fxprune.passes.coupling.shuffles import gather_regions
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.coupling.solver import close
from fxprune.passes.ir.constraints import Constraints, Event
from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ir.options import CouplingOptions
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.registry import find

MOST_COMPOSED = 1000  # dimensions made of several others, before the rest is frozen


def couple_channels(
    captures: Sequence[CapturedProgram], coupling_options: CouplingOptions, frozen_modules: Mapping[str, str] | None = None
) -> Solution:
    """Labels for every value of the captured runs, with ties solved.

    Arguments:
        captures: runs of the same model (evaluation, and training where it differs).
        coupling_options: what may go and what may not.
        frozen_modules: paths of modules nothing of which is removed, nor of what they read and return, with the reason.
    """
    leaves, size = leaf_labels(captures)
    seeking = coupling_options.heads and any(has_heads(c) for c in captures)
    scripts = [Script(capture) for capture in captures]
    constraints, values = read(scripts, leaves, size, coupling_options, seeking=seeking)
    if seeking:
        if any(len(e.labels[0]) > 1 for e in constraints.coarse):
            leaves = by_head(leaves, constraints)
        del constraints, values  # before as much is made again
        constraints, values = read(scripts, leaves, size, coupling_options)
    settled: set[tuple[str, int]] = set()
    while constraints.composed:  # what is composed in one reading may ask for more in the next
        settled |= {constraints.leaf_starts[start][:2] for start in constraints.composed}
        leaves = composed(leaves, constraints)
        size = (
            constraints.size
        )  # labels that were new in this reading may be among them: the next one numbers its own after them
        last = len(settled) > MOST_COMPOSED
        constraints, values = read(scripts, leaves, size, coupling_options, settled=frozenset(settled), compose=not last)
    for name, reason in coupling_options.frozen.items():
        for f in leaves.get(name, NONE):
            constraints.frozen.append(Event(f.labels, -1, reason))
    for which, (capture, labels) in enumerate(zip(captures, values, strict=True)):
        for path, reason in (frozen_modules or {}).items():
            shut(capture, which, labels, path, reason, constraints)
    regions = [gather_regions(c, v) for c, v in zip(captures, values, strict=True)]
    inside = {number(c, i, node) for i, (c, r) in enumerate(zip(captures, regions, strict=True)) for node in r}
    constraints.product = [e for e in constraints.product if e.node not in inside]
    constraints.equal = [e for e in constraints.equal if e.node not in inside]
    return close(list(captures), leaves, values, constraints, regions)


def shut(
    capture: CapturedProgram, which: int, labels: Mapping[int, Labels], path: str, why: str, constraints: Constraints
) -> None:
    """Freeze what a module holds, reads and returns."""
    nodes = [n for n in capture.graph.nodes if n.op == "call_module" and str(n.target) == path]
    for node in nodes:
        for ref in collect([capture.results[n] for n in (*node.all_input_nodes, node)], TensorRef):
            constraints.frozen += [Event(f.labels, number(capture, which, node), why) for f in labels.get(ref.id, NONE)]
    for i, value in enumerate(capture.op_trace.values):
        if nodes and value.name is not None and f"{capture.prefix}{value.name}".startswith(f"{path}."):
            constraints.frozen += [Event(f.labels, number(capture, which, nodes[0]), why) for f in labels.get(i, NONE)]


def has_heads(capture: CapturedProgram) -> bool:
    """Whether the trace holds a product with batch dimensions at all."""
    return any(find(op.func).heads for op in capture.op_trace.ops)
