"""Roles of parameters, from the op trace: which dimensions a product sums over, and which parameters scale a normalised value.

No layer is named here: what counts is the dispatcher call that a parameter enters, and in which argument.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.passes.coupling.leaf_labels import leaf_labels
from fxprune.passes.coupling.propagation import apply_rule
from fxprune.passes.ir.constraints import ConstraintBuilder
from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ir.op_trace import OpCall, OpTrace
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.propagation_state import PropagationState
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.pointwise import same
from fxprune.passes.ops.registry import Product, spec_of


class Origins:
    """Labels of everything that is made of parameters alone, with labels that belong to one dimension of one of them.

    Arguments:
        leaves: labels by name, and `size` how many there are, as `leaf_labels` gives them.
    """

    def __init__(self, leaves: dict[str, Labels], size: int) -> None:
        self.leaves, self.size = leaves, size
        self.known: dict[int, Labels] = {}
        self.constraints = ConstraintBuilder(size)

    def call(self, op: OpCall, op_trace: OpTrace) -> RuleContext:
        return RuleContext(op, PropagationState(op_trace, self.known, self.constraints))

    def follow(self, op: OpCall, op_trace: OpTrace) -> None:
        """Carry labels from the arguments of an op to its results, where no input of the model is among them."""
        refs = collect((op.args, op.kwargs), TensorRef)
        for ref in refs:
            value = op_trace.values[ref.id]
            if value.name is not None and ref.id not in self.known:
                self.known[ref.id] = self.leaves.get(value.name, NONE)
        if any(op_trace.values[r.id].from_input for r in refs) or not any(self.known.get(r.id) for r in refs):
            return
        try:
            apply_rule(self.call(op, op_trace))
        except Exception:  # an op that only coupling, with all labels at hand, can read: what it makes has no origin
            for ref in collect(op.outs, TensorRef):
                self.known.setdefault(ref.id, NONE)
        self.constraints.clear()

    def vector(self, product: Product, shape: Sequence[int], dim: int | None) -> tuple[Tensor, Tensor] | None:
        """Labels along a dimension of a product's weight, and for each the index of the channel it meets; None if none."""
        if dim is None:
            return None
        for f in self.known.get(product.weight.id, NONE):
            if f.major_to_minor[-1] != dim or bool((f.labels >= self.size).any()):
                continue
            n = shape[dim]
            index = torch.arange(n).reshape([n if d == dim else 1 for d in range(len(shape))])
            if product.groups > 1 and dim == product.summed == 1:
                group = torch.arange(shape[0]) // (shape[0] // product.groups)
                index = index + group.reshape([-1] + [1] * (len(shape) - 1)) * n
            elif product.groups > 1 and dim == product.kept == 1:
                continue  # an output channel of each group: none of its own
            labels, index = torch.broadcast_tensors(f.labels, index)
            return labels.reshape(-1), index.reshape(-1)
        return None


@dataclass(slots=True)
class Roles:
    """What parameters are to the program.

    Attributes:
        reads: (parameter, dimension) pairs that a product with an activation sums over.
        scales: names of parameters that multiply a normalised activation.
    """

    reads: set[tuple[str, int]]
    scales: set[str]


def roles(captures: Sequence[CapturedProgram]) -> Roles:
    leaves, size = leaf_labels(captures)
    owner = {}
    for name, labels in leaves.items():
        for f in labels:
            owner.update(dict.fromkeys((int(f.flat[0]), int(f.flat[-1])), (name, f.major_to_minor[-1])))
    starts = sorted(owner)
    found = Roles(set(), set())
    for capture in captures:
        origins = Origins(leaves, size)
        normalised: set[int] = set()
        for op in capture.op_trace.ops:
            origins.follow(op, capture.op_trace)
            call = origins.call(op, capture.op_trace)
            for product in spec_of(op).products_of(call):
                if not capture.op_trace.values[product.source.id].from_input:
                    continue
                met = origins.vector(product, call.shape(product.weight), product.summed)
                if met is not None:
                    found.reads |= {owner[s] for s in owners(starts, met[0])}
            scale = scaling(call, normalised)
            if scale is not None:
                found.scales |= {owner[s][0] for f in origins.known.get(scale.id, NONE) for s in owners(starts, f.labels)}
    return found


def owners(starts: list[int], labels: Tensor) -> set[int]:
    """The first labels of the dimensions that some labels belong to."""
    return {starts[bisect.bisect_right(starts, int(i)) - 1] for i in labels.unique().tolist() if i}


def scaling(call: OpView, normalised: set[int]) -> TensorRef | None:
    """The parameter by which an op scales a normalised value; `normalised` are the values known to be, and grows.

    Normalised is what comes out of a normalisation op, and what is multiplied by a reciprocal root or divided by a root.
    """
    if not call.outputs or not call.inputs:
        return None
    spec, name = spec_of(call.op), call.op.func._schema.name.rpartition("::")[2].rstrip("_")
    out, values = call.outputs[0].id, call.op_trace.values
    if spec.normalizes:
        normalised.add(out)
        return call.tensor("weight")
    if name in ("rsqrt", "sqrt", "std", "linalg_vector_norm") and values[call.first.id].from_input:
        normalised.add(-out - 1)  # a statistic: dividing by it normalises
    elif name in ("mul", "div") and len(call.inputs) == 2:
        a, b = call.inputs
        for x, other in ((a, b), (b, a)):
            if -other.id - 1 in normalised and values[x.id].from_input:
                normalised.add(out)
            elif x.id in normalised and not values[other.id].from_input and name == "mul":
                normalised.add(out)
                return other
    elif name in ("add", "clamp_min", "clamp") and -call.first.id - 1 in normalised:
        normalised.add(-out - 1)
    elif spec.moves or spec.labels is same:
        normalised |= {out} if call.first.id in normalised else {-out - 1} if -call.first.id - 1 in normalised else set()
    return None
