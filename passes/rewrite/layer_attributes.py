"""Attributes of modules that change with pruning, where a module is called as one node of the graph."""

from __future__ import annotations

from typing import Any

import torch

from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.rewrite.layer_table import changed_attributes, table_of
from fxprune.passes.rewrite.pruned_shapes import PrunedShapes


class LayerAttributes:
    """Finds the attributes of standard layers that change, from the shapes of their inputs and of their own tensors."""

    def __init__(self, capture: CapturedProgram, shapes: PrunedShapes) -> None:
        self.capture, self.shapes = capture, shapes
        self.owned: dict[str, dict[str, TensorRef]] = {}  # by module path: its own tensors
        self.inside: dict[str, list[str]] = {}  # by module path: the modules below it that own tensors
        for i, v in enumerate(capture.op_trace.values):
            if v.name is not None:
                path, _, name = v.name.rpartition(".")
                if path not in self.owned:
                    parts = path.split(".")
                    for n in range(1, len(parts)):
                        self.inside.setdefault(".".join(parts[:n]), []).append(path)
                self.owned.setdefault(path, {})[name] = TensorRef(i)

    def changed(self, path: str, inputs: list[TensorRef]) -> dict[str, Any]:
        """The attributes that change of the layer at `path`, where it is called on these tensors."""
        module: Any = self.capture.modules[path]
        kind: Any = type(module)
        if table_of(kind) is None:
            return {}
        before, after = [self.shapes.before(r) for r in inputs], [self.shapes.after(r) for r in inputs]
        found = changed_attributes(module, before, after, self.own_shapes(path))
        if "num_channels" in found and isinstance(module.num_groups, int):  # whole groups may have been removed
            size = before[0][1] // module.num_groups
            found["num_groups"] = len(torch.unique(self.shapes.positions(inputs[0], 1) // size))
        return found

    def own_shapes(self, path: str) -> dict[str, tuple[int, ...]]:
        """Pruned shapes of a module's own tensors and of those of the modules below it."""
        path = path.removeprefix(self.capture.prefix)
        found = {name: self.shapes.after(ref) for name, ref in self.owned.get(path, {}).items()}
        for inner in self.inside.get(path, ()):
            found |= {f"{inner[len(path) + 1 :]}.{n}": self.shapes.after(ref) for n, ref in self.owned[inner].items()}
        return found
