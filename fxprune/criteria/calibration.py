"""Gather the evidence that criteria need from data, batch by batch.

The model runs as a copy in evaluation mode that shares the parameters and owns its buffers. Gradients are stored on no
parameter, and random state is restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.arguments import shown
from fxprune.criteria.activation_stats import Moments, observe_activations, units_of_labels, wide
from fxprune.criteria.experts import contributions
from fxprune.criteria.lockstep import without_cache
from fxprune.passes.capture.patches import visible
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError, told
from fxprune.passes.ir.module_tree import copy_tree, named_tensors, set_mode
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.pytree import collect, map_tensors, without_inference
from fxprune.passes.ir.quiet import gpus_of

Evidence = dict[str, Tensor]
BATCHES = "data=[(images, labels), ...], or a DataLoader of such pairs"


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as forward and the loss take it; `size` samples, by the first dimension of its first tensor.

    With a sparse tensor it is one sample: rows are the nodes of a graph, say.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extra: tuple[Any, ...]
    size: int

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with every tensor changed."""
        args, kwargs, extra = map_tensors((self.args, self.kwargs, self.extra), change)
        return Batch(args, kwargs, extra, self.size)

    def rows(self, keep: slice | Sequence[int]) -> Batch:
        """Some of its samples; tensors of another first dimension (a mask, a scale) stay whole."""
        part = self.map(lambda t: t[keep] if t.dim() and t.shape[0] == self.size and t.layout is torch.strided else t)
        return dataclasses.replace(part, size=len(range(self.size)[keep] if isinstance(keep, slice) else keep))


@dataclass(frozen=True, slots=True)
class Target:
    """What scores are for.

    Attributes:
        heads: whether heads of attention go whole, as in coupling.
        use: makes a function from the probability that each unit stays, shape (labels,), to the expected cost as a share of
            what is allowed; None where nothing is known of it.
    """

    heads: bool | str = True
    use: Callable[[], Callable[[Tensor], Tensor]] | None = None


