"""Rewrite: the captured program with every literal that holds a channel count made right for what is kept.

For each node the shapes of its pruned arguments and results are known from the labels. Arguments that are sizes become the
pruned size; integers that are not sizes (a scale computed from a head's width) keep their original value, since that is
what the masked original computes with. Sizes that depend on the inputs stay symbolic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.passes.capture.train_eval import in_mode
from fxprune.passes.coupling.shuffles import channel_order
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.labels import counts_channels
from fxprune.passes.ir.op_trace import name_of
from fxprune.passes.ir.program import CapturedProgram, Guard, Waiver, select_by_mode, size_source
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.slices import Slicer, TensorSlice, cut_shape
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.ops.layers import changed_attributes, table_of
from fxprune.passes.ops.registry import HANDLERS
from fxprune.passes.ops.rewriting import function_name, groups_left
from fxprune.passes.ops.sliding_windows import slid, sliding
from fxprune.passes.rewrite.guards import describe, holds
from fxprune.passes.rewrite.pruned_module import Program, written

Number = (int, float)
LITERALS = frozenset([int, float, bool, str, type(None), torch.dtype])
PURE = {getattr, "size", "dim", "numel"} | {
    getattr(operator, name)
    for name in ["getitem", "mul", "floordiv", "add", "sub", "truediv", "mod", "pow", "neg", "eq", "ne", "lt", "gt", "le", "ge"]
}


class Same(dict[fx.Node, fx.Node]):
    """A map in which what is not there stands for itself."""

    def __missing__(self, node: fx.Node) -> fx.Node:
        return node


class Rewriter:
    """One captured program on its way to the pruned one.

    The graph is edited in place, and what is known of its nodes is known of the original program: so nodes keep their
    arguments until all have been looked at.

    Attributes:
        capture: what was traced; its graph is used up.
        graph: that graph; `new` maps nodes that are replaced to what stands for them, the others to themselves.
        changes: op, target and arguments that nodes are to have in the end.
        constants: index tensors that the new graph refers to by name.
        attributes: for each module path, the attributes that change.
    """

    def __init__(
        self,
        solution: Solution,
        which: int,
        slicer: Slicer,
        constants: dict[str, Tensor],
        device: torch.device,
        waiver: Waiver | None = None,
    ) -> None:
        self.capture: CapturedProgram = solution.captures[which]
        self.labels = solution.values[which]
        self.regions = solution.regions[which]
        self.slicer = slicer
        self.unit_of, self.may_go = solution.unit_of.numpy(), solution.frozen < 0
        self.constants = constants
        self.device, self.waiver = device, waiver
        self.graph = self.capture.graph
        self.new: dict[fx.Node, fx.Node] = Same()
        self.changes: dict[fx.Node, tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = {}
        self.following: fx.Node = self.graph._root  # the node after the one that is looked at
        self.attributes: dict[str, dict[str, Any]] = {}
        self.made: dict[int, list[TensorSlice]] = {}
        self.touched: dict[fx.Node, bool] = {}
        self.mode: bool | None = None  # of the branch that the node which is looked at belongs to
        self.sizes: dict[tuple[fx.Node, int, bool | None], Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self.owned: dict[str, dict[str, TensorRef]] = {}  # by module path: its own tensors
        self.inside: dict[str, list[str]] = {}  # by module path: those of the modules below it that own tensors
        for i, v in enumerate(self.capture.op_trace.values):
            if v.name is not None:
                path, _, name = v.name.rpartition(".")
                if path not in self.owned:
                    parts = path.split(".")
                    for n in range(1, len(parts)):
                        self.inside.setdefault(".".join(parts[:n]), []).append(path)
                self.owned.setdefault(path, {})[name] = TensorRef(i)
        self.guarded = {g.node: g for g in self.capture.guards}
        self.copying = {
            op.node for op in self.capture.op_trace.ops if name_of(op.func) in ("aten::clone", "aten::_unsafe_view")
        }
        self.sliding = sliding(self.capture.op_trace)
        self.symbolic: dict[fx.Node, bool] = {}
        self.changed: dict[fx.Node, bool] = {}

    # -- what is known of a value -------------------------------------------------------------------------------------

    def cuts(self, ref: TensorRef) -> list[TensorSlice]:
        made = self.made.get(ref.id)
        if made is None:
            made = self.made[ref.id] = self.slicer(self.labels.get(ref.id, ()), self.capture.op_trace.shape(ref))
        return made

    def before(self, ref: TensorRef) -> tuple[int, ...]:
        return self.capture.op_trace.shape(ref)

    def after(self, ref: TensorRef) -> tuple[int, ...]:
        return cut_shape(self.before(ref), self.cuts(ref))

    def result(self, node: Any) -> Any:
        return self.capture.results.get(node) if isinstance(node, fx.Node) else node

    def positions(self, ref: TensorRef, dim: int) -> Tensor:
        """The kept indices along a dimension; of a joint factor's minor dimension, those of the first row that is left.

        Other rows may keep others, but equally many, and as many before any place at which they are cut.
        """
        shape = self.before(ref)
        for cut in self.cuts(ref):
            if dim in cut.dims:
                mask = torch.zeros([shape[d] for d in cut.dims], dtype=torch.bool)
                mask.view(-1)[cut.keep] = True
                at = cut.dims.index(dim)
                rows = mask.flatten(at + 1).any(-1) if at + 1 < mask.dim() else mask
                rows = rows.reshape(-1, shape[dim])
                return rows[int(rows.any(-1).int().argmax())].nonzero().flatten()
        return torch.arange(shape[dim])

    # -- sizes and other numbers --------------------------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        """What a number in the graph evaluates to in the pruned program, at the example's sizes."""
        if isinstance(node, tuple | list):
            return type(node)(self.value(v) for v in node)
        if not isinstance(node, fx.Node):
            return node
        if node not in self.values:
            self.values[node] = self.evaluate(node)
        return self.values[node]

    def evaluate(self, node: fx.Node) -> Any:
        result = self.capture.results[node]
        if collect(result, TensorRef):
            return result
        source = self.result(node.args[0]) if node.args else None
        if isinstance(source, TensorRef):
            shape = self.after(source)
            if (node.target is getattr and node.args[1] == "shape") or (node.target == "size" and len(node.args) == 1):
                return shape
            if node.target == "size":
                return shape[int(node.args[1])]  # type: ignore[arg-type]
            if node.target == "numel":
                return torch.Size(shape).numel()
            return result
        args, kwargs = self.value(tuple(node.args)), {k: self.value(v) for k, v in node.kwargs.items()}
        try:
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        except Exception:
            return result
        return result

    def is_symbolic(self, node: Any) -> bool:
        """Whether a number depends on sizes of the inputs rather than on channel counts alone."""
        if not isinstance(node, fx.Node):
            return False
        if node not in self.symbolic:
            self.symbolic[node] = self.depends(node)
        return self.symbolic[node]

    def depends(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        found = size_source(self.capture, node)
        if found is not None:
            ref, dim = found
            if dim is None:
                return True
            dim %= max(1, len(self.before(ref)))
            return not counts_channels(self.labels.get(ref.id, ()), dim, self.may_go, self.unit_of)
        return any(self.is_symbolic(n) for n in node.all_input_nodes)

    def is_size(self, node: fx.Node) -> bool:
        """Whether a number is read off a tensor's shape."""
        return size_source(self.capture, node) is not None

    def is_changed(self, node: Any) -> bool:
        """Whether a number comes out otherwise in the pruned program."""
        if not isinstance(node, fx.Node):
            return False
        if node not in self.changed:
            differs = self.value(node) != self.capture.results[node]
            self.changed[node] = differs or (not self.is_size(node) and any(self.is_changed(n) for n in node.all_input_nodes))
        return self.changed[node]

    def original(self, node: Any, *, every: bool = False) -> Any:
        """A number as the original program computes it, in terms of the new one's sizes.

        What is not known to depend on the inputs is written out, unless `every` size is to stay in the graph.
        """
        if not isinstance(node, fx.Node) or not self.is_changed(node):
            return self.new[node] if isinstance(node, fx.Node) else node
        was = self.capture.results[node]
        if not (every or self.is_symbolic(node)):
            return was
        if self.is_size(node):
            return self.scaled(self.new[node], Fraction(was, self.value(node))) if isinstance(was, int) else self.new[node]
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.original(n, every=every))
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def scaled(self, number: Any, ratio: Fraction) -> Any:
        if ratio.numerator != 1:
            number = self.graph.call_function(operator.mul, (number, ratio.numerator))
        if ratio.denominator != 1:
            number = self.graph.call_function(operator.floordiv, (number, ratio.denominator))
        return number

    def size(self, given: Any, wanted: int) -> Any:
        """A size argument that must come to `wanted`: literals change, expressions over input sizes are rescaled.

        So are expressions over channels that would come to something else: `rows // heads`, for a batch of one, is one where
        the rows are heads, and yet it stands for the batch.
        """
        if not isinstance(given, fx.Node):
            return given if given == -1 or isinstance(given, bool) or not isinstance(given, int) else wanted
        if self.value(given) == wanted and (self.is_size(given) or not self.is_changed(given)):
            return self.new[given]
        known = self.is_symbolic(given)
        if not known and (self.is_size(given) or self.value(given) == wanted):
            return wanted
        was = self.capture.results[given]
        if not was:
            return self.new[given]
        key = given, wanted, self.mode  # what one branch computes is not there in the other
        if key not in self.sizes:
            self.sizes[key] = self.scaled(self.original(given, every=not known), Fraction(wanted, was))
        return self.sizes[key]

    def number(self, given: fx.Node) -> Any:
        """A number that is no size: it keeps its original value. So does what Python asked of sizes (`c % groups == 0`)."""
        return self.original(given) if isinstance(self.capture.results[given], Number) else self.new[given]

    def number_of(self, given: Any) -> Any:
        """The original value of a number that may be computed in the graph."""
        return self.capture.results[given] if isinstance(given, fx.Node) else given

    def argument(self, x: Any) -> Any:
        """An argument that holds no sizes, carried over."""

        def carried(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return self.device if leaf.type == "meta" else leaf  # the run was without values
            return self.number(leaf) if isinstance(self.result(leaf), Number) else self.new[leaf]

        return map_tensors(x, carried, (fx.Node, torch.device))

    def constant(self, data: Tensor) -> fx.Node:
        """A tensor the new program refers to; equal ones are shared."""
        for name, known in self.constants.items():
            if known.dtype == data.dtype and torch.equal(known, data):
                return self.graph.get_attr(name)
        name = f"_kept_index_{len(self.constants)}"
        self.constants[name] = data
        return self.graph.get_attr(name)

    def gather(self, source: fx.Node, dim: int, positions: Tensor) -> fx.Node:
        """`source` with the given positions of one dimension, in order; nothing where that is all of them."""
        size = self.after(self.result(source))[dim]
        if torch.equal(positions, torch.arange(size)):
            return self.new[source]
        return self.graph.call_method("index_select", (self.new[source], dim, self.constant(positions)))

    # -- the walk -----------------------------------------------------------------------------------------------------

    def run(self) -> tuple[fx.Graph, Program | None]:
        """The pruned program for evaluation, and the one for training where it is another one."""
        only: dict[fx.Node, bool | None] = dict(self.capture.only)
        nodes = list(self.graph.nodes)
        inner: set[fx.Node] = set()
        for node, following in zip(nodes, [*nodes[1:], self.graph._root], strict=True):
            self.following, self.mode = following, only.get(node)
            self.graph.inserting_before(node)
            before = node.prev
            end = self.regions.get(node)
            if end is not None and self.is_cut(end):
                if node is end:
                    self.new[node] = self.region(node)
                else:
                    inner.add(node)
            else:
                made = self.carry(node, HANDLERS)
                if made is not node:
                    self.new[node] = made
                if node in self.guarded:
                    self.graph.inserting_before(self.following)
                    self.guard(node, self.guarded[node])
            if node in self.capture.only:
                while before.next is not following:
                    before = before.next
                    only[before] = self.capture.only[node]
        self.settle(nodes, inner)
        only = {n: mode for n, mode in only.items() if not n._erased}
        branched = self.capture.only or any(
            node.target is select_by_mode for node in nodes
        )  # a branch may hold parameters alone
        trained = written(self.graph, only, True) if branched else None
        if trained is not None:
            in_mode(self.graph, only, False)
        drop_dead(self.graph)
        return self.graph, trained

    def settle(self, nodes: list[fx.Node], inner: set[fx.Node]) -> None:
        """Give every node the arguments it is to have, and erase those that others stand for."""
        gone = [n for n in nodes if n in inner or (n in self.new and n not in self.changes)]
        erased = set(gone)
        for node in nodes:
            if node in erased:
                continue
            change = self.changes.get(node)
            if change is not None:
                op, target, args, kwargs = change
                if node.op != op:
                    node.op = op
                if node.target is not target:
                    node.target = target
                node.args = args
                if kwargs or node.kwargs:
                    node.kwargs = kwargs
            elif any(n in self.new for n in node.all_input_nodes):
                node.args = fx.node.map_arg(node.args, self.new.__getitem__)
                node.kwargs = fx.node.map_arg(node.kwargs, self.new.__getitem__)
        for node in reversed(gone):
            self.graph.erase_node(node)

    def guard(self, node: fx.Node, guard: Guard) -> None:
        """What Python decided by a size holds for inputs that agree with it: the others get an error, not a wrong result."""
        if self.is_symbolic(node) and self.value(node) == guard.value:
            why = f"the pruned program was captured where {describe(node)} is {guard.value!r}"
            tried: tuple[Any, ...] = ()
            if self.waiver is not None and why in self.waiver.guards and self.asks_for_batch(node):
                name = self.waiver.input
                given = next((n for n in self.graph.nodes if n.op == "placeholder" and n.name == name), None)
                tried = () if given is None else (self.graph.call_method("size", (given, 0)), self.waiver.size)
            self.graph.call_function(holds, (self.new[node], guard.value, why, *tried))

    def asks_for_batch(self, node: fx.Node) -> bool:
        """Whether the sizes of inputs that a number is computed from are all of first dimensions."""
        found = size_source(self.capture, node)
        if found is not None:
            return found[1] == 0 or not self.is_symbolic(node)
        return node.op != "placeholder" and all(self.asks_for_batch(n) for n in node.all_input_nodes)

    def is_cut(self, node: fx.Node) -> bool:
        """Whether something is cut out of a node's result."""
        found = self.touched.get(node)
        if found is None:
            result = self.capture.results.get(node)
            refs = (result,) if type(result) is TensorRef else collect(result, TensorRef)
            found = self.touched[node] = any(self.cuts(ref) for ref in refs)
        return found

    def carry(self, node: fx.Node, handlers: dict[str, Callable[..., Any]]) -> fx.Node:
        if node.op in ("placeholder", "get_attr") or node.target is select_by_mode:
            return node
        changed = self.is_cut(node) or any(self.is_cut(n) for n in node.all_input_nodes)
        if node.op == "call_module" and (changed or str(node.target) in self.capture.opaque):
            self.module(node)
        wide = slid(self, node) if changed else None
        if wide is not None:
            return wide
        handler = handlers.get(function_name(node)) if changed and node.op != "output" else None
        if handler is not None:
            made = handler(self, node)
            if made is not None:
                return self.as_copy(node, made)
        result = self.capture.results.get(node)
        if type(result) is not TensorRef and not collect(result, TensorRef) and result is not None and node.op != "output":
            return node  # arithmetic on numbers: mended where it is used
        if self.as_it_is(node) and self.capture.index[node] not in self.copying:
            return node
        return self.as_copy(node, self.emit(node, self.argument(tuple(node.args)), self.argument(dict(node.kwargs))))

    def as_it_is(self, node: fx.Node) -> bool:
        """Whether a node's arguments are tensors and plain literals alone, so that nothing in them can change."""
        for a in (*node.args, *node.kwargs.values()) if node.kwargs else node.args:
            if isinstance(a, fx.Node):
                if isinstance(self.capture.results.get(a), Number):
                    return False
            elif isinstance(a, tuple | list):
                if not all(type(v) in LITERALS for v in a):
                    return False
            elif type(a) not in LITERALS:
                return False
        return True

    def as_copy(self, node: fx.Node, made: fx.Node) -> fx.Node:
        """A reshape that copied stays a copy: with a dimension shrunk to 1 it might become a view, which can be written to."""
        copies = self.capture.index[node] in self.copying and isinstance(self.result(node), TensorRef)
        if not copies or made.target == "clone":
            return made
        refs = [r for n in node.all_input_nodes for r in collect(self.result(n), TensorRef)]
        shrunk = any(now == 1 < was for r in refs for was, now in zip(self.before(r), self.after(r), strict=True))
        return self.graph.call_method("clone", (made,)) if shrunk else made

    def emit(self, node: fx.Node, args: Any, kwargs: Any, *, method: str | None = None) -> fx.Node:
        """The node with other arguments, or as the call of a `method`; what is made next stands after it."""
        op, target = ("call_method", method) if method is not None else (node.op, node.target)
        self.changes[node] = (op, target, tuple(args), dict(kwargs))
        self.graph.inserting_before(self.following)
        return node

    def region(self, end: fx.Node) -> fx.Node:
        """A chain of reshapes that permutes channels, as one gather."""
        chain = [n for n, e in self.regions.items() if e is end]
        source = chain[0].args[0]
        assert isinstance(source, fx.Node)
        ref = self.result(source)
        dim = self.cuts(self.result(end))[0].dims[0]
        order = channel_order(self.capture, chain, dim)
        assert order is not None
        made = self.permuted(source, ref, end, dim, order)
        if made is self.new[source] and any(self.capture.index[n] in self.copying for n in chain):
            return self.graph.call_method("clone", (made,))  # what is left needs no permuting; it may be written to
        return made

    def permuted(self, source: fx.Node, ref: TensorRef, end: fx.Node, dim: int, order: Tensor) -> fx.Node:
        """The result of index map `order` (result index -> source index) among what is kept."""
        place = torch.full((self.before(ref)[dim],), -1)
        kept_in = self.positions(ref, dim)
        place[kept_in] = torch.arange(len(kept_in))
        return self.gather(source, dim, place[order[self.positions(self.result(end), dim)]])

    def module(self, node: fx.Node) -> None:
        path = str(node.target)
        if path in self.capture.opaque:
            from fxprune.passes.rewrite.opaque_attributes import opaque_attributes

            for inner, edits in opaque_attributes(self, path).items():
                self.attributes.setdefault(inner, {}).update(edits)
            return
        refs = [r for n in node.args for r in collect(self.result(n), TensorRef)]
        self.attributes.setdefault(path, {}).update(self.edits(path, refs))

    def edits(self, path: str, refs: list[TensorRef]) -> dict[str, Any]:
        """The attributes of a standard layer that change where it is called on these tensors."""
        module: Any = self.capture.modules[path]
        kind: Any = type(module)
        if table_of(kind) is None:
            return {}
        before, after = [self.before(r) for r in refs], [self.after(r) for r in refs]
        changed = changed_attributes(module, before, after, self.shapes_of(path))
        if "num_channels" in changed and isinstance(module.num_groups, int):  # groups may go whole
            changed["num_groups"] = groups_left(self, refs[0], 1, module.num_groups)
        return changed

    def shapes_of(self, path: str) -> dict[str, tuple[int, ...]]:
        """Pruned shapes of a module's own tensors."""
        path = path.removeprefix(self.capture.prefix)
        shapes = {name: self.after(ref) for name, ref in self.owned.get(path, {}).items()}
        for inner in self.inside.get(path, ()):
            shapes |= {f"{inner[len(path) + 1 :]}.{n}": self.after(ref) for n, ref in self.owned[inner].items()}
        return shapes


def drop_dead(graph: fx.Graph) -> None:
    """Remove numbers and attribute reads that nothing uses; calls that may write in place stay."""
    for node in reversed(list(graph.nodes)):
        pure = node.op == "get_attr" or node.target in PURE
        if pure and not node.users:
            graph.erase_node(node)
