"""Shrink: the new GraphModule, with cut tensors, changed attributes and the rewritten programs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _copy_attr

from fxprune.passes.couple import Solution
from fxprune.passes.kept import Cut, Cutter
from fxprune.passes.rewrite import Rewriter
from fxprune.passes.tree import PLAIN, copy_tree, fetch, named_tensors


class PrunedModule(fx.GraphModule):
    """A GraphModule that keeps one program for evaluation and one for training where the two differ.

    `train()` and `eval()` switch between them. `meta["plan"]` and `meta["verification"]` say how it came about.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        name: str = "Pruned",
        programs: dict[bool, fx.Graph] | None = None,
    ) -> None:
        super().__init__(root, graph, name)
        for program in (programs or {}).values():
            for node in program.nodes:
                if node.op in ("get_attr", "call_module"):
                    _copy_attr(root, self, str(node.target))
        self.__dict__["_programs"] = programs or {}

    def train(self, mode: bool = True) -> PrunedModule:
        super().train(mode)
        programs = self.__dict__.get("_programs") or {}
        if mode in programs and programs[mode] is not self._graph:
            self.graph = programs[mode]
        return self

    def _deepcopy_init(self) -> Callable[..., None]:
        def init(made: PrunedModule, state: nn.Module, graph: fx.Graph) -> None:
            PrunedModule.__init__(made, state, graph, type(self).__name__, state.__dict__.get("_programs"))

        return init

    @property
    def plan(self) -> Any:
        return self.meta.get("plan")

    @property
    def verification(self) -> Any:
        return self.meta.get("verification")


def tensor_cuts(solution: Solution, kept: Tensor, cutter: Cutter | None = None) -> dict[str, list[Cut]]:
    """How each of the model's tensors is cut, by name; raises NotARectangle."""
    shapes = {v.name: v.shape for c in solution.captures for v in c.tape.values if v.name is not None}
    cutter = cutter or Cutter(kept)
    return {name: cutter(labels, shapes[name]) for name, labels in solution.leaves.items()}


def shrink(model: nn.Module, solution: Solution, kept: Tensor, cutter: Cutter | None = None) -> PrunedModule:
    """The pruned model: a new module that shares nothing with `model`."""
    cutter = cutter or Cutter(kept)
    made = tensor_cuts(solution, kept, cutter)
    constants: dict[str, Tensor] = {}
    device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
    programs: list[fx.Graph] = []
    attributes: dict[str, dict[str, Any]] = {}
    for which in range(len(solution.captures)):
        rewriter = Rewriter(solution, which, cutter, constants, device)
        made_here = rewriter.run()
        programs += made_here if len(solution.captures) == 1 else made_here[:1]
        for path, edits in rewriter.attributes.items():
            attributes.setdefault(path, {}).update(edits)
    root = cut_tree(model, solution, made)
    for path, edits in attributes.items():
        module = fetch(root, path) if path else root
        for name, value in edits.items():
            object.__setattr__(module, name, value)  # numbers: what a module's own __setattr__ looks for is not there
    for name, data in constants.items():
        root.register_buffer(name, data.to(device), persistent=False)
    both = {False: programs[0], True: programs[1]} if len(programs) > 1 else None
    pruned = PrunedModule(root, programs[0], type(model).__name__, both)
    pruned.train(model.training)
    modes = {path: m.training for path, m in model.named_modules()}
    for path, module in pruned.named_modules():
        if path:
            vars(module)["training"] = modes.get(path.removeprefix(solution.captures[0].prefix), model.training)
    return pruned


def cut_tree(model: nn.Module, solution: Solution, made: Mapping[str, list[Cut]]) -> Any:
    """A copy of the traced module tree in which every tensor is cut (or cloned), with the model's present values."""
    values = dict(named_tensors(model))
    swap: dict[int, Tensor] = {}
    root = solution.captures[0].root
    with torch.no_grad():
        for path, tensor in named_tensors(root):
            name = path.removeprefix(solution.captures[0].prefix)
            source = values.get(name, tensor)
            new = source.detach()
            for cut in made.get(name, ()):
                new = cut.take(new)
            new = new.clone() if not made.get(name) else new.contiguous()
            if isinstance(source, nn.Parameter):
                new = nn.Parameter(new, requires_grad=source.requires_grad)
            swap[id(tensor)] = new
    tree = copy_tree(root, swap)
    for capture in solution.captures[1:]:  # constants that only the other program met
        for name, tensor in named_tensors(capture.root):
            if name not in values and not hasattr(tree, name) and name.startswith("_tensor_constant"):
                setattr(tree, name, copy.copy(tensor))
    for module in tree.modules():
        plain = [k for k, v in vars(module).items() if type(v) not in PLAIN and isinstance(v, Tensor)]
        module._non_persistent_buffers_set |= set(plain)
    return tree
