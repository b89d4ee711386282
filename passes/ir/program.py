"""The captured program of a model: its graph, its op trace, and how the two correspond."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.passes.ir.module_tree import Apart
from fxprune.passes.ir.op_trace import OpTrace
from fxprune.passes.ir.pytree import TensorRef, collect


@dataclass(frozen=True, slots=True)
class Guard:
    """A value that Python took out of the graph: the emitted program holds for inputs that agree with it."""

    node: fx.Node
    how: str
    value: Any


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module inside an opaque one: which tensors went in and came out."""

    module: str
    args: Any
    outs: Any


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One call of a module that was traced through: the nodes from the number `begin` up to `end` are its.

    Its arguments and its result are nested structures with nodes in place of tensors and numbers, `Built` in place of objects
    that a program has to create, and `UNKNOWN` in place of what a program cannot write down.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Built:
    """An object of a class of its own, created from its parts.

    Attributes:
        create: makes it of its parts.
        parts: by key.
        by_position: whether `create` takes them by position, and not by name.
        by_attribute: whether a part is an attribute of it, and not an item.
    """

    create: Any
    parts: dict[Any, Any]
    by_position: bool = False
    by_attribute: bool = False


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """A tensor of the model, by its name."""

    name: str


UNKNOWN = object()  # what a program cannot write down


@dataclass(kw_only=True)
class CapturedProgram:
    """The captured program of one run of the model.

    Attributes:
        root: the traced module tree; parameters are the original's own, everything else is a copy.
        graph: the captured program.
        op_trace: what the dispatcher ran.
        results: for every node, its value with tensors replaced by references into the op trace.
        opaque: modules kept as one node, with the reason.
        functions: functions of the model's that are one node for each call.
        asking: the opaque modules in which Python asks for the mode.
        evaluating: modules that are to stay in evaluation, since it is not known what they do in training.
        calls: calls made inside opaque modules.
        sizes: attributes of opaque modules that were used as sizes.
        followed: attributes and sizes of tensors that opaque modules used as sizes.
        leaks: tensors in opaque modules whose contents Python took, by path.
        inputs: references of the example inputs' tensors.
        tensor_names: the names of the model's tensors, in its order, and of constants after those.
        outputs: the tensors returned, by name (see `named_outputs`) and reference.
        reads_training: whether a forward asked for its mode in a way that only a second run can answer.
        only: nodes that belong to one mode alone: True for training, False for evaluation, None for neither.
        untracked: nodes whose results did not come out of the dispatcher.
        index: the number of each node.
        prefix: what the names of tensors begin with in `root` and not in the model.
        modules: every module of `root` by all of its paths.
        apart: the modules that do not follow the root's mode, by mode and path; None where that is not known.
        given: what opaque modules were given, call by call, where the run had values and it takes no more than the model does.
        trains_on_values: whether a run without values, as this one, cannot be made in training.
        module_calls: the calls of modules that were traced through, in order of their ends.
        hooked: layers whose hooks are steps of the program, and no longer theirs.
        note: what the emitted model does not do as the original does.
        is_untrained: whether training is as evaluation because its program cannot be followed.
        reads_state: whether it is one node since Python reads tensors of the model that the forward writes to.
        consumed: whether a rewrite has taken the program; see `take`.
    """

    root: nn.Module
    graph: fx.Graph
    op_trace: OpTrace
    results: dict[fx.Node, Any]
    guards: list[Guard]
    opaque: dict[str, str]
    calls: dict[str, list[ModuleCall]]
    sizes: dict[str, list[SizeUse]]
    followed: list[SizeUse]
    leaks: dict[str, list[TensorRef]]
    inputs: list[TensorRef]
    tensor_names: list[str]
    outputs: list[tuple[str, TensorRef]]
    reads_training: bool
    only: dict[fx.Node, bool | None] = field(default_factory=dict)
    untracked: set[fx.Node] = field(default_factory=set)
    index: dict[fx.Node, int] = field(default_factory=dict)
    prefix: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    apart: Apart | None = None
    given: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    trains_on_values: bool = False
    functions: frozenset[Any] = frozenset()
    module_calls: list[TracedCall] = field(default_factory=list)
    asking: set[str] = field(default_factory=set)
    evaluating: frozenset[str] = frozenset()
    hooked: frozenset[str] = frozenset()
    note: str = ""
    is_untrained: bool = False
    reads_state: bool = False
    consumed: bool = False

    def take(self) -> CapturedProgram:
        """The program, for a rewrite that edits its graph and modules in place; raises where one has done so before."""
        if self.consumed:
            raise RuntimeError("this captured program has been rewritten already: capture the model again")
        self.consumed = True
        return self

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    @functools.cached_property
    def unseen(self) -> dict[fx.Node, str]:
        """The nodes whose Python is not rewritten: opaque modules by path, custom autograd functions by name."""
        found: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and str(node.target) in self.opaque:
                found[node] = str(node.target)
            elif node.op == "call_function" and hasattr(node.target, "is_custom"):
                found[node] = f"%{node.name}"
        return found

    def node_at(self, index: int) -> fx.Node | None:
        return self.nodes.get(index)

    @functools.cached_property
    def nodes(self) -> dict[int, fx.Node]:
        return {i: n for n, i in self.index.items()}


