"""The timetable: how a program's time falls with the width of each family, so that choices are timed without pruning.

Layers are timed one by one at a few widths and looked up, as in NetAdapt (Yang et al., arXiv:1804.03230). Here the layers
are calls of the dispatcher: products (what `torch.utils.flop_counter` counts) are run on tensors of the shapes that a cut
would leave; everything else is taken to need time by the size of its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fxprune.passes.errors import NotARectangle
from fxprune.passes.ir.op_trace import OpCall
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.selection.costs import Costs
from fxprune.selection.ladders import Ladder

LEFT_OUT = (0.75, 0.5, 0.25)  # shares of a family at which the calls that it reaches are timed; its last rung is timed too
Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor would be."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LatencyModel:
    """Predicted seconds of one forward, for any rungs of the ladders.

    A call's time is that in the original, times a factor for each ladder that reaches it: the time with that ladder alone
    at a rung over the time with nothing removed, interpolated between the rungs that were timed.

    Arguments:
        ladders: what every pool can lose.
        costs: knows the program's calls and the shapes that a cut leaves.
        device: where products are timed.
        seconds: how long a function takes.
        total: seconds of the whole original; what products do not need of it is shared by all other calls.

    Attributes:
        at: for each ladder the rungs that were timed, from 0 on.
        factors: for each ladder, by timed rung and call; shape (len(at), calls).
        base: seconds of each call in the original.
    """

    def __init__(self, ladders: Sequence[Ladder], costs: Costs, device: torch.device, seconds: Seconds, total: float) -> None:
        self.ladders, self.costs, self.device, self.seconds = ladders, costs, device, seconds
        self.known: dict[str, float] = {}
        self.products = {id(op) for op in costs.products if self.runs(op)}
        self.calls = [op for op in costs.ops if self.computes(op)]
        self.whole = np.array([self.work(op, None) for op in self.calls])
        self.base = self.whole.copy()
        timed = np.array([id(op) in self.products for op in self.calls], bool)
        if not timed.all():  # some is left for them, whatever single products say
            self.base[~timed] *= max(total - self.base[timed].sum(), 0.05 * total) / max(self.base[~timed].sum(), 1)
        reached = self.reached()
        self.at = [timed_rungs(ladder) for ladder in ladders]
        self.factors = [
            np.stack([np.ones(len(self.calls)), *(self.row(ladder, k, mine) for k in rungs[1:])])
            for ladder, rungs, mine in zip(ladders, self.at, reached, strict=True)
        ]

    def __call__(self, rungs: Sequence[int]) -> float:
        """Seconds with each ladder at its rung."""
        times = self.base
        for ladder, rung, at, factors in zip(self.ladders, rungs, self.at, self.factors, strict=True):
            if rung:
                times = times * between(ladder.count[rung], [ladder.count[k] for k in at], factors)
        return float(times.sum())

    def alone(self, ladder: int) -> tuple[tuple[int, float], ...]:
        """How many units of a ladder are left at each timed rung, and the seconds with nothing else removed."""
        total, count = self.ladders[ladder].total, self.ladders[ladder].count
        rows = zip(self.at[ladder], self.factors[ladder], strict=True)
        return tuple((total - count[k], float((self.base * row).sum())) for k, row in rows)

    def reached(self) -> list[list[int]]:
        """For each ladder the calls whose arguments or results it shortens."""
        solution = self.costs.solution
        unit = solution.unit_of.numpy()
        owner = np.full(len(unit), -1, np.int64)
        for i, ladder in enumerate(self.ladders):
            for _, units in ladder.pool.cells:
                owner[units] = i
        owners: dict[int, set[int]] = {}
        found: list[list[int]] = [[] for _ in self.ladders]
        for at, op in enumerate(self.calls):
            met: set[int] = set()
            for f in (
                f for ref in collect((op.args, op.kwargs, op.outs), TensorRef) for f in solution.values[0].get(ref.id, ())
            ):
                if id(f.labels) not in owners:
                    owners[id(f.labels)] = set(np.unique(owner[unit[f.flat]]).tolist()) - {-1}
                met |= owners[id(f.labels)]
            for i in met:
                found[i].append(at)
        return found

    def row(self, ladder: Ladder, rung: int, calls: Sequence[int]) -> np.ndarray:
        """The factor of every call with one ladder at a rung, of those that it reaches."""
        unit = self.costs.solution.unit_of.numpy()
        gone = np.zeros(len(unit), bool)
        gone[ladder.gone(rung)] = True
        slicer = Slicer(torch.from_numpy(~gone[unit]))
        factors = np.ones(len(self.calls))
        for at in calls:
            try:
                factors[at] = self.work(self.calls[at], slicer) / max(self.whole[at], 1e-12)
            except (NotARectangle, RuntimeError):  # others would have to go along
                factors[at] = 1 - ladder.count[rung] / ladder.total
        return factors

    def computes(self, op: OpCall) -> bool:
        """Whether a call makes something new from the inputs, and not another view of it."""
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op.func._schema.returns)
        return not views and any(self.costs.value(ref).from_input for ref in collect(op.outs, TensorRef))

    def work(self, op: OpCall, slicer: Slicer | None) -> float:
        """Seconds of a product at the shapes that are left, or the size of what another call makes."""
        if id(op) in self.products:
            return self.time(op, slicer)
        return float(sum(math.prod(form.shape) for form in collect(self.forms(op.outs, slicer), Form)))

    def runs(self, op: OpCall) -> bool:
        """Whether a call can be run by itself."""
        try:
            return self.time(op, None) > 0
        except Exception:  # it needs more than tensors of these shapes: it is taken by size then
            return False

    def forms(self, x: Any, slicer: Slicer | None) -> Any:
        def form(ref: TensorRef) -> Form:
            value = self.costs.value(ref)
            return Form(value.shape if slicer is None else self.costs.shape(ref, slicer), value.dtype)

        return map_tensors(x, form, TensorRef)

    def time(self, op: OpCall, slicer: Slicer | None) -> float:
        """Seconds of a product by itself at the shapes that are left; what the op raises where it cannot run so."""
        args, kwargs, out = (self.forms(x, slicer) for x in (op.args, op.kwargs, op.outs))
        if op.func is torch.ops.aten.convolution.default:  # the one product with a count among its arguments
            (x, weight), transposed = (form.shape for form in args[:2]), args[6]
            args = (*args[:8], out.shape[1] // weight[1] if transposed else x[1] // weight[1])
        key = repr((op.func, args, kwargs))
        if key not in self.known:
            made = lambda form: torch.ones(form.shape, dtype=form.dtype, device=self.device)  # noqa: E731
            given, named = map_tensors((args, kwargs), made, Form)
            self.known[key] = self.seconds(lambda: op.func(*given, **named))
        return self.known[key]


def timed_rungs(ladder: Ladder) -> list[int]:
    """Rung 0, those nearest to each share in `LEFT`, and the last."""
    left = [1 - n / ladder.total for n in ladder.count]
    near = [min(range(len(left)), key=lambda k: abs(left[k] - share)) for share in LEFT_OUT]
    return sorted({0, *near, len(left) - 1})


def between(count: int, counts: Sequence[int], factors: np.ndarray) -> np.ndarray:
    """Factors at a count of units, interpolated along ascending counts."""
    high = int(np.clip(np.searchsorted(counts, count), 1, len(counts) - 1))
    part = (count - counts[high - 1]) / (counts[high] - counts[high - 1])
    return factors[high - 1] * (1 - part) + factors[high] * part
