"""Picks: whole numbers that say which entries of a labelled dimension were chosen by value.

A router scores experts, `topk` chooses some, and what it returns indexes the weights of the experts. Removed entries are never
chosen, and the numbers of the others become their places among the kept ones. That is exact as long as numbers only pick
entries of dimensions that lose the same: those are tied to the scores. What else is done with them freezes the scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fxprune.passes.coupling.listed_experts import OF_ZEROS, PRODUCTS
from fxprune.passes.ir.labels import NONE, Factor, Labels
from fxprune.passes.ir.op_trace import name_of, writes
from fxprune.passes.ir.propagation_state import PropagationState
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.registry import FUNCTIONS, spec_of

ELSEWHERE = "is chosen by value, and more is done with the choice than to index"
CONVERSIONS = frozenset(
    f"aten::{n}" for n in "_to_copy clone detach alias contiguous lift_fresh view_copy index_select".split()
)
SHAPE_ALONE = frozenset(f"aten::{n}" for n in "zeros_like ones_like empty_like full_like new_zeros new_empty new_ones".split())
COMPARISONS = frozenset(["aten::eq", "aten::ne"])

Handled = list[Labels] | Labels | None


def follow_picks(call: RuleContext) -> Handled:
    """The labels of the results of a call that makes picks or reads them; None where its own rule says them."""
    state, name = call.state, name_of(call.op.func)
    name = name.removesuffix("_") if not name.endswith("__") else name
    if state.number is not None:  # Python has just read a pick, as it does in `weight[pick]`
        value, picked, state.number = *state.number, None
        if name == "aten::select" and call["index"] == value and call.dim(call["dim"], 9) >= 0:
            return index_by(call, call.first, call.dim(call["dim"], len(call.shape(call.first))), picked)
        refuse(call, picked)
    read = [ref for ref in call.inputs if ref.id in state.picks]
    if state.marked and not read and (handled := follow_marks(call, name)) is not None:
        return handled
    if not read:
        return MAKERS[name](call) if name in MAKERS else None
    if name in READERS:
        return READERS[name](call)
    if read == call.inputs[:1] and (spec_of(call.op).moves or name in CONVERSIONS):
        mark(call, call.outputs, state.picks[read[0].id])
    elif name not in SHAPE_ALONE:
        for ref in read:
            refuse(call, state.picks[ref.id])
    return None


def follow_marks(call: RuleContext, name: str) -> Handled:
    """What is zero at entries that are not chosen: the labels of one entry of it, None where the op's own rule says them."""
    marked, labels = call.state.marked, call.labels(call.first) if call.inputs else NONE
    if not any(ref.id in marked for ref in call.inputs):
        return None
    if any(ref.id in marked for ref in writes(call.op)):
        marked.clear()
        return None
    if call.first.id in marked and name in ("aten::select", "aten::slice") and not call.state.opaque:
        dim = call.dim(call["dim"], len(call.shape(call.first)))
        along = [f for f in labels if dim in f.dims]
        number = call["index"] if name == "aten::select" else call.get("start") or 0
        single = name == "aten::select" or call.shape(call.outputs[0])[dim] == 1
        if single and len(along) == 1 and len(along[0].major_to_minor) == 1:
            call.state.asked[call.outputs[0].id] = along[0].flat, number % len(along[0].flat)
            return by_rule(call, call.first, tuple(f for f in labels if f is not along[0]))
    if name in PRODUCTS or (call.first.id in marked and (spec_of(call.op).moves or name in OF_ZEROS)):
        marked.update(ref.id for ref in call.outputs)
    return None


def finish_picks(state: PropagationState, refs: Sequence[TensorRef], why: str = ELSEWHERE) -> None:
    """Freeze what was chosen where the numbers themselves are seen: among a model's outputs, or by unknown code."""
    for ref in refs:
        if ref.id in state.picks:
            state.constraints.freeze(state.picks[ref.id], why)


def refuse(call: RuleContext, picked: np.ndarray) -> None:
    call.constraints.freeze(picked, ELSEWHERE)


def mark(call: RuleContext, refs: Sequence[TensorRef], picked: np.ndarray) -> None:
    for ref in refs:
        call.state.picks[ref.id] = picked


# -- what makes picks ----------------------------------------------------------------------------------------------------


