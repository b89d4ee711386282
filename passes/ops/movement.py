"""Movement within a tensor: the op itself is run on each factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, expand_along, factor
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import handles, rule
from fxprune.passes.ops.rewriting import argument, function_name, picked, place, run_of, with_argument

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter


def moved(labels: Labels, order: Sequence[int]) -> Labels:
    """Factors of a tensor whose dimensions were permuted: output dimension i was input dimension order[i]."""
    place = {d: i for i, d in enumerate(order)}
    return tuple(
        [
            f.at(place[f.major_to_minor[0]], len(place))
            if len(f.major_to_minor) == 1
            else Factor(f.labels.permute(tuple(order)), tuple(place[d] for d in f.major_to_minor))
            for f in labels
        ]
    )


@rule("aten::permute", "aten::permute_copy")
def permute(call: RuleContext) -> Labels:
    ndim = len(call.shape(call.first))
    return moved(call.labels(call.first), [d % ndim for d in call["dims"]])


@rule(
    "aten::t",
    "aten::transpose",
    "aten::numpy_T",
    "aten::mT",
    "aten::swapaxes",
    "aten::t_copy",
    "aten::adjoint",
)
def transpose(call: RuleContext) -> Labels:
    ndim = len(call.shape(call.first))
    if ndim < 2:
        return call.labels(call.first)
    order = list(range(ndim))
    a, b = call.dim(call.get("dim0", 0), ndim), call.dim(call.get("dim1", 1), ndim)
    order[a], order[b] = order[b], order[a]
    return moved(call.labels(call.first), order)


def shifted(f: Factor, labels: Tensor, dropped: int) -> Factor:
    """The factor after one dimension was taken away."""
    return factor(labels, tuple(d - (d > dropped) for d in f.major_to_minor if d != dropped))


def one_by_one(call: RuleContext, f: Factor, dim: int) -> None:
    """An index along the minor dimension of a joint factor picks the same place in every row: columns must agree."""
    if len(f.major_to_minor) > 1 and dim == f.major_to_minor[-1]:
        call.constraints.same_columns(f)


@rule("aten::select", "aten::select_copy")
def select(call: RuleContext) -> Labels:
    dim = call.dim(call["dim"], len(call.shape(call.first)))
    result: list[Factor] = []
    for f in call.labels(call.first):
        if dim not in f.dims:
            result.append(f.without(dim))
            continue
        part = shifted(f, f.labels.select(dim, call["index"]), dim)
        unread = bool(call.uses) and not call.used(call.outputs[0])
        if unread and call.constraints.maker != "opaque":  # wanted for its shape: any index will do
            result += [part] if part.major_to_minor else []
            continue
        one_by_one(call, f, dim)
        result += call.settle(part)
    return tuple(result)


@rule("aten::unbind")
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
    index = (slice(None),) * dim + (slice(start, stop, step),)
    part = factor(f.labels[index], f.major_to_minor)
    if len(f.major_to_minor) > 1 and dim == f.major_to_minor[-1]:
        if step != 1 or part.major_to_minor[-1:] != f.major_to_minor[-1:]:  # or a single column, which every row has or none
            call.constraints.same_columns(f)
        elif start:  # it begins at one place for all rows: as many are kept before it in each
            call.constraints.keep_rows_equal(factor(f.labels.narrow(dim, 0, start), f.major_to_minor))
        call.constraints.keep_rows_equal(part)
    return call.settle(part, "a slice of one channel")


@rule("aten::slice", "aten::slice_copy", "aten::narrow")
def slice_(call: RuleContext) -> Labels:
    shape = call.shape(call.first)
    dim = call.dim(call["dim"], len(shape))
    if "length" in call.named:
        start, stop, step = call["start"], call["start"] + call["length"], 1
    else:
        start, stop, step = slice(call.get("start"), call.get("end"), call.get("step", 1)).indices(shape[dim])
    if call.shape(call.outputs[0]) == shape:
        return call.labels(call.first)
    labels = call.labels(call.first)
    if call.outputs[0].id in call.constraints.pinned:
        labels = call.freeze_dims(labels, [dim], "is written through a view of every so many entries")
    return tuple(g for f in labels for g in cut(call, f, dim, start, stop, step))


@rule(
    "aten::split",
    "aten::split_with_sizes",
    "aten::unsafe_split",
    "aten::unsafe_split_with_sizes",
    "aten::chunk",
)
@rule("aten::split_copy", "aten::split_with_sizes_copy", "aten::tensor_split", "aten::unsafe_chunk")
def split(call: RuleContext) -> list[Labels]:
    dim = call.dim(call["dim"], len(call.shape(call.first)))
    outs, start = [], 0
    for out in call.outputs:
        stop = start + call.shape(out)[dim]
        outs.append(tuple(g for f in call.labels(call.first) for g in cut(call, f, dim, start, stop)))
        start = stop
    return outs


@rule("aten::flip", "aten::roll", "aten::index_select", "aten::rot90")
def along_dims(call: RuleContext) -> Labels:
    """Ops that act on each of a few dimensions by itself: factors that do not vary there pass."""
    shape = call.shape(call.first)
    name = call.op.func._schema.name
    if name == "aten::rot90" or (name == "aten::roll" and not call["dims"]):
        return by_running(call)
    dims = call.dims(call.get("dims", call.get("dim")), len(shape))
    index = call.data(call["index"]) if name == "aten::index_select" else None
    if name == "aten::index_select" and index is None:
        return call.freeze_dims(call.labels(call.first), dims, "indexed by a tensor computed from the inputs")
    result: list[Factor] = []
    for f in call.labels(call.first):
        for i, d in enumerate(dims):
            if d not in f.dims:
                continue
            if name == "aten::flip":
                f = factor(f.labels.flip(d), f.major_to_minor)
                continue
            one_by_one(call, f, d)
            moved_labels = f.labels.roll(call["shifts"][i], d) if index is None else f.labels.index_select(d, index.cpu())
            f = factor(moved_labels, f.major_to_minor)
        result += call.settle(f)
    return tuple(result)


@rule("aten::as_strided")
def as_strided(call: RuleContext) -> Labels:
    """The same elements in the same places, or anything at all: only the first is followed."""
    shape, strides = call.shape(call.first), call["stride"]
    contiguous = torch.empty(shape, device="meta").stride()
    last = torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride() if len(shape) == 4 else contiguous
    real = [d for d, n in enumerate(shape) if n > 1]
    for expected in (contiguous, last):
        if tuple(call["size"]) == shape and all(strides[d] == expected[d] for d in real) and not call.get("storage_offset"):
            return call.labels(call.first)
    call.freeze(call.labels(call.first), "is read by strides")
    return NONE


@rule("aten::tril", "aten::triu")
def triangle(call: RuleContext) -> Labels:
    """Which entries are zero depends on where they stand along two dimensions: both are kept."""
    ndim = len(call.shape(call.first))
    return call.freeze_dims(call.labels(call.first), [ndim - 2, ndim - 1], "is cut to a triangle")


@rule("aten::diagonal", "aten::unfold", "aten::pixel_unshuffle", "aten::pixel_shuffle")
def by_running(call: RuleContext) -> Labels:
    """Any other index map: expand the factor to the tensor's full size and run the op on it."""
    result: list[Factor] = []
    for f in call.labels(call.first):
        if len(f.major_to_minor) > 1:
            call.constraints.same_columns(f)
        full = expand_along(f, call.shape(call.first), range(f.labels.dim()))
        moved_labels = call.op.func(full, *call.op.args[1:], **call.op.kwargs)
        g = factor(moved_labels)
        call.constraints.keep_rows_equal(g)
        if call.op.func._schema.name == "aten::pixel_shuffle":  # its factor stays: all that makes up a channel goes together
            result += call.collapse(g, [d for d in g.major_to_minor if d not in f.dims])
        else:
            result += call.settle(g)
    return tuple(result)


