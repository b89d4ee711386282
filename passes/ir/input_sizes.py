"""Which numbers in a program are sizes of its inputs, and not numbers of channels."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ir.program import CapturedProgram, sizes_read
from fxprune.passes.ir.pytree import TensorRef, collect

NAMES = ("narrow", "split", "split_with_sizes", "tensor_split")  # methods and functions that take a part of a dimension
PARTS = frozenset([*NAMES, *(getattr(torch, name) for name in NAMES)])


def tells_channels(labels: Labels, dim: int, owned: int) -> bool:
    """Whether entries along a dimension all differ, and some are labels of the model's own tensors, the first `owned`."""
    for f in labels:
        if dim in f.dims and f.start is not None:
            if f.start < owned:
                return True
        elif dim in f.dims:
            line = f.labels.movedim(dim, -1).reshape(-1, f.labels.shape[dim])[0].numpy()
            if int(line.min()) < owned and (bool((line[1:] > line[:-1]).all()) or len(np.unique(line)) == len(line)):
                return True
    return False


def sizes_given(capture: CapturedProgram, index: int) -> list[tuple[TensorRef, int | None]]:
    """The sizes that the numbers among a node's arguments come from, of tensors that depend on the inputs.

    Each is a tensor and a dimension; None where any of its dimensions may be meant.
    """
    node, results = capture.node_at(index), capture.results
    if node is None:
        return []
    sizes: dict[tuple[TensorRef, int | None], None] = {}
    numbers = [n for n in node.all_input_nodes if not collect(results[n], TensorRef)]
    for ref, dim in (found for number in numbers for found in sizes_read(number, results)):
        if capture.op_trace.values[ref.id].from_input:
            sizes[ref, None if dim is None else dim % max(1, len(capture.op_trace.shape(ref)))] = None
    return list(sizes)


def dims_sliced(capture: CapturedProgram, index: int, labels: dict[int, Labels], owned: int) -> frozenset[int]:
    """The dimensions of a node's first tensor of which it takes as many entries as a size of the inputs says.

    More of them are read for other inputs than the example's.
    """
    node = capture.node_at(index)
    if node is None or node.op == "call_module" or not node.args:
        return frozenset()
    source = collect(capture.results[node.args[0]] if isinstance(node.args[0], fx.Node) else (), TensorRef)
    ndim = len(capture.op_trace.shape(source[0])) if source else 0
    numbers: list[tuple[int, Any]] = []
    if node.target is operator.getitem:
        numbers = [(dim, n) for _, dim, item in slices_of(node.args[1], ndim) for n in (item.start, item.stop)]
    elif node.target in PARTS:
        numbers = [(dim, n) for n in collect((node.args[1:], node.kwargs), fx.Node) for dim in range(ndim)]
    found = [(dim, source) for dim, n in numbers if isinstance(n, fx.Node) for source in sizes_read(n, capture.results)]
    made = capture.op_trace.values
    return frozenset(d for d, size in found if made[size[0].id].from_input and is_input_size(size, labels, owned))


def is_input_size(found: tuple[TensorRef, int | None], labels: dict[int, Labels], owned: int) -> bool:
    """Whether a size is one of the inputs', and no number of channels.

    The first `owned` labels are those of the model's own tensors: they tell a channel.
    """
    ref, dim = found
    return dim is None or not tells_channels(labels.get(ref.id, NONE), dim, owned)


def slices_of(index: Any, ndim: int) -> list[tuple[int, int, slice]]:
    """The slices of an index, each with the dimension of the tensor and that of what has been taken by then.

    Numbers take dimensions away and None adds some; tensors among the items act after the slices.

    Arguments:
        ndim: of the tensor.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    at = next((i for i, item in enumerate(items) if item is ...), None)
    if at is not None:
        named = sum(item is not None and item is not ... for item in items)
        items[at : at + 1] = [slice(None)] * (ndim - named)
    found, source, dim = [], 0, 0
    for item in items:
        if isinstance(item, slice):
            found.append((source, dim, item))
        source += item is not None
        dim += not isinstance(item, int)
    return found
