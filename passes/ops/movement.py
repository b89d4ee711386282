"""Movement along one dimension at a time: the op itself is run on each factor that varies there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.passes.ir.constraints import LabelArray
from fxprune.passes.ir.labels import NONE, Factor, Labels, factor
from fxprune.passes.ir.program import TensorSize
from fxprune.passes.ir.propagation_state import PartRead
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.index_maps import along_dim, moved_call, movement, one_by_one
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.rewriting import RewriteContext, argument, is_shrunk, known, picked, place, run_of, with_argument


def shifted(f: Factor, labels: Tensor, dropped: int) -> Factor:
    """The factor that these labels, which have one dimension less, are."""
    return factor(labels, tuple(d - (d > dropped) for d in f.major_to_minor if d != dropped))


def pack(call: RuleContext) -> list[Labels]:
    """Sequences (T, B, *) or (B, T, *) and their lengths -> the entries of all (N, *), and how many there are of each step."""
    call.freeze(call.labels(call["lengths"]), "says how long sequences are")
    passed = call.freeze_dims(call.labels(call.first), [0, 1], "is packed by the lengths of sequences")
    return [tuple(f.without(0) for f in passed), NONE]


def select(call: RuleContext) -> Labels:
    dim = call.dim(call["dim"], len(call.shape(call.first)))
    result: list[Factor] = []
    for f in call.labels(call.first):
        if dim not in f.dims:
            result.append(f.without(dim))
            continue
        part = shifted(f, f.labels.select(dim, call["index"]), dim)
        unread = bool(call.uses) and not call.used(call.outputs[0])
        if unread and not call.state.opaque:  # wanted for its shape: any index will do
            result += [part] if part.major_to_minor else []
            continue
        one_by_one(call, f, dim)
        result += call.settle(part)
    return tuple(result)


def unbind(call: RuleContext) -> list[Labels]:
    dim = call.dim(call["dim"], len(call.shape(call.first)))
    outs: list[Labels] = [NONE] * len(call.outputs)
    for f in call.labels(call.first):
        if dim in f.dims:
            one_by_one(call, f, dim)
        for i in range(len(outs)):
            outs[i] += call.settle(shifted(f, f.labels.select(dim, i), dim)) if dim in f.dims else (f.without(dim),)
    return outs


def cut(call: RuleContext, f: Factor, dim: int, start: int, stop: int, step: int = 1) -> Labels:
    """The part of a factor between two indices of a dimension."""
    if dim not in f.dims:
        return (f,)
    if start >= stop:  # nothing
        call.freeze((f,) if len(f.major_to_minor) > 1 else NONE, "has an empty part taken")
        return NONE
    index = (slice(None),) * dim + (slice(start, stop, step),)
    part = factor(f.labels[index], f.major_to_minor)
    if len(f.major_to_minor) > 1 and dim == f.major_to_minor[-1]:
        if step != 1 or 1 in (start, part.labels.shape[dim]):  # a single column, which every row has or none
            call.constraints.keep_columns_equal(f)
        elif start:  # it begins at one place for all rows: as many are kept before it in each
            call.constraints.keep_rows_equal(factor(f.labels.narrow(dim, 0, start), f.major_to_minor), f)
        call.constraints.keep_rows_equal(part, f)
    return call.settle(part, "is sliced to a single channel")


def note_read(call: RuleContext, dim: int, parts: Sequence[slice]) -> None:
    """Note what is read along a dimension, by whichever part of the result, where sizes of inputs say how far, or may."""
    varying = [f for f in call.labels(call.first) if dim in f.dims]
    inside = [call.state.sizes.get(out.id, {}).get(dim) for out in call.outputs]
    unknown = None in inside and call.state.opaque
    by_inputs = unknown or any(isinstance(size, TensorSize) and call.state.is_inputs(size) for size in inside)
    if by_inputs:
        call.state.varying.update(out.id for out in call.outputs)
    if varying and (by_inputs or dim in call.state.sliced_dims()):
        uses = call.state.uses
        used = [part for part, out in zip(parts, call.outputs, strict=True) if not uses or out.id in uses]
        for f in varying:
            lines = f.labels.movedim(dim, 0)
            taken = [lines[part].flatten().numpy() for part in used]
            call.state.part_read.append(PartRead(f.flat, np.concatenate([f.flat[:0], *taken]), call.constraints.node))


def note_parts(call: RuleContext, labels: Labels, dim: int, taken: slice) -> None:
    """Note which part of its rows a slice takes of a joint factor, if nothing else reads them."""
    joint = [f for f in labels if dim in f.dims and len(f.major_to_minor) > 1]
    if joint and sum([call.first in op.inputs for op in call.op_trace.ops]) == 1:
        for f in joint:
            rows = f.labels.movedim(dim, -1).flatten(0, -2)
            call.constraints.collected.parts.append(LabelArray(rows[:, taken], call.constraints.node, whole=rows))


def slice_(call: RuleContext) -> Labels:
    shape = call.shape(call.first)
    dim = call.dim(call["dim"], len(shape))
    if "length" in call.named:
        start, stop, step = call["start"], call["start"] + call["length"], 1
    else:
        start, stop, step = slice(call.get("start"), call.get("end"), call.get("step", 1)).indices(shape[dim])
    if call.shape(call.outputs[0]) == shape:
        return call.labels(call.first)
    note_read(call, dim, [slice(start, stop, step)])
    labels = call.labels(call.first)
    if start < stop:
        note_parts(call, labels, dim, slice(start, stop, step))
    if call.outputs[0].id in call.state.pinned:
        labels = call.freeze_dims(labels, [dim], "is written through a view of every so many entries")
    return tuple(g for f in labels for g in cut(call, f, dim, start, stop, step))


def split(call: RuleContext) -> list[Labels]:
    dim = call.dim(call["dim"], len(call.shape(call.first)))
    outs, start = [], 0
    ends = list(itertools.accumulate(call.shape(out)[dim] for out in call.outputs))
    note_read(call, dim, [slice(a, b) for a, b in itertools.pairwise([0, *ends])])
    for out in call.outputs:
        stop = start + call.shape(out)[dim]
        outs.append(tuple(g for f in call.labels(call.first) for g in cut(call, f, dim, start, stop)))
        start = stop
    return outs


def flip(call: RuleContext) -> Labels:
    ndim = len(call.shape(call.first))
    dims = [call.dim(d, ndim) for d in call["dims"]]
    moved = [(f, [d for d in dims if d in f.dims]) for f in call.labels(call.first)]
    return tuple(factor(f.labels.flip(mine), f.major_to_minor) if mine else f for f, mine in moved)


def roll(call: RuleContext) -> Labels | list[Labels]:
    if not call["dims"]:
        return movement(call)
    shifts, dims = call["shifts"], call.dims(call["dims"], len(call.shape(call.first)))
    result: Labels = NONE
    for f in call.labels(call.first):
        for shift, dim in zip(shifts, dims, strict=True):
            if dim in f.dims:
                one_by_one(call, f, dim)
                f = factor(f.labels.roll(shift, dim), f.major_to_minor)
        result += call.settle(f)
    return result


def index_select(call: RuleContext) -> Labels:
    dim = call.dim(call["dim"], len(call.shape(call.first)))
    index = call.data(call["index"])
    if index is None:
        return call.freeze_dims(call.labels(call.first), [dim], "is indexed by a tensor computed from the inputs")
    return along_dim(call, dim, lambda labels: labels.index_select(dim, index.reshape(-1)))


def channel_shuffle(call: RuleContext) -> Labels:
    groups = call["groups"]
    return along_dim(call, 1, lambda labels: labels.index_select(1, shuffled(labels.shape[1], groups)))


def shuffled(size: int, groups: int) -> Tensor:
    """The order of channels after a shuffle."""
    return torch.arange(size).view(groups, -1).t().reshape(-1)


def triangle(call: RuleContext) -> Labels:
    """Which entries are zero depends on where they stand along two dimensions: both are kept."""
    ndim = len(call.shape(call.first))
    return call.freeze_dims(call.labels(call.first), [ndim - 2, ndim - 1], "is cut to a triangle")


# -- rewriting ---------------------------------------------------------------------------------------------------------


def explicit_split(dim_of: Callable[[fx.Node, int], int]) -> Callable[[RewriteContext, fx.Node], fx.Node | None]:
    """Parts need not be of equal sizes any more: they are written out.

    Arguments:
        dim_of: the dimension that is split, from the node and the number of dimensions.
    """

    def rewrite(r: RewriteContext, node: fx.Node) -> fx.Node | None:
        source = r.result(node.args[0])
        ndim = len(r.before(source))
        dim = dim_of(node, ndim) % ndim
        if not is_shrunk(r, source, dim):
            return None
        parts = [r.after(ref)[dim] for ref in collect(r.result(node), TensorRef)]
        return r.emit(node, (r.new[node.args[0]], parts, dim), {}, method="split")  # type: ignore[index]

    return rewrite


def number(r: RewriteContext, node: fx.Node, position: int, name: str) -> int:
    """The original value of an integer argument."""
    return int(known(r, argument(node, position, name)))


def dim_argument(r: RewriteContext, node: fx.Node) -> int:
    return number(r, node, 1, "dim") % len(r.before(r.result(node.args[0])))


def select_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    source, dim = r.result(node.args[0]), dim_argument(r, node)
    if not is_shrunk(r, source, dim):
        return None
    index = number(r, node, 2, "index") % r.before(source)[dim]
    return with_argument(r, node, 2, "index", int(place(r, source, dim)[index]))


def narrow_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    source, dim = r.result(node.args[0]), dim_argument(r, node)
    if not is_shrunk(r, source, dim):
        return None
    start, length = number(r, node, 2, "start"), number(r, node, 3, "length")
    chosen = place(r, source, dim).narrow(0, start, length)
    run = run_of(chosen[chosen >= 0])
    assert run is not None, "what is kept of a run is a run among the kept"
    return r.graph.call_method("narrow", (r.new[node.args[0]], dim, run.start, run.stop - run.start))  # type: ignore[index]


def gathered(r: RewriteContext, node: fx.Node, orders: Sequence[tuple[int, Tensor]]) -> fx.Node | None:
    """Index maps along dimensions that shrank, each as a gather among what is kept; None where none did.

    Arguments:
        orders: dimensions, each with the index in the source of every index of the result.
    """
    source, target = r.result(node.args[0]), r.result(node)
    made = before = r.new[node.args[0]]  # type: ignore[index]
    for dim, order in orders:
        positions = picked(r, source, target, dim, dim, order)
        if not torch.equal(positions, torch.arange(r.after(source)[dim])):
            made = r.pick(made, source, dim, positions, r.after(source)[dim])
    return r.graph.call_method("clone", (made,)) if made is before else made  # as such an op returns a copy


def roll_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    source, given, shifts = r.result(node.args[0]), argument(node, 2, "dims"), argument(node, 1, "shifts")
    if given is None or given == ():
        return moved_call(r, node)
    listed: Any = [v if isinstance(v, tuple | list) else [v] for v in (given, shifts)]
    ndim = len(r.before(source))
    dims, moves = [r.number_of(d) % ndim for d in listed[0]], [r.number_of(n) for n in listed[1]]
    shrunk = sorted({d for d in dims if is_shrunk(r, source, d)})
    if not shrunk:
        return None
    total = {d: sum(move for other, move in zip(dims, moves, strict=True) if other == d) for d in shrunk}
    made = gathered(r, node, [(d, torch.arange(r.before(source)[d]).roll(total[d])) for d in shrunk])
    rest = [i for i in range(len(dims)) if dims[i] not in shrunk]
    if rest:
        arguments = (made, tuple(r.argument(listed[1][i]) for i in rest), tuple(dims[i] for i in rest))
        return r.graph.call_method("roll", arguments)
    return made


def index_select_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    source, dim = r.result(node.args[0]), dim_argument(r, node)
    if not is_shrunk(r, source, dim):
        return None
    data = r.capture.op_trace.values[r.result(argument(node, 2, "index")).id].data
    assert data is not None, "an index that is computed along a labelled dimension is frozen by its rule"
    return gathered(r, node, [(dim, data.cpu())])


def shuffle_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    source = r.result(node.args[0])
    if not is_shrunk(r, source, 1):
        return None
    return gathered(r, node, [(1, shuffled(r.before(source)[1], number(r, node, 1, "groups")))])


def given_dim(node: fx.Node, ndim: int) -> int:
    return int(argument(node, 2, "dim", 0))


SPLIT = OpSpec(split, explicit_split(given_dim), moves=True, views=True)
register(
    "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk split_copy split_with_sizes_copy tensor_split"
    " unsafe_chunk",
    SPLIT,
)
register("hsplit", dataclasses.replace(SPLIT, rewrite=explicit_split(lambda node, ndim: min(1, ndim - 1))))
register("vsplit", dataclasses.replace(SPLIT, rewrite=explicit_split(lambda node, ndim: 0)))
register("dsplit", dataclasses.replace(SPLIT, rewrite=explicit_split(lambda node, ndim: 2)))
register("_pack_padded_sequence", OpSpec(pack))
register("select select_copy", OpSpec(select, select_kept, moves=True, views=True))
register("unbind", OpSpec(unbind, moves=True, views=True))
register("narrow", OpSpec(slice_, narrow_kept, moves=True, views=True))
register("flip", OpSpec(flip, moves=True))
register("roll", OpSpec(roll, roll_kept, moves=True))
register("index_select", OpSpec(index_select, index_select_kept, moves=True))
register("channel_shuffle native_channel_shuffle", OpSpec(channel_shuffle, shuffle_kept, moves=True))
register("tril triu", OpSpec(triangle))
