"""Scaled dot-product attention: two contractions with a softmax between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.labels import NONE, Factor, Labels, align, factor
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.creation import copies_of_rows, freeze_shared
from fxprune.passes.ops.masking import MaskContext, as_returned, with_value
from fxprune.passes.ops.matmul import contract, keep_own_heads
from fxprune.passes.ops.registry import OpSpec, register
from fxprune.passes.ops.rewriting import RewriteContext, argument, with_argument
from fxprune.passes.ops.unify import unify


def attention(call: RuleContext) -> list[Labels]:
    """q (*, H, L, E), k (*, H, S, E), v (*, H, S, D), mask broadcast to (*, H, L, S) -> (*, H, L, D)."""
    q, k, v = call["query"], call["key"], call["value"]
    mask = call.get("attn_mask", call.get("attn_bias"))
    n = len(call.shape(q)) - 2
    if n < 0 or not call.outputs:
        return [NONE] * len(call.outputs)
    if len({len(call.shape(ref)) for ref in (q, k, v)}) > 1:
        return call.freeze_inputs("is broadcast by an attention")
    if any(call.used(ref) for ref in call.outputs[1:]):
        return call.freeze_inputs("has the statistics of its attention read")
    for ref in (q, k, v):
        tokens = len(call.shape(ref)) - 2
        rows = tuple(f for f in call.labels(ref) if len(f.major_to_minor) > 1 and f.major_to_minor[-1] == tokens)
        call.freeze(rows, "keeps other tokens of an attention in each row")
    if call.get("is_causal", False):  # by their positions
        for ref in (q, k):
            call.freeze_dims(call.labels(ref), [n], "is a token of causal attention")
    k_labels, k_shape = grouped(call, k, call.shape(q))
    v_labels, v_shape = grouped(call, v, call.shape(q))
    if call.heads == "queries":
        for shared in (k_labels, v_labels):
            keep_own_heads(call, shared, n)
    batch = list(range(n))
    # index space: batch, L, S, E
    weights = contract(
        call, call.labels(q), call.shape(q), [*batch, n, n + 2], k_labels, k_shape, [*batch, n + 1, n + 2], n + 3, [n + 2]
    )
    weights = tuple([f.without(-1) for f in weights])
    shape = (*call.shape(q)[:-1], k_shape[-2])
    if mask is not None:
        weights = unify(call, weights, shape, *align(call.labels(mask), call.shape(mask), n + 2))
    # index space: batch, L, D, S
    out = contract(call, weights, shape, [*batch, n, n + 2], v_labels, v_shape, [*batch, n + 2, n + 1], n + 3, [n + 2])
    return [tuple([f.without(-1) for f in out])] + [NONE] * (len(call.outputs) - 1)


def grouped(call: RuleContext, ref: TensorRef, q_shape: Sequence[int]) -> tuple[Labels, tuple[int, ...]]:
    """Keys or values with fewer heads than the queries: each head serves a run of query heads."""
    labels, shape = call.labels(ref), call.shape(ref)
    d = len(shape) - 3
    if d < 0 or shape[d] == q_shape[d] or shape[d] == 1:
        return labels, shape
    times = q_shape[d] // shape[d]
    along = [f for f in labels if d in f.dims]
    if call.heads == "queries" and along:  # each serves query heads of its own, and stays
        freeze_shared(call, along)
        made = copies_of_rows(call, 1, (shape[d], times)).flat
        call.constraints.copies.add(made)
        grown = (*(f for f in labels if f not in along), Factor.vector(made, d, len(shape)))
        return grown, (*shape[:d], q_shape[d], *shape[d + 1 :])
    grown = tuple(factor(f.labels.repeat_interleave(times, d) if d in f.dims else f.labels, f.major_to_minor) for f in labels)
    return grown, (*shape[:d], q_shape[d], *shape[d + 1 :])


def attention_scale(at: int | None) -> Callable[[RewriteContext, fx.Node], fx.Node | None]:
    """The default scale comes from the width of a head: where that shrinks, the original one is written out.

    Arguments:
        at: the position of the scale among the arguments; None where it is given by name only.
    """

    def rewrite(r: RewriteContext, node: fx.Node) -> fx.Node | None:
        query = r.result(argument(node, 0, "query"))
        width = r.before(query)[-1]
        position = len(node.args) if at is None else at
        if r.after(query)[-1] == width or argument(node, position, "scale") is not None:
            return None
        return with_argument(r, node, position, "scale", width**-0.5)

    return rewrite


def attention_macs(call: OpView) -> int:
    """q (*, L, E), k (*, S, E), v (*, S, D): L x S x (E + D)."""
    q, k, v = (call.shape(call[name]) for name in ("query", "key", "value"))
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def masked_attention(run: MaskContext, call: OpView, args: Any, kwargs: Any) -> Any:
    """Removed widths add nothing to a score, removed keys get no weight."""
    keys = run.mask(call["key"])
    args, kwargs = with_value(run, args, kwargs, 0.0)
    if keys is None or keys.shape[-2] == 1:
        return call.op.func(*args, **kwargs)
    named = dict(zip((a.name for a in call.op.func._schema.arguments), args, strict=False)) | kwargs
    q, k, v = named["query"], named["key"], named["value"]
    bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~keys.any(-1).unsqueeze(-2).to(q.device), -math.inf)
    given = named.get("attn_mask", named.get("attn_bias"))
    bias = bias if given is None else bias + given
    causal = bool(named.get("is_causal", False))
    if causal:
        bias = bias.masked_fill(~torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), -math.inf)
    scale = named.get("scale") or q.shape[-1] ** -0.5
    out = (q @ k.transpose(-1, -2) * scale + bias).softmax(-1) @ v
    return as_returned(call, out)


ATTENTION = OpSpec(attention, attention_scale(None), masked=masked_attention, macs=attention_macs, heads=True)
register("_scaled_dot_product_*", ATTENTION)
register(
    "scaled_dot_product_attention",
    dataclasses.replace(ATTENTION, rewrite=attention_scale(6), recorded_as=torch.ops.aten.scaled_dot_product_attention.default),
)
register("_fused_sdp_choice", OpSpec(attention))
