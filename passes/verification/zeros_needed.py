"""Which removed entries of a weight have to be zero in the zeroed original, and which count for nothing anyway.

A removed channel that is zero adds nothing where it is read, so the entries of a weight that read it can stay; and where a norm
of each channel by itself follows, whose scale is zeroed, so can those that make it. Copies of whole weights are most of what a
zeroed original costs. Nothing rests on what is found here: a pruned model that agrees with an original that has fewer zeros
agrees whatever stands in the entries that were left, and where it does not, all of them are zeroed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.ir.labels import NONE, Labels, keeps_all
from fxprune.passes.ir.meta_kernels import VIEWS
from fxprune.passes.ir.op_trace import OpCall, OpTrace
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import Product, spec_of

Needed = Mapping[str, Collection[int]]


class ZerosNeeded:
    """The dimensions of weights along which removed entries have to be zero.

    Arguments:
        trace: the op trace of a capture.
        labels: of each value of the trace.
        kept: which labels are kept, shape (labels,).
        counting: identities of the calls that count zeros, such as a mean over what is cut.
    """

    def __init__(self, trace: OpTrace, labels: Mapping[int, Labels], kept: np.ndarray, counting: Collection[int]) -> None:
        self.trace, self.labels, self.kept, self.counting = trace, labels, kept, counting
        self.readers: dict[int, list[OpCall]] = {}
        for op in trace.ops:
            for ref in op.inputs:
                self.readers.setdefault(ref.id, []).append(op)

    def find(self) -> Needed:
        """Those of each weight that is cut, by name."""
        values = self.trace.values
        cut = [i for i, v in enumerate(values) if v.name is not None and len(v.shape) > 1 and self.is_cut(i)]
        origin = {i: (i, torch.empty(values[i].shape, device="meta")) for i in cut}  # of a weight and of views of it
        found: dict[int, set[int]] = {i: set() for i in cut}
        for op in self.trace.ops:
            if origin.keys().isdisjoint([ref.id for ref in op.inputs]):
                continue
            if op.func in VIEWS:
                leaf, view = origin[op.inputs[0].id]
                origin[op.outputs[0].id] = leaf, VIEWS[op.func](view, *op.args[1:], **op.kwargs)
                continue
            products = {p.weight.id: p for p in spec_of(op).products_of(OpView(op, self.trace))}
            for ref in op.inputs:
                if ref.id in origin:
                    leaf, view = origin[ref.id]
                    found[leaf].update(self.read_by(op, leaf, view, products.get(ref.id)))
        return {str(values[i].name): dims for i, dims in found.items()}

    def is_cut(self, value: int) -> bool:
        return not keeps_all(self.labels.get(value, NONE), self.kept)

    def read_by(self, op: OpCall, leaf: int, view: Tensor, product: Product | None) -> Collection[int]:
        """The dimensions of a weight along which an op that reads it, or a view of it, needs zeros."""
        shape = self.trace.values[leaf].shape
        if product is None or product.kept is None:
            return range(len(shape))
        behind = self.readers.get(op.outputs[0].id, [])
        if behind and all(self.absorbs(reader, op.outputs[0]) for reader in behind):
            return ()
        step, size = view.stride(product.kept), view.shape[product.kept]
        steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]  # how far apart entries along each dimension are
        return [d for d, one in enumerate(steps) if one < step * size and step < one * shape[d]]

    def absorbs(self, op: OpCall, value: TensorRef) -> bool:
        """Whether an op normalises each channel of a value by itself, and multiplies it by a scale that is cut."""
        if not spec_of(op).normalizes or op.inputs[0] is not value or id(op) in self.counting:
            return False
        scale = OpView(op, self.trace).tensor("weight")
        return scale is not None and self.trace.values[scale.id].name is not None and self.is_cut(scale.id)