def best(call: RuleContext) -> Handled:
    """`topk`, `argmax`: so many entries at least stay. Of several rows each keeps so many, if only values are read of them."""
    x, places = call.first, call.outputs[-1:]
    ndim = len(call.shape(x))
    if len(call.inputs) > 1 or not ndim or call.get("dim", -1) is None:
        return None
    dim = call.dim(call.get("dim", -1), ndim)
    if name_of(call.op.func) in ("aten::max", "aten::min", "aten::argmax", "aten::argmin") and "dim" not in call.named:
        return None
    along = [f for f in call.labels(x) if dim in f.dims]
    read = call.used(places[0]) or not call.uses
    if not read and name_of(call.op.func) != "aten::topk":
        return None  # the extreme itself is a reduction like others
    if len(along) != 1 or (len(along[0].major_to_minor) > 1 and (call.used(places[0]) or along[0].major_to_minor[-1] != dim)):
        return None
    call.constraints.keep_copies(along)
    for row in along[0].rows().numpy():
        call.constraints.keep_at_least(row, call.get("k", 1))
    if read and len(along[0].major_to_minor) == 1:
        mark(call, places, along[0].flat)
    reduced = len(call.shape(call.outputs[0])) < ndim
    left = tuple(f.without(dim) if reduced else f for f in call.labels(x) if dim not in f.dims)
    if len(along[0].major_to_minor) > 1:
        rows = call.constraints.new_row_labels(along[0], along[0].major_to_minor[:-1], whole=False)
        left += (rows.without(dim) if reduced else rows,)
    return [left] * len(call.outputs)


def where_true(call: RuleContext) -> Handled:
    """`nonzero` of a vector: the numbers of its entries."""
    labels = call.labels(call.first)
    if len(call.shape(call.first)) != 1 or len(labels) != 1:
        return None
    mark(call, call.outputs, labels[0].flat)
    return NONE


def runs(call: RuleContext) -> Handled:
    """A grouped product whose runs are as many as picks count: a matrix goes with its run, which is empty."""
    ends = call.inputs[2] if len(call.inputs) > 2 else None
    along = [] if ends is None else [f for f in call.labels(ends) if f.dims == {0}]
    return index_by(call, call.inputs[1], 0, along[0].flat) if along else None


# -- what reads them -----------------------------------------------------------------------------------------------------


def tie(call: RuleContext, labels: Labels, dim: int, picked: np.ndarray) -> Labels | None:
    """Tie the entries of a dimension to what was picked; returns the labels without them, None if the dimension stays."""
    along = [f for f in labels if dim in f.dims]
    if len(along) != 1 or len(along[0].major_to_minor) > 1:
        refuse(call, picked)
        return None
    n = min(len(picked), len(along[0].flat))
    call.constraints.tie(torch.from_numpy(along[0].flat[:n]), torch.from_numpy(picked[:n]))
    for rest in (along[0].flat[n:], picked[n:]):
        if len(rest):
            refuse(call, rest)
    return tuple(f for f in labels if f is not along[0])


def index_by(call: RuleContext, x: TensorRef, dim: int, picked: np.ndarray) -> Handled:
    """Entries of a dimension of `x` by their numbers: the op's own rule says what becomes of the other dimensions."""
    labels = call.labels(x)
    left = tie(call, labels, dim, picked)
    return None if left is None else by_rule(call, x, left)


def by_rule(call: RuleContext, x: TensorRef, left: Labels) -> Handled:
    """What the op's own rule says where `x` has other labels."""
    labels, rule = call.labels(x), spec_of(call.op).labels
    if rule is None:
        return None
    call.known[x.id] = left
    try:
        return rule(call)
    finally:
        call.known[x.id] = labels


def indexed(call: RuleContext) -> Handled:
    """x[..., pick, ...], or pick[...]"""
    x, picks, dim = call["self"], call.state.picks, 0
    found: list[tuple[int, np.ndarray]] = []
    for i in call["indices"]:
        if i is not None and i.id in picks:
            found.append((dim, picks[i.id]))
        mask = i is not None and call.op_trace.values[i.id].dtype in (torch.bool, torch.uint8)
        dim += len(call.shape(i)) if mask else 1
    if x.id in picks:
        mark(call, call.outputs, picks[x.id])
    if len(found) != 1:
        for _, picked in found:
            refuse(call, picked)
        return None
    return index_by(call, x, *found[0])


def along_dim(weight: str, index: str, dim: int | None = None) -> Callable[[RuleContext], Handled]:
    """Entries of one dimension, which the call names or which is always the same."""

    def rule(call: RuleContext) -> Handled:
        x, picks = call[weight], call.state.picks
        if x.id in picks:
            mark(call, call.outputs, picks[x.id])
        if call[index].id not in picks:
            return None
        at = call.dim(call["dim"], len(call.shape(x))) if dim is None else dim
        return index_by(call, x, at, picks[call[index].id])

    return rule


def scattered(call: RuleContext) -> Handled:
    """What is written where picks say, into zeros: those have an entry for each that could be picked."""
    x, picked = call["self"], call.state.picks.get(call["index"].id)
    others = [ref for ref in call.inputs if ref.id in call.state.picks and ref is not call["index"]]
    finish_picks(call.state, others)
    if picked is None:
        return None
    ndim = len(call.shape(x))
    dim, size = call.dim(call["dim"], ndim), call.shape(x)[call.dim(call["dim"], ndim)]
    labels = call.labels(x)
    if not any(dim in f.dims for f in labels):
        maker = call.op_trace.maker(x.id)
        if maker is None or maker.inputs or size < len(picked) or not call.state.opaque:
            refuse(call, picked)
            return None
        labels += (Factor.vector(np.concatenate([picked, np.zeros(size - len(picked), picked.dtype)]), dim, ndim),)
        call.known[x.id] = labels
    left = tie(call, labels, dim, picked)
    if left is None:
        return None
    along = tuple(f for f in labels if dim in f.dims)
    if x.id in call.state.marked or is_fresh_zero(call, x):
        call.state.marked.add(call.outputs[0].id)
    if size == len(picked):
        along = (Factor.vector(picked, dim, ndim),)
        labels = left + along
    call.known[x.id] = left
    rule = spec_of(call.op).labels
    made = rule(call) if rule is not None else left
    call.known[x.id] = labels
    return (*made, *along)


