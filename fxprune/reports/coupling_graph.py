"""The coupling as a graph: what each tie joins, before any of them is solved.

A node is a part: the indices of one dimension of one tensor that belong to one family. An edge says that a
rule tied an index of one part to an index of the other, directly or through values that are no tensor of the
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.passes.coupling.families import Family, family_of_labels, place_of
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.constraints import SPAN, Tie
from fxprune.passes.ops.rewriting import function_name

if TYPE_CHECKING:
    import networkx as nx

Node = tuple[str, int, int]


@dataclass(frozen=True)
class Link:
    """Two dimensions of layers that are pruned together, and what ties them.

    Attributes:
        a, b: as `layer:dim`, or `tensor:dim` for what is none of a layer's usual tensors.
        family: the position of their family.
        op: the class of the layer, or the name of the function, that ties them; `shared` where they do from the start.
        module: the path of the module that calls it.
    """

    a: str
    b: str
    family: int
    op: str
    module: str


def coupling_graph(solution: Solution, found: Sequence[Family]) -> nx.Graph:
    """A graph whose connected components are the families.

    Nodes are (tensor, dimension, position of the family), with the attributes `tensor`, `dim`, `family` (its
    name), `frozen` (the reason or None) and `indices` (how many of the dimension, in its longest row).
    """
    import networkx as nx  # here, as it takes long to import

    nodes, counts, labels, parts = parts_of(solution, found)
    result = nx.Graph()
    for (tensor, dim, family), count in zip(nodes, counts):
        kept = found[family]
        result.add_node((tensor, dim, family), tensor=tensor, dim=dim, family=kept.name, frozen=kept.frozen, indices=count)
    for a, b, node in joined(solution.ties, len(solution.unit_of), labels, parts).tolist():
        op, module = cause_of(solution, node)
        result.add_edge(nodes[a], nodes[b], op=op, module=module)
    return result


def links_of(solution: Solution, found: Sequence[Family], order: Sequence[str]) -> tuple[Link, ...]:
    """What ties the layers of each family; `order` are the families' names in the order in which they are numbered."""
    position = {name: i for i, name in enumerate(order)}
    graph = coupling_graph(solution, found)
    links: dict[tuple[str, str, int], Link] = {}
    for (one, dim, family), (other, other_dim, _), data in graph.edges(data=True):
        a, b = f"{place_of(one)}:{dim}", f"{place_of(other)}:{other_dim}"
        number = position[found[family].name]
        known = links.get((a, b, number)) or links.get((b, a, number))
        if a != b and (known is None or known.op == "shared"):  # an op tells more than labels that are equal from the start
            links[(known.a, known.b, number) if known else (a, b, number)] = Link(a, b, number, data["op"], data["module"])
    return tuple(links.values())


