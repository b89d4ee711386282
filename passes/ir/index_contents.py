"""The contents of small index tensors that do not depend on the inputs, which coupling reads."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.errors import NeedsValues
from fxprune.passes.ir.op_trace import OpTrace, arguments_written
from fxprune.passes.ir.pytree import TensorRef, collect


def storage_of(tensor: Tensor) -> int:
    """What tells memory from other memory; what looks on does not take it for a question of the model's."""
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors do not say."""
    return 0 if tensor.is_inference() else tensor._version


class IndexContents:
    """The contents of index tensors, kept right where a forward writes to one.

    A value has one set of contents. What is written before anything was looked up by it takes the place of what was there;
    of a tensor that changes after that the contents count as unknown.
    """

    def __init__(self, op_trace: OpTrace) -> None:
        self.values = op_trace.values
        self.holders: dict[int, list[tuple[weakref.ref[Tensor], TensorRef]]] = {}  # by storage
        self.read: set[int] = set()

    def keep(self, tensor: Tensor, ref: TensorRef) -> None:
        self.values[ref.id].data = tensor.detach().clone()
        self.holders.setdefault(storage_of(tensor), []).append((weakref.ref(tensor), ref))

    def note_reading(self, ins: list[TensorRef], outs: Any) -> None:
        """Indices computed from indices have contents of their own; all else is lost on a change."""
        if any(self.values[ref.id].data is None for ref in collect(outs, TensorRef)):
            self.read.update(ref.id for ref in ins)

    def note_writing(self, func: Any, args: Any, kwargs: Any, from_input: bool) -> None:
        """Raises NeedsValues where something without contents was written into a tensor that has some."""
        given = collect((args, kwargs), Tensor)
        for tensor in arguments_written(func, args, kwargs):
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.layout is not torch.strided:
                continue
            if any(t.is_meta for t in given):
                raise NeedsValues
            for holder, ref in self.holders.get(storage_of(tensor), ()):
                held, value = holder(), self.values[ref.id]
                if held is None:
                    continue
                value.from_input |= from_input
                unknown = value.from_input or ref.id in self.read
                value.data = None if unknown else held.detach().clone()
