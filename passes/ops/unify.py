"""Unification: the factors of the two operands of a pointwise op become those of its result, under broadcasting.

Invariant: for every removal that satisfies the constraints reported here, the op of the sliced operands is the slice of its
result. `tests/test_unify.py` holds it against random operands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import RuleContext

KEPT_WHOLE = "is combined with a tensor that cannot be pruned along that dimension"
FROM_INPUT = "is tied to an input of the model"
FROM_CONSTANT = "is combined with a constant that cannot be pruned along that dimension"


def unify(
    call: RuleContext, a: Labels, a_shape: Sequence[int], b: Labels, b_shape: Sequence[int], *, adds: bool = False
) -> Labels:
    """The factors of two operands of equal rank, made one set; `adds` says that their entries are added.

    (1) Factors over the same dimensions are tied element by element.
    (2) A factor passes if the other operand has size 1 along its minor dimension, and is frozen if it keeps all entries there.
    (3) Factors that overlap are tied under broadcasting; the result varies only where both do.
    """
    if not a and not b:
        return NONE
    if not call.constraints.reduced:
        if (
            len(a) == 1 == len(b) and len(a[0].major_to_minor) == 1 and a[0].major_to_minor == b[0].major_to_minor
        ):  # (1), as it is nearly always
            call.constraints.tie_vectors(a[0], b[0])
            return (call.constraints.determine(a[0], b[0], adds=adds),)
        plain = lines(call, a, a_shape, b, b_shape, adds=adds)
        if plain is not None:
            return plain
    left, right = list(a), list(b)
    told: set[int] = set()  # the dimensions along which the rows of one operand are told by row labels of the other one
    if call.constraints.reduced:
        left, right = beside_rows(call, left, right, told), beside_rows(call, right, left, told)
    result: list[Factor] = compose(call, left, right) + compose(call, right, left)
    for patient in (not call.state.seeking_heads, False):
        for f in list(left):
            twin = counterpart(f, [g for g in right if g.dims == f.dims])
            if twin is not None and not (patient and outbid(f, twin, left)):  # (1)
                left.remove(f)
                right.remove(twin)
                match(call, f, twin)
                result.append(twin if call.constraints.are_row_labels(twin) else call.constraints.determine(f, twin, adds=adds))
    taken = {d for f in result for d in f.dims}
    result += lone(call, left, right, taken, b_shape, told) + lone(call, right, left, taken, a_shape, told)
    for f in [f for f in left if any(f.dims & g.dims for g in right)]:  # (3)
        partners = [g for g in right if f.dims & g.dims]
        g = main_partner(call, f, partners)
        shared = f.dims & g.dims
        if any(shared & h.dims and not made_on_the_way(call, h) for h in result):
            for each in (f, *partners):
                call.constraints.freeze(each.labels, kept_whole(call))
            continue
        call.constraints.tie(f.labels, g.labels, broadcast=True)
        wider = f if len(f.major_to_minor) > len(g.major_to_minor) else g
        if not call.state.seeking_heads:
            lie_across(call, wider, shared)
        apart = heads_alone(wider, wider.dims - shared) if call.state.seeking_heads else None
        if apart is not None:  # it still tells heads apart, and those of rows that it stands for are the same
            call.constraints.tie(wider.labels, apart.labels.expand_as(wider.labels))
            result.append(apart)
            continue
        narrow = g.labels
        for d in g.dims - shared:
            narrow = narrow.narrow(d, 0, 1)
        result.append(factor(narrow, g.major_to_minor))
        for other in partners:
            if other is not g:
                call.constraints.freeze(other.labels, kept_whole(call))
    return tuple(f for f in result if f.major_to_minor)


def vary_alike(call: RuleContext) -> None:
    """Copies and constants that no call has read yet vary jointly along the dimensions along which another operand does.

    What is alike everywhere can lose any of its entries, and so the same ones as what it meets. Dimensions correspond from the
    right.
    """
    for ref in call.inputs:
        new = call.state.unread.get(ref.id, frozenset())
        for f in [f for other in call.inputs if other is not ref for f in joint_in(call, ref, other)] if len(new) > 1 else ():
            if f.dims <= new and all(f.labels.shape[d] == call.shape(ref)[d] for d in f.dims):
                apart = [g for g in call.labels(ref) if g.dims.isdisjoint(f.dims)]
                made = Factor(call.constraints.fresh(f.labels.numel()).reshape(f.labels.shape), f.major_to_minor)
                if any(call.constraints.copies.meets(g.flat[:1]) for g in call.labels(ref) if g.dims & f.dims):
                    call.constraints.copies.add(made.flat)
                call.known[ref.id] = (*apart, made)
                new -= f.dims


def joint_in(call: RuleContext, ref: TensorRef, other: TensorRef) -> list[Factor]:
    """The factors of one operand that vary along several dimensions, all of which another one has, as that one numbers them."""
    ndim = len(call.shape(ref))
    extra = ndim - len(call.shape(other))
    joint = [f for f in call.labels(other) if len(f.major_to_minor) > 1 and min(f.dims) + extra >= 0]
    if extra >= 0:
        return list(align(tuple(joint), call.shape(other), ndim)[0])
    return [factor(f.labels.reshape(f.labels.shape[-extra:]), tuple(d + extra for d in f.major_to_minor)) for f in joint]


def lines(
    call: RuleContext, a: Labels, a_shape: Sequence[int], b: Labels, b_shape: Sequence[int], *, adds: bool
) -> Labels | None:
    """What `unify` comes to where both operands have at most one factor along a dimension, and none along several.

    None where they do not, or where one keeps all of what the other varies along.
    """
    theirs = {f.major_to_minor: f for f in b}
    mine = {f.major_to_minor: f for f in a}
    if len(theirs) < len(b) or len(mine) < len(a) or any(len(nest) > 1 for nest in (*mine, *theirs)):
        return None
    left = [f for nest, f in mine.items() if nest not in theirs]
    right = [f for nest, f in theirs.items() if nest not in mine]
    if any(b_shape[f.major_to_minor[0]] > 1 for f in left) or any(a_shape[f.major_to_minor[0]] > 1 for f in right):
        return None
    met = [f for nest, f in mine.items() if nest in theirs]
    for f in met:
        call.constraints.tie_vectors(f, theirs[f.major_to_minor])
    return (*[call.constraints.determine(f, theirs[f.major_to_minor], adds=adds) for f in met], *left, *right)


def lie_across(call: RuleContext, wider: Factor, shared: frozenset[int]) -> None:
    """Note the lines of a joint factor that are made one unit each, if there are few of them and they are long."""
    rows, rest = [d for d in wider.major_to_minor if d in shared], [d for d in wider.major_to_minor if d not in shared]
    count = math.prod(wider.labels.shape[d] for d in rows)
    if rest and 2 * count * count < wider.labels.numel():
        others = [d for d in range(wider.labels.dim()) if d not in rows]
        call.state.across.append(wider.labels.permute([*others, *rows]).reshape(-1, count))


def heads_alone(f: Factor, dims: Iterable[int]) -> Factor | None:
    """A factor without those of some dimensions whose rows are no heads; None where no such dimension is left.

    Heads occur equally often; class tokens before patches do not. Of such rows the first one stands for all others, or the last
    one where the first does not tell heads apart.
    """
    rows = [d for d in dims if d in f.dims]
    if occur_alike(f.labels, f.dims.difference(rows)):
        return f
    for end in (0, -1):
        labels = f.labels
        for d in rows:
            if not occur_alike(f.labels, f.dims - {d}, end):
                labels = labels.narrow(d, end % labels.shape[d], 1)
        found = factor(labels, f.major_to_minor)
        if not found.dims.isdisjoint(rows):
            return found
    return None


def occur_alike(labels: Tensor, without: Iterable[int], end: int = 0) -> bool:
    """Whether all labels of an array occur equally often, at one end of some dimensions."""
    for d in without:
        labels = labels.narrow(d, end % labels.shape[d], 1)
    _, counts = np.unique(labels.reshape(-1).numpy(), return_counts=True)
    return bool((counts == counts[0]).all())


def beside_rows(call: RuleContext, mine: list[Factor], theirs: list[Factor], told: set[int]) -> list[Factor]:
    """The factors of one operand without row labels whose rows the other operand has: the rows tell what is removed.

    Their dimensions are added to `told`.
    """
    left = []
    for f in mine:
        wide = next((g for g in theirs if f.dims < g.dims), None)
        if wide is not None and call.constraints.are_row_labels(f):
            call.constraints.tie_to_rows(f.labels, wide.labels)
            told |= f.dims
        else:
            left.append(f)
    return left


def main_partner(call: RuleContext, f: Factor, partners: list[Factor]) -> Factor:
    """The one of several overlapping factors that `f` is tied to: over its minor dimension, unless only copies vary there."""
    minor = [g for g in partners if f.major_to_minor[-1] in g.dims]
    owned = [g for g in partners if bool((g.labels < call.constraints.first_new).any())]
    return next((g for g in minor if g in owned), (owned or minor or partners)[0])


def made_on_the_way(call: RuleContext, f: Factor) -> bool:
    """Whether no parameter stands behind a factor, as for the samples of a tensor of zeros that is filled, nor rows of one."""
    return bool((f.labels >= call.constraints.first_new).all()) and not call.constraints.are_row_labels(f)


def lone(
    call: RuleContext, mine: list[Factor], theirs: list[Factor], taken: set[int], shape: Sequence[int], told: set[int]
) -> list[Factor]:
    """The factors that overlap none of the other operand's, whose shape is given; those that must be kept whole are frozen."""
    passed: list[Factor] = []
    for f in list(mine):
        if any(f.dims & g.dims for g in theirs):
            continue
        minor = f.major_to_minor[-1]
        whole = [d for d in f.major_to_minor if shape[d] > 1 or d in taken]
        if (
            minor in whole and len(whole) < len(f.major_to_minor) and not call.state.seeking_heads
        ):  # it has them all in each row
            passed += call.collapse(f, whole)
            continue
        if minor in whole:
            call.constraints.freeze(f.labels, kept_whole(call))
        if shape[minor] == 1 or call.state.seeking_heads:
            passed.append(f)
            rows = [d for d in f.major_to_minor[:-1] if shape[d] > 1 and d not in told]
            if rows and not call.state.seeking_heads:  # the other one has them all: each keeps something
                labels = call.constraints.fresh(math.prod(f.labels.shape[d] for d in rows))
                labels = labels.reshape([n if d in rows else 1 for d, n in enumerate(f.labels.shape)])
                call.constraints.tie_to_rows(labels, f.labels)
                call.constraints.freeze(labels, kept_whole(call))
    return passed


