"""The state of label propagation: what is known when the rule of an op is applied, besides the op itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fxprune.passes.ir.constraints import ConstraintBuilder
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.program import TensorSize

LeafDim = tuple[str, int, int]
SizeSource = TensorSize | tuple[str, str]  # or the path of a module and the name of an attribute


class PartRead(NamedTuple):
    """Labels along a dimension that a call reads as far as a size of the inputs says: all of them, and those of the example."""

    every: np.ndarray
    taken: np.ndarray
    node: int


@dataclass(slots=True)
class PropagationState:
    """Labels on their way through one program.

    Attributes:
        op_trace: the program's calls.
        labels: of every value so far, by number.
        constraints: where rules report.
        heads: whether batch dimensions of products of activations are heads; `queries`: those of KV heads stay.
        uses: values that a later call reads; empty where that is not known.
        varying: values whose contents change with the sizes of the inputs.
        pinned: views that are written into, which cannot become copies.
        uniform: values whose entries are all equal, with the one they are views of; `read_before`: those that a call has read.
        unread: copies and constants that no call has read yet, with the dimensions along which their labels are new.
        seeking_heads: whether this pass only looks for heads.
        summed: in that pass, rows that a product has summed over, by the label that stands for each.
        choices: whether entries that are chosen by value may go, those that are never chosen.
        picks: values that are numbers of chosen entries, each with the labels that they are numbers of.
        number: one of them that Python has just read.
        marked: values that are zero at entries that are not chosen.
        asked: values that are zero if a certain number is never chosen, with the labels of what is chosen from and the number.
        leaf_dims: dimensions of the model's own tensors that may be composed, by first label: tensor, dimension, size.
        composed: those found to belong to several labels at once (an outer product), by first label, with the labels.
        across: lines that lie across few long ones, each of which became one unit as another operand varies along them alone.
        rewrite: what the current node becomes in the pruned program (see `OpSpec`).
        opaque: whether the current node is an opaque module, in which no written-out size can be changed.
        sizes: what sizes in opaque modules are, of other tensors or attributes, by value and dimension.
        sized: the labels along dimensions that opaque modules made as large as an attribute says.
        literals: integers among the current node's arguments that no rewrite can change.
        input_dims: finds the dimensions of the current node's result that it gives sizes of the inputs.
        sliced_dims: finds those of its first tensor that it slices by sizes of the inputs.
        is_inputs: whether a size in an opaque module is one of the inputs.
        part_read: what was read as far as a size of the inputs says.
    """

    op_trace: OpTrace
    labels: dict[int, Labels]
    constraints: ConstraintBuilder
    heads: bool | str = False
    uses: set[int] = field(default_factory=set)
    varying: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    uniform: dict[int, int] = field(default_factory=dict)
    read_before: set[int] = field(default_factory=set)
    unread: dict[int, frozenset[int]] = field(default_factory=dict)
    seeking_heads: bool = False
    summed: dict[int, Tensor] = field(default_factory=dict)
    choices: bool = False
    picks: dict[int, np.ndarray] = field(default_factory=dict)
    number: tuple[Any, np.ndarray] | None = None
    asked: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)
    marked: set[int] = field(default_factory=set)
    leaf_dims: dict[int, LeafDim] = field(default_factory=dict)
    composed: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    across: list[Tensor] = field(default_factory=list)
    rewrite: Callable[..., Any] | None = None
    opaque: bool = False
    sizes: dict[int, dict[int, SizeSource]] = field(default_factory=dict)
    sized: dict[SizeSource, Tensor] = field(default_factory=dict)
    literals: frozenset[int] = frozenset()
    input_dims: Callable[[], frozenset[int]] = frozenset
    sliced_dims: Callable[[], frozenset[int]] = frozenset
    is_inputs: Callable[[TensorSize], bool] = lambda size: False
    part_read: list[PartRead] = field(default_factory=list)
