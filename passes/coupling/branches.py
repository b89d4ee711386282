"""Residual branches: what is computed from a stream and added to it can be left out, as a unit like any other.

Where the branch of `y = x + f(x)` is removed, `x` stands for the sum, and whatever ran for the sake of `f(x)` alone goes. The
rest of the program computes what the original does where `f(x)` is multiplied by zero. What others read of a branch (a table of
positions that later layers use, keys that a cache returns) stays, with what it is computed from.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import fx

from fxprune.passes.coupling.liveness import Cuts, Liveness
from fxprune.passes.ir.branches import Branch, Removed
from fxprune.passes.ir.module_tree import with_outer
from fxprune.passes.ir.op_trace import OpCall, name_of
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef, collect

ADDITIONS = ("aten::add", "aten::add_")
CARRY = ("aten::_to_copy", "aten::clone", "aten::detach", "aten::alias", "aten::mul")


class Branches:
    """The residual branches of a model.

    Arguments:
        captures: its captured programs.
        parameters: the names of what is learned.

    Attributes:
        found: the branches, in the order in which they run.
        ever: the nodes that are wanted with all branches.
    """

    def __init__(self, captures: Sequence[CapturedProgram], parameters: Collection[str]) -> None:
        self.captures, self.parameters = captures, parameters
        self.views = [Liveness(c, mode) for i, c in enumerate(captures) for mode in ((False, True) if c.only else (bool(i),))]
        self.whole = [view.live({}) for view in self.views]
        self.read = [view.tensors(live) for view, live in zip(self.views, self.whole, strict=True)]
        self.ever = set[fx.Node]().union(*self.whole)
        self.sums: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # of two branches: where it is added, and to what

    @functools.cached_property
    def found(self) -> list[Branch]:
        by_view = [self.candidates(i) for i in range(len(self.views))]
        every = list(dict.fromkeys(tensors for found in by_view for tensors in found))
        alike = {t for t in every if all(t in found or not t & read for found, read in zip(by_view, self.read, strict=True))}
        cuts: dict[frozenset[str], dict[fx.Node, fx.Node]] = {}
        for tensors in every:
            own, merged = tensors, dict[fx.Node, fx.Node]()
            for found, read in zip(by_view, self.read, strict=True):
                near = tensors if tensors in found else None
                if near is None and tensors & read:  # what a cache returns of it runs on in one mode alone
                    near = next((t for t in found.keys() - alike if t < tensors or t > tensors), None)
                    if near is None:
                        break
                if near is not None:
                    own, merged = own & near, merged | found[near]
            else:
                cuts.setdefault(own, merged)
        removed = {tensors: self.remove([Branch("", tensors, cut, tensors)]) for tensors, cut in cuts.items()}
        return [Branch(self.name(tensors, gone), gone.tensors, cuts[tensors], tensors) for tensors, gone in removed.items()]

    def join(self, name: str, parts: Sequence[Branch]) -> Branch:
        """Several branches as one."""
        cuts = {add: stream for part in parts for add, stream in part.cuts.items()}
        parameters = frozenset[str]().union(*(part.parameters for part in parts))
        return Branch(name, self.remove(parts).tensors, cuts, parameters, tuple(parts))

    def candidates(self, which: int) -> dict[frozenset[str], dict[fx.Node, fx.Node]]:
        """The additions of one mode of a program with the stream of each, by the parameters that run for the other operand."""
        view, whole, read = self.views[which], self.whole[which], self.read[which]
        before = view.ancestors()
        found: dict[frozenset[str], dict[fx.Node, fx.Node]] = {}
        sums = {node: op for node in view.nodes if node in whole and (op := addition(view, node)) is not None}
        place = {node: 1 << i for i, node in enumerate(view.nodes)}
        stands = lambda stream: functools.reduce(int.__or__, (place[n] for n in carried(view, stream)))  # noqa: E731

        def exclusive(add: fx.Node, stream: fx.Node) -> frozenset[str]:
            left = view.tensors(view.live({add: stream}))
            return frozenset(name for name in read - left if name in self.parameters)

        def note(add: fx.Node, stream: fx.Node, branch: fx.Node) -> None:
            tensors = exclusive(add, stream)
            if not tensors:
                return
            if branch in sums:  # a sum of several: each of them is a branch
                parts = list(operands(view, branch, sums[branch]))
                each = [(other, mine) for other, mine in parts if before[mine] & stands(stream) and exclusive(branch, other)]
                if len(each) == 2 and all(before[stream] & place[mine] == 0 for _, mine in parts):
                    independent = not any(before[a] & place[b] for a, b in parts)
                    if independent:
                        self.sums[branch] = add, stream
                        for other, mine in each:
                            note(branch, other, mine)
                        return
            found.setdefault(tensors, {add: stream})

        for add, op in sums.items():
            for stream, branch in operands(view, add, op):
                if before[branch] & stands(stream):
                    note(add, stream, branch)
        return found

    def remove(self, branches: Iterable[Branch]) -> Removed:
        """What goes with some of the branches."""
        branches = tuple(branches)
        cuts = self.together(branches)
        if not cuts:
            return Removed()
        live = [view.live(cuts) for view in self.views]
        wanted, dead = set[fx.Node]().union(*live), set[fx.Node]()
        gone = set[str]().union(*self.read) - {
            name for v, nodes in zip(self.views, live, strict=True) for name in v.tensors(nodes)
        }
        for view in self.views:
            for node in view.nodes:
                idle = node in self.ever or not gone.isdisjoint(view.names[node]) or any(n in dead for n in view.inputs(node))
                if idle and node not in wanted:
                    dead.add(node)
        streams = {
            add: (stream, any(v.writes_after(add) and not v.shares(add, stream) for v in self.views if add in v.ops))
            for add, stream in cuts.items()
            if add not in dead
        }
        left = {name for view in self.views for name in view.tensors(n for n in view.nodes if n not in dead)}
        modules = self.modules(dead, streams, left)
        for capture in self.captures[:1]:
            inside = [f"{path}." for path in modules]
            gone |= {n for n in capture.tensor_names if f"{capture.prefix}{n}".startswith(tuple(inside))}
        return Removed(branches, frozenset(gone), modules, frozenset(dead), streams)

    def together(self, branches: Iterable[Branch]) -> Cuts:
        """The additions of several branches; a sum of which both operands go is an operand that goes itself."""
        cuts: dict[fx.Node, fx.Node] = {}
        pending = [item for branch in branches for item in branch.cuts.items()]
        for add, stream in pending:
            if cuts.setdefault(add, stream) is not stream and self.found and add in self.sums:  # (which finding them fills)
                pending.append(self.sums[add])  # (appended to while it is read)
        return cuts

    def modules(self, dead: Collection[fx.Node], streams: Collection[fx.Node], left: Collection[str]) -> tuple[str, ...]:
        """The outermost modules of which everything that ran is dead, and no tensor is left."""
        busy, idle = set[str](), set[str]()
        for capture in self.captures:
            nodes = list(capture.graph.nodes)  # (the index has nodes that were erased)
            for node in nodes:
                if node.op == "call_module":
                    (idle if node in dead else busy).add(str(node.target))
            tensors = [n for n in nodes if n in dead or n in self.ever if collect(capture.results.get(n), TensorRef)]
            for call in capture.module_calls:
                inner = [n for n in tensors if call.begin <= capture.index[n] < call.end]
                if inner:
                    (idle if all(n in dead for n in inner) else busy).add(call.path)
        held = {f"{c.prefix}{name}" for c in self.captures for name in left}
        stays = {path for start in busy | held for path in with_outer(start)}
        found = {p for path in idle for p in with_outer(path) if p and p not in stays}
        return tuple(sorted(p for p in found if not any(outer in found for outer in with_outer(p.rpartition(".")[0]) if outer)))

    def name(self, parameters: frozenset[str], gone: Removed) -> str:
        """Of a branch, by its parameters and what goes with it."""
        place = os.path.commonpath(["/" + name.rpartition(".")[0].replace(".", "/") for name in parameters])
        place = place.strip("/").replace("/", ".")
        others = {n for n in self.parameters if n.startswith(f"{place}." if place else "")} - parameters
        if not others:
            return place
        sizes = Counter[str]()
        shapes = {v.name: v.shape for c in self.captures for v in c.op_trace.values if v.name is not None}
        for path in gone.modules:
            for name in parameters:
                if f"{self.captures[0].prefix}{name}".startswith(f"{path}."):
                    sizes[path] += math.prod(shapes[name])
        return max(sorted(sizes), key=sizes.__getitem__) if sizes else min(parameters)


def addition(view: Liveness, node: fx.Node) -> OpCall | None:
    """The addition of two tensors that a node is; None where it is anything else."""
    ops = view.ops.get(node, [])
    if len(ops) != 1 or name_of(ops[0].func) not in ADDITIONS or len(view.inputs(node)) != 2:
        return None
    return ops[0] if len(ops[0].inputs) == 2 and type(ops[0].outs) is TensorRef else None


def carried(view: Liveness, node: fx.Node) -> Iterator[fx.Node]:
    """A node, and those that it is a copy of: in another precision, say, or times what is learned."""
    results, values = view.capture.results, view.capture.op_trace.values
    while True:
        yield node
        inputs = [n for n in view.inputs(node) if any(values[ref.id].from_input for ref in collect(results.get(n), TensorRef))]
        if len(inputs) != 1 or any(name_of(op.func) not in CARRY for op in view.ops.get(node, [])):
            return
        mine, other = results.get(node), results.get(inputs[0])
        if type(mine) is not TensorRef or type(other) is not TensorRef or values[mine.id].shape != values[other.id].shape:
            return
        (node,) = inputs


def operands(view: Liveness, add: fx.Node, op: OpCall) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Both operands of an addition as (stream, branch), where the stream has the form of the result."""
    results, values = view.capture.results, view.capture.op_trace.values
    a, b = add.all_input_nodes
    out = values[op.outs.id]
    for stream, branch in ((a, b), (b, a)):
        ref, other = results.get(stream), results.get(branch)
        if type(ref) is TensorRef and type(other) is TensorRef and ref is not other:
            have = values[ref.id]
            if (have.shape, have.dtype) == (out.shape, out.dtype):
                yield stream, branch
