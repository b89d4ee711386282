"""Contractions: factors are unified along the contracted dimension, the free dimensions of each operand pass.

Batch dimensions of a product of activations are units of their own, heads, above the fine ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxprune.passes.ir.labels import NONE, Labels, align, factor
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.masking import with_value
from fxprune.passes.ops.matmul import contract
from fxprune.passes.ops.registry import handles, masked, rule
from fxprune.passes.ops.rewriting import argument, with_argument
from fxprune.passes.ops.unify import unify

if TYPE_CHECKING:
    from fxprune.passes.rewrite.rewriter import Rewriter
    from fxprune.passes.verification.masked_model import MaskedRun


@rule("aten::_scaled_dot_product_*", "aten::scaled_dot_product_attention", "aten::_fused_sdp_choice")
def attention(call: RuleContext) -> list[Labels]:
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


def grouped(call: RuleContext, ref: object, q_shape: Sequence[int]) -> tuple[Labels, tuple[int, ...]]:
    """Keys or values with fewer heads than the queries: each head serves a run of query heads."""
    labels, shape = call.labels(ref), call.shape(ref)  # type: ignore[arg-type]
    d = len(shape) - 3
    if d < 0 or shape[d] == q_shape[d] or shape[d] == 1:
        return labels, shape
    times = q_shape[d] // shape[d]
    grown = tuple(factor(f.labels.repeat_interleave(times, d) if d in f.dims else f.labels, f.major_to_minor) for f in labels)
    return grown, (*shape[:d], q_shape[d], *shape[d + 1 :])


FUSED_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math")


@handles(*(f"_scaled_dot_product_{kind}" for kind in FUSED_ATTENTION))
def fused_attention_scale(r: Rewriter, node: fx.Node) -> fx.Node | None:
    width = r.before(r.result(node.args[0]))[-1]
    if r.after(r.result(node.args[0]))[-1] == width or node.kwargs.get("scale") is not None:
        return None
    return r.emit(node, r.argument(tuple(node.args)), {**r.argument(dict(node.kwargs)), "scale": width**-0.5})


@handles("scaled_dot_product_attention")
def attention_scale(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The default scale comes from the width of a head: where that shrinks, the original one is written out."""
    query = r.result(node.args[0] if node.args else node.kwargs["query"])
    width = r.before(query)[-1]
    if r.after(query)[-1] == width or argument(node, 6, "scale") is not None:
        return None
    return with_argument(r, node, 6, "scale", width**-0.5)


@masked("_scaled_dot_product_*", "scaled_dot_product_attention")
def masked_attention(masker: MaskedRun, call: RuleContext, args: Any, kwargs: Any) -> Any:
    """Removed widths add nothing to a score, removed keys get no weight."""
    keys = masker.mask(call["key"])
    args, kwargs = with_value(masker, args, kwargs, 0.0)
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
    rest = len(call.op.func._schema.returns) - 1
    return (out, *[out.new_empty(0)] * rest) if rest else out