@rule("aten::diag_embed")
def diag_embed(call: RuleContext) -> Labels:
    """(*, n) -> (*, n, n): a channel takes its row and its column with it."""
    n = len(call.shape(call.first))
    if {call.get("dim1", -2) % (n + 1), call.get("dim2", -1) % (n + 1)} != {n - 1, n} or call.get("offset", 0):
        call.freeze(call.labels(call.first), "is laid along another diagonal")
        return NONE
    result: Labels = NONE
    for f in call.labels(call.first):
        result += (factor(f.labels.unsqueeze(n), f.major_to_minor),)
        if n - 1 in f.dims:
            result += (factor(f.labels.unsqueeze(n - 1), tuple(n if d == n - 1 else d for d in f.major_to_minor)),)
    return result


@rule("aten::channel_shuffle", "aten::native_channel_shuffle")
def channel_shuffle(call: RuleContext) -> Labels:
    groups = call["groups"]
    result: list[Factor] = []
    for f in call.labels(call.first):
        if 1 in f.dims:
            order = torch.arange(f.labels.shape[1]).view(groups, -1).t().reshape(-1)
            f = factor(f.labels.index_select(1, order), f.major_to_minor)
        result.append(f)
    return tuple(result)


@rule("aten::view_as_real", "aten::view_as_complex")
def view_complex(call: RuleContext) -> Labels:
    """The pair of real and imaginary parts is a dimension of its own at the end."""
    before, after = len(call.shape(call.first)), len(call.shape(call.outputs[0]))
    labels = call.labels(call.first)
    if after > before:
        return tuple(Factor(f.labels.unsqueeze(-1), f.major_to_minor) for f in labels)
    passed = call.freeze_dims(labels, [before - 1], "is the pair of real and imaginary parts")
    return tuple(Factor(f.labels.squeeze(-1), f.major_to_minor) for f in passed)


