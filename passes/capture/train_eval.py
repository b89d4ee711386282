"""Evaluation and training in one capture.

A module that asks which mode it is in (`self.training`) may do different things in the two. Its forward is then captured
once more, in training mode, right after the first time: two branches of one graph. What follows continues from `switch`
nodes that stand for either branch's result. Where that cannot be done, the whole model is captured a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from fxprune.passes.capture.layer_cache import likeness
from fxprune.passes.capture.proxy import Items, ValueProxy
from fxprune.passes.capture.training_flag import plainly, settled
from fxprune.passes.errors import ReadsMissing
from fxprune.passes.ir.module_tree import walk
from fxprune.passes.ir.program import select_by_mode
from fxprune.passes.ir.pytree import ATOMS, like_dict
from fxprune.passes.ir.tensor_ref import TensorRef

if TYPE_CHECKING:
    from fxprune.passes.capture.tracer import ValueTracer


COMPARED = ATOMS | {complex, torch.Size, torch.layout, torch.memory_format}


@dataclass(slots=True)
class Branch:
    """Numbers of the nodes of the two branches: evaluation from `begin`, training from `middle`, up to `end`.

    `alike`: whether they do the same but for flags and fractions, and for what is done to single numbers.
    """

    begin: int
    middle: int
    end: int
    alike: bool


def in_both_modes(tracer: ValueTracer, module: nn.Module, forward: Any, arguments: Any, out: Any, begin: int) -> Any:
    """The result of a forward that asked for its mode, good for both modes.

    Arguments:
        tracer: which has just captured the forward in evaluation mode.
        module: whose forward it was.
        arguments: what to call it with once more.
        out: its result.
        begin: the number of its first node.
    """
    if tracer.branches is None:
        return out
    trains = tracer.trained
    if tracer.reads_training or module.training or trains is None:
        tracer.reads_training = True
        return out
    inner = list(walk(module))
    if not any(trains.get(m, True) for m in inner):  # all of it is kept in evaluation
        return out
    if asked_around(tracer):
        return out
    key = likeness(module, *arguments)
    if key is not None and key in tracer.same:
        return out
    middle, branches = len(tracer.index), len(tracer.branches)
    modes = {m: vars(m)["training"] for m in inner}
    ops = len(tracer.recorder.op_trace.ops)
    outer, retry = tracer.branches, tracer.retry
    tracer.branches, tracer.retry = None, False
    try:
        for m in inner:
            vars(m)["training"] = trains.get(m, True)
        tracer.forget_reads(begin)  # those are the other branch's
        trained = forward(*arguments[0], **arguments[1])
    except Exception as error:  # what training needs (targets, say) is not there
        trained = None
        tracer.trains_on_values |= isinstance(error, ReadsMissing)
    finally:
        tracer.branches, tracer.retry = outer, retry
        for m, mode in modes.items():
            vars(m)["training"] = mode
    found = joined(tracer, begin, middle, ops, out, trained)
    if key is not None and found is out and not tracer.reads_training and len(tracer.branches) == branches:
        tracer.same.add(key)
    return found


def asked_around(tracer: ValueTracer) -> bool:
    """Whether a module around the present one has asked for its mode: then all in it is captured once more."""
    return any(reading.asked for reading in tracer.readings[:-1])


def by_flag(tracer: ValueTracer, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call that is given a flag (see `flag.py`), good for both modes."""
    if tracer.branches is None or tracer.reads_training or tracer.readings[-1].asked or asked_around(tracer):
        plain = tuple(map(plainly, args)), {k: plainly(v) for k, v in kwargs.items()}
        return tracer.create_proxy(kind, target, *plain)
    begin = len(tracer.index)
    out = tracer.create_proxy(kind, target, *settled(False, args, kwargs))
    middle, ops = len(tracer.index), len(tracer.recorder.op_trace.ops)
    try:
        trained = tracer.create_proxy(kind, target, *settled(True, args, kwargs))
    except Exception:
        trained = None
    return joined(tracer, begin, middle, ops, out, trained)


def joined(tracer: ValueTracer, begin: int, middle: int, ops: int, out: Any, trained: Any) -> Any:
    """What follows a branch goes on with this: `out`, where the two are the same, else a switch.

    Where one cannot stand in for the other the model has to be captured once more. `ops` is the length of the tape before the
    training branch.
    """
    end = len(tracer.index)
    before, after = (leaves(out), leaves(trained))
    same = len(before) == len(after) and all(alike(tracer, a, b) for a, b in zip(before, after, strict=True))
    if not same:
        tracer.reads_training = True
    if not same or code(tracer, begin, middle, out) == code(tracer, middle, end, trained):
        tracer.roll_back(middle, ops)
        return out
    loosely = code(tracer, begin, middle, out, loosely=True) == code(tracer, middle, end, trained, loosely=True)
    made = switched(tracer, out, trained)
    assert tracer.branches is not None
    tracer.branches.append(Branch(begin, middle, end, loosely))
    return made


