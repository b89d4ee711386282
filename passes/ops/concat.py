"""Joining: factors of several tensors become one array along the joined dimension, or parts of one are written into another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, expand_along, factor
from fxprune.passes.ir.op_trace import OpTrace, name_of
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.index_maps import COMPUTED, PARTLY, one_by_one
from fxprune.passes.ops.index_maps import same_everywhere as index_everywhere
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.rewriting import RewriteContext, argument, function_name, is_shrunk, known, place, with_argument
from fxprune.passes.ops.unify import unify, vary_alike

LARGEST_JOINT = 1 << 22


def cat(call: RuleContext) -> Labels:
    refs = [r for r in call["tensors"] if call.shape(r) != (0,)]
    if not refs:
        return NONE
    dim = call.dim(call["dim"], len(call.shape(refs[0])))
    return join(call, [call.labels(r) for r in refs], [call.shape(r) for r in refs], dim)


def stack(call: RuleContext) -> Labels:
    refs: list[TensorRef] = list(call["tensors"])
    dim = call.dim(call["dim"], len(call.shape(refs[0])) + 1)
    lifted = [
        tuple(Factor(f.labels.unsqueeze(dim), tuple(d + (d >= dim) for d in f.major_to_minor)) for f in call.labels(r))
        for r in refs
    ]
    shapes = [(*call.shape(r)[:dim], 1, *call.shape(r)[dim:]) for r in refs]
    return join(call, lifted, shapes, dim)


def join(call: RuleContext, parts: Sequence[Labels], shapes: Sequence[Sequence[int]], dim: int) -> Labels:
    """Factors that vary along the same other dimensions are laid end to end; a part with no such factor counts as kept.

    (1) Along the joined dimension alone the parts are independent of one another.
    (2) Along other dimensions each part is a row of a joint factor: it must keep equally many entries, not the same ones.
    (3) A part without entries, such as the first of a list that grows, loses what the first row of the others does.
    """
    signatures: list[frozenset[int]] = []
    for labels in parts:
        for f in labels:
            if f.dims - {dim} not in signatures:
                signatures.append(f.dims - {dim})
    result: Labels = NONE
    filled = [shape[dim] > 0 for shape in shapes]
    if not any(filled):
        filled = [True] * len(shapes)
    sizes = list(itertools.compress(shapes, filled))
    for other in sorted(signatures, key=sorted):
        chosen = [pick(call, labels, other, dim) for labels in parts]
        if other and any(f is None for f in chosen):
            for part in chosen:
                if part is not None:
                    call.constraints.freeze(
                        part.labels, "is joined along another dimension to a tensor that keeps all its channels"
                    )
            if not call.state.seeking_heads:
                continue
        arrays = [lay_out(f, shape, dim, other) for f, shape in zip(chosen, shapes, strict=True)]
        head = arrays[filled.index(True)].narrow(dim, 0, 1)
        for a in itertools.compress(arrays, [not n for n in filled]):
            if other and a.numel():
                call.constraints.tie(a, head)
        arrays, chosen = list(itertools.compress(arrays, filled)), list(itertools.compress(chosen, filled))
        if all(f is None for f in chosen):  # what had labels was without entries, and is frozen
            continue
        nests = {tuple(d for d in f.major_to_minor if d != dim) for f in chosen if f is not None}
        if other and same_everywhere(arrays, dim):
            result += (factor(arrays[0].narrow(dim, 0, 1), nests.pop()),)
            continue
        total = sum(shape[dim] for shape in shapes)
        if other and total * arrays[0].numel() // max(1, arrays[0].shape[dim]) > LARGEST_JOINT:
            result += tie_parts(call, arrays, dim, nests)
            continue
        grown = [a.expand(*a.shape[:dim], shape[dim], *a.shape[dim + 1 :]) for a, shape in zip(arrays, sizes, strict=True)]
        orders = {f.major_to_minor for f in chosen if f is not None and dim in f.dims} or {(dim, *nest) for nest in nests}
        alike = len(nests) == len(orders) == 1  # packed one way in all parts
        f = factor(torch.cat(grown, dim), min(orders) if alike else (dim,))
        if not alike:
            call.constraints.keep_columns_equal(f)
        call.constraints.keep_rows_equal(f)
        result += call.settle(f)
    return result


def pick(call: RuleContext, labels: Labels, other: frozenset[int], dim: int) -> Factor | None:
    """The part's factor over the given other dimensions; a second one there is frozen."""
    found = [f for f in labels if f.dims - {dim} == other]
    for f in found[1:]:
        call.constraints.freeze(f.labels, "overlaps another label in a join")
    return found[0] if found else None


