"""The solved coupling: labels of every value, and the units that removal acts on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from fxprune.passes.ir.constraints import Tie
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.program import CapturedProgram


@dataclass(slots=True)
class Solution:
    """Labels of every value and the units that removal acts on.

    Attributes:
        captures: the runs that were read.
        leaves: labels of the model's own tensors, by name.
        values: for each capture, the labels of every value on its tape.
        unit_of: the unit of each label, named by the smallest label in it.
        frozen: for each unit that is never removed the number of the reason, else -1 (indexed by label).
        reasons: clauses, each with the place in the program.
        equal_rows: matrices of units whose rows must keep equally many entries.
        regions: nodes replaced by one gather, so that what they pass through need not be a rectangle.
        ties: those that were solved, as the rules reported them.
        shapes: of the model's own tensors, by name.
        some_stay: units of which one at least must stay.
    """

    captures: list[CapturedProgram]
    leaves: dict[str, Labels]
    values: list[dict[int, Labels]]
    unit_of: Tensor
    frozen: np.ndarray
    reasons: list[str]
    equal_rows: list[np.ndarray]
    regions: list[dict[fx.Node, fx.Node]]
    ties: list[Tie]
    shapes: dict[str, tuple[int, ...]]
    some_stay: list[np.ndarray]
