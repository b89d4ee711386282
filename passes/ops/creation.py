"""New entries that are all alike: constants, broadcast copies and padding get fresh labels, so any number of them may go."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, along, factor
from fxprune.passes.ir.op_trace import name_of
from fxprune.passes.ir.program import TensorSize
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import RuleContext, frozen
from fxprune.passes.ops.pointwise import pointwise, same
from fxprune.passes.ops.registry import OpSpec, register, spec_of
from fxprune.passes.ops.rewriting import (
    RewriteContext,
    SizeArguments,
    argument,
    picked,
    resized,
    sizes_written_out,
    with_argument,
)


def uniform(call: RuleContext) -> Labels:
    """Entries that are all alike: any number of them may go."""
    shape = call.shape(call.outputs[0])
    if call.state.opaque:
        return sized_alike(call, len(shape))
    call.state.uniform[call.outputs[0].id] = call.outputs[0].id
    made = tuple(call.fresh(n, d, len(shape)) for d, n in enumerate(shape) if n > 1 and n not in call.state.literals)
    call.state.unread[call.outputs[0].id] = frozenset(f.major_to_minor[0] for f in made)
    return made


def drawn(call: RuleContext) -> Any:
    """Numbers for each entry of the tensors that are given, or of a size."""
    return pointwise(call) if call.inputs else uniform(call)


def sized_alike(call: RuleContext, ndim: int) -> Labels:
    """In an opaque module no size can be written anew; one that is read from a tensor follows that tensor.

    An attribute can change, and with it whatever is as large as it says, which so has the same labels.
    """
    given = call.state.sizes.get(call.outputs[0].id, {})
    result: Labels = NONE
    for dim, size in given.items():
        count = call.shape(call.outputs[0])[dim]
        if not isinstance(size, TensorSize) and count > 1:
            if size not in call.state.sized:
                call.state.sized[size] = call.constraints.fresh(count)
            result += (along(call.state.sized[size], dim, ndim),)
    sizes = {dim: size for dim, size in given.items() if isinstance(size, TensorSize)}
    for ref in dict.fromkeys(size.ref for size in sizes.values()):
        to = {size.dim: dim for dim, size in sizes.items() if size.ref is ref}
        for f in call.labels(ref):
            if f.dims <= to.keys():
                order = [to[d] for d in f.major_to_minor]
                apart = f.labels.permute([*f.major_to_minor, *(d for d in range(f.ndim) if d not in f.dims)])
                shape = [f.labels.shape[d] for d in f.major_to_minor] + [1] * (ndim - len(order))
                places = [*order, *(d for d in range(ndim) if d not in order)]
                moved = apart.reshape(shape).permute([places.index(d) for d in range(ndim)])
                result += (Factor(moved.contiguous(), tuple(order)),)
    return result


def ramp(call: RuleContext) -> Labels:
    """Entries that differ, each by its place: the tensor is made whole and then cut."""
    shape = call.shape(call.outputs[0])
    return tuple(call.fresh(n, d, len(shape)) for d, n in enumerate(shape) if n > 1 and n not in call.state.literals)


def literal(call: RuleContext) -> Labels:
    """A tensor written out in the program."""
    shape = call.shape(call.first)
    if call.state.rewrite is not make_whole or call.labels(call.first):
        return call.labels(call.first)
    call.known[call.first.id] = tuple(call.fresh(n, d, len(shape)) for d, n in enumerate(shape) if n > 1)
    return call.known[call.first.id]


def distinct(call: RuleContext) -> list[Labels]:
    """Entries that differ: none can go."""
    return [NONE] * len(call.outputs)


def expand(call: RuleContext) -> Labels:
    after = call.shape(call.outputs[0])
    labels, before = align(call.labels(call.first), call.shape(call.first), len(after))
    grown = [d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a == 1 and b > 1]
    rows = [f for f in labels if len(grown) == 1 and grown[0] - 1 in f.dims]
    if rows and (call.heads == "queries" or (call.state.choices and all(map(call.constraints.are_row_labels, rows)))):
        return labels_of_shared(call, labels, rows, grown[0], after)
    return labels + copies(call, [call.fresh(after[d], d, len(after)) for d in grown])


def labels_of_shared(call: RuleContext, labels: Labels, rows: list[Factor], d: int, shape: Sequence[int]) -> Labels:
    """Labels where each entry of the dimension before has copies of its own, as a KV head has for its query heads.

    What is copied stays. While a masked model runs that is known, and nothing else may be said of it.
    """
    if call.heads == "queries" and call.uses and not call.constraints.are_row_labels(rows[0]) and not meets_heads(call):
        return labels + copies(call, [call.fresh(shape[d], d, len(shape))])
    if call.uses or call.constraints.are_row_labels(rows[0]):
        freeze_shared(call, rows)
        labels = tuple(f for f in labels if f not in rows)
    return labels + copies(call, [copies_of_rows(call, d, shape)])


def freeze_shared(call: RuleContext, rows: list[Factor]) -> None:
    """Freeze what is copied; heads, all the same, are told apart, so that what they share does not tie them."""
    for f in rows:
        if call.state.seeking_heads and len(f.major_to_minor) > 1:
            call.constraints.add_head_rows(f.rows())
    call.freeze(tuple(rows), SHARED)


def meets_heads(call: RuleContext) -> bool:
    """Whether what is made of a call's result by moving entries is an operand of attention."""
    known = {ref.id for ref in call.outputs}
    for op in call.op_trace.ops:
        if any(ref.id in known for ref in op.inputs):
            spec = spec_of(op)
            if spec.heads:
                return True
            if spec.moves or spec.views or name_of(op.func) in ("aten::clone", "aten::_to_copy"):
                known |= {ref.id for ref in op.outputs}
    return False