def lay_out(f: Factor | None, shape: Sequence[int], dim: int, other: frozenset[int]) -> Tensor:
    if f is None:
        sizes = [n if d == dim or d in other else 1 for d, n in enumerate(shape)]
        return torch.zeros(sizes, dtype=torch.int64)
    return expand_along(f, shape, other | ({dim} if dim in f.dims or not other else set()))


def same_everywhere(arrays: Sequence[Tensor], dim: int) -> bool:
    """Whether the parts have the same labels, and those do not vary along the joined dimension."""
    first = arrays[0]
    return first.shape[dim] == 1 and all(a.shape == first.shape and bool((a == first).all()) for a in arrays[1:])


def tie_parts(call: RuleContext, arrays: Sequence[Tensor], dim: int, nests: set[tuple[int, ...]]) -> Labels:
    """A joint factor that would be as large as an activation: one row of labels for all instead."""
    head = arrays[0].narrow(dim, 0, 1)
    for a in arrays:
        call.constraints.tie(a, head, broadcast=a.shape != head.shape)
    return call.settle(factor(head, nests.pop()))


# -- parts that are written into a tensor --------------------------------------------------------------------------------


def written(call: RuleContext, dim: int, rows: Tensor, part: Labels, *, adds: bool = False) -> Labels:
    """A part with these labels is written, or added, to known rows of the first argument: each entry goes with its place."""
    shape = list(call.shape(call.first))
    places: Labels = NONE
    for f in call.labels(call.first):
        if dim in f.dims:
            one_by_one(call, f, dim)
        places += call.settle(factor(f.labels.index_select(dim, rows), f.major_to_minor) if dim in f.dims else f)
    shape[dim] = len(rows)
    unify(call, places, shape, part, shape, adds=adds)
    return call.labels(call.first)


def is_rewritten(call: RuleContext, rewrite: Any) -> bool:
    """Whether the rows of such a call are mapped to kept ones: it is one by that name, and no part of another."""
    return call.constraints.node < 0 or call.state.rewrite is rewrite


def index_add(call: RuleContext) -> Labels:
    vary_alike(call)
    x, source = call["self"], call["source"]
    shape = call.shape(x)
    dim = call.dim(call["dim"], len(shape))
    rows = call.data(call["index"]) if is_rewritten(call, rows_kept) else None
    if rows is not None and shape and any(dim in f.dims for f in call.labels(x)):
        call.freeze(call.labels(call["index"]), "holds indices")
        return written(call, dim, rows.reshape(-1), call.labels(source), adds="alpha" in call.named)
    flat = [n if d != dim else 1 for d, n in enumerate(shape)]
    mine = call.freeze_dims(call.labels(x), [dim], COMPUTED)
    theirs = call.freeze_dims(call.labels(source), [dim], COMPUTED)
    return unify(call, mine, flat, theirs, flat)


def scatter(call: RuleContext) -> Labels:
    vary_alike(call)
    x = call["self"]
    shape = call.shape(x)
    dim = call.dim(call["dim"], len(shape))
    rows = scattered_rows(call.op_trace, call["index"], call.tensor("src"), x, dim)
    if rows is not None and is_rewritten(call, scatter_kept) and call.get("reduce") is None:
        call.freeze(call.labels(call["index"]), "holds indices")
        return written(call, dim, rows, call.labels(call["src"]), adds="scatter_add" in name_of(call.op.func))
    parts = [ref for ref in call.inputs[1:] if call.shape(ref)]
    partly = [d for d in range(len(shape)) if d != dim and any(call.shape(ref)[d] != shape[d] for ref in parts)]
    labels = call.freeze_dims(call.freeze_dims(call.labels(x), [dim], COMPUTED), partly, PARTLY)
    flat = [1 if d == dim or d in partly else n for d, n in enumerate(shape)]
    for ref in parts:
        other = call.freeze_dims(call.freeze_dims(call.labels(ref), [dim], COMPUTED), partly, PARTLY)
        labels = unify(call, labels, flat, other, flat)
    return labels