@dataclass
class Source:
    """A model, the data to run it on, and the loss.

    Attributes:
        model: a copy that may be run; `parameters` are its parameters, by the names in the original.
        data: batches: pairs of inputs and target, dicts of keyword arguments, or inputs alone.
        loss: a function of the output and, where a batch has one, its target, that returns a mean over the batch.
        criterion: its name, for messages.
        solution: the coupling; None where nothing is asked of it.
        target: what scores are for.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    data: Iterable[Any] | None
    loss: Callable[..., Tensor] | None
    criterion: str
    solution: Solution | None
    target: Target = Target()

    @property
    def captures(self) -> list[CapturedProgram]:
        return [] if self.solution is None else self.solution.captures

    def batches(self, *, single: bool = False) -> Iterator[Batch]:
        """Every batch, on the model's device; with `single`, sample by sample."""
        if self.data is None:
            raise PruneError(f"the criterion {self.criterion} needs data", fix=BATCHES)
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        count = 0
        for item in read(progress_bar(self.data, f"scoring by {self.criterion}", "batch")):
            batch = parse_batch(item).map(lambda t: t.to(device))
            count += batch.size
            yield from (batch.rows(slice(i, i + 1)) for i in range(batch.size)) if single and batch.size > 1 else [batch]
        if not count:
            raise no_batches()

    def run(self, batch: Batch) -> Any:
        """What the model returns for a batch."""
        try:
            return self.model(*batch.args, **without_cache(self.model, batch.kwargs))
        except PruneError:
            raise
        except Exception as error:
            raise batch_refused(error) from error

    def value(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        out = self.run(batch)
        if self.loss is None and loss_in(out) is None:
            what = f"the criterion {self.criterion} needs a loss, and the output of the model holds none"
            raise PruneError(
                what, fix="loss=torch.nn.functional.cross_entropy, or labels in the batches of a model that takes them"
            )
        try:
            found: Any = loss_in(out) if self.loss is None else self.loss(out, *batch.extra)
        except Exception as error:
            raise PruneError(
                f"the loss raises {told(error)}",
                fix="a function of the output and the target of a batch, or of the output alone where data has no targets",
            ) from error
        if not isinstance(found, Tensor) or found.numel() != 1:
            got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise PruneError(f"the loss must be a scalar, not {got}", fix="a mean over the batch: loss(...).mean()")
        if not found.requires_grad:
            raise PruneError("the loss does not depend on the model's parameters", fix="a loss made of the model's output")
        return found.reshape(())

    def gradients(self, of: Tensor, **options: Any) -> Iterator[tuple[str, Tensor]]:
        """Gradients by name; a parameter that the program does not use has none."""
        names = list(self.parameters)
        found = torch.autograd.grad(of, [self.parameters[n] for n in names], allow_unused=True, **options)
        return ((n, g) for n, g in zip(names, found, strict=True) if g is not None)


def batch_refused(error: Exception) -> PruneError:
    return PruneError(f"the model raises on a batch of data: {told(error)}", fix=BATCHES)


def loss_in(out: Any) -> Tensor | None:
    """The loss that the output of a model holds, under that name."""
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def read(data: Iterable[Any]) -> Iterator[Any]:
    """Batch by batch what is in data; raises PruneError for what the code that makes them raises."""
    left = iter(data)
    while True:
        try:
            item = next(left)
        except StopIteration:
            return
        except PruneError:
            raise
        except Exception as error:
            raise PruneError(f"reading data raises {told(error)}", fix="data that `for batch in data: pass` reads") from error
        yield item


def parse_batch(item: Any) -> Batch:
    """A batch from what a loader yields: a pair is inputs and target; a mapping is keywords, and the target for the loss."""
    pair = isinstance(item, tuple | list) and len(item) == 2
    inputs, *extra = [dict(part) if isinstance(part, Mapping) else part for part in (item if pair else (item,))]
    named = isinstance(inputs, dict)
    args = () if named else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    kwargs, extra = inputs if named else {}, extra or ([inputs] if named else [])
    tensors = collect((args, kwargs), Tensor)
    if collect((args, kwargs), np.ndarray):
        raise PruneError("a batch of data holds an array of NumPy's, not a tensor", fix="torch.from_numpy(array)")
    if any(t.is_meta for t in tensors):
        raise PruneError("a batch of data holds a tensor on the meta device, which has no values", fix=BATCHES)
    if not tensors:
        raise PruneError(f"a batch of type {type(item).__name__} holds no tensor", fix=BATCHES)
    rows = tensors[0].dim() > 0 and all(t.layout is torch.strided for t in tensors)
    args, kwargs, extra = map_tensors((args, kwargs, extra), without_inference)
    return Batch(args, kwargs, tuple(extra), tensors[0].shape[0] if rows else 1)


def held_batches(data: Any, device: torch.device | None = None) -> list[Batch]:
    """All batches, perhaps on another device; raises PruneError where there are none."""
    check_batches(data)
    batches = [parse_batch(item).map(lambda t: t if device is None else t.to(device)) for item in read(data)]
    if not any(batch.size for batch in batches):
        raise no_batches("the batches of data hold no samples" if batches else "data holds no batches")
    return batches


def no_batches(what: str = "data holds no batches") -> PruneError:
    return PruneError(what, fix=f"{BATCHES}; one that was read to its end is empty")


def check_source(data: Any, loss: Any) -> None:
    """Raise PruneError for what cannot be batches, or a loss, whether or not a criterion needs them."""
    if data is not None:
        check_batches(data)
    if loss is not None and not callable(loss):
        raise PruneError(f"loss must be a function, not {shown(loss)}", fix="loss=torch.nn.functional.cross_entropy")


def check_batches(data: Any) -> None:
    """Raise PruneError for what cannot be batches."""
    if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str):
        raise PruneError(f"data must be batches, not a {type(data).__name__}", fix=BATCHES)


@contextlib.contextmanager
def prepare_source(model: nn.Module, data: Any, loss: Any, criterion: str, solution: Solution | None) -> Iterator[Source]:
    """A copy of the model that can be run, with random state and gradient mode restored afterwards."""
    swap: dict[int, Tensor] = {}
    parameters: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model):
        if isinstance(tensor, nn.Parameter):
            number = tensor.is_floating_point() or tensor.is_complex()
            swap[id(tensor)] = parameters[name] = nn.Parameter(without_inference(tensor.detach()), requires_grad=number)
        elif not tensor.is_leaf:
            swap[id(tensor)] = tensor.detach().clone()
    learned = {name: p for name, p in parameters.items() if p.requires_grad}
    copy = set_mode(copy_tree(model, swap), False)
    with torch.random.fork_rng(devices=gpus_of(model)), torch.enable_grad(), visible():
        yield Source(copy, learned, data, loss, criterion, solution)


