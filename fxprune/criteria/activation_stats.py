"""Statistics of activations, by the labels of the weights they meet: one run of the model under a dispatcher mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.criteria.parameter_roles import Origins
from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.coupling.leaf_labels import leaf_labels
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import Product, spec_of


class Moments:
    """Count, mean and sum of squared deviations by label, merged as Chan et al. (1979) do: shape (labels,), float64."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.spread = (torch.zeros(size, dtype=torch.float64) for _ in range(3))

    def add(self, labels: Tensor, x: Tensor, index: Tensor, dim: int) -> None:
        """Merge the entries of `x` along one dimension, taken at `index`, into those of `labels`."""
        rest = [d for d in range(x.dim()) if d != dim]
        x = wide(x)
        var, mean = torch.var_mean(x, rest, correction=0) if rest else (torch.zeros_like(x), x)
        n = float(x.numel() // x.shape[dim])
        var, mean = var.double().cpu()[index], mean.double().cpu()[index]
        total = self.count[labels] + n
        change = mean - self.mean[labels]
        self.spread[labels] += var * n + change.square() * self.count[labels] * n / total
        self.mean[labels] += change * n / total
        self.count[labels] = total


class ActivationObserver(Recorder):
    """Runs a model and keeps, for each label of a weight, the moments of the activations that it multiplies or makes.

    Arguments:
        names: the model's tensors by identity.
        origins: labels that belong to one dimension of one parameter.
        differentiate: also follow gradients at the results of products.
        units: for each label its unit, shape (labels,): follow first-order terms of the loss at what products read instead.

    Attributes:
        inputs, outputs: moments of what products read and make.
        backward: by label the sum of squared gradients at results.
        terms: by label the sum of squared terms, a unit's in equal parts.
    """

    def __init__(
        self, names: dict[int, str], origins: Origins, *, differentiate: bool = False, units: Tensor | None = None
    ) -> None:
        super().__init__(names)
        self.own_leaves, self.size = origins.leaves, origins.size
        self.origins = origins
        self.differentiate, self.units = differentiate and units is None, units
        self.read: list[tuple[Tensor, Tensor, Tensor, int, bool]] = []
        self.terms = torch.zeros(self.size, dtype=torch.float64)
        self.inputs, self.outputs = Moments(self.size), Moments(self.size)
        self.backward = torch.zeros(self.size, dtype=torch.float64)
        self.samples = 0
        self.weighted = 1
        self.pending: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def begin(self, batch: Any) -> None:
        """Forget the last batch's values, and learn which tensors are inputs."""
        fresh = Recorder(self.names)
        self.op_trace, self.known, self.held, self.contents = fresh.op_trace, fresh.known, fresh.held, fresh.contents
        self.origins = Origins(self.own_leaves, self.size)
        self.samples += batch.size
        self.weighted = batch.size
        for tensor in collect((batch.args, batch.kwargs), Tensor):
            self.add(tensor, from_input=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.settle()
        before = len(self.op_trace.ops)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for op in self.op_trace.ops[before:]:
            self.origins.follow(op, self.op_trace)
            call = self.origins.call(op, self.op_trace)
            for found in spec_of(call.op).products_of(call):
                if self.op_trace.values[found.source.id].from_input and self.origins.known.get(found.weight.id):
                    tensors = {self.ref(t).id: t for t in collect((args, kwargs), Tensor)}
                    self.look(found, tensors, call, out)
        del self.op_trace.ops[before:]
        return out

    def look(self, product: Product, tensors: Mapping[int, Tensor], call: OpView, out: Tensor) -> None:
        """Look at one product of a call; `tensors` are those of the call, by the numbers of their references."""
        shape, is_image = call.shape(product.weight), "dilation" in call.named
        met = self.origins.vector(product, shape, product.summed)
        if met is not None and self.units is not None:
            labels, source, index, dim = once(*met, tensors[product.source.id], product.along)
            self.inputs.count[labels] += 1
            if source.requires_grad:
                self.read.append((source, labels, index, dim % source.dim(), is_image))
        elif met is not None:
            self.inputs.add(*once(*met, tensors[product.source.id], product.along))
        made = self.origins.vector(product, shape, product.kept) if self.differentiate else None
        if made is not None:
            result = out.detach()
            if product.added is not None:
                result = result - lifted(tensors[product.added.id].detach(), result.dim(), product.out)
            self.outputs.add(*once(*made, result, product.out))
            self.pending.append((out, *made, product.out))

    def settle(self) -> None:
        """Ask for the gradients at results that autograd has seen by now; whatever writes them in place comes later."""
        for out, labels, index, dim in self.pending:
            node = out.grad_fn
            if node is not None:
                node.register_prehook(self.collector(labels, index, dim, self.weighted))
        self.pending.clear()

    def differentiate_terms(self, loss: Tensor) -> None:
        """Add the squared terms of a loss, a mean over the batch, at all that products have read."""
        assert self.units is not None
        gradients: Sequence[Tensor | None] = ()
        if self.read:
            gradients = torch.autograd.grad(loss, [x for x, *_ in self.read], allow_unused=True)
        for (x, labels, index, dim, is_image), g in zip(self.read, gradients, strict=True):
            if g is None:
                continue
            product = (wide(x) * wide(g) * self.weighted).movedim(dim, -1)
            rows = product.flatten(1, -2).sum(1) if is_image and product.dim() > 2 else product.reshape(-1, product.shape[-1])
            units, place = self.units[labels].unique(return_inverse=True)
            if len(units) == len(labels):  # units of one channel each: nothing to be added up within them
                self.terms[labels] += rows.square().sum(0, dtype=torch.float64).cpu()[index.cpu()]
                continue
            place = place.to(rows.device)
            sums = rows.new_zeros(len(rows), len(units)).index_add_(1, place, rows[:, index.to(rows.device)])
            each = (sums.square().sum(0, dtype=torch.float64) / place.bincount()).cpu()
            self.terms[labels] += each[place.cpu()]
        self.read.clear()

    def collector(self, labels: Tensor, index: Tensor, dim: int, size: int) -> Callable[[Any], None]:
        def collect_gradient(gradients: Any) -> None:
            if gradients[0] is not None:  # that of a mean over the batch: each sample's is `size` times as large
                g = wide(gradients[0]) * size
                squares = g.square().sum([d for d in range(g.dim()) if d != dim]).double().cpu()
                self.backward[labels] += squares[index]

        return collect_gradient

    def by_parameter(self, values: Tensor, known: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values by label, as tensors that broadcast to the parameters they are of."""
        found: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            for f in self.own_leaves.get(name, ()):
                if bool(known[f.labels].any()):
                    found[name] = values[f.labels].to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        return found


def wide(x: Tensor) -> Tensor:
    """Without its history, in at least single precision."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def once(labels: Tensor, index: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Each label once: a label that stands in several rows meets the same channel in all of them."""
    unique, inverse = labels.unique(return_inverse=True)
    first = torch.full((len(unique),), len(labels)).scatter_reduce(0, inverse, torch.arange(len(labels)), "amin")
    return unique, x, index[first], dim


def lifted(bias: Tensor, ndim: int, dim: int) -> Tensor:
    """A bias as it is added along one dimension; one of as many dimensions as the result is added as it is."""
    return bias.reshape([-1 if d == dim else 1 for d in range(ndim)]) if bias.dim() == 1 else bias


def observe_activations(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    captures: Sequence[CapturedProgram],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    *,
    back: bool = False,
    units: Tensor | None = None,
    by: type[ActivationObserver] = ActivationObserver,
) -> ActivationObserver:
    """Run the model on every batch under an observer.

    Arguments:
        model: what `run` runs.
        parameters: its parameters by the names that the captures know.
        captures: the captured programs, for the labels.
        batches: what to run.
        run: from a batch to the model's output; with `back`, to a loss, whose gradients are observed too.
        units: as for the observer.
        by: the class of the observer.
    """
    names = {id(t): n for n, t in named_tensors(model)} | {id(p): n for n, p in parameters.items()}
    observer = by(names, Origins(*leaf_labels(captures)), differentiate=back, units=units)
    for batch in batches:
        observer.begin(batch)
        with observer:
            made = run(batch)
        observer.settle()
        if units is not None:
            observer.differentiate_terms(made)
        elif back:
            torch.autograd.grad(made, list(parameters.values()), allow_unused=True)
    return observer


def units_of_labels(solution: Solution) -> Tensor:
    """For each label that one dimension of one parameter has before any constraint, its unit, or a number of its own."""
    leaves, size = leaf_labels(solution.captures)
    unit = solution.unit_of
    found = len(unit) + torch.arange(size)
    for name, labels in leaves.items():
        for f in labels:
            for g in solution.leaves.get(name, ()):
                if g.dims == f.dims and len(g.flat) == len(f.flat):
                    found[torch.from_numpy(f.flat)] = unit[torch.from_numpy(g.flat)]
    return found