def kept_whole(call: RuleContext) -> str:
    """Why an operand's dimension stays: what the other one is, if it has no labels."""
    for ref in call.inputs:
        if not call.labels(ref) and any(n > 1 for n in call.shape(ref)):
            if not call.op_trace.values[ref.id].from_input:
                return FROM_CONSTANT
            if made_of_inputs(call, ref):
                return FROM_INPUT
    return KEPT_WHOLE


def made_of_inputs(call: RuleContext, ref: TensorRef) -> bool:
    """Whether nothing that the model learned or that was ever labelled went into a value."""
    pending, seen = [ref.id], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if call.known.get(current):
            return False
        op = call.op_trace.maker(current)
        if op is not None:
            pending += [r.id for r in collect((op.args, op.kwargs), TensorRef)]
    return True


def compose(call: RuleContext, several: list[Factor], single: list[Factor]) -> list[Factor]:
    """A dimension of a parameter that meets several factors at once gets the labels of all of them in the next propagation."""
    if len(several) < 2:
        return []
    for g in list(single):
        parts = [f for f in several if f.dims == g.dims]
        alone = sum(h.dims == g.dims for h in single) == 1
        if len(parts) < 2 or not alone or len(g.major_to_minor) != 1:
            continue
        start = int(g.flat[0])
        known = call.state.leaf_dims.get(start)
        if known is not None and known[2] == len(g.flat):
            call.state.composed[start] = tuple(f.labels.reshape(-1) for f in parts)
            single.remove(g)
            for f in parts:
                several.remove(f)
            return parts
    return []


