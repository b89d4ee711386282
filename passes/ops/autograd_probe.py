"""The autograd probe: what an op without a specification does to its indices, read from seeded gradients.

Random values go through the op; the gradient of one output element says which input elements it depends on. Along each
dimension that is one of three: the same index only (coupled), every index (contracted), or anything else (frozen).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ir.pytree import TensorRef, map_tensors
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.unify import unify

NO_RULE = "goes through an op that has no rule and that the autograd trace cannot read"


def probe(call: RuleContext) -> list[Labels]:
    """Labels of the results of an op without a rule."""
    name = call.op.func._schema.name
    tensors = [r for r in call.inputs if call.op_trace.values[r.id].dtype.is_floating_point]
    others = [r for r in call.inputs if r not in tensors]
    shapes = [call.shape(r) for r in tensors]

    def run(*values: Tensor) -> Any:
        table = {r.id: v for r, v in zip(tensors, values, strict=True)}

        def value(ref: TensorRef) -> Tensor:
            if ref.id in table:
                return table[ref.id]
            data = call.data(ref)
            if data is None:
                raise ValueError("contents unknown")
            return data

        args, kwargs = map_tensors((call.op.args, call.op.kwargs), value, TensorRef)
        return call.op.func(*args, **kwargs)

    found = dependence(run, shapes, [call.shape(o) for o in call.outputs])
    if found is None or any(call.labels(r) for r in others):
        for ref in call.inputs:
            call.freeze(call.labels(ref), f"{NO_RULE} ({name})")
        return [NONE] * len(call.outputs)
    return from_dependence(call, tensors, found)


Kinds = list[list[list[str]]]


def dependence(run: Callable[..., Any], shapes: list[tuple[int, ...]], outs: list[tuple[int, ...]]) -> Kinds | None:
    """For each output, input and input dimension: `same`, `all` or `other`; None where autograd sees nothing.

    An output dimension corresponds to the input dimension of the same number and size.
    """
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def read() -> Kinds | None:
        leaves = [v.requires_grad_() for v in values]
        results = run(*leaves)
        results = list(results) if isinstance(results, tuple | list) else [results]
        if any(not isinstance(r, Tensor) or not r.requires_grad for r in results):
            return None
        kinds = [read_gradients(result, leaves, shapes) for result in results]
        for at, per_input in enumerate(kinds):
            for i, dims in enumerate(per_input):
                for d in [d for d, k in enumerate(dims) if k == "same"]:
                    if not follows_indices(run, values, at, i, d):
                        dims[d] = "other"
        return kinds

    # in a thread of its own, dispatcher modes and the keys that they exclude are not in force
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(read).result()
        except Exception:  # the op takes no such values, or has no formula for its gradient
            return None


def read_gradients(result: Tensor, values: list[Tensor], shapes: list[tuple[int, ...]]) -> list[list[str]]:
    """For each input and input dimension, how one output depends on it, judged from a few seeded output elements."""
    seen: list[list[set[str]]] = [[set() for _ in s] for s in shapes]
    for seed in range(4):
        picker = torch.Generator().manual_seed(seed)
        at = tuple(int(torch.randint(n, (1,), generator=picker)) for n in result.shape)
        grads = torch.autograd.grad(result[at], values, retain_graph=True, allow_unused=True)
        for i, g in enumerate(grads):
            for d in range(len(shapes[i])):
                seen[i][d].add(kind(g, d, at, tuple(result.shape)))
    return [[s.pop() if len(s) == 1 else "other" for s in dims] for dims in seen]


def follows_indices(run: Callable[..., Any], values: list[Tensor], at: int, i: int, dim: int) -> bool:
    """Whether any half of a dimension of a result depends on the same half of that of an input, and on all of it.

    An op that does something else at a few indices looks like one that does not, one element at a time.
    """
    generator = torch.Generator().manual_seed(1)
    size = values[i].shape[dim]
    half = torch.randperm(size, generator=generator)[: size // 2]
    for chosen in (half, torch.tensor([k for k in range(size) if k not in set(half.tolist())])):
        touched = torch.zeros(size, dtype=torch.bool)
        for _ in range(8):  # of other values, as some have no gradient
            leaves = [torch.randn(v.shape, generator=generator, dtype=v.dtype).requires_grad_() for v in values]
            results = run(*leaves)
            result = results[at] if isinstance(results, tuple | list) else results
            (gradient,) = torch.autograd.grad(result.index_select(dim, chosen).sum(), leaves[i])
            others = [d for d in range(gradient.dim()) if d != dim]
            touched |= gradient.ne(0).any(dim=others) if others else gradient.ne(0)
            if int(touched.sum()) >= len(chosen):
                break
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[chosen] = True
        if not torch.equal(touched, wanted):
            return False
    return True


def kind(gradient: Tensor | None, dim: int, at: tuple[int, ...], out: tuple[int, ...]) -> str:
    if gradient is None:
        return "none"
    if gradient.shape[dim] == 1:
        return "single"
    others = [d for d in range(gradient.dim()) if d != dim]
    touched = gradient.ne(0).any(dim=others) if others else gradient.ne(0)
    indices = touched.nonzero().flatten().tolist()
    if dim < len(out) and out[dim] == gradient.shape[dim] and indices == [at[dim]]:
        return "same"
    return "all" if len(indices) == gradient.shape[dim] else "other"


def from_dependence(call: RuleContext, refs: list[TensorRef], kinds: Kinds) -> list[Labels]:
    """Factors along one-to-one dimensions are unified across the operands; everything else that is labelled is frozen.

    A dimension that one operand does not have, or where it depends in another way, says nothing of the others there: they
    keep it whole.
    """
    why = f"{NO_RULE} ({call.op.func._schema.name})"
    results: list[Labels] = []
    for out, per_input in zip(call.outputs, kinds, strict=True):
        ndim = len(call.shape(out))
        unclear: set[int] = set()
        for dims in per_input:
            if len(dims) == ndim:
                unclear |= {d for d, k in enumerate(dims) if k == "other"}
            elif {"same", "other"}.intersection(dims):
                unclear |= set(range(ndim))
        merged: Labels = NONE
        met = [1] * ndim
        for ref, dims in zip(refs, per_input, strict=True):
            same = [d for d, k in enumerate(dims) if k == "same" and d not in unclear] if len(dims) == ndim else []
            passed = call.freeze_dims(call.labels(ref), [d for d in range(len(dims)) if d not in same], why)
            if len(dims) == ndim:
                sizes = [n if d in same else 1 for d, n in enumerate(call.shape(ref))]
                merged = unify(call, merged, met, passed, sizes)
                met = [max(a, b) for a, b in zip(met, sizes, strict=True)]
        results.append(merged)
    return results
