"""What must hold of a coupling and of a choice; checked where `FXPRUNE_STRICT=1` is set, as it is in tests.

What must hold of an emitted program is checked where it is emitted.
"""

from __future__ import annotations

import os

import torch

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ir.slices import Slicer, cut_shape


class StageFault(BaseException):
    """A stage returned what the next one cannot rely on; no `except Exception` takes it for an error of the model's."""


def strict() -> bool:
    return os.environ.get("FXPRUNE_STRICT") == "1"


def require(holds: bool, what: str) -> None:
    if not holds:
        raise StageFault(what)


def check_coupling(solution: Solution) -> None:
    """Captured graphs are well formed, references are to values that were recorded, and labels have shapes of their tensors."""
    if not strict():
        return
    labels = len(solution.unit_of)
    for capture, values in zip(solution.captures, solution.values, strict=True):
        capture.graph.lint()
        recorded = len(capture.op_trace.values)
        for node in capture.graph.nodes:
            refs = collect(capture.results.get(node), TensorRef)
            require(all(0 <= ref.id < recorded for ref in refs), f"{node} refers to a value that was not recorded")
        require(all(0 <= i < recorded for i in values), "a value has labels and was not recorded")
    unit = solution.unit_of
    require(bool((unit <= torch.arange(labels)).all()), "a unit is not named by its smallest label")
    require(bool((unit[unit] == unit).all()), "a unit is named by a label of another unit")
    for name, found in solution.leaves.items():
        shape = solution.shapes[name]
        for f in found:
            full = len(f.labels.shape) == len(shape) and all(a in (1, b) for a, b in zip(f.labels.shape, shape, strict=True))
            require(full, f"the labels of {name} do not have its shape")
            require(not f.labels.numel() or int(f.labels.max()) < labels, f"{name} has a label that was not solved")


def check_choice(solution: Solution, slicer: Slicer) -> None:
    """Units stay or go as one, and every tensor is left a rectangle with something in it."""
    if not strict():
        return
    kept = slicer.kept
    require(bool((kept == kept[solution.unit_of]).all()), "labels of one unit are kept and removed")
    for name, labels in solution.leaves.items():
        shape = solution.shapes[name]
        left = cut_shape(shape, slicer(labels, shape))
        require(all(n > 0 or not was for n, was in zip(left, shape, strict=True)), f"nothing is left of {name}")
