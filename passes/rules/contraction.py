"""Contractions: factors are unified along the contracted dimension, the free dimensions of each operand pass.

Batch dimensions of a product of activations are units of their own, heads, above the fine ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxprune.passes.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.rules import Call, rule
from fxprune.passes.rules.movement import moved
from fxprune.passes.rules.pointwise import unify
from fxprune.passes.tape import Ref


def placed(labels: Labels, shape: Sequence[int], places: Sequence[int], ndim: int) -> tuple[Labels, list[int]]:
    """Labels and shape of a tensor moved into a space of `ndim` dimensions; dimension i goes to places[i]."""
    order = sorted(range(len(places)), key=lambda d: places[d])
    sizes = [1] * ndim
    for d, place in enumerate(places):
        sizes[place] = shape[d]
    result = []
    for f in labels:
        if len(f.nest) == 1:
            result.append(f.at(places[f.nest[0]], ndim))
            continue
        small = [1] * ndim
        for d, place in enumerate(places):
            small[place] = f.labels.shape[d]
        result.append(Factor(f.labels.permute(order).reshape(small), tuple(places[d] for d in f.nest)))
    return tuple(result), sizes


def contract(
    call: Call,
    a: Labels,
    a_shape: Sequence[int],
    a_places: Sequence[int],
    b: Labels,
    b_shape: Sequence[int],
    b_places: Sequence[int],
    ndim: int,
    summed: Sequence[int],
    copied: Sequence[int] = (),
) -> Labels:
    """Labels of a product over a common index space of `ndim` dimensions, in which `summed` ones are then of size 1.

    Along the `copied` ones an operand is one weight, expanded: they are no heads.
    """
    left, left_shape = placed(a, a_shape, a_places, ndim)
    right, right_shape = placed(b, b_shape, b_places, ndim)
    batch = [d for d in range(ndim) if d not in (*summed, *copied) and d in a_places and d in b_places]
    heads = as_heads(call, left + right, batch) if call.heads else NONE
    shared = [d for d in range(ndim) if d in a_places and d in b_places and d not in summed]
    left, right = mixed(call, left, right, summed, shared), mixed(call, right, left, summed, shared)
    merged = unify(call, left, left_shape, right, right_shape)
    result = [f for f in merged if not f.dims & set(summed)]
    for f in merged:
        rest = f.dims - set(summed)
        # rows survive a sum over the minor dimensions; a sum over major ones mixes what is packed row by row
        if rest and f.dims & set(summed) and f.nest[-1] not in summed:
            result += call.collapse(f, [d for d in summed if d in f.dims])
        elif not call.heads and rest and f.dims & set(summed) and rest <= set(batch):
            result.append(call.ties.row_labels(f, tuple(rest)))
    if heads:
        result += [h for h in heads if not any(h.dims <= f.dims for f in result)][:1]
    return tuple(result)


def copies(call: Call, ref: Ref, places: Sequence[int]) -> list[int]:
    """Where a tensor that no input goes into repeats itself: dimension i of it is places[i]."""
    if call.tape.values[ref.id].from_input:
        return []
    new = [f for f in call.labels(ref) if len(f.nest) == 1 and bool((f.labels >= call.ties.first_fresh).all())]
    return [places[f.nest[0]] for f in new]


def mixed(call: Call, mine: Labels, theirs: Labels, summed: Sequence[int], shared: Sequence[int]) -> Labels:
    """Factors of one operand, ready to meet those of the other.

    A sum over the rows of a joint factor (streams that were stacked) with one weight for each row ties column to column
    and leaves the rows alone. Were the weight's index of rows to meet the factor, it would tie all columns of a row: so it
    does where rows are no fewer than half the columns, or where both operands have the columns (a batch).
    """
    result: list[Factor] = []
    for f in mine:
        rows = [d for d in f.nest if d in summed]
        free = f.nest[-1] not in (*summed, *shared)
        if not rows or not free or any(f.dims <= g.dims for g in theirs):
            result.append(f)
            continue
        count = math.prod(f.labels.shape[d] for d in rows)
        if 2 * count * count < len(f.labels.unique()):
            result += call.collapse(f, rows)
        else:
            result.append(f)
    return tuple(result)


def as_heads(call: Call, labels: Labels, batch: Sequence[int]) -> Labels:
    """Joint factors over batch and other dimensions: each row is a head, to be removed whole."""
    found: list[Factor] = []
    for f in labels:
        rows = [d for d in f.nest if d in batch]
        rest = [d for d in f.nest if d not in batch]
        if rows and rest:
            matrix = f.labels.permute([d for d in range(f.labels.dim()) if d not in rest] + rest)
            count = matrix.shape[: matrix.dim() - len(rest)].numel()
            call.ties.head_rows(matrix.reshape(count, -1))
            head = factor(f.labels.amax(rest, keepdim=True), rows)
            if head.nest:
                found.append(head)
    return tuple(found)


@rule(
    "aten::mm",
    "aten::bmm",
    "aten::matmul",
    "aten::linear",
    "aten::mv",
    "aten::dot",
    "aten::_addmm_activation",
)
@rule("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::addbmm", "aten::vdot", "aten::inner")
def matmul(call: Call) -> Labels:
    name = call.op.func._schema.name.rpartition("::")[2]
    added = None
    if name in ("addmm", "baddbmm", "addmv", "_addmm_activation"):
        added, a, b = call.inputs
    elif name == "linear":
        a, b = call.inputs[:2]
        added = call.inputs[2] if len(call.inputs) > 2 else None
    else:
        a, b = call.inputs
    a_labels, a_shape, b_labels, b_shape = call.labels(a), call.shape(a), call.labels(b), call.shape(b)
    if name == "linear":
        b_labels, b_shape = moved(b_labels, (1, 0)), b_shape[::-1]
    vector = len(b_shape) == 1
    if vector:
        b_labels, b_shape = tuple(Factor(f.labels.unsqueeze(-1), f.nest) for f in b_labels), (*b_shape, 1)
    lead = len(a_shape) - 1 if name in ("linear", "dot", "vdot") or len(b_shape) == 2 else len(a_shape) - 2
    a_places = [*range(len(a_shape) - 1), len(a_shape)]
    ndim = len(a_shape) + 1
    b_places = [*range(len(b_shape) - 2), ndim - 1, ndim - 2] if lead < len(a_shape) - 1 else [ndim - 1, ndim - 2]
    copied = [d for ref, places in ((a, a_places), (b, b_places)) if len(places) > 2 for d in copies(call, ref, places)]
    out = contract(call, a_labels, a_shape, a_places, b_labels, b_shape, b_places, ndim, [ndim - 1], copied)
    out = tuple([f.without(-1) for f in out])
    shape = call.shape(call.outputs[0])
    if vector:
        out = tuple([f.without(-1) for f in out if len(shape)])
    if added is not None:
        out = unify(call, out, shape, *align(call.labels(added), call.shape(added), len(shape)))
    return out


@rule("aten::_grouped_mm")
def grouped_product(call: Call) -> Labels:
    """Rows (M, K) in runs, each with a matrix of its own of (G, K, N), -> (M, N); where the runs end is computed.

    So neither rows nor matrices can go. With the runs along another dimension nothing of either operand does.
    """
    a, b = call.inputs[:2]
    a_shape, b_shape = call.shape(a), call.shape(b)
    if len(a_shape) == len(b_shape) == 3:
        return matmul(call)
    why = "is in a product whose runs are told apart by their ends"
    if len(a_shape) != 2 or len(b_shape) != 3:
        call.freeze((*call.labels(a), *call.labels(b)), why)
        return NONE
    left = call.freeze_dims(call.labels(a), [0], why)
    right = tuple([f.without(0) for f in call.freeze_dims(call.labels(b), [0], why)])
    # index space: M, N, K
    out = contract(call, left, a_shape, [0, 2], right, b_shape[1:], [2, 1], 3, [2])
    return tuple([f.without(-1) for f in out])


@rule("aten::_scaled_dot_product_*", "aten::scaled_dot_product_attention", "aten::_fused_sdp_choice")
def attention(call: Call) -> list[Labels]:
    """q (*, H, L, E), k (*, H, S, E), v (*, H, S, D), mask broadcast to (*, H, L, S) -> (*, H, L, D)."""
    q, k, v = call["query"], call["key"], call["value"]
    mask = call.get("attn_mask", call.get("attn_bias"))
    n = len(call.shape(q)) - 2
    if n < 0 or not call.outputs:
        return [NONE] * len(call.outputs)
    if call.get("is_causal", False):  # by their positions
        for ref in (q, k):
            call.freeze_dims(call.labels(ref), [n], "is a token of causal attention")
    k_labels, k_shape = grouped(call, k, call.shape(q))
    v_labels, v_shape = grouped(call, v, call.shape(q))
    batch = list(range(n))
    # index space: batch, L, S, E
    weights = contract(
        call,
        call.labels(q),
        call.shape(q),
        [*batch, n, n + 2],
        k_labels,
        k_shape,
        [*batch, n + 1, n + 2],
        n + 3,
        [n + 2],
    )
    weights = tuple([f.without(-1) for f in weights])
    shape = (*call.shape(q)[:-1], k_shape[-2])
    if mask is not None:
        weights = unify(call, weights, shape, *align(call.labels(mask), call.shape(mask), n + 2))
    # index space: batch, L, D, S
    out = contract(call, weights, shape, [*batch, n, n + 2], v_labels, v_shape, [*batch, n + 2, n + 1], n + 3, [n + 2])
    return [tuple([f.without(-1) for f in out])] + [NONE] * (len(call.outputs) - 1)


def grouped(call: Call, ref: object, q_shape: Sequence[int]) -> tuple[Labels, tuple[int, ...]]:
    """Keys or values with fewer heads than the queries: each head serves a run of query heads."""
    labels, shape = call.labels(ref), call.shape(ref)  # type: ignore[arg-type]
    d = len(shape) - 3
    if d < 0 or shape[d] == q_shape[d] or shape[d] == 1:
        return labels, shape
    times = q_shape[d] // shape[d]
    grown = tuple(factor(f.labels.repeat_interleave(times, d) if d in f.dims else f.labels, f.nest) for f in labels)
    return grown, (*shape[:d], q_shape[d], *shape[d + 1 :])


@rule(
    "aten::convolution",
    "aten::_convolution",
    "aten::conv*",
    "aten::mkldnn_convolution",
    "aten::cudnn_convolution*",
)
@rule(
    "aten::miopen_convolution*",
    "aten::conv_depthwise*",
    "aten::_conv_depthwise*",
    "aten::thnn_conv*",
    "aten::slow_conv*",
)
def convolution(call: Call) -> Labels:
    """x (N, C, *), weight (O, C/g, *) or, transposed, (C, O/g, *), bias (O) -> (N, O, *)."""
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    groups, transposed = call.get("groups", 1), call.get("transposed", False)
    ndim = len(call.shape(x))
    w_shape = call.shape(weight)
    spatial = range(2, ndim)
    if groups == 1 and not transposed and by_position(call) and any(f.dims & set(spatial) for f in call.labels(x)):
        return pointwise_convolution(call)
    along_channels = slides(call, groups, transposed)
    ins = flat_channels(call, tuple(f for f in call.labels(x) if f not in along_channels))
    w = call.freeze_dims(call.labels(weight), range(2, len(w_shape)), "is a kernel's spatial dimension")
    outs = grouped_convolution(call, ins, call.shape(x), w, w_shape, groups, transposed)
    result = tuple([f.at(1, ndim) for f in outs])
    result += tuple([f for f in ins if not f.dims & {1, *spatial}]) + along_channels
    return with_bias(call, result, bias)


def slides(call: Call, groups: int, transposed: bool) -> Labels:
    """Factors that a window slides along and leaves as wide as they are: entry by entry, what is removed is a zero to it.

    The rewriter lays such a dimension out at its original width, which it cannot do inside of an opaque module.
    """
    if groups != 1 or transposed or call.ties.maker == "opaque":
        return NONE
    before, after = call.shape(call["input"]), call.shape(call.outputs[0])
    labels = call.labels(call["input"])
    return tuple(f for f in labels if len(f.nest) == 1 and f.nest[0] > 1 and before[f.nest[0]] == after[f.nest[0]])


def by_position(call: Call) -> bool:
    """Whether a convolution looks at one position at a time and visits all of them."""
    kernel = call.shape(call["weight"])[2:]
    return set(kernel) == {1} and set(call["stride"]) == {1} and not any(call["padding"])


def pointwise_convolution(call: Call) -> Labels:
    """A matrix product at every position, so that what varies along space passes."""
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    ndim = len(call.shape(x))
    w = tuple(Factor(f.labels.flatten(1), f.nest) for f in call.labels(weight))
    places = [0, ndim, *range(2, ndim)]
    out = contract(call, call.labels(x), call.shape(x), places, w, call.shape(weight)[:2], [1, ndim], ndim + 1, [ndim])
    out = tuple([f.without(-1) for f in out])
    return with_bias(call, out, bias)


def with_bias(call: Call, result: Labels, bias: Ref | None) -> Labels:
    """The labels of a convolution's result, with those of its bias (O)."""
    if bias is None:
        return result
    shape = call.shape(call.outputs[0])
    ndim = len(shape)
    lifted = tuple([f.at(1, ndim) for f in call.labels(bias)])
    return unify(call, result, shape, lifted, [1, shape[1]] + [1] * (ndim - 2))


