"""The coupling as a graph: what each tie joins, before any of them is solved.

A node is a part: the indices of one dimension of one tensor that belong to one family. An edge says that a
rule tied an index of one part to an index of the other, directly or through values that are no tensor of the
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.constraints import Tie
from fxprune.selection.costs import family_of_labels

Node = tuple[str, int, int]


def coupling_graph(solution: Solution, found: Sequence[Family]) -> nx.Graph:
    """A graph whose connected components are the families.

    Nodes are (tensor, dimension, position of the family), with the attributes `tensor`, `dim`, `family` (its
    name), `frozen` (the reason or None) and `indices` (how many of the dimension, in its longest row).
    """
    nodes, counts, labels, parts = parts_of(solution, found)
    result = nx.Graph()
    for (tensor, dim, family), count in zip(nodes, counts):
        kept = found[family]
        result.add_node((tensor, dim, family), tensor=tensor, dim=dim, family=kept.name, frozen=kept.frozen, indices=count)
    edges = joined(solution.ties, len(solution.unit_of), labels, parts)
    result.add_edges_from((nodes[a], nodes[b]) for a, b in edges.tolist())
    return result


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
    """Which parts the ties join, each once; shape (edges, 2).

    Arguments:
        pairs: the ties.
        size: number of labels.
        labels, parts: which label lies in which part.
    """
    home = np.full(size, -1, np.int64)
    home[labels] = parts
    left, right = ends(pairs)
    # labels of padding, of expanded copies and of constants lie in no part, but tie others together
    free = (home[left] < 0) & (home[right] < 0)
    loose = coo_matrix((np.ones(int(free.sum()), np.int8), (left[free], right[free])), shape=(size, size))
    hub = connected_components(loose, directed=False)[1].astype(np.int64)
    both = (home[left] >= 0) & (home[right] >= 0)
    to_left, to_right = (home[left] < 0) & ~free, (home[right] < 0) & ~free
    hubs = np.concatenate([hub[labels], hub[left[to_left]], hub[right[to_right]]])
    spokes = np.concatenate([parts, home[right[to_left]], home[left[to_right]]])
    edges = np.concatenate([np.stack([home[left[both]], home[right[both]]], 1), stars(hubs, spokes)])
    return np.unique(np.sort(edges[edges[:, 0] != edges[:, 1]], 1), axis=0)


def ends(pairs: Sequence[Tie]) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of every tie between two labels. A tie with label 0 freezes: it joins nothing."""
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for pair in pairs:
        a, b = pair.sides()
        constraints = (a != b) & (a != 0) & (b != 0)
        left.append(a[constraints])
        right.append(b[constraints])
    return np.concatenate(left), np.concatenate(right)


def stars(hubs: np.ndarray, spokes: np.ndarray) -> np.ndarray:
    """For everything that meets at one hub, edges from its first spoke to the others; shape (edges, 2)."""
    met = np.unique(np.stack([hubs, spokes], 1), axis=0)
    first = np.r_[True, met[1:, 0] != met[:-1, 0]] if len(met) else np.zeros(0, bool)
    centre = met[np.flatnonzero(first)[np.cumsum(first) - 1], 1] if len(met) else met[:, 1]
    return np.stack([centre, met[:, 1]], 1)


def to_dot(graph: nx.Graph, name: str) -> str:
    """The graph in the language of Graphviz; parts of families that are kept whole are dashed.

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
