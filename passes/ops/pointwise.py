"""Pointwise ops: the factors of the operands are unified under broadcasting."""

from __future__ import annotations

from fxprune.passes.ir.labels import NONE, Labels, align, factor
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import rule
from fxprune.passes.ops.unify import unify


@rule(
    "aten::masked_fill",
    "aten::where",
    "aten::copy",
    "aten::copy_",
    "aten::addcmul",
    "aten::addcdiv",
    "aten::lerp",
    "aten::clamp",
    "aten::isfinite",
    "aten::complex",
    "aten::polar",
    "aten::dropout",
    "aten::native_dropout",
    "aten::rrelu_with_noise",
    "aten::_prelu_kernel",
    "aten::hardswish",
    "aten::hardsigmoid",
    "aten::softplus",
    "aten::softshrink",
    "aten::hardshrink",
    "aten::celu",
    "aten::log_sigmoid_forward",
    "aten::bernoulli",
    "aten::bernoulli_",
    "aten::fill",
    "aten::uniform_",
    "aten::normal_",
    "aten::zero_",
    "aten::exponential_",
)
def pointwise(call: RuleContext) -> list[Labels]:
    outs = call.outputs
    if not outs:
        return []
    ndim = len(call.shape(outs[0]))
    merged: Labels = NONE
    shape: tuple[int, ...] = (1,) * ndim
    for ref in call.inputs:
        labels, size = align(call.labels(ref), call.shape(ref), ndim)
        merged = unify(call, merged, shape, labels, size)
        shape = tuple(max(a, b) for a, b in zip(shape, size, strict=True))
    return [merged] * len(outs)


@rule("aten::prelu")
def prelu(call: RuleContext) -> Labels:
    x, weight = call.inputs
    ndim = len(call.shape(x))
    size = call.shape(weight)
    if size and size[0] > 1:
        lifted = (1, size[0]) + (1,) * (ndim - 2)
        w = tuple(factor(f.labels.reshape(lifted)) for f in call.labels(weight))
        return unify(call, call.labels(x), call.shape(x), w, lifted)
    return call.labels(x)


@rule("aten::rsub", "aten::threshold", "aten::hardtanh", "aten::glu_jvp")
def _as_pointwise(call: RuleContext) -> list[Labels]:
    return pointwise(call)


@rule(
    "aten::detach",
    "aten::alias",
    "aten::clone",
    "aten::contiguous",
    "aten::_to_copy",
    "aten::to",
    "aten::positive",
    "aten::_conj",
    "aten::resolve_conj",
    "aten::resolve_neg",
)
def same(call: RuleContext) -> Labels:
    return call.labels(call.first)