def flat_channels(call: Call, labels: Labels) -> Labels:
    """A window mixes positions: what varies along space must be one unit there."""
    result: list[Factor] = []
    for f in labels:
        if len(f.nest) == 1 and f.nest[0] < 2:
            result.append(f)
            continue
        space = [d for d in f.nest if d > 1]
        if space and len(space) == len(f.nest):
            call.ties.freeze(f.labels, "is a spatial dimension of a convolution")
        else:
            result += call.collapse(f, space)
    return tuple(result)


def grouped_convolution(
    call: Call,
    ins: Labels,
    x_shape: Sequence[int],
    w: Labels,
    w_shape: Sequence[int],
    groups: int,
    transposed: bool,
) -> Labels:
    """Ties of input channels to the weight, per group; returns the labels (O,) of the output channels.

    Index space: (batch, group, outputs per group, inputs per group).
    """
    channels = x_shape[1]
    if groups == 1 and all(f.nest == (1,) for f in ins) and all(len(f.nest) == 1 for f in w):
        per_in = 0 if transposed else 1
        x_line = tuple([f.at(0, 1) for f in ins])
        w_line = tuple([f.at(0, 1) for f in w if f.nest[0] == per_in])
        unify(call, x_line, [channels], w_line, [channels])
        return tuple([f for f in w if f.nest[0] == 1 - per_in])
    per_in = channels // groups
    per_out = w_shape[1] if transposed else w_shape[0] // groups
    if per_in == per_out == 1 and len(ins) == len(w) == 1 and ins[0].nest == (1,) and w[0].nest == (0,):
        call.ties.join(ins[0], w[0])  # a group is one channel
        return w
    x_part: list[Factor] = []
    for f in ins:
        if 1 in f.dims:
            nest = [n for d in f.nest for n in ((0,) if d == 0 else (1, 3))]
            x_part.append(factor(f.labels.reshape(f.labels.shape[0], groups, 1, per_in), nest))
    w_part: list[Factor] = []
    for f in w:
        rows = f.labels.shape[0] > 1
        array = f.labels.flatten(1).narrow(1, 0, 1) if f.labels.shape[1] == 1 else f.labels.reshape(f.labels.shape[:2])
        array = array.reshape(groups if rows else 1, -1 if rows else 1, array.shape[1])
        array = array.transpose(1, 2) if transposed else array
        w_part.append(factor(array.unsqueeze(0)))
    w_size = [1, groups, per_out, per_in]
    if groups > 1 and (per_in == 1 or per_out == 1):
        return whole_groups(call, x_part, w_part, w_size)
    x_size = [x_shape[0], groups, 1, per_in]
    for f in [*x_part, *w_part]:
        call.ties.keep_rows_equal(f)
    if groups > 1:
        whole_or_part(call, x_part, w_part, groups)
    merged = unify(call, tuple(x_part), x_size, tuple(w_part), w_size)
    return tuple(factor(f.labels[:1].expand(1, groups, per_out, -1)[..., 0].reshape(-1)) for f in merged if f.dims <= {1, 2})