def cause_of(solution: Solution, node: int) -> tuple[str, str]:
    """What a tie comes from: the class of a layer or the name of a function, and the path of the module that calls it.

    Arguments:
        solution: the coupling.
        node: the number of the node among those of all captures; -1 where two parts share labels from the start.
    """
    capture = solution.captures[max(node, 0) // SPAN]
    found = capture.node_at(node % SPAN) if node >= 0 else None
    if found is None:
        return "shared", ""
    if found.op == "call_module":
        return type(capture.modules[str(found.target)]).__name__, str(found.target).removeprefix(capture.prefix)
    return function_name(found) or found.op, f"{found.meta.get('module') or ''}.".removeprefix(capture.prefix).removesuffix(".")


def parts_of(solution: Solution, found: Sequence[Family]) -> tuple[list[Node], list[int], np.ndarray, np.ndarray]:
    """Every part with its number of indices, and as two arrays which label lies in which part."""
    member = family_of_labels(solution, found)
    nodes: dict[Node, int] = {}
    counts: list[int] = []
    labels, parts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for name, factors in solution.leaves.items():
        for f in factors:
            rows = f.rows().numpy()
            families = member[rows]
            for family in np.unique(families[families >= 0]).tolist():
                inside = families == family
                part = nodes.setdefault((name, f.major_to_minor[-1], family), len(nodes))
                if part == len(counts):
                    counts.append(0)
                counts[part] = max(counts[part], int(inside.sum(-1).max()))
                mine = np.unique(rows[inside])
                labels.append(mine)
                parts.append(np.full(len(mine), part))
    return list(nodes), counts, np.concatenate(labels), np.concatenate(parts)


def joined(pairs: Sequence[Tie], size: int, labels: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Which parts the ties join, each pair once, and the node of the first tie that does; shape (edges, 3).

    Arguments:
        pairs: the ties.
        size: number of labels.
        labels, parts: which label lies in which part.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    home = np.full(size, -1, np.int64)
    home[labels] = parts
    left, right, node = ends(pairs)
    # labels of padding, of expanded copies and of constants lie in no part, but tie others together
    free = (home[left] < 0) & (home[right] < 0)
    loose = coo_matrix((np.ones(int(free.sum()), np.int8), (left[free], right[free])), shape=(size, size))
    hub = connected_components(loose, directed=False)[1].astype(np.int64)
    both = (home[left] >= 0) & (home[right] >= 0)
    to_left, to_right = (home[left] < 0) & ~free, (home[right] < 0) & ~free
    hubs = np.concatenate([hub[labels], hub[left[to_left]], hub[right[to_right]]])
    spokes = np.concatenate([parts, home[right[to_left]], home[left[to_right]]])
    by = np.concatenate([np.full(len(parts), -1), node[to_left], node[to_right]])
    edges = np.concatenate([np.stack([home[left[both]], home[right[both]], node[both]], 1), stars(hubs, spokes, by)])
    edges = edges[edges[:, 0] != edges[:, 1]]
    edges = np.concatenate([np.sort(edges[:, :2], 1), edges[:, 2:]], 1)
    edges = edges[np.lexsort((np.where(edges[:, 2] < 0, np.iinfo(np.int64).max, edges[:, 2]), edges[:, 1], edges[:, 0]))]
    return edges[np.r_[True, (edges[1:, :2] != edges[:-1, :2]).any(1)]] if len(edges) else edges


def ends(pairs: Sequence[Tie]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both ends of every tie between two labels, and its node. A tie with label 0 freezes: it joins nothing."""
    found = [np.zeros((3, 0), np.int64)]
    for pair in pairs:
        a, b = pair.sides()
        some = (a != b) & (a != 0) & (b != 0)
        found.append(np.stack([a[some], b[some], np.full(int(some.sum()), pair.node)]))
    left, right, node = np.concatenate(found, 1)
    return left, right, node


def stars(hubs: np.ndarray, spokes: np.ndarray, by: np.ndarray) -> np.ndarray:
    """For everything that meets at one hub, edges from its first spoke to the others, with the nodes that tie those to the hub;
    shape (edges, 3)."""
    order = np.lexsort((by, spokes, hubs))
    met = np.stack([hubs, spokes, by], 1)[order]
    if not len(met):
        return met
    met = met[np.r_[True, (met[1:, :2] != met[:-1, :2]).any(1)]]
    first = np.r_[True, met[1:, 0] != met[:-1, 0]]
    start = np.flatnonzero(first)[np.cumsum(first) - 1]
    node = np.where(met[:, 2] < 0, met[start, 2], met[:, 2])  # a label that is the hub itself is tied by nothing
    return np.stack([met[start, 1], met[:, 1], node], 1)


def to_dot(graph: nx.Graph, name: str) -> str:
    """The graph in the language of Graphviz; parts of families that are kept whole are dashed.

    >>> import networkx as nx
    >>> print(to_dot(nx.Graph([("a", "b")]), "tiny"), end="")
    graph "tiny" {
      node [shape=box];
      n0 [label="a"];
      n1 [label="b"];
      n0 -- n1;
    }
    """
    numbers = {node: f"n{i}" for i, node in enumerate(graph)}
    lines = [f"graph {quoted(name)} {{", "  node [shape=box];"]
    for node, data in graph.nodes(data=True):
        label, style = quoted(describe_node(node, data)), ", style=dashed" if data.get("frozen") else ""
        lines.append(f"  {numbers[node]} [label={label}{style}];")
    lines += [f"  {numbers[a]} -- {numbers[b]};" for a, b in graph.edges]
    return "\n".join([*lines, "}", ""])


def describe_node(node: Any, data: dict[str, Any]) -> str:
    return f"{data['tensor']}:{data['dim']}\n{data['indices']} indices" if data else str(node)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
