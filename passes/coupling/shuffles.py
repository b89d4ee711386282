"""Regions: chains of reshapes that only permute channels (a channel shuffle) and can be one gather instead.

Between the ends of such a chain a tensor is a rectangle of groups, which would force every group to keep equally many
channels, the same ones if the chain also transposes them. As one `index_select` the chain needs neither: each channel is
removed by itself.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.op_trace import writes
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.index_maps import order_along
from fxprune.passes.ops.registry import find_node


def gather_regions(capture: CapturedProgram, labels: dict[int, Labels]) -> dict[fx.Node, fx.Node]:
    """For each node inside a region, the node that ends it."""
    found: dict[fx.Node, fx.Node] = {}
    written = {op.node for op in capture.op_trace.ops if writes(op)}
    for node in capture.graph.nodes:
        if node in found or not is_step(capture, node):
            continue
        chain = follow(capture, node, written)
        for length in range(len(chain), 1, -1):
            if permutes_channels(capture, labels, chain[:length]):
                found.update(dict.fromkeys(chain[:length], chain[length - 1]))
                break
    return found


def is_step(capture: CapturedProgram, node: fx.Node) -> bool:
    """Whether a node only moves the elements of its first argument, the only tensor it is given."""
    if node.op == "call_module" or not find_node(node).moves:
        return False
    tensors = [n for n in node.all_input_nodes if isinstance(capture.results.get(n), TensorRef)]
    return len(tensors) == 1 and node.args[:1] == (tensors[0],)


def follow(capture: CapturedProgram, node: fx.Node, written: set[int]) -> list[fx.Node]:
    """The chain of single-use steps that starts at a node; nothing else may ask for what is in between, not even its size.

    It is done at its end, so that nothing may be written before that: `written` has the numbers of the nodes that write.
    """
    chain = [node]
    while True:
        users = list(chain[-1].users)
        if len(users) != 1 or not is_step(capture, users[0]) or users[0].args[0] is not chain[-1]:
            return chain
        if not written.isdisjoint(range(capture.index[node], capture.index[users[0]])):
            return chain
        chain.append(users[0])


def permutes_channels(capture: CapturedProgram, labels: dict[int, Labels], chain: list[fx.Node]) -> bool:
    """Whether the chain splits a labelled dimension and ends in the same shape with only that dimension permuted."""
    source = capture.results.get(chain[0].args[0]) if isinstance(chain[0].args[0], fx.Node) else None
    target = capture.results.get(chain[-1])
    if not isinstance(source, TensorRef) or not isinstance(target, TensorRef):
        return False
    shape = capture.op_trace.shape(source)
    if capture.op_trace.shape(target) != shape:
        return False
    middle = [capture.results[n] for n in chain[:-1]]
    if not all(isinstance(ref, TensorRef) for ref in middle):
        return False
    joint = any(len(f.major_to_minor) > 1 for ref in middle for f in labels.get(ref.id, ()))
    dims = {d for f in labels.get(source.id, ()) for d in f.dims}
    if not joint or len(dims) != 1 or any(len(f.major_to_minor) > 1 for f in labels.get(source.id, ())):
        return False
    return channel_order(capture, chain, dims.pop()) is not None


def channel_order(capture: CapturedProgram, chain: list[fx.Node], dim: int) -> torch.Tensor | None:
    """The permutation of one dimension that a chain amounts to, found by running it on indices; None if it does more."""
    source = capture.results[chain[0].args[0]]  # type: ignore[index]
    shape = capture.op_trace.shape(source)
    places = torch.arange(math.prod(shape), dtype=torch.double).view(shape)  # `unfold` moves no integers
    values = {chain[0].args[0]: places}
    for node in chain:
        args = fx.node.map_arg(node.args, lambda n: values[n] if n in values else capture.results[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n] if n in values else capture.results[n])
        run = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
        values[node] = run(*args[1:], **kwargs) if node.op == "call_method" else run(*args, **kwargs)  # type: ignore[operator]
    return order_along(places.long(), values[chain[-1]].long(), dim)
