"""Scores of residual branches: by what they do to their stream, by a loss, or by their parameters.

- `influence`: 1 - the mean cosine between the stream before and after, along the dimensions of channels, over all samples and
  positions (block influence: Men et al., ShortGPT, arXiv:2403.03853);
- `token_taylor`: the squared first-order change of the loss at each position, for branches that go together. A term is the sum
  over channels of activation times gradient (over all places of an image, too); each pair of branches has the sum over samples
  and positions of the product of their terms, and a set of branches the sum over all pairs;
- `taylor`: the magnitude of the sum over the branch's output of activation times gradient, the first-order change of the loss;
- `loss`: the change of the loss without the branch, one forward for each branch and batch;
- a function of the stream and what is added to it that returns a number, of which the mean over samples counts;
- `weights`: the mean over all elements of the branch's parameters of the importance that the criterion gives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.arguments import is_number, number
from fxprune.criteria.activation_stats import wide
from fxprune.criteria.base import Criterion, CriterionSpec
from fxprune.criteria.calibration import Batch, Source, prepare_source
from fxprune.criteria.catalog import resolve
from fxprune.inputs import ExampleInputs
from fxprune.passes.capture.modules import after_forward, before_forward
from fxprune.passes.coupling.branches import Branches
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError, told
from fxprune.passes.ir.branches import Branch
from fxprune.passes.ir.module_tree import named_parameters

SCORES = ("influence", "token_taylor", "taylor", "loss", "weights")
Influence = Callable[[Tensor, Tensor], Any]  # of the stream, and what is added to it
Look = Callable[
    [int, Tensor, Tensor, Tensor, bool], None
]  # of a branch, its stream, what it adds, the sum; whether that is all


class BranchRun(fx.Interpreter):
    """Runs the program of an original in evaluation mode, and looks at what is added to its streams.

    Arguments:
        program: flat, with the original's tensors.
        places: of each addition the node by name, the place of its branch among the branches, and which operand the branch is.

    Attributes:
        looks: what is called at an addition; see `Look`.
        without: a branch to leave out.
    """

    def __init__(self, program: fx.GraphModule, places: Sequence[tuple[str, int, int]]) -> None:
        super().__init__(program)
        self.extra_traceback = False  # errors are said without the node
        self.at = {name: (i, which) for name, i, which in places}
        self.last = {i: name for name, i, _ in places}
        self.looks: Look | None = None
        self.without: int | None = None
        self.arguments: Mapping[str, Any] = {}
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the program has such arguments, which `run` then goes by."""
        try:
            args, kwargs = self.given = before_forward(self.module, args, kwargs)
            given = inspect.signature(self.module.forward).bind(*args, **kwargs)
        except TypeError:
            return False
        given.apply_defaults()
        self.arguments = given.arguments
        return True

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return after_forward(self.module, *self.given, super().output(target, args, kwargs))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.arguments[str(target).lstrip("*")]

    def run_node(self, node: fx.Node) -> Any:
        if node.name not in self.at:
            return super().run_node(node)
        i, which = self.at[node.name]
        operands = [self.env[n] for n in node.all_input_nodes]
        branch, stream = operands[which], operands[1 - which]
        out = stream.clone() if self.without == i else stream + branch
        if self.looks is not None:
            self.looks(i, stream, branch, out, self.last[i] == node.name)
        return out


WholeProgram = Callable[[ExampleInputs | None], tuple[Solution, fx.GraphModule]]


class BranchRuns:
    """Runs an original, by one program for each kind of batches: they may hold other arguments than the example inputs.

    Attributes:
        looks, without: as of `BranchRun`.
    """

    def __init__(self, model: nn.Module, solution: Solution, branches: Sequence[Branch], program: WholeProgram) -> None:
        self.model, self.branches, self.program = model, branches, program
        self.runs = [BranchRun(program(None)[1], places_of(solution, [b.parts or (b,) for b in branches]))]
        self.looks: Look | None = None
        self.without: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = next((run for run in self.runs if run.takes(args, kwargs)), None)
        if run is None:
            run = self.capture(ExampleInputs(args, kwargs))
            run.takes(args, kwargs)
            self.runs.insert(0, run)  # the next batch is likely to be of its kind
        run.looks, run.without = self.looks, self.without
        return run.run()

    def capture(self, inputs: ExampleInputs) -> BranchRun:
        """A program for other arguments; raises PruneError where a branch does not run with them."""
        solution, program = self.program(inputs)
        known = {b.parameters: b for b in Branches(solution.captures, set(named_parameters(self.model))).found}
        for branch in (part for b in self.branches for part in b.parts or (b,)):
            if branch.parameters not in known:
                raise PruneError(
                    "a residual branch of the example inputs does not run with the arguments of a batch of data",
                    where=branch.name,
                    fix="example_inputs with the keywords of the batches, or depth_criterion='weights'",
                )
        parts = [[known[part.parameters] for part in b.parts or (b,)] for b in self.branches]
        return BranchRun(program, places_of(solution, parts))


