"""Attributes of modules that change with pruning, where a module is called as one node of the graph; `TABLE` has the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.ir.op_trace import name_of
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ir.slices import TensorSlice
from fxprune.passes.rewrite.size_expressions import PrunedShapes


class LayerAttributes:
    """Finds the attributes of standard layers that change, from the shapes of their inputs and of their own tensors."""

    def __init__(self, capture: CapturedProgram, shapes: PrunedShapes) -> None:
        self.capture, self.shapes = capture, shapes
        self.computed: dict[str, list[TensorSlice]] = {}  # of weights that hooks compute, by name
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
        table = table_of(type(module))  # type: ignore[arg-type]  # a class is hashable, whatever mypy says
        if table is None:
            return {}
        before, after = [self.shapes.before(r) for r in inputs], [self.shapes.after(r) for r in inputs]
        own = self.own_shapes(path)
        computed = None
        if "weight" not in own and getattr(module, "weight", None) is not None:
            shape = tuple(module.weight.shape)
            computed = self.computed_weight(path.removeprefix(self.capture.prefix), shape)
            own["weight"] = shape if computed is None else self.shapes.after(computed)
        found = {k: v for k, v in table(module, before, after, own).items() if getattr(module, k) != v}
        if "num_channels" in found and isinstance(module.num_groups, int):  # whole groups may have been removed
            size = before[0][1] // module.num_groups
            found["num_groups"] = len(torch.unique(self.shapes.positions(inputs[0], 1) // size))
        if computed is not None and isinstance(vars(module).get("weight"), Tensor):  # what a hook put there last
            self.computed[f"{path.removeprefix(self.capture.prefix)}.weight"] = self.shapes.cuts(computed)
        return found

    def read_only(self, called: Collection[str]) -> dict[str, dict[str, Any]]:
        """The attributes, by path, of layers that others read and nobody calls, such as the projection of an attention."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.owned:
            path = f"{self.capture.prefix}{name}"
            module: Any = self.capture.modules.get(path)
            table = None if module is None or path in called else table_of(type(module))  # type: ignore[arg-type]
            if not any(table is known for known in OF_WEIGHTS):
                continue
            if changed := self.changed(path, []):
                found[path] = changed
        return found

    def own_shapes(self, path: str) -> dict[str, tuple[int, ...]]:
        """Pruned shapes of a module's own tensors and of those of the modules below it."""
        path = path.removeprefix(self.capture.prefix)
        found = {name: self.shapes.after(ref) for name, ref in self.owned.get(path, {}).items()}
        for inner in self.inside.get(path, ()):
            found |= {f"{inner[len(path) + 1 :]}.{n}": self.shapes.after(ref) for n, ref in self.owned[inner].items()}
        return found

    def computed_weight(self, path: str, shape: tuple[int, ...]) -> TensorRef | None:
        """A weight that hooks or a parametrization compute: the last of its shape from the layer's own.

        A transpose of one, which a linear layer takes of its weight, is none.
        """
        trace = self.capture.op_trace
        own = [ref for p in (path, *self.inside.get(path, ())) for ref in self.owned.get(p, {}).values()]
        found = {ref.id for ref in own}
        weights = [ref for ref in own if trace.shape(ref) == shape]
        for op in trace.ops:
            if any(r.id in found for r in op.inputs) and not any(trace.values[r.id].from_input for r in op.inputs):
                found |= {r.id for r in op.outputs}
                if name_of(op.func) not in TRANSPOSES or op.inputs[0] not in weights:
                    weights += [r for r in op.outputs if trace.shape(r) == shape]
        return weights[-1] if weights else None


TRANSPOSES = ("aten::t", "aten::transpose", "aten::permute")
Shapes = dict[str, tuple[int, ...]]


@functools.lru_cache(256)
def table_of(kind: type) -> Callable[..., dict[str, Any]] | None:
    """What is known of a kind of layer; None where nothing is.

    The attributes of a layer of this kind come of the layer, of the shapes of its inputs in the original and in the pruned
    program, and of the pruned shapes of its own parameters and buffers by name.
    """
    return next((table for known, table in TABLE if issubclass(kind, known)), None)


def conv(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    weight, channels = own["weight"], after[0][-len(m.kernel_size) - 1]
    if m.transposed:
        groups = m.groups if m.groups == 1 else groups_of(m, weight[0], m.in_channels)
        return {"in_channels": channels, "out_channels": weight[1] * groups, "groups": groups}
    groups = m.groups if m.groups == 1 else channels // weight[1]
    return {"in_channels": channels, "out_channels": weight[0], "groups": groups}


def groups_of(m: Any, left: int, whole: int) -> int:
    """Whole groups go where a group has one channel in or out; otherwise their number stays."""
    per_in, per_out = m.in_channels // m.groups, m.out_channels // m.groups
    return left // (whole // m.groups) if 1 in (per_in, per_out) else m.groups


def linear(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    weight = own["weight"]
    return {"in_features": weight[1], "out_features": weight[0]}


def batch_norm(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    return {"num_features": after[0][1]} if m.num_features == before[0][1] else {}


def instance_norm(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    ndim = {"1": 3, "2": 4, "3": 5}[type(m).__name__[-2]] if type(m).__name__[-2].isdigit() else len(before[0])
    return {"num_features": after[0][len(before[0]) - ndim + 1]}


def layer_norm(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    return {"normalized_shape": own.get("weight") or tuple(after[0][-len(m.normalized_shape) :])}


def group_norm(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    return {"num_channels": after[0][1]}


def prelu(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    return {"num_parameters": own["weight"][0]}


def embedding(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    return {"embedding_dim": own["weight"][1]}


def bilinear(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    out, in1, in2 = own["weight"]
    return {"in1_features": in1, "in2_features": in2, "out_features": out}


def rnn(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    hidden = own.get("weight_hh_l0", tuple(m.weight_hh_l0.shape))
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    sizes = {"input_size": own.get("weight_ih_l0", tuple(m.weight_ih_l0.shape))[1], "hidden_size": hidden[0] // gates}
    return sizes | ({"proj_size": hidden[1]} if m.proj_size else {})


def rnn_cell(m: Any, before: Any, after: Any, own: Shapes) -> dict[str, Any]:
    return {"input_size": own["weight_ih"][1], "hidden_size": own["weight_hh"][1]}


OF_WEIGHTS = (linear, embedding, bilinear, prelu)  # which look at the layer's own tensors alone
TABLE: list[tuple[Any, Any]] = [
    (nn.modules.conv._ConvNd, conv),
    (nn.Linear, linear),
    (nn.modules.instancenorm._InstanceNorm, instance_norm),
    (nn.modules.batchnorm._BatchNorm, batch_norm),
    (nn.LayerNorm | nn.RMSNorm, layer_norm),
    (nn.GroupNorm, group_norm),
    (nn.PReLU, prelu),
    (nn.Embedding | nn.EmbeddingBag, embedding),
    (nn.Bilinear, bilinear),
    (nn.RNNBase, rnn),
    (nn.RNNCellBase, rnn_cell),
]
