"""How many indices and parameter elements each family holds, and what a choice of units costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.coupling.families import Family, family_of_labels
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.labels import Factor
from fxprune.passes.ir.op_trace import OpCall, OpTrace, TensorInfo
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef, map_tensors
from fxprune.passes.ir.slices import Slicer, clusters, cut_shape
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import spec_of

Shares = tuple[float, dict[int, float]]


def elements(
    solution: Solution, found: Sequence[Family], tensors: Mapping[str, Tensor], kept: np.ndarray | None = None
) -> list[int]:
    """How many parameter elements go with each family.

    A weight counts for the family of its outputs and for that of its inputs.

    Arguments:
        solution: the coupling.
        found: its families.
        tensors: the model's tensors by name.
        kept: for each label whether it is still there, shape (labels,); by default all are.
    """
    member = family_of_labels(solution, found)
    alive = np.ones(len(member), bool) if kept is None else kept
    totals = np.zeros(len(found))
    for name, tensor in tensors.items():
        if not isinstance(tensor, nn.Parameter):
            continue
        groups = [shares(group, member, alive) for group in clusters(solution.leaves.get(name, ()))]
        left = tensor.numel() * float(np.prod([whole for whole, _ in groups]))
        for family in {i for _, mine in groups for i in mine}:
            # what would be left without the family, as a part of what is
            rest = np.prod([1 - mine.get(family, 0.0) / whole for whole, mine in groups if whole])
            totals[family] += left * (1 - float(rest))
    return [round(total) for total in totals]


def shares(group: list[Factor], member: np.ndarray, alive: np.ndarray) -> Shares:
    """The share of the indices that some factors span that is alive, and the share of each family."""
    if len(group) == 1:
        labels = group[0].labels.reshape(-1).numpy()
        there = alive[labels]
        families, counts = np.unique(member[labels][there], return_counts=True)
        return float(there.mean()), {int(f): n / len(labels) for f, n in zip(families, counts) if f >= 0}
    arrays = [a.numpy() for a in torch.broadcast_tensors(*(f.labels for f in group))]
    together = np.logical_and.reduce([alive[a] for a in arrays])
    families = np.unique(np.concatenate([member[f.labels.reshape(-1).numpy()] for f in group]))
    inside = {int(i): np.logical_or.reduce([member[a] == i for a in arrays]) for i in families if i >= 0}
    return float(together.mean()), {i: float((mask & together).mean()) for i, mask in inside.items()}


class Costs:
    """What a choice of units costs, computed from the shapes it leaves.

    Multiply-accumulates are those of `torch.utils.flop_counter`, whose formulas are given the new shapes; the program is
    that of evaluation, on the example inputs.

    Arguments:
        solution: the coupling.
        tensors: the model's tensors by name, each once.
    """

    def __init__(self, solution: Solution, tensors: Mapping[str, Tensor]) -> None:
        self.solution = solution
        self.tensors = tensors
        self.ops = evaluation_calls(solution.captures[0])
        self.products = [op for op in self.ops if counts(op)]

    def original(self, kind: str) -> int:
        """The cost with nothing removed."""
        return self.of(Slicer(torch.ones(len(self.solution.unit_of), dtype=torch.bool)), kind)

    def of(self, slicer: Slicer, kind: str) -> int:
        """The `params`, `macs` or `memory` (bytes of parameters and buffers) that are left."""
        if kind == "macs":
            gone = {self.solution.captures[0].index.get(n) for n in slicer.removed.nodes}
            return sum(self.macs(op, slicer) for op in self.products if op.node not in gone)
        total = 0
        for name, tensor in self.tensors.items():
            if name in slicer.removed.tensors:
                continue
            if kind == "memory" or isinstance(tensor, nn.Parameter):
                shape = cut_shape(tensor.shape, slicer(self.solution.leaves.get(name, ()), tensor.shape))
                total += math.prod(shape) * (tensor.element_size() if kind == "memory" else 1)
        return total

    def macs(self, op: OpCall, slicer: Slicer) -> int:
        """Multiply-accumulates of one call at the shapes that are left."""
        return macs_of(op, self.solution.captures[0].op_trace, lambda ref: self.shape(ref, slicer))

    def shape(self, ref: TensorRef, slicer: Slicer) -> tuple[int, ...]:
        """The shape that is left of a value of the program."""
        before = self.value(ref).shape
        return cut_shape(before, slicer(self.solution.values[0].get(ref.id, ()), before))

    def value(self, ref: TensorRef) -> TensorInfo:
        """What is known of a value of the program."""
        return self.solution.captures[0].op_trace.values[ref.id]


def counts(op: OpCall) -> bool:
    """Whether an op has multiply-accumulates: by its specification, or by a formula registered with torch."""
    if spec_of(op).macs is not None:
        return True
    from torch.utils.flop_counter import flop_registry  # here, as it imports triton

    return getattr(op.func, "_overloadpacket", None) in flop_registry


def evaluation_calls(capture: CapturedProgram) -> list[OpCall]:
    """The dispatcher calls of a program that run in evaluation mode, on the example."""
    training = {capture.index[n] for n, mode in capture.only.items() if mode is not False}
    return [op for op in capture.op_trace.ops if op.node not in training and not op.trial]


def macs_of(op: OpCall, op_trace: OpTrace, shape: Callable[[TensorRef], tuple[int, ...]]) -> int:
    """Multiply-accumulates of one call, with tensors of the shapes that `shape` says."""
    count = spec_of(op).macs
    if count is not None:
        return count(OpView(op, op_trace, shape))
    from torch.utils.flop_counter import flop_registry

    args, kwargs, out = (map_tensors(x, shape, TensorRef) for x in (op.args, op.kwargs, op.outs))
    return int(flop_registry[op.func._overloadpacket](*args, **kwargs, out_val=out)) // 2
