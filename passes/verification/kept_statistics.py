"""Statistics of the zeroed original over what is kept: a norm or a mean along channels leaves out what was removed.

Zeros count in such an operator, so the zeroed original alone is no reference for a model that has one. The capture's labels say
which entries of an operand the operator is to leave out; that they are what was removed is not taken from the labels: each has
to be zero in the run. All else that the zeroed original computes knows nothing of labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.passes.capture.recorder import by_ops, decomposition
from fxprune.passes.ir.labels import Labels, fill_removed, keeps_all, kept_mask
from fxprune.passes.ir.op_trace import OpCall, OpTrace, TensorInfo
from fxprune.passes.ir.pytree import TensorRef, collect, map_tensors
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import find

# of each operator that counts what is removed anywhere, call by call: the labels of its operands; None for one that does not
Statistics = Mapping[Any, Sequence[Sequence[Labels] | None]]


class OtherCalls(Exception):
    """A run whose statistics are not those of the capture, or are taken over more than zeros."""


class KeptStatistics(TorchDispatchMode):
    """While a zeroed original runs, takes its statistics over what is kept.

    Arguments:
        statistics: the calls to look at.
        kept: which labels are kept, shape (labels,).
    """

    supports_higher_order_operators = True

    def __init__(self, statistics: Statistics, kept: Tensor) -> None:
        super().__init__()
        self.statistics, self.kept = statistics, kept
        self.seen = dict.fromkeys(statistics, 0)
        self.failed = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return by_ops(self, func, args, kwargs)
        if (parts := decomposition(func)) is not None:
            with self:
                return parts(*args, **kwargs)
        calls = self.statistics.get(func)
        if calls is None:
            return func(*args, **kwargs)
        at = self.seen[func]
        self.seen[func] += 1
        if at >= len(calls):
            raise self.failure(f"{func} runs more often than in the capture")
        labels = calls[at]
        return func(*args, **kwargs) if labels is None else self.over_kept(func, labels, args, kwargs)

    def over_kept(self, func: Any, labels: Sequence[Labels], args: Any, kwargs: Any) -> Any:
        """What an operator makes of kept entries; zeros where its results have removed ones."""
        form, tensors = find(func).masked, collect((args, kwargs), Tensor)
        if form is None or len(tensors) != len(labels) or not all(map(fits, labels, tensors)):
            raise self.failure(f"{func} has other operands than in the capture")
        for tensor, own in zip(tensors, labels, strict=True):
            if bool(tensor.masked_fill(kept_mask(own, tensor.shape, self.kept).to(tensor.device), 0).any()):
                raise self.failure(f"{func} reads removed entries that are not zero")
        call = OneCall(func, args, kwargs, labels, self.kept)
        first = tensors[0]
        return map_tensors(
            form(call, call.view, args, kwargs),
            lambda out: fill_removed(out, labels[0], self.kept, 0.0) if out.shape == first.shape else out,
        )

    def failure(self, reason: str) -> OtherCalls:
        self.failed = reason
        return OtherCalls(reason)

    def check(self) -> None:
        """Raises OtherCalls where the run was not that of the capture; a model may have caught what was raised."""
        if not self.failed and any(len(calls) != self.seen[func] for func, calls in self.statistics.items()):
            self.failed = "operators run less often than in the capture"
        if self.failed:
            raise OtherCalls(self.failed)


class OneCall:
    """A call and the labels of its operands, as a masked form asks for them.

    Attributes:
        labels: of each operand, by number.
        kept: which labels are kept.
        view: the call itself.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, labels: Sequence[Labels], kept: Tensor) -> None:
        self.kept = kept
        self.refs: dict[int, TensorRef] = {}
        self.labels: dict[int, Labels] = {}
        trace = OpTrace()
        for tensor, own in zip(collect((args, kwargs), Tensor), labels, strict=True):
            ref = self.refs.setdefault(id(tensor), TensorRef(len(trace.values)))
            if ref.id == len(trace.values):
                trace.values.append(TensorInfo(tuple(tensor.shape), tensor.dtype, False))
                self.labels[ref.id] = own
        self.view = OpView(OpCall(func, map_tensors(args, self.ref), map_tensors(kwargs, self.ref), (), -1), trace)

    def ref(self, tensor: Tensor) -> TensorRef:
        return self.refs[id(tensor)]

    def is_zeroed(self, ref: TensorRef) -> bool:
        return True

    def mask(self, ref: TensorRef) -> Tensor | None:
        labels = self.labels[ref.id]
        return None if keeps_all(labels, self.kept.numpy()) else kept_mask(labels, self.view.shape(ref), self.kept)


def fits(labels: Labels, tensor: Tensor) -> bool:
    """Whether labels that were found at one size say all of a tensor of another."""
    return all(
        f.ndim == tensor.dim() and all(f.labels.shape[d] == (size if d in f.dims else 1) for d, size in enumerate(tensor.shape))
        for f in labels
    )