SHARED = "is shared by others of which each keeps some"


def copies_of_rows(call: RuleContext, d: int, shape: Sequence[int]) -> Factor:
    """New labels of copies along a dimension, other ones for each entry of the dimension before; each keeps equally many."""
    sizes = [n if i in (d - 1, d) else 1 for i, n in enumerate(shape)]
    made = Factor(call.constraints.fresh(shape[d - 1] * shape[d]).reshape(sizes), (d - 1, d))
    call.constraints.keep_rows_equal(made)
    return made


def copies(call: RuleContext, made: list[Factor]) -> Labels:
    """New labels of copies of the first argument."""
    call.state.unread[call.outputs[0].id] = frozenset(f.major_to_minor[0] for f in made)
    if call.op_trace.values[call.first.id].from_input:
        for f in made:
            call.constraints.copies.add(f.flat)
    return tuple(made)


def repeat(call: RuleContext) -> Labels:
    repeats = list(call["repeats"])
    if 0 in call.shape(call.outputs[0]):
        return call.freeze_inputs("is repeated to nothing")[0]
    labels, before = align(call.labels(call.first), call.shape(call.first), len(repeats))
    result: Labels = NONE
    for f in labels:
        tiles = [r if d in f.dims else 1 for d, r in enumerate(repeats)]
        if len(f.major_to_minor) > 1 and any(t > 1 for t in tiles):
            call.constraints.keep_columns_equal(f)
        result += (factor(f.labels.repeat(tiles), f.major_to_minor),)
    return result + copies(call, [call.fresh(r, d, len(repeats)) for d, r in enumerate(repeats) if r > 1 and before[d] == 1])


def pad(call: RuleContext) -> Labels:
    """Padding with one value adds entries along a labelled dimension that are removable themselves."""
    shape = call.shape(call.first)
    amounts = list(call["pad"])
    result: Labels = NONE
    for f in call.labels(call.first):
        for d in sorted(padded(amounts, len(shape))):
            if d not in f.dims:
                continue
            before, after = amounts[2 * (len(shape) - 1 - d)], amounts[2 * (len(shape) - 1 - d) + 1]
            left = shape[d] + min(0, before) + min(0, after)
            if len(f.major_to_minor) > 1:
                call.constraints.keep_columns_equal(f)
                if not left:
                    call.freeze((f,), "has all its entries taken away in padding")
            array = f.labels.narrow(d, max(0, -before), left)
            sides = [array]
            for count, at in ((before, 0), (after, 2)):
                if count > 0:
                    sizes = list(array.shape)
                    sizes[d] = count  # of each row of a joint factor, so that rows may go whole
                    sides.insert(at, call.constraints.fresh(max(2, math.prod(sizes)))[: math.prod(sizes)].reshape(sizes))
            f = factor(torch.cat(sides, d), f.major_to_minor)
        result += call.settle(f)
    return result


