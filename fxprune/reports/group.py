"""What goes with some channels, link by link: each with the op that ties it to what went before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from rich.text import Text
from torch import nn

from fxprune.arguments import checked_class
from fxprune.passes.coupling.families import place_of
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.constraints import SPAN
from fxprune.passes.ops.registry import spec_of
from fxprune.reports.coupling_graph import ends
from fxprune.reports.formatting import Printable, counted, table
from fxprune.selection.argument_checks import check_flag
from fxprune.selection.indices import spelled
from fxprune.selection.options import Verify
from fxprune.selection.places import Place
from fxprune.selection.removal import why_uneven

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fxprune.pipeline import Pruned

AS_ASKED = "as asked"
SPELLED = 4  # runs of indices in a line


@dataclass(frozen=True, slots=True)
class Link:
    """Indices of one dimension of one tensor that go, and why.

    Attributes:
        tensor, dim: the dimension.
        indices: those that go, ascending; in the second dimension of a grouped convolution's weight, input channels.
        source: the tensor and dimension that they go with; None for what was asked for.
        op: the operation that ties the two, and the module it is in; of several in a row, each.
    """

    tensor: str
    dim: int
    indices: tuple[int, ...]
    source: tuple[str, int] | None
    op: str

    def __str__(self) -> str:
        why = self.op if self.source is None else f"with {place_of(self.source[0])}:{self.source[1]}, by {self.op}"
        return f"{place_of(self.tensor)}:{self.dim} [{spelled(self.indices, SPELLED)}] {why}"


@checked_class
@dataclass(frozen=True)
class Group(Printable):
    """All that goes with some channels, as a chain; iterable, printable, and `apply()` removes it.

    Attributes:
        name: what was asked for: a layer, a dimension of a tensor, or a family.
        indices: of it, ascending.
        links: each with the op that causes it, in the order in which one leads to the next.
        frozen: the reason why some of it stays whole, or None.
        rows: what else has to go so that tensors stay full, or None.
    """

    name: str
    indices: tuple[int, ...]
    links: tuple[Link, ...]
    frozen: str | None
    rows: str | None
    _apply: Callable[..., Any] = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[Link]:
        return iter(self.links)

    def __len__(self) -> int:
        return len(self.links)

    @property
    def remove(self) -> dict[str, list[int]]:
        """The same as `prune(..., remove=...)` takes it: indices by `tensor:dim`."""
        found: dict[str, set[int]] = {}
        for link in self.links:
            found.setdefault(f"{link.tensor}:{link.dim}", set()).update(link.indices)
        return {place: sorted(indices) for place, indices in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        found = {name: getattr(self, name) for name in ("name", "indices", "frozen", "rows")}
        return found | {"links": [asdict(link) for link in self.links]}

    @overload
    def apply(self, *, verify: Verify = "auto", same_class: Literal[False] = False) -> Pruned: ...

    @overload
    def apply(self, *, verify: Verify = "auto", same_class: bool) -> nn.Module: ...

    def apply(self, *, verify: Verify = "auto", same_class: bool = False) -> Pruned | nn.Module:
        """The pruned model without these channels and all that goes with them; the original is not touched.

        Arguments: as for `prune`. Raises: PruneError where they cannot go, or not alone.
        """
        check_flag("same_class", same_class)
        made: Pruned | nn.Module = self._apply(self.remove, verify, same_class)
        return made

    def headline(self) -> str:
        places = counted(len(self.remove), "dimension")
        return f"{self.name} [{spelled(self.indices, SPELLED)}]: {len(self.indices):,} asked for, {places} of tensors"

    def tables(self) -> Iterator[RenderableType]:
        """The headline, the links and what keeps them, as rich renders them."""
        yield Text(self.headline())
        yield ""
        rows: dict[tuple[str, ...], None] = {}
        shown: set[tuple[str, tuple[int, ...]]] = set()
        for link in self.links:
            place = f"{place_of(link.tensor)}:{link.dim}"
            source = "" if link.source is None else f"{place_of(link.source[0])}:{link.source[1]}"
            if source != place or (place, link.indices) not in shown:  # a layer's bias goes with its weight
                rows[place, spelled(link.indices, SPELLED), source, link.op] = None
            shown.add((place, link.indices))
        yield table(("goes", "indices", "with", "by"), list(rows), names=("with",))
        if self.frozen is not None:
            yield ""
            yield Text(f"None of it can go: it {self.frozen}")
        if self.rows is not None:
            yield ""
            yield Text(f"Not alone: {self.rows}")


class Chains:
    """Every tie of a coupling between two labels, and where the labels of the model's tensors are."""

    def __init__(self, solution: Solution) -> None:
        self.solution, self.unit = solution, solution.unit_of.numpy()
        self.left, self.right, self.node = ends(solution.ties)
        self.heads = np.full(len(self.unit), -1)  # the attention by whose heads a label stands for several indices
        attention = head_nodes(solution)
        for tie in solution.ties:
            if tie.node in attention:
                a, b = tie.sides()
                self.heads[self.unit[a[a == b]]] = tie.node
        self.heads = self.heads[self.unit]
        self.places: dict[tuple[str, int], int] = {}
        label, place, index = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for name, factors in solution.leaves.items():
            for f in factors:
                number = self.places.setdefault((name, f.major_to_minor[-1]), len(self.places))
                label.append(f.compressed)
                place.append(np.full(len(f.compressed), number))
                index.append(np.arange(len(f.compressed)))
        self.label, self.place, self.index = np.concatenate(label), np.concatenate(place), np.concatenate(index)

    def follow(self, start: np.ndarray, first: int) -> list[Link]:
        """What the labels `start`, of the place with number `first`, lead to."""
        mine = np.isin(self.unit, self.unit[start])
        mine[0] = False
        inside = np.flatnonzero(mine[self.label])
        label, place, index = self.label[inside], self.place[inside], self.index[inside]
        home = np.full(len(self.unit), -1)
        home[label[::-1]] = place[::-1]  # the first place of each label
        home[start] = np.where(np.isin(start, label[place == first]), first, home[start])
        rank, source, route, routes = self.search(start, mine, home)
        shared = home[label] != place
        came = np.where(shared, home[label], source[label])
        by = np.where(shared, -2 - self.heads[label], route[label])
        found: dict[tuple[int, ...], list[int]] = {}
        for at in np.lexsort((index, place, shared, rank[label])).tolist():
            key = (int(place[at]), int(came[at]), int(by[at]))
            found.setdefault(key, []).append(int(index[at]))
        names = list(self.places)
        links = []
        for (where, origin, how), indices in found.items():
            if origin < 0:
                links.append(Link(*names[where], tuple(sorted(set(indices))), None, AS_ASKED))
                continue
            op = self.ops(routes[how]) if how >= 0 else f"heads of {op_at(self.solution, -2 - how)}"
            links.append(Link(*names[where], tuple(sorted(set(indices))), names[origin], op))
        return links

    def search(
        self, start: np.ndarray, mine: np.ndarray, home: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, ...]]]:
        """Breadth first along the ties of some units: for each label the round in which it is met, the place that it is met
        from, and the number of the nodes on the way; and these nodes."""
        edges = np.flatnonzero(mine[self.left])
        left, right, node = self.left[edges], self.right[edges], self.node[edges]
        rank, source, route = (np.full(len(self.unit), -1) for _ in range(3))
        routes: list[tuple[int, ...]] = [()]
        numbers = {(): 0}
        rank[start] = 0
        source[start] = -1
        route[start] = 0
        level = 0
        while True:
            crossing = np.flatnonzero((rank[left] < 0) != (rank[right] < 0))
            if not len(crossing):
                return rank, source, route, routes
            level += 1
            forward = rank[left[crossing]] >= 0
            old = np.where(forward, left[crossing], right[crossing])
            new, which = np.unique(np.where(forward, right[crossing], left[crossing]), return_index=True)
            parent, via = old[which], node[crossing[which]]
            rank[new] = level
            rests = home[parent] >= 0
            source[new] = np.where(rests, home[parent], source[parent])
            before = np.where(rests, 0, route[parent])
            pairs, inverse = np.unique(np.stack([before, via], 1), axis=0, return_inverse=True)
            made = []
            for behind, at in pairs.tolist():
                path = routes[behind]
                path = path if path[-1:] == (at,) else (*path, at)
                if path not in numbers:
                    numbers[path] = len(routes)
                    routes.append(path)
                made.append(numbers[path])
            route[new] = np.array(made)[inverse.reshape(-1)]

    def ops(self, nodes: Sequence[int]) -> str:
        """The operations at some nodes, as a user reads them."""
        return ", ".join(dict.fromkeys(op_at(self.solution, node) for node in nodes))


