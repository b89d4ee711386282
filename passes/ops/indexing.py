"""Indexing by tensors: exact where the indices are constants of the model, else only other dimensions pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Labels, align, along, expand_along, factor
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import RuleContext, frozen
from fxprune.passes.ops.index_maps import COMPUTED, of_size_one, one_by_one
from fxprune.passes.ops.masking import with_zeros
from fxprune.passes.ops.movement import slice_
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.rewriting import RewriteContext, SizeArguments, argument, known, places_of, resize_result, run_of, taken
from fxprune.passes.ops.unify import unify


def index(call: RuleContext) -> Labels:
    x, indices = call["self"], call["indices"]
    shape = call.shape(x)
    contents: list[Tensor | None] = []
    indexed = indexed_dims(call, indices)
    exact = all(i is None or call.data(i) is not None for i in indices)
    for i in indices:
        if i is None:
            contents.append(None)
            continue
        data = call.data(i)
        contents.append(data if data is not None else stand_in(call, i))
        call.freeze(call.labels(i), "holds indices")
    result: Labels = NONE
    for f in call.labels(x):
        touched = [d for d in indexed if d in f.dims]
        if touched and not exact:
            call.constraints.freeze(f.labels, COMPUTED)
            continue
        for d in touched:
            one_by_one(call, f, d)
        if not touched:
            result += call.settle(factor(torch.ops.aten.index.Tensor(f.labels, of_size_one(contents))))
            continue
        result += call.settle(factor(torch.ops.aten.index.Tensor(expand_along(f, shape, indexed), contents)))
    return result


def stand_in(call: RuleContext, ref: TensorRef) -> Tensor:
    return torch.zeros(call.shape(ref), dtype=torch.bool if is_mask(call, ref) else torch.int64)


def embedding(call: RuleContext) -> list[Labels]:
    """(V, D) by indices of any shape -> (*, D): rows are looked up by values of the input, columns pass."""
    weight = call.first
    for ref in call.inputs[1:]:
        call.freeze(call.labels(ref), "says what is looked up")
    passed = call.freeze_dims(call.labels(weight), [0], "is looked up by the input's values (a vocabulary)")
    ndim = len(call.shape(call.outputs[0]))
    lifted = tuple(along(f.labels.reshape(-1), ndim - 1, ndim) for f in passed)
    return [lifted] + [NONE] * (len(call.outputs) - 1)


def index_put(call: RuleContext) -> Labels:
    """What is written where indices say.

    (1) Indices that are constants of the model: each value is tied to the entry that it replaces.
    (2) One mask over leading dimensions, and a value that is the same wherever it is written: a choice element by element.
    (3) Other dimensions than the indexed ones correspond.
    """
    x, indices, values = call["self"], call["indices"], call["values"]
    shape, size = call.shape(x), call.shape(values)
    rewritten = call.constraints.node < 0 or call.state.rewrite is getitem  # under other names it keeps its indices
    if rewritten and all(i is None or call.data(i) is not None for i in indices):
        return put_at_constants(call, x, indices, values)
    indexed = indexed_dims(call, indices)
    behind = len(shape) - len(indexed)
    lead = max(0, len(size) - behind)
    if len(indices) == 1 and is_mask(call, indices[0]) and set(size[:lead]) <= {1}:
        mask = tuple(
            factor(f.labels.reshape([*f.labels.shape, *[1] * behind]), f.major_to_minor) for f in call.labels(indices[0])
        )
        chosen = unify(call, call.labels(x), shape, mask, (*call.shape(indices[0]), *[1] * behind))
        tail = tuple(factor(f.labels.reshape(f.labels.shape[lead:])) for f in call.labels(values))
        return unify(call, chosen, shape, *align(tail, size[lead:], len(shape)))
    for i in indices:
        if i is not None:
            call.freeze(call.labels(i), "holds indices")
    return put_at_computed(call, x, indices, values)


def indexed_dims(call: RuleContext, indices: list[TensorRef | None]) -> list[int]:
    """The dimensions that indices take entries along: a mask as many as it has itself."""
    found: list[int] = []
    dim = 0
    for i in indices:
        width = len(call.shape(i)) if i is not None and is_mask(call, i) else 1
        found += range(dim, dim + width) if i is not None else ()
        dim += width
    return found


def is_mask(call: RuleContext, ref: TensorRef) -> bool:
    return call.op_trace.values[ref.id].dtype in (torch.bool, torch.uint8)


def put_at_computed(call: RuleContext, x: TensorRef, indices: list[TensorRef | None], values: TensorRef) -> Labels:
    """Where what is written comes to depends on the inputs: along the indexed dimensions all stays."""
    indexed, shape, size = indexed_dims(call, indices), call.shape(x), call.shape(values)
    rest = [d for d in range(len(shape)) if d not in indexed]
    rank = max(1 if is_mask(call, i) else len(call.shape(i)) for i in indices if i is not None)
    at = indexed[0] if indexed == list(range(indexed[0], indexed[0] + len(indexed))) else 0  # in front if others lie between
    order = [*rest[:at], *[None] * rank, *rest[at:]]  # of the dimensions of what is written
    laid = lambda sizes: [1 if d is None else sizes[d] for d in order]  # noqa: E731
    passed = call.freeze_dims(call.labels(x), indexed, COMPUTED)
    places = tuple(factor(f.labels.reshape(laid(f.labels.shape)), tuple(map(order.index, f.major_to_minor))) for f in passed)
    if len(size) > len(order):
        call.freeze(call.labels(values) + places, COMPUTED)
        return passed
    given, size = align(call.labels(values), size, len(order))
    kept = call.freeze_dims(given, [d for d, n in enumerate(order) if n is None], COMPUTED)
    unify(call, places, laid(shape), kept, size)
    return passed


def put_at_constants(call: RuleContext, x: TensorRef, indices: list[TensorRef | None], values: TensorRef) -> Labels:
    """What is written is tied to the entries it replaces."""
    contents = [None if i is None else call.data(i) for i in indices]
    shape = torch.ops.aten.index.Tensor(torch.empty(call.shape(x), device="cpu"), contents).shape
    places: Labels = NONE
    indexed = indexed_dims(call, indices)
    for f in call.labels(x):
        full = expand_along(f, call.shape(x), indexed)
        g = factor(torch.ops.aten.index.Tensor(full, contents))
        places += (g,) if g.major_to_minor else NONE
    unify(call, places, shape, *align(call.labels(values), call.shape(values), len(shape)))
    return call.labels(x)


# -- rewriting ---------------------------------------------------------------------------------------------------------


def getitem(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """x[index]: along dimensions that shrank, numbers, slices and index tensors are mapped to kept positions."""
    return indexed(r, node, node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))


def called_slice(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """A slice along one dimension, called by name."""
    dim = argument(node, 1, "dim", 0) % len(r.before(r.result(node.args[0])))
    bounds = slice(*(argument(node, 2 + i, name) for i, name in enumerate(("start", "end", "step"))))
    return indexed(r, node, (*[slice(None)] * dim, bounds))


def called_index(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """An index by tensors, called by name."""
    return indexed(r, node, tuple(slice(None) if i is None else i for i in argument(node, 1, "indices")))


def indexed(r: RewriteContext, node: fx.Node, index: tuple[Any, ...]) -> fx.Node | None:
    source = r.result(node.args[0])
    if not isinstance(source, TensorRef):
        return None
    shape = r.before(source)
    index = tuple([entry for i in index for entry in entries(r, i)])
    spans = [span(r, i) for i in index]
    at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    fill = (slice(None),) * (len(shape) - sum(spans))
    full = (*index[:at], *fill, *index[at + 1 :]) if at < len(index) else (*index, *fill)
    dim, made = 0, dims_indexed(r, full)
    target = r.result(node) if node.target is not operator.setitem else written(r, node.args[2], made)
    if target is not None and not isinstance(target, TensorRef):
        return None
    left = r.after(source)
    new: list[Any] = []
    joint = {d for cut in r.cuts(source) if len(cut.dims) > 1 for d in cut.dims}
    lines: dict[int, Tensor] = {}  # what entries before take of rows: others may keep other columns
    for i, out in zip(full, made, strict=True):
        shrunk = dim < len(shape) and left[dim] < shape[dim]
        if target is not None and is_lookup(r, i):  # with others that lose entries
            shrunk |= any(r.after(target)[d] < r.before(target)[d] for d in out)
        if i is None or isinstance(i, bool):
            new.append(i)
            continue
        if not shrunk:
            new.append(unchanged(r, i))
        else:
            new.append(mapped(r, r.positions(source, dim, lines), shape[dim], target, out, i))
        if dim in joint and (places := taken(r, i, shape[dim])) is not None:
            lines[dim] = places
        dim += span(r, i)
    while new and at == len(index) and isinstance(new[-1], slice) and new[-1] == slice(None) and len(new) > len(index):
        new.pop()
    args = [r.new[node.args[0]], tuple(new) if len(new) != 1 else new[0]]  # type: ignore[index]
    if node.target not in (operator.getitem, operator.setitem):
        return r.graph.call_function(operator.getitem, tuple(args))
    return r.emit(node, args + [r.argument(a) for a in node.args[2:]], {})


def entries(r: RewriteContext, i: Any) -> list[Any]:
    """An entry of an index, or what it is the same as: flags of several dimensions are positions along each."""
    ref = r.result(i) if isinstance(i, fx.Node) else None
    data = r.capture.op_trace.values[ref.id].data if isinstance(ref, TensorRef) else None
    if isinstance(i, list) and not collect(i, fx.Node):
        i = data = torch.tensor(i, dtype=None if collect(i, int) else torch.int64)
    if data is not None and data.dim() > 1 and data.dtype in (torch.bool, torch.uint8):
        return list(data.cpu().nonzero(as_tuple=True))
    return [i]


def written(r: RewriteContext, value: Any, made: Sequence[range]) -> TensorRef | None:
    """What is written to the places of an index, where it has a dimension for each that the index makes."""
    ref = r.result(value)
    rank = max((d + 1 for out in made for d in out), default=0)
    return ref if isinstance(ref, TensorRef) and len(r.before(ref)) == rank else None


def unchanged(r: RewriteContext, i: Any) -> Any:
    return bounds(r, i) if isinstance(i, slice) else r.constant(i) if isinstance(i, torch.Tensor) else r.argument(i)


def is_lookup(r: RewriteContext, i: Any) -> bool:
    """Whether an entry of an index is a list of known positions."""
    ref = r.result(i) if isinstance(i, fx.Node) else None
    known = isinstance(ref, TensorRef) and r.capture.op_trace.values[ref.id].data is not None
    return known or isinstance(i, list | torch.Tensor)


def dims_indexed(r: RewriteContext, index: tuple[Any, ...]) -> list[range]:
    """For each entry of an index the dimensions of the result that it makes.

    Those by tensors make theirs together: where the first of them stands, or in front where others lie in between.
    """
    made = [1 if i is None or isinstance(i, slice | bool) else 0 for i in index]
    together = dict[int, int]()  # how many dimensions each entry by a tensor has
    for n, i in enumerate(index):
        ref = r.result(i) if isinstance(i, fx.Node) else None
        if isinstance(i, list | torch.Tensor):
            together[n] = 1 if isinstance(i, list) else i.dim()
        elif isinstance(ref, TensorRef):
            together[n] = len(r.before(ref)) if r.capture.op_trace.values[ref.id].dtype != torch.bool else 1
    most = max(together.values(), default=0)
    first, last = min(together, default=0), max(together, default=0)
    apart = any(made[first:last])
    begins = [sum(made[:n]) + (most if apart or n > last else 0) for n in range(len(index))]
    begin = 0 if apart else sum(made[:first])
    return [range(begin, begin + most) if n in together else range(at, at + made[n]) for n, at in enumerate(begins)]


def span(r: RewriteContext, i: Any) -> int:
    """How many dimensions one entry of an index takes up."""
    if i is None or i is Ellipsis or isinstance(i, bool):
        return 0
    ref = r.result(i) if isinstance(i, fx.Node) else None
    if isinstance(ref, TensorRef) and r.capture.op_trace.values[ref.id].dtype in (torch.bool, torch.uint8):
        return len(r.before(ref))
    return 1


def bounds(r: RewriteContext, i: slice) -> slice:
    """A slice over a dimension that did not shrink: its bounds keep their values."""
    return slice(*(r.argument(b) for b in (i.start, i.stop, i.step)))


def mapped(r: RewriteContext, kept: Tensor, size: int, target: TensorRef | None, out: range, i: Any) -> Any:
    """One entry of an index along a dimension of this size that shrank to what is kept."""
    table = places_of(kept, size)
    if isinstance(i, slice):
        if i == slice(None):
            return i
        chosen = table[taken(r, i, size)]
        chosen = chosen[chosen >= 0]
        run = run_of(chosen)
        if run is None:
            return r.constant(chosen)
        if not len(chosen):
            return slice(0, 0)
        return slice(bound(run.start, i.start, len(kept), 0), bound(run.stop, i.stop, len(kept), size))
    if isinstance(i, int) or isinstance(r.result(i), int):
        value = i if isinstance(i, int) else r.capture.results[i]
        at = int(table[value % size])
        return at - len(kept) if i is value and at >= 0 > value else at
    if isinstance(i, list):  # with sizes in it
        i = torch.tensor([known(r, position) for position in i])
    data = i if isinstance(i, torch.Tensor) else r.capture.op_trace.values[r.result(i).id].data
    if data is None:  # the numbers of what is chosen by value are those of kept entries by themselves
        return r.argument(i)
    data = data.cpu()
    if data.dtype in (torch.bool, torch.uint8):
        data = data.nonzero().flatten()
    if target is not None and len(out):
        data = left_of(r, target, out, data)
    places = table[data % size]
    return r.constant(places if target is not None or bool((places >= 0).all()) else places[places >= 0])


FEWER_CLASSES = resize_result(SizeArguments(1, ("num_classes",), lambda args, kwargs, ndim, count: ndim - 1))


def classes(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """Numbers of kept entries are encoded as such; others may be of any class: the columns of those that go are taken out."""
    ref = r.result(node)
    number, last = r.before(ref)[-1], len(r.before(ref)) - 1
    if r.result(node.args[0]).id in r.picks or r.after(ref)[-1] == number:
        return FEWER_CLASSES(r, node)
    whole = r.emit(node, (r.argument(node.args[0]), number), {})
    return r.pick(whole, ref, last, r.positions(ref, last), number)


def bound(place: int, given: Any, number: int, end: int) -> int | None:
    """A bound of a slice at a place among `number` kept entries, counted from where the given one is; `end` needs none."""
    reached = place == (number if end else 0)  # which a slice by steps may not do, though it has no bound
    if reached and (given is None or not end or (isinstance(given, int) and given > end)):
        return None
    if isinstance(given, int) and not given > end > 0:  # positions may be part of the dimension, and be more another time
        return (place - number or None) if given < 0 else place
    return None if reached else place


def left_of(r: RewriteContext, target: TensorRef, out: range, data: torch.Tensor) -> torch.Tensor:
    """What is left of positions that make the dimensions `out` of a result."""
    before, after = ([shape[d] for d in out] for shape in (r.before(target), r.after(target)))
    stays = torch.ones(before, dtype=torch.bool)
    for cut in r.cuts(target):
        mine = [d for d in out if d in cut.dims]
        if len(mine) == len(cut.dims):
            stays &= cut.mask(r.before(target)).reshape([n if d in mine else 1 for d, n in zip(out, before, strict=True)])
        for d in mine if len(mine) < len(cut.dims) else ():
            line = torch.isin(torch.arange(r.before(target)[d]), r.positions(target, d))
            stays &= line.reshape([-1 if other == d else 1 for other in out])
    return data.expand(before)[stays].reshape(after)


register("slice slice_copy", OpSpec(slice_, called_slice, moves=True, views=True))
register("index _unsafe_index", OpSpec(index, called_index, moves=True))
register("", OpSpec(rewrite=getitem), functions="getitem __getitem__ setitem")
register("embedding _embedding_bag _embedding_bag_forward_only embedding_bag", OpSpec(embedding))
register("index_put _index_put_impl", OpSpec(index_put))
BY_VALUE = frozen("is selected by value")
register("diagonal_scatter", OpSpec(frozen("is written onto a diagonal, or read from it")))
register(
    "index_fill masked_scatter masked_select _unique2 unique_dim bucketize searchsorted bincount",
    OpSpec(BY_VALUE),
)
register("nonzero", OpSpec(BY_VALUE, masked=with_zeros))
register("one_hot", OpSpec(BY_VALUE, classes))