@rule("aten::im2col")
def im2col(call: RuleContext) -> Labels:
    """(N, C, H, W) -> (N, C * kernel, L): each channel becomes a run of kernel entries."""
    shape = call.shape(call.first)
    channels = len(shape) - 3
    kernel = call["kernel_size"][0] * call["kernel_size"][1]
    result: list[Factor] = []
    for f in call.freeze_dims(call.labels(call.first), range(channels + 1, len(shape)), "is a spatial dimension"):
        labels = f.labels.repeat_interleave(kernel, channels) if channels in f.dims else f.labels
        result.append(factor(labels.squeeze(-1), f.major_to_minor))
    return tuple(result)


@rule("aten::col2im")
def col2im(call: RuleContext) -> Labels:
    """(N, C * kernel, L) -> (N, C, H, W): the entries of one channel's kernel are summed."""
    shape = call.shape(call.first)
    channels = len(shape) - 2
    kernel = call["kernel_size"][0] * call["kernel_size"][1]
    result: list[Factor] = []
    for f in call.freeze_dims(call.labels(call.first), [channels + 1], "is a spatial dimension"):
        labels = f.labels
        if channels in f.dims:
            labels = labels.unflatten(channels, (-1, kernel))
            head = labels.narrow(channels + 1, 0, 1)
            call.constraints.tie(labels, head, broadcast=True)
            labels = head.squeeze(channels + 1)
        result += call.settle(factor(labels.unsqueeze(-1), f.major_to_minor), "is a window, the entries of which are summed")
    return tuple(result)


@handles("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk", "hsplit")
def explicit_split(r: Rewriter, node: fx.Node) -> fx.Node | None:
    source = r.result(node.args[0])
    dim = argument(node, 2, "dim", 0) % len(r.before(source))
    parts = [r.after(ref)[dim] for ref in collect(r.result(node), TensorRef)]
    if not any(dim in c.dims for c in r.cuts(source)):
        return None
    # the halves need not be equal any more: explicit sizes
    return r.emit(node, (r.new[node.args[0]], list(parts), dim), {}, method="split")  # type: ignore[index]


@handles("index_select", "select", "narrow", "roll", "flip", "channel_shuffle", "native_channel_shuffle")
def along_one_dim(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """Index maps along one dimension: the op is run on the dimension's indices and becomes a gather among the kept."""
    source, target = r.result(node.args[0]), r.result(node)
    name = function_name(node)
    ndim = len(r.before(source))
    dims: Any = argument(node, 1, "dim", 0)
    if name == "roll":
        dims = argument(node, 2, "dims")
    elif "shuffle" in name:
        dims = 1
    elif name == "flip":
        return None  # what is kept, reversed, is what is kept of the reversed
    dims = [d % ndim for d in (dims if isinstance(dims, tuple | list) else [dims])]
    shrunk = [d for d in dims if any(d in c.dims for c in r.cuts(source))]
    if not shrunk:
        return None
    dim = shrunk[0]
    size = r.before(source)[dim]
    if name == "select":
        index = argument(node, 2, "index")
        value = index if isinstance(index, int) else r.capture.results[index]
        return with_argument(r, node, 2, "index", int(place(r, source, dim)[value % size]))
    order = original_order(r, node, name, size, dims.index(dim))
    if name == "narrow":
        chosen = place(r, source, dim)[order]
        run = run_of(chosen[chosen >= 0])
        assert run is not None, "what is kept of a run is a run among the kept"
        return r.graph.call_method("narrow", (r.new[node.args[0]], dim, run.start, run.stop - run.start))  # type: ignore[index]
    positions = picked(r, source, target, dim, dim, order)
    made = r.gather(node.args[0], dim, positions)  # type: ignore[arg-type]
    if made is r.new[node.args[0]]:  # type: ignore[index]
        made = r.graph.call_method("clone", (made,))  # as these ops return one: either may be written to
    others = [i for i, d in enumerate(dims) if d != dim]
    if name == "roll" and others:
        shifts = argument(node, 1, "shifts")
        rest = tuple(r.argument(shifts[i]) for i in others)
        return r.graph.call_method("roll", (made, rest, tuple(dims[i] for i in others)))
    return made


def original_order(r: Rewriter, node: fx.Node, name: str, size: int, which: int) -> Tensor:
    """Source index of every result index, in the original program."""
    indices = torch.arange(size)
    if name == "roll":
        shifts = argument(node, 1, "shifts")
        shift = shifts[which] if isinstance(shifts, tuple | list) else shifts
        return indices.roll(r.capture.results[shift] if isinstance(shift, fx.Node) else shift)
    if name == "narrow":
        start, length = (
            r.capture.results[a] if isinstance(a, fx.Node) else a
            for a in (argument(node, 2, "start"), argument(node, 3, "length"))
        )
        return indices.narrow(0, start, length)
    if name == "index_select":
        data = r.capture.op_trace.values[r.result(argument(node, 2, "index")).id].data
        assert data is not None
        return data.cpu()
    groups = argument(node, 1, "groups")
    return indices.view(groups, -1).t().reshape(-1)


# what these return is a view of their argument, or a copy of its entries
MOVING = frozenset(
    f"aten::{name}"
    for name in (
        "select slice narrow unbind split split_with_sizes unsafe_split unsafe_split_with_sizes chunk tensor_split"
        " view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze expand alias detach"
    ).split()
)
