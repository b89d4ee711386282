"""Counts: parameters, multiply-accumulates and bytes of a model, module by module."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from torch import fx, nn

from fxprune.arguments import checked_call, checked_class, did_you_mean, shown
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.passes.capture.programs import programs
from fxprune.passes.errors import PruneError, surface
from fxprune.passes.ir.module_tree import named_tensors, on_meta, walk, with_outer
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.quiet import gc_paused, unobserved
from fxprune.reports.formatting import Printable, plain_data, short, table
from fxprune.selection.costs import counts, evaluation_calls, macs_of

if TYPE_CHECKING:
    from rich.console import RenderableType

DEEPEST = 2  # levels of modules that are printed


@dataclass(frozen=True)
class ModuleCount:
    """What one module holds and computes, the modules inside it included.

    Attributes:
        path: its name in the model; that of the model itself is empty.
        kind: the name of its class.
        parameters: elements of its parameters. A tensor that several modules share counts in the first one.
        macs: multiply-accumulates of all its calls in one forward, if example inputs were given.
        bytes: of its parameters and buffers.
    """

    path: str
    kind: str
    parameters: int
    macs: int | None
    bytes: int


@checked_class
@dataclass(frozen=True)
class Count(Printable):
    """What a model holds and computes; printable.

    Attributes:
        model: the name of its class.
        modules: every module, the model itself first, in the order of `named_modules`.
    """

    model: str
    modules: tuple[ModuleCount, ...]

    @property
    def parameters(self) -> int:
        return self.modules[0].parameters

    @property
    def macs(self) -> int | None:
        return self.modules[0].macs

    @property
    def bytes(self) -> int:
        return self.modules[0].bytes

    @functools.cached_property
    def by_module(self) -> dict[str, ModuleCount]:
        """The modules by their names."""
        return {m.path: m for m in self.modules}

    def __getitem__(self, path: str) -> ModuleCount:
        if path in self.by_module:
            return self.by_module[path]
        near = did_you_mean(path, self.by_module) if isinstance(path, str) else ""
        raise PruneError(f"{shown(path)} is no module of {self.model}", fix=f"{near}one of the names of model.named_modules()")

    def __repr__(self) -> str:
        return f"Count({self.headline()})"

    def headline(self) -> str:
        macs = "" if self.macs is None else f", {short(self.macs)} multiply-accumulates"
        return f"{self.model}: {short(self.parameters)} parameters{macs}, {short(self.bytes)} bytes"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return plain_data(self)

    def tables(self) -> Iterator[RenderableType]:
        """The totals and the upper modules, as rich renders them."""
        yield Text(self.headline())
        shown = [m for m in self.modules[1:] if m.path.count(".") < DEEPEST and (m.parameters or m.macs or m.bytes)]
        if shown:
            yield ""
            numbers = [(short(m.parameters), "" if m.macs is None else short(m.macs), short(m.bytes)) for m in shown]
            cells = [(m.path, *three, m.kind) for m, three in zip(shown, numbers, strict=True)]
            yield table(("module", "parameters", "MACs", "bytes", "class"), cells)


@checked_call()
def count(model: nn.Module, example_inputs: Any = None) -> Count:
    """Parameters, multiply-accumulates of one forward and bytes of a model, module by module.

    Multiply-accumulates are half of what `torch.utils.flop_counter` counts, where attention is computed step by step
    (`SDPBackend.MATH`): those of products and convolutions, in evaluation mode. Products of runs of rows (`_grouped_mm`), which
    it does not know, count likewise. A budget of `prune` means the same.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> found = count(net, torch.randn(3, 4))
    >>> found
    Count(Sequential: 44 parameters, 108 multiply-accumulates, 176 bytes)
    >>> found["0"].macs
    72

    Arguments:
        model: any module, pruned or not, on any device: the meta device, too. It is not touched.
        example_inputs: as for `prune`; multiply-accumulates are counted if they are given.

    Raises: PruneError where the model does not run on them.
    """
    with entry_point(model) as model:
        given = example_inputs is not None
        return counted_model(model, ExampleInputs.parse(example_inputs, model).check(model, weights=False) if given else None)


def counted_model(model: nn.Module, inputs: ExampleInputs | None) -> Count:
    """What a model holds and computes; without multiply-accumulates where there are no inputs."""
    macs = None if inputs is None else macs_by_module(captured_program(model, inputs))
    return Count(type(model).__name__, tuple(module_counts(model, macs)))


def captured_program(model: nn.Module, inputs: ExampleInputs) -> CapturedProgram:
    """The program of a model in evaluation mode, without values where that is enough."""
    with unobserved(model), gc_paused():
        try:
            return programs(model, inputs.args, inputs.kwargs, on_meta)[0]
        except Exception as error:  # it reads values
            surface(error)
            return programs(model, inputs.args, inputs.kwargs, None)[0]


def module_counts(model: nn.Module, macs: Mapping[str, int] | None) -> Iterator[ModuleCount]:
    """What every module holds and computes; `macs` are those of each module's own calls, by path."""
    parameters, size, computed = Counter[str](), Counter[str](), Counter[str]()
    for name, tensor in named_tensors(model):
        for path in within(name.rpartition(".")[0]):
            parameters[path] += tensor.numel() * isinstance(tensor, nn.Parameter)
            size[path] += tensor.numel() * tensor.element_size()
    for inner, n in (macs or {}).items():
        for path in within(inner):
            computed[path] += n
    for module, path in walk(model).items():
        yield ModuleCount(path, type(module).__name__, parameters[path], None if macs is None else computed[path], size[path])


def within(path: str) -> list[str]:
    """The path of a module and those of all that it lies in, the root included."""
    return ["", *(with_outer(path) if path else ())]


def macs_by_module(capture: CapturedProgram) -> dict[str, int]:
    """Multiply-accumulates of every module's own calls, by path."""
    found = Counter[str]()
    for op in evaluation_calls(capture):
        if counts(op):
            found[module_of(capture, capture.nodes[op.node])] += macs_of(op, capture.op_trace, capture.op_trace.shape)
    return dict(found)


def module_of(capture: CapturedProgram, node: fx.Node) -> str:
    """The path of the module whose forward a node is of; of a layer that is one node, its own."""
    path = str(node.target) if node.op == "call_module" else str(node.meta.get("module") or "")
    return f"{path}.".removeprefix(capture.prefix).removesuffix(".")
