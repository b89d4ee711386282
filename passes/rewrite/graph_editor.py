"""Edit a captured graph in one walk over its nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

Change = tuple[str, Any, tuple[Any, ...], dict[str, Any]]  # op, target, args, kwargs


class Replacements(dict[fx.Node, fx.Node]):
    """A map of nodes in which a node without an entry stands for itself."""

    def __missing__(self, node: fx.Node) -> fx.Node:
        return node


@dataclass
class GraphEditor:
    """Collects the edits of a graph.

    What is known of a node was recorded for the program as captured, so no node changes while others are still looked at:
    `emit` and `replace` note what is to happen, and `apply` does it. Nodes that are created meanwhile stand at a cursor:
    before the node that is visited, until that node is emitted, and after it from then on.

    Attributes:
        graph: edited in place.
        branches: nodes that belong to one mode alone: True for training, False for evaluation, None for neither.
        new: nodes that are replaced, and what stands for them; other nodes stand for themselves.
        changes: what nodes become that are neither replaced nor left as they are.
        branch: the branch of the node that is visited.
        before, following: the nodes around the one that is visited.
        origin: for nodes that were created, the one that was visited then.
    """

    graph: fx.Graph
    branches: Mapping[fx.Node, bool | None]
    new: dict[fx.Node, fx.Node] = field(default_factory=Replacements)
    changes: dict[fx.Node, Change] = field(default_factory=dict)
    branch: bool | None = None
    origin: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches = dict(self.branches)
        self.before = self.following = self.graph._root

    def visit(self, node: fx.Node) -> None:
        """Begin with a node: what is created stands before it, and belongs to its branch."""
        self.before, self.following, self.branch = node.prev, node.next, self.branches.get(node)
        self.graph.inserting_before(node)

    def leave(self, node: fx.Node) -> None:
        """End with a node that is visited."""
        if node.prev is self.before and node.next is self.following:
            return
        last = self.before
        while last.next is not self.following:
            last = last.next
            if last is not node:
                self.origin[last] = node
                if node in self.branches:
                    self.branches[last] = self.branch  # type: ignore[index]

    def move_past(self) -> None:
        """What is created from now on stands after the node that is visited."""
        self.graph.inserting_before(self.following)

    def emit(self, node: fx.Node, args: Any, kwargs: Any, *, method: str | None = None) -> fx.Node:
        """Give a node other arguments, or turn it into a call of `method`; the cursor moves past it."""
        op, target = ("call_method", method) if method is not None else (node.op, node.target)
        self.changes[node] = (op, target, tuple(args), dict(kwargs))
        self.move_past()
        return node

    def replace(self, node: fx.Node, made: fx.Node) -> None:
        """Let `made` stand for `node`."""
        if made is not node:
            self.new[node] = made

    def touched(self, unused: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """The original nodes that `apply` changes, or that something was created for."""
        yield from unused
        yield from self.origin.values()
        yield from (n for n in self.new if n not in self.changes)
        for node, change in self.changes.items():
            if change != (node.op, node.target, tuple(node.args), dict(node.kwargs)):
                yield node

    def apply(self, nodes: Iterable[fx.Node], unused: set[fx.Node]) -> None:
        """Apply the edits to the original nodes, and erase those that are replaced or `unused`."""
        nodes = list(nodes)
        gone = [n for n in nodes if n in unused or (n in self.new and n not in self.changes)]
        erased = set(gone)
        for node in nodes:
            if node in erased:
                continue
            change = self.changes.get(node)
            if change is not None:
                op, target, args, kwargs = change
                if node.op != op:
                    node.op = op
                if node.target is not target:
                    node.target = target
                node.args = args
                if kwargs or node.kwargs:
                    node.kwargs = kwargs
            elif any(n in self.new for n in node.all_input_nodes):
                node.args = fx.node.map_arg(node.args, self.new.__getitem__)
                node.kwargs = fx.node.map_arg(node.kwargs, self.new.__getitem__)
        for node in reversed(gone):
            self.graph.erase_node(node)
        self.branches = {n: mode for n, mode in self.branches.items() if not n._erased}