def head_nodes(solution: Solution) -> set[int]:
    """The nodes of the calls whose rows are heads."""
    every = enumerate(solution.captures)
    return {SPAN * i + op.node for i, capture in every for op in capture.op_trace.ops if spec_of(op).heads}


def op_at(solution: Solution, number: int) -> str:
    """The operation at a node of a captured program, and the module it is in."""
    node = solution.captures[number // SPAN].node_at(number % SPAN) if number >= 0 else None
    if node is None:
        return "the program"
    if node.op == "call_module":
        capture = solution.captures[number // SPAN]
        return f"{type(capture.modules[str(node.target)]).__name__} {node.target}"
    name = "the output" if node.op == "output" else str(getattr(node.target, "__name__", node.target))
    module = node.meta.get("module")
    return f"{name} in {module}" if module else name


def group_of(chains: Chains, place: Place, indices: Sequence[int], apply: Callable[..., Any]) -> Group:
    """All that goes with some indices of a place; `apply` prunes by what `Group.remove` says."""
    solution = chains.solution
    units = np.unique(place.units[:, list(indices)])
    if place.tensor is None:
        holding = np.isin(chains.unit[chains.label], units)
        first = int(chains.place[holding][0])
    else:
        assert place.dim is not None
        first = chains.places[place.tensor, place.dim]
    at = (chains.place == first) & np.isin(chains.unit[chains.label], units)
    if place.tensor is not None:
        at &= np.isin(chains.index, list(indices))
    frozen = units[solution.frozen[units] >= 0]
    removed = np.zeros(len(solution.unit_of), bool)
    removed[units] = True
    uneven = None if len(frozen) else why_uneven(solution, removed)
    return Group(
        place.name,
        tuple(indices),
        tuple(chains.follow(np.unique(chains.label[at]), first)),
        solution.reasons[int(solution.frozen[frozen[0]])] if len(frozen) else None,
        None if uneven is None else f"{uneven.what}; {uneven.fix}",
        apply,
    )