def whole_or_part(call: Call, x: list[Factor], w: list[Factor], groups: int) -> None:
    """A group goes with its inputs and its outputs, or keeps some of both."""
    labels = call.ties.fresh(groups).reshape(1, groups, 1, 1)
    for f in [*x, *w]:
        if 1 in f.dims:
            call.ties.stand(labels, f.labels)
    if not any(1 in f.dims for f in x):
        call.ties.freeze(labels, "is a group of a convolution whose inputs are all kept")


def whole_groups(call: Call, x: list[Factor], w: list[Factor], size: Sequence[int]) -> Labels:
    """One channel in or out of each group (depthwise): a group goes with its channels, whole."""
    groups = size[1]
    arrays = [f.labels.narrow(0, 0, 1).expand(1, groups, -1, -1).reshape(groups, -1) for f in [*x, *w]]
    for f in x:
        call.ties.tie(f.labels, f.labels.narrow(0, 0, 1))
    if not arrays:
        return NONE
    lead = arrays[0][:, :1]
    for array in arrays:
        call.ties.tie(array, lead.expand_as(array))
    if not any(1 in f.dims or 3 in f.dims for f in x):
        call.ties.freeze(lead, "is a group of a convolution whose inputs are all kept")
    outs = next((f for f in w if f.dims & {1, 2}), None)
    labels = outs.labels.expand(1, groups, size[2], -1)[..., 0] if outs is not None else lead.expand(groups, size[2])
    return (factor(labels.reshape(-1)),)


@rule("aten::_trilinear")
def trilinear(call: Call) -> Labels:
    """The product of three tensors over a common space, then a sum over some dimensions (nn.Bilinear)."""
    refs = [call["i1"], call["i2"], call["i3"]]
    expands = [call["expand1"], call["expand2"], call["expand3"]]
    ndim = len(call.shape(refs[0])) + len(expands[0])
    merged: Labels = NONE
    shape = [1] * ndim
    for ref, expanded in zip(refs, expands, strict=True):
        places = [d for d in range(ndim) if d not in expanded]
        labels, size = placed(call.labels(ref), call.shape(ref), places, ndim)
        merged = unify(call, merged, shape, labels, size)
        shape = [max(a, b) for a, b in zip(shape, size, strict=True)]
    gone = sorted(call["sumdim"], reverse=True)
    result = []
    for f in merged:
        if f.dims & set(gone):
            continue
        for d in gone:
            f = f.without(d)
        result.append(f)
    return tuple(result)