def leaves(x: Any) -> list[Any]:
    """What a forward returned, flat: proxies and plain values, with the keys and kinds of containers."""
    if type(x) is Items:
        return [type(x.value), *(v for item in x for v in leaves(item))]
    if type(x) in (tuple, list):
        return [type(x), *(v for item in x for v in leaves(item))]
    if isinstance(x, dict):  # also one of a class of its own, which transformers' outputs are
        return [type(x), *(v for k, item in x.items() for v in (k, *leaves(item)))]
    return [x]


def alike(tracer: ValueTracer, a: Any, b: Any) -> bool:
    """Whether one can stand in for the other in what follows."""
    if type(a) is ValueProxy and type(b) is ValueProxy and isinstance(a.value, Tensor) and isinstance(b.value, Tensor):
        if (a.value.shape, a.value.dtype, a.value.device) != (b.value.shape, b.value.dtype, b.value.device):
            return False
        fractions = a.value.is_floating_point() or a.value.is_complex()
        computed = tracer.depends[a.node] or tracer.depends[b.node]
        # things may be looked up by all else: what is known of it would be true of one mode alone
        return a.value.is_meta or (fractions and computed) or torch.equal(a.value, b.value)
    if type(a) is ValueProxy or type(b) is ValueProxy or type(a) is not type(b):
        return a is b
    return a is b or (type(a) in COMPARED and bool(a == b))


def switched(tracer: ValueTracer, a: Any, b: Any) -> Any:
    """`a` with every tensor replaced by a node that stands for either."""
    if type(a) is ValueProxy:
        return a if a.node is b.node else tracer.create_proxy("call_function", select_by_mode, (a, b), {})
    if type(a) is Items:
        items = [switched(tracer, x, y) for x, y in zip(a, b, strict=True)]
        return Items.of(a.node, a.value, items) if isinstance(a.value, tuple) and hasattr(a.value, "_fields") else tuple(items)
    if type(a) in (tuple, list):
        return type(a)([switched(tracer, x, y) for x, y in zip(a, b, strict=True)])
    return like_dict(a, {k: switched(tracer, v, b[k]) for k, v in a.items()}) if isinstance(a, dict) else a


def code(tracer: ValueTracer, first: int, end: int, out: Any, *, loosely: bool = False) -> list[Any]:
    """What the nodes numbered from `first` to `end` do, with names that do not depend on where they stand.

    `loosely`: without flags and fractions, and without what is done to single numbers.
    """
    names: dict[fx.Node, str] = {}

    def name(n: fx.Node) -> Any:
        return str(n.target) if n.op == "get_attr" else names.get(n, n)

    def masked(x: Any) -> Any:
        return name(x) if isinstance(x, fx.Node) else "?" if isinstance(x, bool | float) else x

    lines: list[Any] = []
    mine = []
    node = tracer.graph._root.prev
    while node.op != "root" and tracer.index[node] >= first:
        if tracer.index[node] < end and node.op != "get_attr" and not (loosely and is_number(tracer, node)):
            mine.append(node)
        node = node.prev
    for node in reversed(mine):
        names[node] = f"%{len(lines)}"
        given = (node.args, dict(node.kwargs))
        said = fx.node.map_aggregate(given, masked) if loosely else fx.node.map_arg(given, name)
        lines.append((node.op, node.target, str(said)))
    return [*lines, [name(v.node) if type(v) is ValueProxy else str(v) for v in leaves(out)]]


def is_number(tracer: ValueTracer, node: fx.Node) -> bool:
    """Whether a node makes a tensor without dimensions from such tensors."""
    refs = [tracer.results[n] for n in (node, *node.all_input_nodes)]
    return all(type(r) is TensorRef and not tracer.recorder.op_trace.values[r.id].shape for r in refs)


def membership(graph: fx.Graph, branches: list[Branch], index: dict[fx.Node, int]) -> dict[fx.Node, bool | None] | None:
    """For nodes of a branch the mode they belong to (`Capture.only`); None where a branch leaks into what follows.

    Parameters that a branch reads first are read in either mode.
    """
    only: dict[fx.Node, bool | None] = {}
    if not branches:
        return only
    numbered = {index[node]: node for node in graph.nodes if node.op != "get_attr"}
    for branch in branches:
        for at in range(branch.begin, branch.end):
            node = numbered.get(at)
            if node is not None:
                mode = at >= branch.middle
                only[node] = mode if only.get(node, mode) == mode else None
    for node in graph.nodes:
        for mode in (False, True):
            if only.get(node, mode) == mode:
                needed = [node.args[mode]] if node.target is select_by_mode else node.all_input_nodes
                if any(only.get(n, mode) != mode for n in needed):
                    return None
    return only


def in_mode(graph: fx.Graph, only: Mapping[fx.Node, bool | None], mode: bool) -> fx.Graph:
    """Turn a graph with branches into the program of one mode."""
    for node in list(graph.nodes):
        if node.target is select_by_mode:
            node.replace_all_uses_with(node.args[mode])
    for node in reversed(list(graph.nodes)):
        if node.target is select_by_mode or only.get(node, mode) != mode:
            graph.erase_node(node)
    return graph
