"""What a capture says of runs of its model, so that none has to be made to find it out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.passes.capture.rollback import written_in_place
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.labels import Labels, keeps_all
from fxprune.passes.ir.op_trace import OpCall, OpTrace
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.convolution import convolution_with_zeros
from fxprune.passes.ops.masking import products_with_zeros, with_zeros
from fxprune.passes.ops.reduction import masked_norm
from fxprune.passes.ops.registry import find
from fxprune.passes.verification.index_order import draws_numbers
from fxprune.passes.verification.kept_statistics import Statistics
from fxprune.passes.verification.zeros_needed import Needed, ZerosNeeded

# to a norm of negative order they do, which is rare
ZEROS_ADD_NOTHING = (None, with_zeros, products_with_zeros, convolution_with_zeros, masked_norm)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What to expect of a run.

    Attributes:
        draws: whether it draws random numbers.
        writes: whether it writes to parameters; modules that are not captured might, also by other data (`p.data = x`).
        statistics: the calls in which zeros count, as in a mean over what is cut.
        kept: which labels are kept, shape (labels,).
        zeros: for weights by name, the dimensions along which removed entries have to be zero; of others all are.
    """

    draws: bool
    writes: bool
    statistics: Statistics
    kept: Tensor
    zeros: Needed


def outlook(solution: Solution, kept: np.ndarray, parameters: Collection[str]) -> Outlook:
    """The outlook for a choice.

    Arguments:
        kept: which labels are kept, shape (labels,).
        parameters: the names of the model's parameters.
    """
    capture, labels = solution.captures[0], solution.values[0]
    trace = evaluating(capture)
    counting = {id(op) for op in trace.ops if op.inputs and counts_zeros(op, trace, labels.get(op.inputs[0].id, ()), kept)}
    return Outlook(
        any(draws_numbers(op.func, op.args, op.kwargs) for op in trace.ops),
        bool(capture.opaque) or not written_in_place(trace, ()).isdisjoint(parameters),
        statistics(trace, labels, counting),
        torch.from_numpy(kept),
        ZerosNeeded(trace, labels, kept, counting).find(),
    )


def evaluating(capture: CapturedProgram) -> OpTrace:
    """The trace of a capture without the calls that are made in training alone."""
    training = {capture.index[node] for node, mode in capture.only.items() if mode}
    if not training:
        return capture.op_trace
    return OpTrace(capture.op_trace.values, [op for op in capture.op_trace.ops if op.node not in training])


def statistics(trace: OpTrace, labels: Mapping[int, Labels], counting: Collection[int]) -> Statistics:
    """All calls of each operator that somewhere counts what is removed: the labels of its operands; None where it does not.

    Arguments:
        counting: identities of the calls that count it.
    """
    found: dict[Any, list[Sequence[Labels] | None]] = {op.func: [] for op in trace.ops if id(op) in counting}
    for op in trace.ops if found else ():
        if op.func in found:
            found[op.func].append([labels.get(ref.id, ()) for ref in op.inputs] if id(op) in counting else None)
    return found


def counts_zeros(op: OpCall, trace: OpTrace, labels: Labels, kept: np.ndarray) -> bool:
    """Whether an operator reduces or normalises its first tensor along a dimension that is cut, and no sum is all it takes."""
    if not labels or find(op.func).masked in ZEROS_ADD_NOTHING:
        return False
    gone = {dim for f in labels if not keeps_all([f], kept) for dim in f.dims}
    return bool(gone) and not gone.isdisjoint(dims_reduced(OpView(op, trace), len(trace.shape(op.inputs[0]))))


def dims_reduced(call: OpView, ndim: int) -> Iterable[int]:
    """The dimensions that a reduction or a normalisation goes over; none for other operators."""
    shape, dim = call.get("normalized_shape"), call.get("dim")
    if shape is not None:
        return range(ndim - len(shape), ndim)
    if call.get("group", call.get("num_groups")) is not None:
        return range(1, ndim)
    return [d % ndim for d in ([dim] if isinstance(dim, int) else dim or ()) if isinstance(d, int) and ndim]
