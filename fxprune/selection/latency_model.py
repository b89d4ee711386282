"""Predict latency: how a program's time falls with the width of each family, without pruning it.

Layers are timed one by one at a few widths and looked up, as in NetAdapt (Yang et al., arXiv:1804.03230). Here the layers
are calls of the dispatcher: products (what `torch.utils.flop_counter` counts) are run on tensors of the shapes that a cut
would leave; everything else is taken to need time by the size of its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.passes.errors import NotARectangle
from fxprune.passes.ir.op_trace import OpCall
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.pytree import TensorRef, collect, map_tensors
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.candidates import Candidates
from fxprune.selection.costs import Costs

KEPT = (0.75, 0.5, 0.25)  # shares of a group at which the calls that it reaches are timed; so is its highest level
Seconds = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, slots=True)
class TensorForm:
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LatencyModel:
    """Predicted seconds of one forward, for any level of each group.

    A call's time is that in the original, times a factor for each group that reaches it: the time with that group alone
    at a level over the time with nothing removed, interpolated between the levels that were timed.

    Arguments:
        candidates: what every group can lose.
        costs: knows the program's calls and the shapes that a cut leaves.
        device: where products are timed.
        seconds: how long a function takes.
        total: seconds of the whole original; what products do not need of it is shared by all other calls.
        lost: from a group and a level to the nodes of the program that go with residual branches.

    Attributes:
        at: for each group the levels that were timed, from 0 on.
        factors: for each group, by timed level and call; shape (len(at), calls).
        base: seconds of each call in the original.
    """

    def __init__(
        self,
        candidates: Sequence[Candidates],
        costs: Costs,
        device: torch.device,
        seconds: Seconds,
        total: float,
        lost: Callable[[int, int], Collection[fx.Node]] = lambda group, level: (),
    ) -> None:
        self.candidates, self.costs, self.device, self.seconds, self.total = candidates, costs, device, seconds, total
        self.known, self.lost = dict[str, float](), lost
        self.products = {id(op) for op in costs.products if self.runs(op)}
        self.calls = [op for op in costs.ops if self.computes(op)]
        self.whole = np.array([self.work(op, None) for op in self.calls])
        self.base = self.whole.copy()
        timed = np.array([id(op) in self.products for op in self.calls], bool)
        if not timed.all():  # some is left for them, whatever single products say
            self.base[~timed] *= max(total - self.base[timed].sum(), 0.05 * total) / max(self.base[~timed].sum(), 1)
        reached = self.reached()
        self.at = [timed_levels(found) for found in candidates]
        self.factors = [
            np.stack([np.ones(len(self.calls)), *(self.row(group, level, mine) for level in levels[1:])])
            for group, (levels, mine) in enumerate(zip(self.at, reached, strict=True))
        ]

    def __call__(self, levels: Sequence[int]) -> float:
        """Seconds with each group at its level."""
        times = self.base
        for found, level, at, factors in zip(self.candidates, levels, self.at, self.factors, strict=True):
            if level:
                times = times * interpolate(found.count[level], [found.count[k] for k in at], factors)
        return float(times.sum())

    def without(self, slicer: Slicer) -> float:
        """Seconds without the residual branches that a slicer removes."""
        gone = {self.costs.solution.captures[0].index.get(node) for node in slicer.removed.nodes}
        return float(self.base[[op.node not in gone for op in self.calls]].sum())

    def of_each(self, slicers: Sequence[Slicer], clock: Callable[..., list[list[float]]]) -> list[float]:
        """Seconds of one forward with what each of some choices leaves.

        A call's time is that in the original, by what it takes at the shapes that are left over what it takes at its own. Both
        are timed in turns by `clock` (see `measure_seconds`), since a machine is not as fast at one time as at another.
        """
        found = np.zeros(len(slicers))
        known: dict[tuple[str, ...], list[float]] = {}
        calls = list(zip(self.calls, self.base, self.whole, strict=True))
        for op, base, whole in progress_bar(calls, "timing", "op"):
            if id(op) not in self.products:
                found += base * np.array([self.work(op, slicer) for slicer in slicers]) / max(whole, 1e-12)
                continue
            runs = [self.call(op, slicer) for slicer in (None, *slicers)]
            keys = tuple(key for key, _ in runs)
            if keys not in known:
                times = clock(list(dict(runs).values()), self.device, least=5, seconds=0.01)
                least = dict(zip(dict(runs), map(min, times), strict=True))  # whatever disturbs a run makes it longer
                known[keys] = [least[key] / max(least[keys[0]], 1e-12) for key in keys[1:]]
            found += base * np.array(known[keys])
        return [float(seconds) for seconds in found * (self.total / max(self.base.sum(), 1e-12))]

    def alone(self, group: int) -> tuple[tuple[int, float], ...]:
        """How many units of a group are left at each timed level, and the seconds with nothing else removed."""
        total, count = self.candidates[group].total, self.candidates[group].count
        rows = zip(self.at[group], self.factors[group], strict=True)
        return tuple((total - count[k], float((self.base * row).sum())) for k, row in rows)

    def reached(self) -> list[list[int]]:
        """For each group the calls whose arguments or results it shortens."""
        solution = self.costs.solution
        unit = solution.unit_of.numpy()
        owner = np.full(len(unit), -1, np.int64)
        for i, candidates in enumerate(self.candidates):
            for family, units in candidates.group.strata:
                if family >= 0:  # residual branches are no units
                    owner[units] = i
        owners: dict[int, set[int]] = {}
        found: list[list[int]] = [[] for _ in self.candidates]
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

    def row(self, group: int, level: int, calls: Sequence[int]) -> np.ndarray:
        """The factor of every call with one group at a level; `calls` are those that it reaches."""
        candidates = self.candidates[group]
        unit = self.costs.solution.unit_of.numpy()
        removed = np.zeros(len(unit), bool)
        removed[candidates.removed(level)] = True
        slicer = Slicer(torch.from_numpy(~removed[unit]))
        gone = {self.costs.solution.captures[0].index.get(node) for node in self.lost(group, level)}
        factors = np.array([0.0 if op.node in gone else 1.0 for op in self.calls])
        for at in calls:
            try:
                factors[at] = self.work(self.calls[at], slicer) / max(self.whole[at], 1e-12)
            except (NotARectangle, RuntimeError):  # other units would have to be removed too
                factors[at] = 1 - candidates.count[level] / candidates.total
        return factors

    def computes(self, op: OpCall) -> bool:
        """Whether a call makes something new from the inputs, and not another view of it."""
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op.func._schema.returns)
        return not views and any(self.costs.value(ref).from_input for ref in collect(op.outs, TensorRef))

    def work(self, op: OpCall, slicer: Slicer | None) -> float:
        """Seconds of a product at the shapes that are left, or the size of what another call makes."""
        if id(op) in self.products:
            return self.time(op, slicer)
        return float(sum(math.prod(form.shape) for form in collect(self.forms(op.outs, slicer), TensorForm)))

    def runs(self, op: OpCall) -> bool:
        """Whether a call can be run by itself."""
        try:
            return self.time(op, None) > 0
        except Exception:  # it needs more than tensors of these shapes: it is taken by size then
            return False

    def forms(self, x: Any, slicer: Slicer | None) -> Any:
        def form(ref: TensorRef) -> TensorForm:
            value = self.costs.value(ref)
            return TensorForm(value.shape if slicer is None else self.costs.shape(ref, slicer), value.dtype)

        return map_tensors(x, form, TensorRef)

    def time(self, op: OpCall, slicer: Slicer | None) -> float:
        """Seconds of a product by itself at the shapes that are left; what the op raises where it cannot run so."""
        key, run = self.call(op, slicer)
        if key not in self.known:
            self.known[key] = self.seconds(run)
        return self.known[key]

    def call(self, op: OpCall, slicer: Slicer | None) -> tuple[str, Callable[[], object]]:
        """A product by itself at the shapes that are left, and a name that it shares with others that are the same call."""
        args, kwargs, out = (self.forms(x, slicer) for x in (op.args, op.kwargs, op.outs))
        if op.func is torch.ops.aten.convolution.default:  # the one product with a count among its arguments
            (x, weight), transposed = (form.shape for form in args[:2]), args[6]
            args = (*args[:8], out.shape[1] // weight[1] if transposed else x[1] // weight[1])
        given: list[Any] = []

        def run() -> object:
            if not given:  # tensors take memory: they are made when it is run
                made = lambda form: torch.ones(form.shape, dtype=form.dtype, device=self.device)  # noqa: E731
                given.append(map_tensors((args, kwargs), made, TensorForm))
            return op.func(*given[0][0], **given[0][1])

        return repr((op.func, args, kwargs)), run


def timed_levels(candidates: Candidates) -> list[int]:
    """Level 0, those nearest to each share in `KEPT`, and the highest."""
    left = [1 - n / candidates.total for n in candidates.count]
    near = [min(range(len(left)), key=lambda k: abs(left[k] - share)) for share in KEPT]
    return sorted({0, *near, len(left) - 1})


def interpolate(count: int, counts: Sequence[int], factors: np.ndarray) -> np.ndarray:
    """Factors at a count of units, interpolated along ascending counts."""
    high = int(np.clip(np.searchsorted(counts, count), 1, len(counts) - 1))
    part = (count - counts[high - 1]) / (counts[high] - counts[high - 1])
    return factors[high - 1] * (1 - part) + factors[high] * part
