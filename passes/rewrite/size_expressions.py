"""Numbers that a captured graph computes from sizes, and what they must become in the pruned program.

A graph holds numbers as literals (`view(4, 64)`) and as nodes that read sizes and compute with them (`view(b * 12, n, 64)`).
For a node `n`:

- `was(n)` is its value when the program was captured (`results`);
- `value(n)` is what the same expression evaluates to in the pruned program, at the example's sizes;
- `n` is *symbolic* if it depends on a size that is no number of channels, and so may differ for other inputs;
- `n` is *changed* if `value(n) != was(n)`, or if a number it is computed from is changed.

An argument that is a size and must come to `wanted` (`size`):

1. a literal becomes `wanted`;
2. a node with `value(n) == wanted` stays, unless it comes to that by accident (it is changed and no size itself);
3. a size, or an expression with `value(n) == wanted`, that is not symbolic becomes the literal `wanted`;
4. any other expression becomes `original(n) * wanted / was(n)`, with the fraction in lowest terms: `original(n)` is exact for
   every input, and the ratio is the part of the channels that stays. `b * 12` with 9 of 12 heads left is `b * 12 * 3 // 4`.

A number that is no size, such as a scale or a condition, keeps the value of the original program (`original`): a changed size
`s` that it reads is written as `s * was(s) / value(s)`, or as the literal `was(s)` where `s` is not symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Size, Tensor, fx

from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.program import CapturedProgram, size_source
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ir.slices import Slicer, TensorSlice, cut_shape
from fxprune.passes.rewrite.graph_editor import GraphEditor


class PrunedShapes:
    """What pruning leaves of each value on an op trace.

    Arguments:
        op_trace: the trace, whose values have their original shapes.
        labels: the labels of each value, by its number.
        slicer: the slices that remove the chosen labels.
    """

    def __init__(self, op_trace: OpTrace, labels: Mapping[int, Labels], slicer: Slicer) -> None:
        self.op_trace, self.labels, self.slicer = op_trace, labels, slicer
        self.slices: dict[int, list[TensorSlice]] = {}

    def cuts(self, ref: TensorRef) -> list[TensorSlice]:
        """The slices that pruning takes of a value; empty where all of it stays."""
        found = self.slices.get(ref.id)
        if found is None:
            found = self.slices[ref.id] = self.slicer(self.labels.get(ref.id, ()), self.op_trace.shape(ref))
        return found

    def before(self, ref: TensorRef) -> tuple[int, ...]:
        return self.op_trace.shape(ref)

    def after(self, ref: TensorRef) -> tuple[int, ...]:
        return cut_shape(self.before(ref), self.cuts(ref))

    def positions(self, ref: TensorRef, dim: int, lines: Mapping[int, Tensor] = {}) -> Tensor:
        """The kept indices along a dimension; along the minor dimension of a joint factor, those of the first row that stays.

        Only rows count whose places along other dimensions are among `lines`. Others may keep other indices, but equally many
        of them, and as many before any place at which they are split.
        """
        shape = self.before(ref)
        for cut in self.cuts(ref):
            if dim in cut.dims:
                mask = cut.kept(shape)
                for d in lines.keys() & set(cut.dims) - {dim}:
                    mask = mask.index_select(cut.dims.index(d), lines[d])
                at = cut.dims.index(dim)
                rows = mask.flatten(at + 1).any(-1) if at + 1 < mask.dim() else mask
                rows = rows.reshape(-1, shape[dim])
                return rows[int(rows.any(-1).int().argmax())].nonzero().flatten()
        return torch.arange(shape[dim])


class SizeExpressions:
    """Evaluates and rewrites the numbers of one captured graph.

    Arguments:
        capture: the program; its `results` hold the value of each node.
        shapes: shapes of the tensors, before and after.
        counts_channels: whether a size (a tensor and a dimension) is a number of channels and nothing else.
        editor: creates the nodes that new expressions need.
    """

    def __init__(
        self,
        capture: CapturedProgram,
        shapes: PrunedShapes,
        counts_channels: Callable[[TensorRef, int], bool],
        editor: GraphEditor,
    ) -> None:
        self.capture, self.shapes, self.counts_channels, self.editor = capture, shapes, counts_channels, editor
        self.values: dict[fx.Node, Any] = {}
        self.symbolic: dict[fx.Node, bool] = {}
        self.changed: dict[fx.Node, bool] = {}
        self.rescaled: dict[tuple[fx.Node, int, bool | None], Any] = {}

    def value(self, node: Any) -> Any:
        """What a number evaluates to in the pruned program, at the example's sizes."""
        if isinstance(node, tuple | list):
            return type(node)(self.value(v) for v in node)
        if not isinstance(node, fx.Node):
            return node
        if node not in self.values:
            self.values[node] = self.evaluate(node)
        return self.values[node]

    def evaluate(self, node: fx.Node) -> Any:
        was = self.capture.results[node]
        if collect(was, TensorRef):
            return was
        source = self.capture.results.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if isinstance(source, TensorRef):
            return self.read(node, self.shapes.after(source), was)
        args, kwargs = self.value(tuple(node.args)), {k: self.value(v) for k, v in node.kwargs.items()}
        try:
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except Exception:
            return was
        return was

    def read(self, node: fx.Node, shape: tuple[int, ...], was: Any) -> Any:
        """What a node that asks a tensor for its sizes gets where the tensor has this shape."""
        if (node.target is getattr and node.args[1] == "shape") or (node.target == "size" and len(node.args) == 1):
            return shape
        if node.target == "size":
            return shape[int(node.args[1])]  # type: ignore[arg-type]
        return Size(shape).numel() if node.target == "numel" else was

    def is_symbolic(self, node: Any) -> bool:
        """Whether a number depends on sizes of the inputs rather than on channel counts alone."""
        if not isinstance(node, fx.Node):
            return False
        if node not in self.symbolic:
            self.symbolic[node] = self.depends_on_inputs(node)
        return self.symbolic[node]

    def depends_on_inputs(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        found = size_source(node, self.capture.results)
        if found is not None:
            ref, dim = found
            return dim is None or not self.counts_channels(ref, dim % max(1, len(self.shapes.before(ref))))
        return any(self.is_symbolic(n) for n in node.all_input_nodes)

    def is_size(self, node: fx.Node) -> bool:
        """Whether a number is read off a tensor's shape."""
        return size_source(node, self.capture.results) is not None

    def is_changed(self, node: Any) -> bool:
        """Whether a number, or one that it is computed from, has another value in the pruned program."""
        if not isinstance(node, fx.Node):
            return False
        if node not in self.changed:
            differs = self.value(node) != self.capture.results[node]
            numbers = [n for n in node.all_input_nodes if not collect(self.capture.results.get(n), TensorRef)]
            self.changed[node] = differs or (not self.is_size(node) and any(map(self.is_changed, numbers)))
        return self.changed[node]

    def original(self, node: Any, *, keep_sizes: bool = False) -> Any:
        """A number as the original program computes it, in terms of the pruned program's sizes.

        What does not depend on the inputs becomes a literal, unless all sizes are to stay in the graph.
        """
        if not isinstance(node, fx.Node) or not self.is_changed(node):
            return self.editor.new[node] if isinstance(node, fx.Node) else node
        was = self.capture.results[node]
        if not (keep_sizes or self.is_symbolic(node)):
            return was
        if self.is_size(node):
            new = self.editor.new[node]
            return self.scaled(new, Fraction(was, self.value(node))) if isinstance(was, int) else new
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.original(n, keep_sizes=keep_sizes))
        return self.editor.graph.create_node(node.op, node.target, args, kwargs)

    def scaled(self, number: Any, ratio: Fraction) -> Any:
        """A node for `number * ratio`, which is a whole number."""
        graph = self.editor.graph
        if ratio.numerator != 1:
            number = graph.call_function(operator.mul, (number, ratio.numerator))
        if ratio.denominator != 1:
            number = graph.call_function(operator.floordiv, (number, ratio.denominator))
        return number

    def size(self, given: Any, wanted: int) -> Any:
        """A size argument that must come to `wanted`: cases 1 to 4 above.

        Case 2 leaves out accidents: `rows // heads` is 1 for a batch of one where the rows are the heads, before and after
        pruning, and yet it stands for the batch.
        """
        if not isinstance(given, fx.Node):
            return given if given == -1 or isinstance(given, bool) or not isinstance(given, int) else wanted  # 1
        if self.value(given) == wanted and (self.is_size(given) or not self.is_changed(given)):
            return self.editor.new[given]  # 2
        symbolic = self.is_symbolic(given)
        if not symbolic and (self.is_size(given) or self.value(given) == wanted):
            return wanted  # 3
        was = self.capture.results[given]
        if not was:
            return self.original(given)  # there is no ratio of zero
        key = given, wanted, self.editor.branch  # a node of one branch does not exist in the other
        if key not in self.rescaled:
            number = self.original(given, keep_sizes=not symbolic)
            self.rescaled[key] = self.scaled(number, Fraction(wanted, was))  # 4
        return self.rescaled[key]