def scattered_rows(trace: OpTrace, index: TensorRef, source: TensorRef | None, x: TensorRef, dim: int) -> Tensor | None:
    """The rows that a scatter writes whole rows of its source to, if its index is a constant repeated for all; else None."""
    shape = [n for d, n in enumerate(trace.values[x.id].shape) if d != dim]
    sizes = [trace.values[ref.id].shape for ref in (index, source) if ref is not None]
    if len(sizes) < 2 or not sizes[0] or sizes[0] != sizes[1] or shape != [n for d, n in enumerate(sizes[0]) if d != dim]:
        return None
    if trace.maker(index.id) is None and any(n > 1 for n in shape):
        return None  # one of a size of its own, which writes to as much of larger inputs
    return index_everywhere(trace, index, dim, len(sizes[0]))


def slice_scatter(call: RuleContext) -> Labels:
    shape = call.shape(call.first)
    dim = call.dim(call.get("dim", 0), len(shape))
    rows = torch.arange(shape[dim])[slice(call.get("start"), call.get("end"), call.get("step", 1))]
    return written(call, dim, rows, call.labels(call["src"]))


def select_scatter(call: RuleContext) -> Labels:
    dim = call.dim(call["dim"], len(call.shape(call.first)))
    part = tuple(
        Factor(f.labels.unsqueeze(dim), tuple(d + (d >= dim) for d in f.major_to_minor)) for f in call.labels(call["src"])
    )
    return written(call, dim, torch.tensor([call["index"] % call.shape(call.first)[dim]]), part)


# -- rewriting ---------------------------------------------------------------------------------------------------------


def kept_places(r: RewriteContext, node: fx.Node, dim: int, rows: Tensor) -> fx.Node:
    """Where those of these rows that are kept are among the kept ones."""
    places = place(r, r.result(node.args[0]), dim)[rows]
    return r.constant(places[places >= 0])


def rows_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    dim = r.number_of(argument(node, 1, "dim")) % len(r.before(r.result(node.args[0])))
    if not is_shrunk(r, r.result(node.args[0]), dim):
        return None
    data = r.capture.op_trace.values[r.result(argument(node, 2, "index")).id].data
    assert data is not None, "an index that is computed along a labelled dimension is frozen by its rule"
    return with_argument(r, node, 2, "index", kept_places(r, node, dim, data.cpu().reshape(-1)))


def scatter_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """Rows that are written whole, as a call that takes an index of rows."""
    x, name = r.result(node.args[0]), function_name(node)
    dim = r.number_of(argument(node, 1, "dim")) % len(r.before(x))
    index, source = r.result(argument(node, 2, "index")), r.result(argument(node, 3, "src"))
    source = source if isinstance(source, TensorRef) else None
    rows = scattered_rows(r.capture.op_trace, index, source, x, dim)
    if rows is None or not r.cuts(x) or node.kwargs.get("reduce") is not None or name.startswith("scatter_reduce"):
        return None
    method = ("index_add" if name.startswith("scatter_add") else "index_copy") + "_" * name.endswith("_")
    given = (argument(node, 0, "input"), dim, kept_places(r, node, dim, rows), argument(node, 3, "src"))
    return r.emit(node, tuple(map(r.argument, given[:2])) + given[2:3] + (r.argument(given[3]),), {}, method=method)


def slice_scatter_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    shape = r.before(r.result(node.args[0]))
    dim = r.number_of(argument(node, 2, "dim", 0)) % len(shape)
    if not is_shrunk(r, r.result(node.args[0]), dim):
        return None
    bounds = slice(*(known(r, argument(node, 3 + i, name)) for i, name in enumerate(("start", "end", "step"))))
    places = kept_places(r, node, dim, torch.arange(shape[dim])[bounds])
    given = (r.argument(node.args[0]), dim, places, r.argument(argument(node, 1, "src")))
    return r.emit(node, given, {}, method="index_copy")


def select_scatter_kept(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    x = r.result(node.args[0])
    dim = r.number_of(argument(node, 2, "dim")) % len(r.before(x))
    if not is_shrunk(r, r.result(node.args[0]), dim):
        return None
    index = int(known(r, argument(node, 3, "index"))) % r.before(x)[dim]
    return with_argument(r, node, 3, "index", int(place(r, x, dim)[index]))


register("cat concat concatenate", OpSpec(cat))
register("stack", OpSpec(stack))
register("index_add index_copy", OpSpec(index_add, rows_kept), functions="index_add_ index_copy_")
register("scatter scatter_add scatter_reduce", OpSpec(scatter, scatter_kept), functions="scatter_ scatter_add_")
register("slice_scatter", OpSpec(slice_scatter, slice_scatter_kept))
register("select_scatter", OpSpec(select_scatter, select_scatter_kept))
