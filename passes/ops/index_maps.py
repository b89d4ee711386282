"""Index maps of any kind: labels, and what a call becomes, are found by running the op itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, expand_along, factor
from fxprune.passes.ir.op_trace import OpTrace, name_of
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ir.slices import apply_slices
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.masking import with_zeros
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.rewriting import RewriteContext, argument, function_name, picked, spread_out
from fxprune.passes.ops.unify import unify

COMPUTED = "is indexed by a tensor computed from the inputs"
PARTLY = "is indexed by a tensor that is smaller there"


def movement(call: RuleContext) -> Labels | list[Labels]:
    """The op is run on each factor, laid out in full."""
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        return call.freeze_inputs("is moved by an op of several tensors")
    return moved(call, call.labels(call.first))


def moved(call: RuleContext, labels: Labels) -> Labels:
    return tuple(g for f in labels for g in call.settle(moved_factor(call, f)))


def moved_factor(call: RuleContext, f: Factor) -> Factor:
    if len(f.major_to_minor) > 1:
        call.constraints.keep_columns_equal(f)
    full = expand_along(f, call.shape(call.first), range(f.labels.dim())).contiguous()
    moved = factor(on_numbers(lambda t: call.op.func(t, *call.op.args[1:], **call.op.kwargs), full))
    call.constraints.keep_rows_equal(moved)
    return moved


def diagonal(call: RuleContext) -> Labels:
    """Entries with the same index along two dimensions, which becomes the last one: both keep the same of them."""
    ndim = len(call.shape(call.first))
    dims = call.dim(call.get("dim1", 0), ndim), call.dim(call.get("dim2", 1), ndim)
    labels = call.labels(call.first)
    if call.get("offset", 0):  # which would have to change with what is removed before it
        labels = call.freeze_dims(labels, dims, "is beside a diagonal")
    both = tuple(f for f in labels if f.dims.issuperset(dims))
    call.freeze(both, "is on a diagonal of rows that keep columns of their own")
    labels = tuple(f for f in labels if f not in both)
    sides: list[Labels] = []
    for dim, other in (dims, dims[::-1]):
        mine = tuple(f for f in labels if dim in f.dims and other not in f.dims)
        sides.append(tuple(moved_factor(call, f) for f in mine))
    rest = tuple(moved_factor(call, f) for f in labels if not f.dims & set(dims))
    shape = call.shape(call.outputs[0])
    return (*unify(call, sides[0], shape, sides[1], shape), *(g for f in rest for g in call.settle(f)))


def of_size_one(contents: list[Tensor | None]) -> list[Tensor | None]:
    """Indices that take the only entry of dimensions of size 1, where others with these contents index: to the same places."""
    found: list[Tensor | None] = []
    for c in contents:
        if c is None:
            found.append(None)
        elif c.dtype in (torch.bool, torch.uint8):
            found += [torch.zeros(1, dtype=torch.int64)] * c.dim()
        else:
            found.append(torch.zeros([1] * c.dim(), dtype=torch.int64))
    return found


def windows(call: RuleContext) -> Labels:
    """(*, n, *) -> (*, n / size, *, size): windows, each of which keeps equally many entries."""
    shape, size = call.shape(call.first), call["size"]
    labels, dim = call.labels(call.first), call.dim(call["dimension"], len(shape))
    if shape and (call["step"] != size or shape[dim] % size):
        labels = call.freeze_dims(labels, [dim], "is read in windows that overlap or leave entries out")
    return moved(call, labels)


def pixel_unshuffle(call: RuleContext) -> Labels:
    """(*, C, H r, W r) -> (*, C r r, H, W)"""
    ndim = len(call.shape(call.first))
    return moved(call, call.freeze_dims(call.labels(call.first), [ndim - 2, ndim - 1], "is a spatial dimension"))


def pixel_shuffle(call: RuleContext) -> Labels:
    """(*, C r r, H, W) -> (*, C, H r, W r): all that makes up a channel goes together."""
    result: Labels = NONE
    for f in call.labels(call.first):
        g = moved_factor(call, f)
        result += call.collapse(g, [d for d in g.major_to_minor if d not in f.dims])
    return result


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


def on_numbers(run: Callable[[Tensor], Tensor], whole: Tensor) -> Tensor:
    """A movement of integers; as floating numbers, where the op takes no others."""
    try:
        return run(whole)
    except Exception:
        return run(whole.double()).long()


def moved_call(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """A call of such an op among what is kept.

    (1) It stays where it commutes with cutting. (2) Where one dimension is reordered it is one gather. (3) Else what is gone
    is filled up with zeros, moved, and cut out again.
    """
    source, target = r.result(node.args[0]), r.result(node)
    if not isinstance(source, TensorRef) or not isinstance(target, TensorRef):
        return None
    args, kwargs = fx.node.map_arg((node.args[1:], dict(node.kwargs)), lambda n: r.capture.results[n])

    def run(tensor: Tensor) -> Tensor:
        function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
        return on_numbers(lambda t: function(t, *args, **kwargs), tensor)

    shape = r.before(source)
    places = torch.arange(math.prod(shape)).reshape(shape)
    whole = run(places)
    if commutes(run, apply_slices(r.cuts(source), places), apply_slices(r.cuts(target), whole)):  # (1)
        return None
    dims = {d for cut in r.cuts(source) for d in cut.dims}
    if len(dims) == 1 and places.dim() == whole.dim():  # (2)
        dim = dims.pop()
        order = order_along(places, whole, dim)
        if order is not None:
            made = r.permuted(node.args[0], source, node, dim, order)  # type: ignore[arg-type]
            return r.graph.call_method("clone", (made,)) if made is r.new[node.args[0]] else made  # type: ignore[index]
    made = r.new[node.args[0]]  # type: ignore[index]
    for dim in sorted({d for cut in r.cuts(source) for d in cut.dims}):
        made = spread_out(r, made, source, dim)
    made = r.emit(node, (made, *r.argument(tuple(node.args[1:]))), r.argument(dict(node.kwargs)))
    for dim in sorted({d for cut in r.cuts(target) for d in cut.dims}):
        made = r.pick(made, target, dim, r.positions(target, dim), r.before(target)[dim])
    return made


def order_along(places: Tensor, moved: Tensor, dim: int) -> Tensor | None:
    """The indices of one dimension that take numbered places to where they were moved; None where more was done to them."""
    first = moved[tuple(slice(None) if d == dim else 0 for d in range(moved.dim()))]
    order = first // math.prod(places.shape[dim + 1 :]) % places.shape[dim]
    return order if torch.equal(places.index_select(dim, order), moved) else None


def resize_windows(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    source, target = r.result(node.args[0]), r.result(node)
    size = r.after(target)[-1]
    if size == r.before(target)[-1]:
        return None
    dim = argument(node, 1, "dimension")
    return r.emit(node, (r.new[node.args[0]], r.number_of(dim) % len(r.before(source)), size, size), {})  # type: ignore[index]


def commutes(run: Callable[[Tensor], Tensor], few: Tensor, wanted: Tensor) -> bool:
    try:
        return torch.equal(run(few.contiguous()), wanted)
    except Exception:  # its arguments only suit the whole
        return False


# -- by the contents of an index tensor ---------------------------------------------------------------------------------


def one_by_one(call: RuleContext, f: Factor, dim: int) -> None:
    """An index along the minor dimension of a joint factor picks the same place in every row: columns must agree."""
    if len(f.major_to_minor) > 1 and dim == f.major_to_minor[-1]:
        call.constraints.keep_columns_equal(f)


def along_dim(call: RuleContext, dim: int, move: Callable[[Tensor], Tensor]) -> Labels:
    """Labels after the entries of one dimension were moved in the same way wherever the other ones stand."""
    result: Labels = NONE
    for f in call.labels(call.first):
        if dim in f.dims:
            one_by_one(call, f, dim)
            f = factor(move(f.labels), f.major_to_minor)
        result += call.settle(f)
    return result


def gather(call: RuleContext) -> Labels:
    """Along `dim` entries are picked by value; along the others input and index correspond one to one.

    An index that is a constant, and the same everywhere, picks whole rows, as `index_select` does; `take_along_dim` without a
    dimension, which flattens first, is not rewritten so.
    """
    x, picks = call["self"], call["index"]
    ndim = len(call.shape(x))
    if ndim != len(call.shape(picks)):  # of nothing
        return call.freeze_inputs(COMPUTED)[0]
    dim = call.dim(call["dim"], ndim)
    sizes, others = call.shape(x), align(call.labels(picks), call.shape(picks), ndim)[1]
    maker = call.op_trace.maker(x.id)
    flattened = maker is not None and maker.node == call.op.node and name_of(maker.func) != "aten::expand"
    rewritten = call.constraints.node < 0 or (call.state.rewrite is gather_rows and not flattened)
    if rewritten and any(dim in f.dims for f in call.labels(x)):
        rows = same_everywhere(call.op_trace, picks, dim, ndim)
        if rows is not None and all(a == b for d, (a, b) in enumerate(zip(sizes, others, strict=True)) if d != dim):
            call.freeze(call.labels(picks), "holds indices")
            return along_dim(call, dim, lambda labels: labels.index_select(dim, rows))
    partly = [d for d in range(ndim) if d != dim and sizes[d] != others[d] and others[d] != 1]
    passed = call.freeze_dims(call.labels(x), [dim], COMPUTED)
    passed = call.freeze_dims(passed, partly, PARTLY)
    chosen = call.freeze_dims(call.labels(picks), partly, PARTLY)
    shape = [1 if d == dim or d in partly else n for d, n in enumerate(sizes)]
    return unify(call, passed, shape, *align(chosen, call.shape(picks), ndim))


SAME_CONTENTS = frozenset(
    f"aten::{name}" for name in "view _unsafe_view unsqueeze expand clone lift_fresh _to_copy detach".split()
)


def same_everywhere(trace: OpTrace, picks: TensorRef, dim: int, ndim: int) -> Tensor | None:
    """The contents along `dim` of a constant index, if they are the same at all places of its other dimensions; else None.

    They do not depend on sizes of the inputs: all that is done to the constant is to move and to repeat its entries.
    """
    data = trace.values[picks.id].data
    if data is None or not data.numel() or trace.values[picks.id].from_input:
        return None
    data = data.cpu().reshape([1] * (ndim - data.dim()) + list(data.shape))
    rows = data.movedim(dim, -1).reshape(-1, data.shape[dim])
    ref, maker = picks, trace.maker(picks.id)
    while maker is not None and maker.inputs:
        before = trace.values[maker.inputs[0].id].data
        after = trace.values[ref.id].data
        # as `take_along_dim` does, by the size: it changes negative ones
        wrapped = name_of(maker.func) == "aten::remainder" and before is not None and after is not None
        if not (name_of(maker.func) in SAME_CONTENTS or (wrapped and torch.equal(before, after))):  # type: ignore[arg-type]
            return None
        ref, maker = maker.inputs[0], trace.maker(maker.inputs[0].id)
    return rows[0] if maker is None and len(rows) and bool((rows == rows[0]).all()) else None


def gather_rows(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """A gather by an index that is the same everywhere, as a choice of rows."""
    source, target = r.result(node.args[0]), r.result(node)
    if function_name(node) == "take_along_dim":
        index, dim = argument(node, 1, "indices"), argument(node, 2, "dim")
    else:
        dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
    ndim = len(r.before(source))
    dim = 0 if dim is None and ndim == 1 else dim
    if dim is None or not isinstance(r.result(index), TensorRef):
        return None
    dim %= ndim
    rows = same_everywhere(r.capture.op_trace, r.result(index), dim, ndim)
    if rows is None or list(r.before(target)) != [len(rows) if d == dim else n for d, n in enumerate(r.before(source))]:
        return None
    left, chosen = list(r.after(source)), list(r.after(r.result(index)))
    if left[dim] == r.before(source)[dim] and chosen == [*left[:dim], len(rows), *left[dim + 1 :]]:
        return None  # it still does as it is
    order = r.constant(picked(r, source, target, dim, dim, rows))
    return r.graph.call_method("index_select", (r.argument(node.args[0]), dim, order))


register("diagonal", OpSpec(diagonal, moves=True))
register("rot90", OpSpec(movement, moves=True))
register("fft_fftshift fft_ifftshift", OpSpec(movement, moved_call, moves=True))
register("unfold", OpSpec(windows, resize_windows, moves=True))
register("pixel_unshuffle", OpSpec(pixel_unshuffle, moves=True))
register("pixel_shuffle", OpSpec(pixel_shuffle, moves=True))
register("diag_embed", OpSpec(diag_embed))
register("im2col", OpSpec(im2col))
register("col2im", OpSpec(col2im, masked=with_zeros))
register("gather take_along_dim", OpSpec(gather, gather_rows))