class Sums:
    """Running sums by name, in at least single precision, and how many samples they are over."""

    def __init__(self) -> None:
        self.total: Evidence = {}
        self.count = 0

    def add(self, name: str, value: Tensor, times: float = 1.0) -> None:
        value = wide(value)
        if name in self.total:
            self.total[name].add_(value, alpha=times)
        else:
            self.total[name] = value * times

    def mean(self) -> Evidence:
        return {name: total.div_(self.count) for name, total in self.total.items()}


def gradient(source: Source) -> Evidence:
    """The gradient of the mean loss over all samples."""
    sums = Sums()
    for batch in source.batches():
        for name, g in source.gradients(source.value(batch)):
            sums.add(name, g, batch.size)
        sums.count += batch.size
    return sums.mean()


def squared_gradient(source: Source) -> Evidence:
    """The mean over samples of the squared gradient of each: the diagonal of the empirical Fisher matrix."""
    sums = Sums()
    for batch in source.batches(single=True):
        for name, g in source.gradients(source.value(batch)):
            sums.add(name, wide(g).square())
        sums.count += 1
    return sums.mean()


def curvature(source: Source) -> Evidence:
    """The Hessian of the mean loss times its gradient, in a second pass over the data."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
        whole = gradient(source)
        sums = Sums()
        for batch in source.batches():
            pairs = list(source.gradients(source.value(batch), create_graph=True))
            flow = torch.stack([(g * whole[n].to(g.dtype)).sum() for n, g in pairs if g.requires_grad]).sum()
            for name, product in source.gradients(flow):
                sums.add(name, product, batch.size)
            sums.count += batch.size
    return sums.mean()


EVIDENCE_OF_INPUTS: Mapping[str, Callable[[Moments], Tensor]] = {  # of every activation that a weight multiplies
    "norm of inputs": lambda m: (m.spread + m.count * m.mean.square()).sqrt(),  # L2, over all samples and positions
    "variance of inputs": lambda m: m.spread / (m.count - 1).clamp(min=1),  # of the sample
}


def inputs_of(source: Source, needs: str) -> Evidence:
    """For each weight of a product a statistic of every activation that it multiplies."""
    with torch.no_grad():
        observer = observe_activations(source.model, source.parameters, source.captures, source.batches(), source.run)
    values = EVIDENCE_OF_INPUTS[needs](observer.inputs)
    return observer.by_parameter(values, observer.inputs.count > 0, source.parameters)


def loss_terms(source: Source) -> Evidence:
    """For each weight of a product and each unit that it reads, the sum over samples and positions of squared loss terms.

    A term is the change of the loss, to first order, where the unit is set to zero there: the sum of activation times gradient
    over its channels, over all places of an image, at each position of a sequence. Of a unit of several channels each holds an
    equal part of the score.
    """
    assert source.solution is not None
    units = units_of_labels(source.solution)
    observer = observe_activations(
        source.model, source.parameters, source.captures, source.batches(), source.value, back=True, units=units
    )
    times = torch.zeros(observer.size, dtype=torch.int64)  # a channel of a group stands in as many rows as filters read it
    for f in (f for labels in observer.own_leaves.values() for f in labels):
        times += torch.from_numpy(f.flat).bincount(minlength=observer.size)
    return observer.by_parameter(observer.terms / times.clamp(min=1), observer.inputs.count > 0, source.parameters)


def filter_curvature(source: Source) -> Evidence:
    """For each filter of a product's weight, half its second moment times that of the gradient at its result."""
    observer = observe_activations(source.model, source.parameters, source.captures, source.batches(), source.value, back=True)
    positions = (observer.outputs.count / observer.samples).clamp(min=1)
    squares = observer.outputs.spread + observer.outputs.count * observer.outputs.mean.square()
    score = squares / observer.samples * observer.backward / observer.samples / positions / 2
    return observer.by_parameter(score, observer.outputs.count > 0, source.parameters)


LOSS_TERMS = "loss terms"  # of units, so that heads differ from dimensions within them
GATHER: Mapping[str, Callable[[Source], Evidence]] = {
    "gradient": gradient,
    "squared gradient": squared_gradient,
    "curvature": curvature,
    **{needs: functools.partial(inputs_of, needs=needs) for needs in EVIDENCE_OF_INPUTS},
    "filter curvature": filter_curvature,
    LOSS_TERMS: loss_terms,
    "contributions of experts": contributions,
}
SAMPLES = "gradients of samples"  # the score is the mean over samples of the square of what each gives


def sample_gradients(source: Source) -> Iterator[Evidence]:
    """The gradients of each sample's loss."""
    for batch in source.batches(single=True):
        yield {name: g.detach() for name, g in source.gradients(source.value(batch))}