def padded(amounts: list[int], ndim: int) -> set[int]:
    """The dimensions to which padding adds, or from which it takes."""
    return {ndim - 1 - i // 2 for i, n in enumerate(amounts) if n}


def pad_with_copies(call: RuleContext) -> Labels:
    """Padding that copies entries of the tensor."""
    dims = sorted(padded(list(call["padding"]), len(call.shape(call.first))))
    return call.freeze_dims(call.labels(call.first), dims, "is padded with copies of other entries")


def expanded_as(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """To the shape of another tensor, of which other things may be removed."""
    sizes = sizes_written_out(r, r.result(node), argument(node, 1, "other"))
    return r.graph.call_method("expand", (r.new[node.args[0]], tuple(sizes)))  # type: ignore[index]


def broadcast(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """Each of several tensors, expanded to the shape that all of them have together."""
    given = node.args[0] if isinstance(node.args[0], tuple | list) else node.args
    made = []
    for source, target in zip(given, r.result(node), strict=True):
        after = list[Any](r.after(target))
        for d, n in enumerate(r.before(target)):
            whole = [g for g in given if r.before(r.result(g))[d - len(after) :][:1] == (n,) and n > 1]
            if whole and after[d] == n and r.after(r.result(whole[0]))[d - len(after)] == n:
                after[d] = r.graph.call_method("size", (r.new[whole[0]], d - len(after)))  # type: ignore[index]
        made.append(r.graph.call_method("expand", (r.new[source], tuple(after))))
    return r.graph.call_function(as_tuple, tuple(made))


def grid(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """Each of several vectors along a dimension of its own, expanded along the others by as many entries as are kept there."""
    given = node.args[0] if isinstance(node.args[0], tuple | list) else node.args
    places = list(range(len(given)))
    if argument(node, len(node.args), "indexing", "ij") == "xy" and len(given) > 1:
        places[:2] = 1, 0
    made = []
    for place, source, target in zip(places, given, r.result(node), strict=True):
        sizes = list[Any](r.after(target))
        for d, other in zip(places, given, strict=True):
            if sizes[d] == math.prod(r.before(r.result(other))) == math.prod(r.after(r.result(other))):
                sizes[d] = r.graph.call_method("numel", (r.new[other],))
        shape = [-1 if d == place else 1 for d in range(len(given))]
        line = r.graph.call_method("reshape", (r.new[source], shape))
        sizes[place] = -1
        made.append(r.graph.call_method("expand", (line, tuple(sizes))))
    return r.graph.call_function(as_tuple, tuple(made))


def as_tuple(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


COUNTS = SizeArguments(1, ("repeats", "dims"))  # of repetitions, along every dimension


def make_whole(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """Entries that differ by their place are made as in the original and then cut."""
    if node.args and isinstance(r.result(node.args[0]), TensorRef):
        return None  # `as_tensor` of a tensor, which has been cut
    args, kwargs, ref = r.argument(tuple(node.args)), r.argument(dict(node.kwargs)), r.result(node)
    whole = r.emit(node, args, kwargs)
    varies = any(isinstance(r.result(n), int) for n in collect((node.args, node.kwargs), fx.Node))
    for cut in r.cuts(ref):
        whole = r.pick(whole, ref, cut.dims[0], cut.keep, r.before(ref)[cut.dims[0]], varies)
    return whole


def repeat_counts(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """How often each dimension is repeated, where copies go."""
    given, how = COUNTS.given(node.args, node.kwargs)
    before, after = r.after(r.result(node.args[0])), r.after(r.result(node))
    before = (1,) * (len(after) - len(before)) + before
    given = [1] * (len(after) - len(given)) + given
    wanted = [a // b if b else 0 for a, b in zip(after, before, strict=True)]
    new = resized(r, given, wanted)
    return r.emit(node, (r.new[node.args[0]], *new) if how == "spread" else (r.new[node.args[0]], tuple(new)), {})  # type: ignore[index]


def interleave_counts(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    source, target = r.result(node.args[0]), r.result(node)
    now, then = (math.prod(r.after(t)) if dim is None else r.after(t)[dim] for t in (target, source))  # flat, or along it
    varies = isinstance(r.result(times), TensorRef)  # how often each entry is repeated
    if dim is not None and any(r.after(t)[dim] != r.before(t)[dim] for t in (source, target)):
        dim, size = dim % len(r.before(source)), r.before(source)[dim]
        counts: Any = r.capture.op_trace.values[r.result(times).id].data.cpu() if varies else r.before(target)[dim] // size
        order = torch.arange(size).repeat_interleave(counts)
        positions = picked(r, source, target, dim, dim, order)
        if varies or not torch.equal(positions, torch.arange(then).repeat_interleave(now // then)):
            return r.graph.call_method("index_select", (r.new[node.args[0]], dim, r.constant(positions)))  # type: ignore[index]
    if varies:
        return None
    args, kwargs = [r.argument(a) for a in node.args], {k: r.argument(v) for k, v in node.kwargs.items()}
    repeats = r.size(times, now // then)
    if len(args) > 1:
        args[1] = repeats
    else:
        kwargs["repeats"] = repeats
    if node.kwargs.get("output_size") is not None:
        kwargs["output_size"] = r.size(node.kwargs["output_size"], now)
    return r.emit(node, args, kwargs)


def pad_amounts(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    amounts = list(argument(node, 1, "pad"))
    source, target = r.result(node.args[0]), r.result(node)
    ndim = len(r.before(source))
    for i in range(0, len(amounts), 2):
        dim = ndim - 1 - i // 2
        left = amounts[i] if isinstance(amounts[i], int) else r.capture.results[amounts[i]]
        if not any(dim in c.dims for c in [*r.cuts(source), *r.cuts(target)]):
            amounts[i], amounts[i + 1] = r.argument(amounts[i]), r.argument(amounts[i + 1])
            continue
        kept = r.positions(target, dim)
        before = int((kept < left).sum()) if left > 0 else -int((r.positions(source, dim) < -left).sum())
        amounts[i], amounts[i + 1] = before, len(kept) - r.after(source)[dim] - before
    return with_argument(r, node, 1, "pad", amounts)


register("ones_like empty_like randn_like randint_like bernoulli_like", OpSpec(same))
register("rand_like", OpSpec(same, within=(0.0, 1.0)))
register("zeros_like", OpSpec(same, filled_with=lambda call: 0))
register("full_like", OpSpec(same, filled_with=lambda call: call["fill_value"]))
CREATED = OpSpec(uniform, sizes=SizeArguments(0))
register("ones empty randn", CREATED)
register("rand", dataclasses.replace(CREATED, within=(0.0, 1.0)))
register("zeros", dataclasses.replace(CREATED, filled_with=lambda call: 0))
register("full", dataclasses.replace(CREATED, filled_with=lambda call: call["fill_value"]))
register("new_ones new_full new_empty", dataclasses.replace(CREATED, sizes=SizeArguments(1)))
register("new_zeros", dataclasses.replace(CREATED, sizes=SizeArguments(1), filled_with=lambda call: 0))
register("randint", dataclasses.replace(CREATED, sizes=SizeArguments(-1)))
register("normal", OpSpec(drawn, sizes=SizeArguments(2)))
register("multinomial", OpSpec(frozen("is drawn by value")))
register("_efficientzerotensor", OpSpec(ramp, filled_with=lambda call: 0))  # of forward-mode autograd, as large as a tensor
register("empty_strided new_empty_strided", OpSpec(uniform))
register("scalar_tensor", OpSpec(uniform, filled_with=lambda call: call["s"]))
register("arange linspace logspace eye hann_window", OpSpec(ramp, make_whole))
register("lift_fresh lift", OpSpec(literal))
register("tensor as_tensor", OpSpec(rewrite=make_whole))
register("randperm tril_indices triu_indices _local_scalar_dense _assert_async", OpSpec(distinct))
register("expand expand_copy broadcast_to", OpSpec(expand, sizes=SizeArguments(1), moves=True, views=True))
register("expand_as", OpSpec(rewrite=expanded_as))
register("", OpSpec(rewrite=grid), functions="meshgrid")
register("broadcast_tensors", OpSpec(rewrite=broadcast))
register("repeat", OpSpec(repeat, repeat_counts), functions="tile")
register("repeat_interleave", OpSpec(rewrite=interleave_counts))
register("constant_pad_nd pad", OpSpec(pad, pad_amounts))
register("reflection_pad* replication_pad*", OpSpec(pad_with_copies))