def is_fresh_zero(call: RuleContext, x: TensorRef) -> bool:
    """Whether a value is zeros that nothing else has been done with yet."""
    chain = {x.id}
    maker = call.op_trace.maker(x.id)
    while maker is not None and name_of(maker.func) in CONVERSIONS and maker.inputs and maker.inputs[0].id not in chain:
        chain.add(maker.inputs[0].id)
        maker = call.op_trace.maker(maker.inputs[0].id)
    before = itertools.takewhile(lambda op: op is not call.op, call.op_trace.ops)
    seen = [op for op in before if any(ref.id in chain for ref in op.inputs)]
    filled_with = None if maker is None else spec_of(maker).filled_with
    made = maker is not None and filled_with is not None and filled_with(OpView(maker, call.op_trace)) == 0
    return made and all(len(op.outputs) == 1 and op.outputs[0].id in chain and name_of(op.func) in CONVERSIONS for op in seen)


def counted(call: RuleContext) -> Handled:
    """A histogram with one bin for each entry."""
    picked = call.state.picks[call.first.id]
    if not (call["bins"] == len(picked) and call["min"] == 0 and call["max"] == len(picked) - 1):
        refuse(call, picked)
        return NONE
    return (Factor.vector(picked, 0, 1),)


def ordered(call: RuleContext) -> Handled:
    """Sorting by number: kept entries keep their order."""
    if name_of(call.op.func) == "aten::sort":
        mark(call, call.outputs[:1], call.state.picks[call.first.id])
    return None


def compared(call: RuleContext) -> Handled:
    """Which numbers are equal to one that none of the kept entries has, or to those of a row of all numbers (`one_hot`)."""
    picks, (first, *others) = call.state.picks, call.inputs
    picked = picks.get(first.id)
    if others:
        ndim = len(call.shape(call.outputs[0]))
        extra = ndim - len(call.shape(others[0]))
        maker = call.op_trace.maker(others[0].id)
        along = [f for f in call.labels(others[0]) if f.dims == {ndim - 1 - extra}]
        numbers = maker is not None and name_of(maker.func) == "aten::arange" and maker.args[0] == len(along and along[0].flat)
        if picked is not None and others[0].id not in picks and numbers and call.shape(first)[-1:] == (1,):
            tie(call, tuple(along), ndim - 1 - extra, picked)
            call.state.marked.add(call.op.outs.id)
            return (along[0].at(ndim - 1, ndim),)
        finish_picks(call.state, call.inputs)
        return None
    assert picked is not None
    number = call["other"]
    beyond = isinstance(number, int) and (number >= len(picked) or (call.state.opaque and number >= 0 and picked[number] == 0))
    equal = name_of(call.op.func) == "aten::eq" and type(number) is int and 0 <= number < len(picked)
    if equal and not call.state.opaque:
        call.state.asked[call.op.outs.id] = picked, number
    elif not beyond:
        refuse(call, picked)
    return None


def read_by_python(call: RuleContext) -> Handled:
    call.state.number = (call.op.outs, call.state.picks[call.first.id])
    return []


def ranged(call: RuleContext) -> Handled:
    """The least and the greatest of all, together or each by itself, which `one_hot` compares to the number of classes."""
    of_all = len(call.inputs) == 1 and call.get("dim", None) is None
    tried = call.state.opaque or call.state.rewrite is FUNCTIONS["one_hot"].rewrite  # opaque modules are tried once cut
    if not (of_all and tried):
        refuse(call, call.state.picks[call.first.id])
    return None


MAKERS: dict[str, Callable[[RuleContext], Handled]] = {
    **{f"aten::{n}": best for n in ("topk", "max", "min", "argmax", "argmin")},
    "aten::nonzero": where_true,
    "aten::_grouped_mm": runs,
}
READERS: dict[str, Callable[[RuleContext], Handled]] = {
    "aten::index": indexed,
    "aten::index_select": along_dim("self", "index"),
    "aten::gather": along_dim("self", "index"),
    "aten::embedding": along_dim("weight", "indices", 0),
    **{f"aten::{n}": scattered for n in ("scatter", "scatter_add", "scatter_reduce")},
    "aten::histc": counted,
    "aten::sort": ordered,
    "aten::argsort": ordered,
    **dict.fromkeys(COMPARISONS, compared),
    "aten::_local_scalar_dense": read_by_python,
    **{f"aten::{n}": ranged for n in ("aminmax", "max", "min")},
}
