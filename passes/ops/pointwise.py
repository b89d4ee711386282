"""Pointwise ops: the factors of the operands are unified under broadcasting."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.labels import NONE, Labels, align, factor
from fxprune.passes.ir.op_trace import name_of
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.registry import TAGGED, UNKNOWN, OpSpec, register, spec_of
from fxprune.passes.ops.rewriting import RewriteContext, argument, with_argument
from fxprune.passes.ops.unify import unify, vary_alike

ADDING = frozenset(["aten::add", "aten::sub", "aten::rsub"])


def pointwise(call: RuleContext, like: TensorRef | None = None) -> list[Labels]:
    """One result element from those at the same place, under broadcasting; with as many dimensions as `like` or the result."""
    outs = call.outputs
    if not outs:
        return []
    ndim = len(call.shape(outs[0] if like is None else like))
    merged: Labels = NONE
    shape: tuple[int, ...] = (1,) * ndim
    adds = name_of(call.op.func).rstrip("_") in ADDING
    vary_alike(call)
    for ref in call.inputs:
        labels, size = align(call.labels(ref), call.shape(ref), ndim)
        merged = unify(call, merged, shape, labels, size, adds=adds)
        shape = tuple(max(a, b) for a, b in zip(shape, size, strict=True))
    return [merged] * len(outs)


def overwrite(call: RuleContext) -> list[Labels]:
    """Entries that a number is written over go with what was there, but none of its parameters sets them to zero any more."""
    result = pointwise(call)
    value = call.inputs[1] if len(call.inputs) > 1 else call.get("value")
    if isinstance(value, TensorRef) and any(call.constraints.undetermined(f) is None for f in call.labels(value)):
        return result
    if not is_zero(call, value):
        for f in (f for labels in result for f in labels):
            call.constraints.overwritten.add(f.flat)
    return result


def is_zero(call: RuleContext, value: Any) -> bool:
    """Whether a value is known to be zero: a number, or a tensor that is made of one."""
    while isinstance(value, TensorRef):
        op = call.op_trace.maker(value.id)
        spec = UNKNOWN if op is None else spec_of(op)
        if op is None or not (spec.moves or spec.filled_with):
            return False
        value = op.inputs[0] if spec.filled_with is None else spec.filled_with(OpView(op, call.op_trace))
    return bool(value == 0)


def prelu(call: RuleContext) -> Labels:
    x, weight = call.inputs
    ndim = len(call.shape(x))
    size = call.shape(weight)
    if size and size[0] > 1:
        lifted = (1, size[0]) + (1,) * (ndim - 2)
        w = tuple(factor(f.labels.reshape(lifted)) for f in call.labels(weight))
        return unify(call, call.labels(x), call.shape(x), w, lifted)
    return call.labels(x)


def quantized(call: RuleContext) -> list[Labels]:
    """With a scale and a zero point for each entry along an axis, or one for all."""
    x, *given = call.inputs
    labels, shape, axis = call.labels(x), call.shape(x), call.get("axis")
    for ref in given if axis is not None else ():
        lifted = tuple(f.at(axis, len(shape)) for f in call.labels(ref))
        labels = unify(call, labels, shape, lifted, [n if d == axis else 1 for d, n in enumerate(shape)])
    return [labels] * len(call.outputs)


def same(call: RuleContext) -> Labels:
    """The result has the elements of the first argument."""
    return call.labels(call.first) if call.inputs else NONE  # a number


POINTWISE = OpSpec(pointwise)
TAGGED[torch.Tag.pointwise] = POINTWISE


def addr(call: RuleContext) -> Labels:
    """The product of each entry of a vector (n) with each of another one (m), and what is added to them (n, m)."""
    added, a, b = call.inputs
    (n,), (m,) = call.shape(a), call.shape(b)
    rows, columns = tuple([f.at(0, 2) for f in call.labels(a)]), tuple([f.at(1, 2) for f in call.labels(b)])
    out = unify(call, rows, [n, 1], columns, [1, m])
    return unify(call, out, [n, m], *align(call.labels(added), call.shape(added), 2))


def cross(call: RuleContext) -> Labels:
    """The vector product along a dimension of three entries."""
    a, b = call.inputs
    ndim = len(call.shape(call.outputs[0]))
    dim = call.dim(call["dim"], ndim)
    sides = []
    for ref in (a, b):
        labels, shape = align(call.labels(ref), call.shape(ref), ndim)
        passed = call.freeze_dims(labels, [dim], "is the dimension of a vector product")
        sides.append((passed, [1 if d == dim else n for d, n in enumerate(shape)]))
    return unify(call, *sides[0], *sides[1])


def cross_dim(r: RewriteContext, node: fx.Node) -> fx.Node | None:
    """By default it is the first dimension of three entries, which may be another one once something is removed."""
    if argument(node, 2, "dim") is not None:
        return None
    return with_argument(r, node, 2, "dim", r.before(r.result(node)).index(3))


register(
    "masked_fill where addcmul addcdiv lerp clamp isfinite complex polar dropout native_dropout"
    " rrelu_with_noise _prelu_kernel hardswish hardsigmoid softplus softshrink hardshrink celu log_sigmoid_forward bernoulli"
    " zero_ rsub threshold hardtanh glu_jvp"
    " bernoulli_ uniform_ normal_ exponential_ geometric_ log_normal_ cauchy_ random_ poisson binomial _standard_gamma",
    POINTWISE,
)
register("fill copy copy_", OpSpec(overwrite))
register("prelu", OpSpec(prelu))
register(
    "fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask"
    " _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine"
    " fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask _fake_quantize_learnable_per_channel_affine",
    OpSpec(quantized),
)
register("detach alias", OpSpec(same, moves=True, views=True))
register("clone contiguous", OpSpec(same, moves=True))
register("_to_copy to", OpSpec(same, filled_with=lambda call: call.first))
register("positive _conj resolve_conj resolve_neg", OpSpec(same))
register("addr", OpSpec(addr))
register("linalg_cross", OpSpec(cross))
register("", OpSpec(rewrite=cross_dim), functions="cross")
