"""The expected cost of a model each of whose units stays with some probability, which gates are trained against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.op_trace import OpCall
from fxprune.selection.allocation import match_ratios
from fxprune.selection.costs import Costs, macs_of
from fxprune.selection.options import Options

Use = Callable[[Tensor], Tensor]


def expected_use(solution: Solution, options: Options, free: Sequence[Family], tensors: Mapping[str, Tensor]) -> Use:
    """From the probability that each unit stays, shape (labels,), to the expected cost as a share of what is allowed.

    A cost is a product of numbers of indices; its expectation is taken as the product of theirs, which it is for units that
    are independent and no two of which are the same. A budget of latency counts multiply-accumulates. A ratio counts units.

    Arguments:
        solution: the coupling.
        options: the budget, or the ratio.
        free: the families that may lose units.
        tensors: the model's, by name.
    """
    if options.budget is None:
        ratios = match_ratios(free, options.ratio, solution, options.scopes)
        units = torch.from_numpy(np.concatenate([f.units for f in free]))
        allowed = sum((1 - ratio) * len(f.units) for ratio, f in zip(ratios, free, strict=True))
        return lambda stays: stays[units].sum() / allowed
    costs, budget = Costs(solution, tensors), options.budget
    kind = "macs" if budget.measured else budget.kind
    expected = ExpectedCost(solution, costs, kind)
    original = float(costs.original(kind)) if kind in ("params", "macs", "memory") else expected.whole
    share = budget.of(1.0) if budget.relative else 1.0 if budget.measured else budget.of(original) / original
    return lambda stays: expected(stays) / (share * expected.whole)


class ExpectedCost:
    """A cost as a sum of products of shares.

    Arguments:
        solution, costs: of the model.
        kind: `params`, `memory` or `macs`; of any other kind parameters are counted.

    Attributes:
        sets: sets of units, each with the unit of every index.
        terms: the cost of each tensor or call, and the positions of the sets that it grows with.
        whole: the cost where all units stay.
    """

    def __init__(self, solution: Solution, costs: Costs, kind: str) -> None:
        self.unit = solution.unit_of.numpy()
        self.sets: list[Tensor] = []
        self.known: dict[bytes, int] = {}
        if kind == "macs":
            trace, shape = solution.captures[0].op_trace, lambda ref: costs.value(ref).shape
            self.terms = [(float(macs_of(op, trace, shape)), self.places(labels_of(op, solution))) for op in costs.products]
        else:
            sizes = {n: t.element_size() if kind == "memory" else 1 for n, t in costs.tensors.items()}
            counted = {n: t for n, t in costs.tensors.items() if kind == "memory" or isinstance(t, nn.Parameter)}
            self.terms = [(float(t.numel() * sizes[n]), self.places(solution.leaves.get(n, ()))) for n, t in counted.items()]
        self.whole = sum(cost for cost, _ in self.terms)

    def places(self, labels: Labels) -> tuple[int, ...]:
        """The sets of units of some labels, each once, without those that are a part of another one."""
        spans = {span.tobytes(): span for span in (f.lookup(self.unit) for f in labels)}
        inside = [set(span.tolist()) for span in spans.values()]
        found = []
        for i, (key, span) in enumerate(spans.items()):
            if not any(inside[i] < other or (inside[i] == other and j < i) for j, other in enumerate(inside) if j != i):
                if key not in self.known:
                    self.known[key] = len(self.sets)
                    self.sets.append(torch.from_numpy(span.astype(np.int64)))
                found.append(self.known[key])
        return tuple(found)

    def __call__(self, stays: Tensor) -> Tensor:
        """The expected cost, a scalar; `stays` is the probability of each unit, shape (labels,)."""
        shares = [stays[units].mean() for units in self.sets]
        parts = []
        for cost, places in self.terms:
            part = stays.new_tensor(cost)
            for place in places:
                part = part * shares[place]
            parts.append(part)
        return torch.stack(parts).sum()


def labels_of(op: OpCall, solution: Solution) -> Labels:
    """The labels of all that a call reads."""
    return tuple(f for ref in op.inputs for f in solution.values[0].get(ref.id, ()))