def counterpart(f: Factor, candidates: list[Factor]) -> Factor | None:
    """Of several factors over the same dimensions, the one whose labels correspond one to one."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None

    return min(candidates, key=lambda g: blur(f, g))


def blur(f: Factor, g: Factor) -> int:
    """How far two factors over the same dimensions are from corresponding one to one."""
    ours, theirs = f.labels.unique(return_inverse=True), g.labels.unique(return_inverse=True)
    pairs = (ours[1] * len(theirs[0]) + theirs[1]).unique()  # a number for each pair: comparing rows takes far longer
    return 2 * len(pairs) - len(ours[0]) - len(theirs[0])


def outbid(f: Factor, g: Factor, mine: list[Factor]) -> bool:
    """Whether another factor of the operand, over the same dimensions, corresponds better to one of the other operand's."""
    rivals = [h for h in mine if h is not f and h.dims == f.dims]
    return bool(rivals) and min(blur(h, g) for h in rivals) < blur(f, g)


def match(call: RuleContext, f: Factor, g: Factor) -> None:
    if len(f.major_to_minor) == 1:
        call.constraints.tie_vectors(f, g)
        return
    if f.major_to_minor != g.major_to_minor:
        call.constraints.keep_columns_equal(f)
        call.constraints.keep_columns_equal(g)
    call.constraints.tie(f.labels, g.labels)