def additions(solution: Solution, parts: Sequence[Branch]) -> list[tuple[fx.Node, fx.Node]]:
    """The additions of some branches in evaluation mode, in the order in which they run, and the stream of each."""
    capture = solution.captures[0]
    cuts = {add: stream for part in parts for add, stream in part.cuts.items()}
    found = [(add, stream) for add, stream in cuts.items() if add in capture.index and not capture.only.get(add, False)]
    return sorted(found, key=lambda pair: capture.index[pair[0]])


def places_of(solution: Solution, branches: Sequence[Sequence[Branch]]) -> list[tuple[str, int, int]]:
    """The additions of all branches, each in its parts, as `BranchRun` takes them."""
    found = [(i, *pair) for i, parts in enumerate(branches) for pair in additions(solution, parts)]
    return [(add.name, i, 1 - add.all_input_nodes.index(stream)) for i, add, stream in found]


def score_branches(
    model: nn.Module,
    solution: Solution,
    branches: Sequence[Branch],
    how: str | Influence,
    criterion: str | Criterion,
    data: Any,
    loss: Any,
    program: WholeProgram,
) -> np.ndarray:
    """The score of each branch, lowest where it matters least, shape (branches,); by `token_taylor` of each pair, as a matrix.

    Arguments:
        model: the original.
        solution: its coupling.
        branches: what to score.
        how: one of `SCORES`, or a function of the stream and what is added to it, shapes as in the model.
        criterion: of elements, for `weights`.
        data, loss: as for `fxprune.prune`.
        program: makes a coupling and the flat program of the original in evaluation mode; with other inputs, if they are given.

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
            return found.by_loss()
        if how == "taylor":
            return found.by_gradient()
        if how == "token_taylor":
            return found.by_terms(dims)
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
        for size, i, branch, gradient in (found for batch in self.gradients() for found in batch):
            self.total[i] += size * float((gradient.double() * branch.double()).sum())
        return np.abs(self.mean())

    def by_terms(self, dims: Sequence[Sequence[int]]) -> np.ndarray:
        """Terms at positions of different streams are not of one thing: branches there have no score together."""
        found = np.zeros((len(self.total), len(self.total)))
        for batch in self.gradients():
            like: dict[int, dict[int, Tensor]] = {}
            for size, i, branch, gradient in batch:
                along = dims[i] if list(dims[i]) == [branch.dim() - 1] else range(1, branch.dim())  # positions, or whole images
                terms = (wide(branch) * wide(gradient) * size).double().sum(list(along)).flatten()
                mine = like.setdefault(len(terms), {})
                mine[i] = mine[i] + terms if i in mine else terms
            for mine in like.values():
                rows = torch.stack(list(mine.values()))
                found[np.ix_(list(mine), list(mine))] += (rows @ rows.T).cpu().numpy()
        return found

    def gradients(self) -> Iterator[list[tuple[int, int, Tensor, Tensor]]]:
        """Of each batch, for each addition: the batch's size, the branch, what it adds, the gradient of the loss at the sum."""
        seen: list[tuple[int, Tensor, Tensor]] = []

        def look(i: int, stream: Tensor, branch: Tensor, out: Tensor, last: bool) -> None:
            seen.append((i, branch.detach(), out))

        self.run.looks = look
        for batch in self.source.batches():
            seen.clear()
            value = self.source.value(self.each(batch))
            learned = [found for found in seen if found[2].requires_grad]
            found = torch.autograd.grad(value, [out for *_, out in learned], allow_unused=True)
            pairs = zip(learned, found, strict=True)
            yield [(batch.size, i, branch, gradient) for (i, branch, _), gradient in pairs if gradient is not None]

    def by_loss(self) -> np.ndarray:
        for batch in self.source.batches():
            whole = float(self.source.value(self.each(batch)).detach())
            for i in range(len(self.total)):
                self.run.without = i
                self.total[i] += batch.size * (float(self.source.value(batch).detach()) - whole)
            self.run.without = None
        return self.mean()


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
