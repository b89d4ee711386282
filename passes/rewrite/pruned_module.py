"""The emitted module: a GraphModule with one program for evaluation and, where it differs, one for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from fxprune.passes.ir.module_tree import Apart
from fxprune.passes.ir.program import select_by_mode


@dataclass(frozen=True, slots=True)
class Program:
    """A graph written down node by node: arguments refer to other nodes by name. It is built when it is asked for."""

    lines: tuple[tuple[str, str, Any, Any, Any, dict[str, Any]], ...]

    def graph(self) -> fx.Graph:
        graph, made = fx.Graph(), {}
        for name, op, target, args, kwargs, meta in self.lines:
            named = [fx.node.map_aggregate(a, lambda x: made[x.name] if isinstance(x, Name) else x) for a in (args, kwargs)]
            made[name] = graph.create_node(op, target, named[0], named[1], name)
            made[name].meta = dict(meta)
        return graph


@dataclass(frozen=True, slots=True)
class Name:
    """A node, by its name."""

    name: str


def written(graph: fx.Graph, only: Mapping[fx.Node, bool | None], mode: bool) -> Program:
    """The program of one mode out of a graph with branches (see `train_eval.py`)."""
    names: dict[Any, Any] = {}
    lines = []
    for node in graph.nodes:
        if only.get(node, mode) != mode:
            continue
        if node.target is select_by_mode:
            chosen = node.args[mode]
            names[node] = names[chosen] if isinstance(chosen, fx.Node) else chosen
        else:
            names[node] = Name(node.name)
            args, kwargs = (fx.node.map_arg(x, names.__getitem__) if x else x for x in (node.args, node.kwargs))
            lines.append((node.name, node.op, node.target, args, kwargs, node.meta))
    return Program(tuple(lines))


class PrunedModule(fx.GraphModule):
    """A GraphModule that keeps one program for evaluation and one for training where the two differ.

    `train()` and `eval()` switch between them; modules that they leave in the other mode in the original they leave so here.
    `meta["plan"]` says what was removed, `meta["verification"]` how exact the result is.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        name: str = "Pruned",
        programs: dict[bool, fx.Graph | Program] | None = None,
        apart: Apart | None = None,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        vars(self)["training"] = root.training
        for program in {id(p): p for p in (graph, *(programs or {}).values())}.values():
            adopt(self, root, targets_of(program))
        self.graph = graph
        self.__dict__["_programs"] = programs or {}
        self.__dict__["_apart"] = apart or {}

    def recompile(self) -> PythonCode:
        if not len(self._graph.nodes):  # the empty one that `__init__` starts with
            return PythonCode("", {}, None)
        return super().recompile()

    def train(self, mode: bool = True) -> PrunedModule:
        super().train(mode)
        apart = self.__dict__.get("_apart", {}).get(mode)
        for path, module in self.named_modules() if apart else ():
            module.training = mode != (path in apart)
        self.choose(mode)
        return self

    def choose(self, mode: bool) -> None:
        """Switch to the program of a mode."""
        programs = self.__dict__.get("_programs") or {}
        if mode in programs and programs[mode] is not self._graph:
            if isinstance(programs[mode], Program):
                programs[mode] = programs[mode].graph()
            self.graph = programs[mode]

    def _deepcopy_init(self) -> Callable[..., None]:
        def init(made: PrunedModule, state: nn.Module, graph: fx.Graph) -> None:
            held = vars(state)
            PrunedModule.__init__(made, state, graph, type(self).__name__, held.get("_programs"), held.get("_apart"))

        return init

    @property
    def plan(self) -> Any:
        return self.meta.get("plan")

    @property
    def verification(self) -> Any:
        return self.meta.get("verification")


def targets_of(program: fx.Graph | Program) -> list[str]:
    """The paths of the modules and tensors that a program refers to."""
    if isinstance(program, Program):
        return [target for _, op, target, *_ in program.lines if op in ("get_attr", "call_module")]
    return [str(n.target) for n in program.nodes if n.op in ("get_attr", "call_module")]


def adopt(made: nn.Module, root: nn.Module, targets: Iterable[str]) -> None:
    """Give a module what a program refers to, under the paths that it has in `root`; modules in between become plain ones.

    GraphModule does the same, but looks up every path from the root, twice.
    """
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {"": (root, made)}

    def pair(path: str) -> tuple[nn.Module, nn.Module]:
        found = pairs.get(path)
        if found is None:
            above, _, name = path.rpartition(".")
            source, target = pair(above)
            child = source._modules[name] if name in source._modules else getattr(source, name)
            assert isinstance(child, nn.Module)
            mine = child if source is target else target._modules.get(name)
            if mine is None:
                mine = target._modules[name] = nn.Module()
            found = pairs[path] = (child, mine)
        return found

    for path in targets:
        above, _, name = path.rpartition(".")
        source, target = pair(above)
        if source is target:
            continue  # a module it lies in has been adopted whole
        if name in source._modules:
            target._modules[name] = source._modules[name]
            pairs.pop(path, None)
            continue
        value = getattr(source, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            target.register_buffer(name, value, persistent=name not in source._non_persistent_buffers_set)
        else:
            setattr(target, name, value)
    for source, target in pairs.values():
        if source is not target:
            for kind in ("_parameters", "_buffers", "_modules"):
                keep_order(vars(source)[kind], vars(target)[kind])


def keep_order(wanted: Iterable[str], held: dict[str, Any]) -> None:
    """Move the entries of a dictionary into the order of those names."""
    for name in wanted:
        if name in held:
            held[name] = held.pop(name)
