"""Sizes that are made by data, such as how many scores pass a threshold.

What Python decides by such a size it decides by values of tensors, and pruning changes those: it is nothing that a program may
take for granted about its inputs. So a module that branches on one is kept as one node, whose own code decides each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.op_trace import OpCall, OpTrace, name_of
from fxprune.passes.ir.program import sizes_read
from fxprune.passes.ir.pytree import TensorRef

RESHAPES = frozenset(f"aten::{name}" for name in ("view", "_unsafe_view", "reshape", "cat", "slice", "repeat_interleave"))


class DataSizes:
    """Which dimensions of which values on an op trace are as large as data make them; read on as the trace grows."""

    def __init__(self, op_trace: OpTrace) -> None:
        self.op_trace = op_trace
        self.read: list[OpCall] = []
        self.dims: dict[int, frozenset[int]] = {}

    def decide(self, node: fx.Node, results: Mapping[fx.Node, Any]) -> bool:
        """Whether a number is computed from a size that data make."""
        self.update()
        return bool(self.dims) and any(
            made and (dim is None or dim % max(1, len(self.op_trace.shape(ref))) in made)
            for ref, dim in sizes_read(node, results)
            if (made := self.dims.get(ref.id))
        )

    def update(self) -> None:
        ops = self.op_trace.ops
        while self.read and (len(self.read) > len(ops) or ops[len(self.read) - 1] is not self.read[-1]):  # it was given up
            for ref in self.read.pop().outputs:
                self.dims.pop(ref.id, None)
        for op in ops[len(self.read) :]:
            self.read.append(op)
            for ref in op.outputs:
                made = self.made_by(op, ref)
                if made:
                    self.dims[ref.id] = made

    def made_by(self, op: OpCall, out: TensorRef) -> frozenset[int]:
        """The dimensions of a result that are as large as data make them."""
        shape, inputs = self.op_trace.shape(out), op.inputs
        found = {d for d in (new_dim(op, self.op_trace),) if d is not None and d < len(shape)}
        known = {self.op_trace.shape(ref)[d] for ref in inputs for d in self.dims.get(ref.id, ())}
        if known:
            found |= {d for d, size in enumerate(shape) if size in known}
            if name_of(op.func) in RESHAPES and not found:
                before = {size for ref in inputs for size in self.op_trace.shape(ref)}
                found |= {d for d, size in enumerate(shape) if size not in before}
        return frozenset(found)


def new_dim(op: OpCall, op_trace: OpTrace) -> int | None:
    """The dimension of a result whose size an operator finds out from data that depend on the inputs."""
    name, values = name_of(op.func), op_trace.values
    if name == "aten::index":
        for at, index in enumerate(op.args[1]):
            value = values[index.id] if isinstance(index, TensorRef) else None
            if value is not None and value.from_input and value.dtype in (torch.bool, torch.uint8):
                return at
        return None
    dynamic = torch.Tag.dynamic_output_shape in getattr(op.func, "tags", ()) or name == "torchvision::nms"
    return 0 if dynamic and any(values[ref.id].from_input for ref in op.inputs) else None