def size_source(node: fx.Node, results: Mapping[fx.Node, Any]) -> tuple[TensorRef, int | None] | None:
    """The tensor whose size a number (or tuple of numbers) is, and the dimension; None where it is computed otherwise."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    ref = results.get(source)
    if isinstance(ref, TensorRef):
        dim = node.args[1] if node.target == "size" and len(node.args) == 2 else None
        return (ref, dim if isinstance(dim, int) else None) if reads_shape(node) else None
    dim = node.args[1] if len(node.args) > 1 else None
    outer = source.args[0] if isinstance(ref, tuple) and source.args else None
    tensor = results.get(outer) if isinstance(outer, fx.Node) else None
    return (tensor, dim if isinstance(dim, int) else None) if isinstance(tensor, TensorRef) and reads_shape(source) else None


def sizes_read(node: fx.Node, results: Mapping[fx.Node, Any]) -> Iterator[tuple[TensorRef, int | None]]:
    """The sizes that a number is computed from: tensors, and the dimension where it is one."""
    pending, seen = [node], {node}
    while pending:
        n = pending.pop()
        found = size_source(n, results)
        if found is not None:
            yield found
            continue
        new = [m for m in n.all_input_nodes if m not in seen and not collect(results.get(m), TensorRef)]
        seen.update(new)
        pending += new


def tensors_read(node: fx.Node, results: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
    """The tensors from whose contents a number is read."""
    pending, seen = [node], {node}
    while pending:
        n = pending.pop()
        for m in n.all_input_nodes:
            if m not in seen and not collect(results.get(m), TensorRef):
                pending.append(m)
            elif m not in seen and n.target in ("item", "tolist"):
                yield m
            seen.add(m)


def reads_shape(node: fx.Node) -> bool:
    return node.target in ("size", "numel", "nelement") or (node.target is getattr and str(node.args[1]) == "shape")


def select_by_mode(evaluated: Any, trained: Any) -> Any:
    """In a captured graph: the first in evaluation mode, the second in training mode. The tracer ties the two."""
    raise AssertionError(f"a node that selects between {evaluated} and {trained} is in no emitted program")


def keyword(given: Any, name: str, default: Any) -> Any:
    """One of the keywords that a program takes by `**`; FX's interpreter has an empty list where there are none."""
    if isinstance(given, fx.Proxy):  # a tracer of FX's own goes over the program
        return given.tracer.create_proxy("call_function", keyword, (given, name, default), {})
    return given.get(name, default) if given else default


IS_GRAD_ENABLED, SET_GRAD_ENABLED = torch.is_grad_enabled, torch._C._set_grad_enabled  # by which regions are lines of a program


@fx.node.has_side_effect
def enter_autocast(*how: Any) -> Any:
    """Enter a region of autocast, with the arguments of `torch.autocast`; by the function that compilers know, if one looks."""
    if torch.compiler.is_dynamo_compiling():
        return torch.amp.autocast_mode._enter_autocast(*how)
    region = torch.autocast(*how)
    region.__enter__()
    return region


@fx.node.has_side_effect
def exit_autocast(region: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        torch.amp.autocast_mode._exit_autocast(region)
    else:
        region.__exit__(None, None, None)


@fx.node.has_side_effect
def seed_draws(seed: int) -> None:
    torch.manual_seed(seed)


@fx.node.has_side_effect
def read_draws(*device: Any) -> Tensor:
    """The state of a GPU's generator; without an argument, of the processor's."""
    return torch.cuda.get_rng_state(*device) if device else torch.get_rng_state()


@fx.node.has_side_effect
def write_draws(state: Tensor, *device: Any) -> None:
    if device:
        torch.cuda.set_rng_state(state, *device)
    else:
        torch.set_rng_state(state)


REGIONS = frozenset([SET_GRAD_ENABLED, enter_autocast, exit_autocast])  # what changes the state of the thread


def assigned(held: Tensor, value: Tensor) -> None:
    """In a program, what `module.tensor = value` leaves: the module's tensor holds the value, where it has its shape."""
    if held.shape == value.shape:
        with torch.no_grad():
            held.copy_(value)


@dataclass(frozen=True, slots=True)
class Waiver:
    """Guards that need not hold where the first dimension of an input is of one size.

    Only such guards as ask for sizes of first dimensions alone: what was tried says nothing of other ones.

    Attributes:
        input: the name of the program's argument, a tensor.
        size: of its first dimension.
        guards: what each of them says.
    """

    input: str
    size: int
    guards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorSize:
    """The size of a dimension of a tensor, read while an opaque module ran."""

    ref: TensorRef
    dim: int


@dataclass(frozen=True, slots=True)
class SizeUse:
    """A number that came from attributes or sizes of tensors, found as the size of a dimension of a tensor.

    Attributes:
        tree: the path of a module and the name of an attribute, a `TensorSize`, or an operator and its two sides.
    """

    tree: Any
    ref: TensorRef
    dim: int

    @property
    def attributes(self) -> set[tuple[str, str]]:
        return attributes_of_size(self.tree)

    @property
    def is_plain(self) -> bool:
        """Whether it is one attribute or size itself."""
        return isinstance(self.tree, TensorSize) or (isinstance(self.tree, tuple) and len(self.tree) == 2)


def attributes_of_size(tree: Any) -> set[tuple[str, str]]:
    """The attributes that a number was computed from; see `SizeUse`."""
    if isinstance(tree, int | TensorSize):
        return set()
    return attributes_of_size(tree[1]) | attributes_of_size(tree[2]) if len(tree) > 2 else {tree}
