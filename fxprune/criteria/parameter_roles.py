"""Roles of parameters, read off the tape: which dimensions a product sums over, and which parameters scale a normalised value.

No layer is named here: what counts is the dispatcher call that a parameter enters, and in which argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.coupling.leaf_labels import leaf_labels
from fxprune.passes.coupling.propagation import apply_rule
from fxprune.passes.ir.constraints import Constraints
from fxprune.passes.ir.labels import NONE, Labels
from fxprune.passes.ir.op_trace import OpCall, OpTrace
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.registry import load

MATRIX = frozenset("mm addmm bmm baddbmm matmul mv addmv _addmm_activation".split())
CONVOLUTIONS = ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")
PASSING = frozenset("_to_copy view _unsafe_view reshape expand permute transpose clone contiguous".split())


@dataclass(frozen=True, slots=True)
class Product:
    """A weight in a contraction: which of its dimensions is summed, which becomes one of the result's.

    Attributes:
        weight, source: the two operands.
        summed, kept: dimensions of the weight; `kept` is None where it adds none to the result.
        along: the dimension of the source that is summed.
        out: the dimension of the result that `kept` becomes.
        groups: of a convolution.
        added: what the result also has added to it: the bias.
    """

    weight: TensorRef
    source: TensorRef
    summed: int
    kept: int | None
    along: int
    out: int
    groups: int = 1
    added: TensorRef | None = None


def products(call: RuleContext) -> Iterator[Product]:
    """The ways in which an op multiplies one operand by another, as a weight of its own would."""
    name = call.op.func._schema.name.rpartition("::")[2]
    if name in CONVOLUTIONS:
        x, weight, bias = call["input"], call["weight"], call.get("bias")
        turned = bool(call.get("transposed", False))
        summed, kept = (0, 1) if turned else (1, 0)
        yield Product(weight, x, summed, kept, 1, 1, call.get("groups", 1), bias if isinstance(bias, TensorRef) else None)
    elif name == "linear":
        bias = call.get("bias")
        last = len(call.shape(call["input"])) - 1
        yield Product(call["weight"], call["input"], 1, 0, last, last, 1, bias if isinstance(bias, TensorRef) else None)
    elif name in MATRIX:
        *rest, a, b = call.inputs
        added = rest[0] if rest else None
        n, m = len(call.shape(a)), len(call.shape(b))
        if m == 1:
            yield Product(a, b, n - 1, n - 2, 0, 0, 1, added)
        elif n == m:
            yield Product(b, a, m - 2, m - 1, n - 1, n - 1, 1, added)
            yield Product(a, b, n - 1, n - 2, m - 2, n - 2, 1, added)


class Origins:
    """Labels of everything that is made of parameters alone, with labels that belong to one dimension of one of them.

    Arguments:
        leaves: labels by name, and `size` how many there are, as `leaf_labels` gives them.
    """

    def __init__(self, leaves: dict[str, Labels], size: int) -> None:
        load()
        self.leaves, self.size = leaves, size
        self.known: dict[int, Labels] = {}
        self.constraints = Constraints(size=size)

    def call(self, op: OpCall, op_trace: OpTrace) -> RuleContext:
        return RuleContext(op, op_trace, self.known, self.constraints, False, set())

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
        for name in ("pairs", "frozen", "coarse", "equal", "product"):
            getattr(self.constraints, name).clear()

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
    """The roles of all parameters."""
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
            for product in products(call):
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
    import bisect

    return {starts[bisect.bisect_right(starts, int(i)) - 1] for i in labels.unique().tolist() if i}


def scaling(call: RuleContext, normalised: set[int]) -> TensorRef | None:
    """The parameter by which an op scales a normalised value; `normalised` are the values known to be, and grows.

    Normalised is what comes out of a normalisation op, and what is multiplied by a reciprocal root or divided by a root.
    """
    name = call.op.func._schema.name.rpartition("::")[2].rstrip("_")
    if not call.outputs or not call.inputs:
        return None
    out = call.outputs[0].id
    if any(kind in name for kind in NORMS):
        normalised.add(out)
        weight: Any = call.get("weight")
        return weight if isinstance(weight, TensorRef) else None
    if name in ("rsqrt", "sqrt", "std", "linalg_vector_norm") and call.op_trace.values[call.first.id].from_input:
        normalised.add(-out - 1)  # a statistic: dividing by it normalises
        return None
    values = call.op_trace.values
    if name in ("mul", "div") and len(call.inputs) == 2:
        a, b = call.inputs
        for x, other in ((a, b), (b, a)):
            if -other.id - 1 in normalised and values[x.id].from_input:
                normalised.add(out)
            elif x.id in normalised and not values[other.id].from_input and name == "mul":
                normalised.add(out)
                return other
    elif name in ("add", "clamp_min", "clamp") and -call.first.id - 1 in normalised:
        normalised.add(-out - 1)
    elif name in PASSING:
        normalised |= {out} if call.first.id in normalised else {-out - 1} if -call.first.id - 1 in normalised else set()
    return None
