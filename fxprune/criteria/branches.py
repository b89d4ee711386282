"""Scores of residual branches: by what they do to their stream, by a loss, or by their parameters.

- `influence`: 1 - the mean cosine between the stream before and after, along the dimensions of channels, over all samples and
  positions (block influence: Men et al., ShortGPT, arXiv:2403.03853);
- `taylor`: the magnitude of the sum over the branch's output of activation times gradient, the first-order change of the loss;
- `loss`: the change of the loss without the branch and those that go before it, the least for what it costs next (BlockPruner:
  Zhong et al., arXiv:2406.10594). One forward of each batch for every branch, and a few for each that goes: a change that was
  measured with fewer gone is taken for the least that it can be (Minoux, 1978);
- a function of the stream and what is added to it that returns a number, of which the mean over samples counts;
- `weights`: the mean over all elements of the branch's parameters of the importance that the criterion gives them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.arguments import is_number, number
from fxprune.criteria.activation_stats import wide
from fxprune.criteria.base import Criterion, CriterionSpec
from fxprune.criteria.branch_runs import BranchRuns, WholeProgram, additions
from fxprune.criteria.calibration import Batch, Source, prepare_source
from fxprune.criteria.catalog import resolve
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError, told
from fxprune.passes.ir.branches import Branch
from fxprune.passes.ir.module_tree import named_parameters

SCORES = ("influence", "taylor", "loss", "weights")
Influence = Callable[[Tensor, Tensor], Any]  # of the stream, and what is added to it


def score_branches(
    model: nn.Module,
    solution: Solution,
    branches: Sequence[Branch],
    how: str | Influence,
    criterion: str | Criterion,
    data: Any,
    loss: Any,
    program: WholeProgram,
    prices: np.ndarray | None = None,
    enough: Callable[[Sequence[int]], bool] | None = None,
) -> np.ndarray:
    """The score of each branch, lowest where it matters least, shape (branches,).

    Arguments:
        model: the original.
        solution: its coupling.
        branches: what to score.
        how: one of `SCORES`, or a function of the stream and what is added to it, shapes as in the model.
        criterion: of elements, for `weights`.
        data, loss: as for `fxprune.prune`.
        program: makes a coupling and the flat program of the original in evaluation mode; with other inputs, if they are given.
        prices: what each branch costs, for `loss`; by default the number of its parameters.
        enough: for `loss`, whether no more than some branches need to go; by default half of them.

    Raises: PruneError where data or a loss is missing, and for scores that are no numbers.
    """
    if how == "weights":
        return by_weights(model, branches, criterion)
    capture = solution.captures[0]
    parameters = named_parameters(model)
    dims: list[list[int]] = []
    for branch in branches:
        ref = capture.results[additions(solution, branch.parts or (branch,))[0][1]]
        held = {d for f in solution.values[0].get(ref.id, ()) for d in f.dims}
        ndim = len(capture.op_trace.shape(ref))  # of a stream that is frozen nothing says which dimension channels are
        kernels = ndim > 2 and any(parameters[name].dim() == ndim for name in branch.parameters)
        dims.append(sorted(held) or [1 if kernels else ndim - 1])
    label = how if isinstance(how, str) else getattr(how, "__name__", type(how).__name__)
    with prepare_source(model, data, loss, label, solution) as source:
        run: Any = BranchRuns(model, solution, branches, program)
        source.model = run
        found = Scores(source, run, len(branches))
        if how == "loss":
            sizes = [sum(parameters[name].numel() for name in branch.parameters) for branch in branches]
            prices = np.array(sizes, np.float64) if prices is None else prices
            return found.by_loss(prices, enough or (lambda gone: 2 * len(gone) >= len(branches)))
        if how == "taylor":
            return found.by_gradient()
        if isinstance(how, str):
            return found.by_function(lambda i, stream, added: influence(stream, stream + added, dims[i]))
        return found.by_function(lambda i, stream, added: checked(how, stream, added, label))


class Scores:
    """Scores of the branches of one program by data, batch by batch."""

    def __init__(self, source: Source, run: BranchRuns, count: int) -> None:
        self.source, self.run = source, run
        self.total, self.samples = np.zeros(count), 0

    def mean(self) -> np.ndarray:
        return self.total / self.samples

    def each(self, batch: Batch) -> Batch:
        self.samples += batch.size
        return batch

    def by_function(self, function: Callable[[int, Tensor, Tensor], float]) -> np.ndarray:
        size, begun = 0, dict[int, Tensor]()

        def look(i: int, stream: Tensor, added: Tensor, out: Tensor, last: bool) -> None:
            if not last:
                begun.setdefault(i, stream.clone())
                return
            first = begun.pop(i, None)
            if first is not None and first.shape == out.shape:
                stream, added = first, out - first
            self.total[i] += size * function(i, stream, added)

        self.run.looks = look
        with torch.no_grad():
            for batch in self.source.batches():
                size = batch.size
                self.source.run(self.each(batch))
        return self.mean()

    def by_gradient(self) -> np.ndarray:
        seen: list[tuple[int, Tensor, Tensor]] = []

        def look(i: int, stream: Tensor, branch: Tensor, out: Tensor, last: bool) -> None:
            seen.append((i, branch.detach(), out))

        self.run.looks = look
        for batch in self.source.batches():
            seen.clear()
            value = self.source.value(self.each(batch))
            learned = [found for found in seen if found[2].requires_grad]
            gradients = torch.autograd.grad(value, [out for *_, out in learned], allow_unused=True)
            for (i, branch, _), gradient in zip(learned, gradients, strict=True):
                if gradient is not None:
                    self.total[i] += batch.size * float((gradient.double() * branch.double()).sum())
        return np.abs(self.mean())

    def by_loss(self, prices: np.ndarray, enough: Callable[[Sequence[int]], bool]) -> np.ndarray:
        """Scores that, over the prices, are in the order in which branches went; others keep what was measured last."""
        batches = [self.each(batch) for batch in self.source.batches()]

        def measure(*gone: int) -> float:
            self.run.without = gone
            return sum(batch.size * float(self.source.value(batch).detach()) for batch in batches) / self.samples

        whole, taken = measure(), list[int]()
        pending = [((measure(i) - whole) / price, i, 0) for i, price in enumerate(prices)]
        heapq.heapify(pending)
        each, least = np.zeros(len(prices)), -math.inf
        while pending:
            share, i, gone = pending[0]
            done = enough(taken)
            if gone < len(taken) and not done:
                heapq.heapreplace(pending, ((measure(*taken, i) - whole) / prices[i], i, len(taken)))
                continue
            heapq.heappop(pending)
            if not done:
                whole += share * prices[i]
                taken.append(i)
            least = each[i] = max(share, least + 1e-9 * abs(least) if least > -math.inf else least)
        self.run.without = ()
        return each * prices


def influence(stream: Tensor, out: Tensor, dims: list[int]) -> float:
    """1 - the mean cosine between a stream before and after a branch, along the dimensions of channels.

    >>> round(influence(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0]]), [1]), 6)
    0.5
    """
    a, b = stream.double(), out.double()
    product = (a * b).sum(dims)
    norms = a.square().sum(dims).sqrt() * b.square().sum(dims).sqrt()
    same = torch.where(norms > 0, product / norms.clamp(min=1e-300), torch.ones_like(norms))
    return 1 - float(same.mean())


def checked(function: Influence, stream: Tensor, added: Tensor, label: str) -> float:
    """What a function of the user's gives, as a number; raises PruneError for anything else."""
    try:
        found = number(function(stream, added))
    except Exception as error:
        raise PruneError(
            f"depth_criterion {label} raises {told(error)}",
            fix="a function of the stream and what is added to it that returns a number",
        ) from error
    if not is_number(found):
        raise PruneError(f"depth_criterion {label} returns {found!r}, which is no number", fix="float(score)")
    return float(found)


def by_weights(model: nn.Module, branches: Sequence[Branch], criterion: str | Criterion) -> np.ndarray:
    """The mean importance of the elements of each branch's parameters."""
    spec = resolve(criterion)
    if spec.score_units is not None:
        return np.asarray(spec.score_units(len(branches)), np.float64)
    if spec.runs:
        what = f"the criterion {spec.name} gives branches no score by their weights alone"
        raise PruneError(what, fix="data=batches, or criterion='magnitude'")
    parameters, found = named_parameters(model), np.zeros(len(branches))
    with torch.no_grad():
        for i, branch in enumerate(branches):
            weights = [w for name in sorted(branch.parameters) if (w := parameters[name].detach()).is_floating_point()]
            found[i] = sum(importance(spec, wide(w)) for w in weights) / max(1, sum(w.numel() for w in weights))
    return found


def importance(spec: CriterionSpec, weight: Tensor) -> float:
    """The sum of what a criterion gives the elements of a parameter; raises PruneError where it gives no tensor."""
    try:
        return float(spec.score_elements(weight).double().sum())
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(
            f"the criterion {spec.name} raises {told(error)}",
            fix="return the importance of each element, as a tensor of the parameter's shape",
        ) from error
