"""Indexing by tensors: exact where the indices are a constant of the model, else only other dimensions pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.passes.ir.labels import NONE, Labels, align, along, expand_along, factor
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.movement import one_by_one
from fxprune.passes.ops.registry import rule
from fxprune.passes.ops.unify import unify

COMPUTED = "is indexed by a tensor computed from the inputs"


@rule("aten::index", "aten::_unsafe_index")
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
        contents.append(data.cpu() if data is not None else stand_in(call, i))
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


def stand_in(call: RuleContext, ref: TensorRef) -> Tensor:
    return torch.zeros(call.shape(ref), dtype=torch.bool if is_mask(call, ref) else torch.int64)


@rule("aten::embedding", "aten::_embedding_bag", "aten::_embedding_bag_forward_only", "aten::embedding_bag")
def embedding(call: RuleContext) -> list[Labels]:
    """(V, D) by indices of any shape -> (*, D): rows are looked up by values of the input, columns pass."""
    weight = call.first
    passed = call.freeze_dims(call.labels(weight), [0], "is looked up by the input's values (a vocabulary)")
    ndim = len(call.shape(call.outputs[0]))
    lifted = tuple(along(f.labels.reshape(-1), ndim - 1, ndim) for f in passed)
    return [lifted] + [NONE] * (len(call.outputs) - 1)


@rule("aten::gather", "aten::take_along_dim")
def gather(call: RuleContext) -> Labels:
    """Along `dim` entries are picked by value; along the others input and index correspond one to one."""
    x, picks = call["self"], call["index"]
    ndim = len(call.shape(x))
    dim = call.dim(call["dim"], ndim)
    passed = call.freeze_dims(call.labels(x), [dim], COMPUTED)
    shape = list(call.shape(x))
    shape[dim] = 1
    return unify(call, passed, shape, *align(call.labels(picks), call.shape(picks), ndim))


@rule("aten::index_put", "aten::_index_put_impl")
def index_put(call: RuleContext) -> Labels:
    """What is written where indices say.

    (1) Indices that are constants of the model: each value is tied to the entry that it replaces.
    (2) One mask over leading dimensions, and a value that is the same wherever it is written: a choice element by element.
    (3) Rows are written: the dimensions behind the indexed ones correspond from the right.
    """
    x, indices, values = call["self"], call["indices"], call["values"]
    shape, size = call.shape(x), call.shape(values)
    rewritten = call.constraints.maker in ("setitem", "")  # what is called by another name keeps its indices
    if rewritten and all(i is None or call.data(i) is not None for i in indices):
        return put_at_constants(call, x, indices, values)
    indexed = indexed_dims(call, indices)
    if indexed != list(range(len(indexed))):
        call.freeze(call.labels(x) + call.labels(values), COMPUTED)
        return NONE
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
    passed = call.freeze_dims(call.labels(x), indexed, COMPUTED)
    tail = tuple(factor(f.labels.reshape(f.labels.shape[len(indexed) :])) for f in passed)
    kept = call.freeze_dims(call.labels(values), range(lead), COMPUTED)
    tails = tuple(factor(f.labels.reshape(f.labels.shape[lead:])) for f in kept)
    unify(call, tail, shape[len(indexed) :], *align(tails, size[lead:], behind))
    return passed


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


def put_at_constants(call: RuleContext, x: TensorRef, indices: list[TensorRef | None], values: TensorRef) -> Labels:
    """What is written is tied to the entries it replaces."""
    contents = [None if i is None else call.data(i).cpu() for i in indices]  # type: ignore[union-attr]
    shape = torch.ops.aten.index.Tensor(torch.empty(call.shape(x), device="cpu"), contents).shape
    places: Labels = NONE
    indexed = indexed_dims(call, indices)
    for f in call.labels(x):
        full = expand_along(f, call.shape(x), indexed)
        g = factor(torch.ops.aten.index.Tensor(full, contents))
        places += (g,) if g.major_to_minor else NONE
    unify(call, places, shape, *align(call.labels(values), call.shape(values), len(shape)))
    return call.labels(x)


@rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def scatter(call: RuleContext) -> Labels:
    x = call["self"]
    shape = call.shape(x)
    dim = call.dim(call["dim"], len(shape))
    labels = call.freeze_dims(call.labels(x), [dim], COMPUTED)
    flat = [n if d != dim else 1 for d, n in enumerate(shape)]
    for ref in call.inputs[1:]:
        if call.shape(ref):
            other = call.freeze_dims(call.labels(ref), [dim], COMPUTED)
            labels = unify(call, labels, flat, other, [n if d != dim else 1 for d, n in enumerate(call.shape(ref))])
    return labels


@rule("aten::index_add", "aten::index_copy")
def index_add(call: RuleContext) -> Labels:
    x, source = call["self"], call["source"]
    shape = call.shape(x)
    dim = call.dim(call["dim"], len(shape))
    flat = [n if d != dim else 1 for d, n in enumerate(shape)]
    mine = call.freeze_dims(call.labels(x), [dim], COMPUTED)
    theirs = call.freeze_dims(call.labels(source), [dim], COMPUTED)
    return unify(call, mine, flat, theirs, flat)


@rule(
    "aten::index_fill",
    "aten::masked_scatter",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
)
@rule("aten::unique_dim", "aten::bucketize", "aten::searchsorted", "aten::one_hot", "aten::bincount")
def by_value(call: RuleContext) -> list[Labels]:
    for ref in call.inputs:
        call.freeze(call.labels(ref), "is selected by value")
    return [NONE] * len(call.outputs)
