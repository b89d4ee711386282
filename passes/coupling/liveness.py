"""What of a captured program runs for the sake of its results, with some residual branches left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import fx

from fxprune.passes.ir.op_trace import OpCall, signature, writes
from fxprune.passes.ir.program import CapturedProgram, select_by_mode
from fxprune.passes.ir.pytree import TensorRef, collect

Cuts = Mapping[fx.Node, fx.Node]  # additions, and the operand that stands for each


class Liveness:
    """The nodes of one mode of a captured program that its results, and what it writes, depend on.

    Arguments:
        capture: the program.
        mode: whether of training.

    Attributes:
        nodes: those of the mode, in order.
        ops: the dispatcher calls of each node.
        names: the model's tensors that each node reads.
    """

    def __init__(self, capture: CapturedProgram, mode: bool) -> None:
        self.capture, self.mode, self.index = capture, mode, capture.index
        self.nodes = [n for n in capture.graph.nodes if capture.only.get(n, mode) == mode]
        members = set(self.nodes)
        self.ops: dict[fx.Node, list[OpCall]] = defaultdict(list)
        for op in capture.op_trace.ops:
            node = capture.nodes.get(op.node)
            if node is not None and node in members:
                self.ops[node].append(op)
        self.memory = memory_of(capture)
        values = capture.op_trace.values
        outer = {self.memory.get(i, i) for i, v in enumerate(values) if v.name is not None}
        outer |= {self.memory.get(r.id, r.id) for r in capture.inputs}
        self.names: dict[fx.Node, set[str]] = {}
        self.touched: dict[fx.Node, set[int]] = {}
        self.writers: dict[int, list[fx.Node]] = defaultdict(list)
        self.roots: list[fx.Node] = []
        for node in self.nodes:
            refs = collect(capture.results.get(node), TensorRef) + [r for op in self.ops[node] for r in op.inputs]
            self.names[node] = {name for r in refs if (name := values[r.id].name) is not None}
            self.touched[node] = {self.memory.get(r.id, r.id) for r in refs}
            written = {self.memory.get(r.id, r.id) for op in self.ops[node] for r in writes(op)}
            for place in written:
                self.writers[place].append(node)
            # a layer's own statistics are of no interest without its result; other tensors may be looked at from outside
            if node.op in ("placeholder", "output") or (written & outer and node.op != "call_module"):
                self.roots.append(node)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node reads in this mode."""
        if node.target is select_by_mode:
            chosen = node.args[self.mode]
            return [chosen] if isinstance(chosen, fx.Node) else []
        return node.all_input_nodes

    def live(self, cuts: Cuts) -> set[fx.Node]:
        """The nodes that are wanted where each of some additions is one of its operands."""
        ends: dict[int, list[int]] = defaultdict(list)  # where an addition that is gone wrote into the branch's memory
        for add in cuts:
            for op in self.ops.get(add, ()):
                for ref in writes(op):
                    if self.shares(add, cuts[add]):
                        continue
                    ends[self.memory.get(ref.id, ref.id)].append(self.index[add])
        era = lambda place, node: sum(self.index[node] > end for end in ends.get(place, ()))  # noqa: E731
        found: set[fx.Node] = set()
        pending = list(self.roots)
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            if node in cuts:
                pending.append(cuts[node])
                continue
            pending += self.inputs(node)
            for place in self.touched[node]:
                pending += [w for w in self.writers.get(place, ()) if w not in cuts and era(place, w) == era(place, node)]
        return found

    def tensors(self, nodes: Iterable[fx.Node]) -> set[str]:
        """The names of the model's tensors that some nodes read."""
        return {name for node in nodes for name in self.names[node]}

    def ancestors(self) -> dict[fx.Node, int]:
        """For each node, as bits by position in `nodes`, itself and what its elements are computed from.

        What reads a size or a device of a tensor, and nothing else of it, is not computed from it.
        """
        found: dict[fx.Node, int] = {}
        results = self.capture.results
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            for n in self.inputs(node):
                if n not in results or collect(results[n], TensorRef):
                    bits |= found.get(n, 0)
            found[node] = bits
        return found

    def shares(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether what a node writes to is the memory of another one's result."""
        held = {self.memory.get(r.id, r.id) for r in collect(self.capture.results.get(other), TensorRef)}
        return any(self.memory.get(r.id, r.id) in held for op in self.ops.get(node, ()) for r in writes(op))

    def writes_after(self, add: fx.Node) -> bool:
        """Whether the memory of a node's result is written to later."""
        refs = collect(self.capture.results[add], TensorRef)
        return any(self.index[w] > self.index[add] for r in refs for w in self.writers.get(self.memory.get(r.id, r.id), ()))


def memory_of(capture: CapturedProgram) -> dict[int, int]:
    """For each value of a program that shares memory with others, the smallest of those, by number."""
    found: dict[int, int] = {}

    def root(i: int) -> int:
        while (j := found.get(i, i)) != i:
            i = j
        return i

    for op in capture.op_trace.ops:
        schema = getattr(op.func, "_schema", None)
        if schema is None or not any(r.alias_info is not None for r in schema.returns):
            continue
        names = signature(op.func)[0]
        given = {**dict(zip(names, op.args, strict=False)), **op.kwargs}
        shared = [given.get(a.name) for a in schema.arguments if a.alias_info is not None]
        roots = {root(ref.id) for ref in [*collect(shared, TensorRef), *op.outputs]}
        for r in roots:
            found[r] = min(roots)
    return {i: root(i) for i in found}
