"""What a family is to the program: a residual stream, a hidden layer, a head, by what the op trace does to its channels.

No name is looked at. Let a *layer product* be a product of an activation with a weight that is made of parameters alone.

- *head*: its units are along a batch dimension of a product of two activations, as attention's are. It is a *KV group* where
  rows in succession are one unit there: query heads that share a key head.
- *expert*: its units are chosen among by value, and the numbers of the chosen ones index parameters.
- *head dimension*: its units are along one of the other two dimensions of such a product.
- *residual stream*: its channels are in a sum of two activations, one of which is computed from the other one.
- *hidden layer*: layer products make its channels, and others read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fxprune.passes.coupling.choices import chosen_units
from fxprune.passes.coupling.families import Family, family_of_labels
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.labels import NONE, Factor
from fxprune.passes.ir.op_trace import OpCall, OpTrace, name_of
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import spec_of

ADDITIONS = frozenset({"aten::add", "aten::add_", "aten::sub", "aten::sub_"})
WHOLE = 0.5  # of the layer products: a stream that more of them touch crosses the whole model


@dataclass(frozen=True, slots=True)
class Role:
    """What a family is to the program.

    Attributes:
        name: `residual stream`, `hidden layer`, `head`, `KV group`, `head dimension`, `expert`, or "" where none of them fits.
        share: the share of the model's layer products that make or read its channels.
    """

    name: str
    share: float

    @property
    def crosses(self) -> bool:
        """Whether it is a residual stream through the whole model."""
        return self.name == "residual stream" and self.share > WHOLE


class Trace:
    """Which families the values of one op trace hold.

    Arguments:
        solution: the coupling.
        number: of the captured program.
        family: for each label the position of its family, -1 if it has none.
    """

    def __init__(self, solution: Solution, number: int, family: np.ndarray) -> None:
        self.op_trace: OpTrace = solution.captures[number].op_trace
        self.values, self.family = solution.values[number], family
        self.looked_up: dict[object, tuple[object, set[int]]] = {}  # with what an identity is of
        self.made_at = {ref.id: i for i, op in reversed([*enumerate(self.op_trace.ops)]) for ref in op.outputs}

    def families(self, ref: TensorRef, dim: int | None = None) -> set[int]:
        """The families with channels along a dimension of a value, or along any."""
        rank = len(self.op_trace.shape(ref))
        found = [f for f in self.values.get(ref.id, NONE) if dim is None or dim % rank in f.dims]
        return {i for f in found for i in self.of(f) if i >= 0}

    def of(self, f: Factor) -> set[int]:
        """The families of some labels, which many values share."""
        key = (f.start, len(f.flat)) if f.start is not None else id(f.base)
        if key not in self.looked_up:
            self.looked_up[key] = f.base, set(np.unique(self.family[f.flat]).tolist())
        return self.looked_up[key][1]

    def from_input(self, ref: TensorRef) -> bool:
        return self.op_trace.values[ref.id].from_input

    def products(self) -> Iterator[tuple[set[int], set[int]]]:
        """For each layer product the families that it reads and those that it makes."""
        for op in self.op_trace.ops:
            for product in spec_of(op).products_of(OpView(op, self.op_trace)):
                if self.from_input(product.source) and not self.from_input(product.weight):
                    made = set() if product.kept is None else self.families(op.outputs[0], product.out)
                    yield self.families(product.source, product.along), made

    def attention(self) -> tuple[set[int], set[int], set[int]]:
        """The families along batch dimensions of products of two activations; those of them with several rows in
        succession to a unit; and the families along the other dimensions."""
        batch, grouped, rest = set[int](), set[int](), set[int]()
        for op in self.op_trace.ops:
            operands = op.inputs[:3] if spec_of(op).heads else []
            if len(operands) > 1 and all(self.from_input(ref) and len(self.op_trace.shape(ref)) > 2 for ref in operands[:2]):
                for ref in filter(self.from_input, operands):
                    rank = len(self.op_trace.shape(ref))
                    for f in self.values.get(ref.id, NONE):
                        mine = self.of(f)
                        batch |= mine if max(f.dims) < rank - 2 else set()
                        grouped |= mine if max(f.dims) < rank - 2 and bool((f.flat[1:] == f.flat[:-1]).any()) else set()
                        rest |= mine
        return batch, grouped, rest - batch

    def residual(self) -> set[int]:
        """The families whose channels are in a sum of an activation and what is computed from it."""
        found: set[int] = set()
        for i, op in enumerate(self.op_trace.ops):
            if name_of(op.func) in ADDITIONS and len(op.inputs) == 2 and all(map(self.from_input, op.inputs)):
                a, b = op.inputs
                both = self.families(a) & self.families(b)
                if both - found and (self.depends(i, b, a) or self.depends(i, a, b)):
                    found |= both
        return found

    def depends(self, before: int, value: TensorRef, on: TensorRef) -> bool:
        """Whether a value, made before some op, is computed from another one by a product: `x + x**3` is an activation."""
        start = self.made_at.get(on.id, -1)
        known, behind = {value.id}, set[int]()  # what it is computed from; of those, by a product
        for op in reversed(self.op_trace.ops[start + 1 : before]):
            made = {ref.id for ref in op.outputs}
            if known.isdisjoint(made):
                continue
            read = {ref.id for ref in op.inputs}
            known |= read
            if not behind.isdisjoint(made) or self.multiplies(op):
                behind |= read
                if on.id in behind:
                    return value.id != on.id
        return False

    def multiplies(self, op: OpCall) -> bool:
        return any(True for _ in spec_of(op).products_of(OpView(op, self.op_trace))) or bool(spec_of(op).heads)


def find_roles(solution: Solution, found: Sequence[Family]) -> list[Role]:
    label = family_of_labels(solution, found)
    reads, makes, touches, total = Counter[int](), Counter[int](), Counter[int](), 0
    streams, heads, groups, dims = set[int](), set[int](), set[int](), set[int]()
    chosen = chosen_units(solution)
    experts = {i for i, family in enumerate(found) if np.isin(family.units, chosen).any()}
    for number in range(len(solution.captures)):
        trace = Trace(solution, number, label)
        for read, made in trace.products():
            reads.update(read)
            makes.update(made)
            touches.update(read | made)
            total += 1
        streams |= trace.residual()
        batch, several, rest = trace.attention()
        heads, groups, dims = heads | batch, groups | several, dims | rest
    names = []
    for i in range(len(found)):
        if i in experts:
            names.append("expert")
        elif i in heads:
            names.append("KV group" if i in groups else "head")
        elif i in streams:
            names.append("residual stream")
        else:
            names.append("head dimension" if i in dims else "hidden layer" if reads[i] and makes[i] else "")
    return [Role(name, touches[i] / max(total, 1)) for i, name in enumerate(names)]
