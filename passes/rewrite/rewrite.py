"""Shrink: the new GraphModule, with cut tensors, changed attributes and the rewritten programs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.module_tree import Apart, apart_from, every_path, fetch, named_tensors, replace_tensors, walk
from fxprune.passes.ir.program import Waiver
from fxprune.passes.ir.slices import Slicer, TensorSlice
from fxprune.passes.rewrite.pruned_module import Program, PrunedModule
from fxprune.passes.rewrite.rewriter import Rewriter
from fxprune.passes.rewrite.slicing import Room, cut


def tensor_cuts(solution: Solution, kept: Tensor, slicer: Slicer | None = None) -> dict[str, list[TensorSlice]]:
    """How each of the model's tensors is cut, by name; raises NotARectangle."""
    slicer = slicer or Slicer(kept)
    return {name: slicer(labels, solution.shapes[name]) for name, labels in solution.leaves.items()}


def rewrite_program(
    model: nn.Module,
    solution: Solution,
    kept: Tensor,
    slicer: Slicer | None = None,
    *,
    made: Mapping[str, list[TensorSlice]] | None = None,
    values: Mapping[str, Tensor] | None = None,
    waiver: Waiver | None = None,
) -> PrunedModule:
    """The pruned model: a new module that shares nothing with `model`. The captures of the solution are used up.

    Arguments: `made`, the cuts of the model's tensors, and `values`, these tensors by name, where they are known already;
    `waiver`, guards that need not hold everywhere.
    """
    slicer = slicer or Slicer(kept)
    made = tensor_cuts(solution, kept, slicer) if made is None else made
    constants: dict[str, Tensor] = {}
    values = dict(named_tensors(model)) if values is None else values
    device = next((t.device for t in values.values()), torch.device("cpu"))
    programs: dict[bool, fx.Graph | Program] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for which in range(len(solution.captures)):
        rewriter = Rewriter(solution, which, slicer, constants, device, waiver)
        graph, trained = rewriter.run()
        programs[bool(which)] = graph
        if trained is not None and len(solution.captures) == 1:
            programs[True] = trained
        for path, edits in rewriter.attributes.items():
            attributes.setdefault(path, {}).update(edits)
    root = cut_tree(values, solution, made)
    for path, edits in attributes.items():
        module = solution.captures[0].modules.get(path) or fetch(root, path)
        for name, value in edits.items():
            object.__setattr__(module, name, value)  # numbers: what a module's own __setattr__ looks for is not there
    for name, data in constants.items():
        root.register_buffer(name, data.to(device), persistent=False)
    evaluated = programs[False]
    assert isinstance(evaluated, fx.Graph)
    pruned = PrunedModule(root, evaluated, type(model).__name__, programs if len(programs) > 1 else None)
    vars(pruned)["_apart"] = modules_apart(model, solution, walk(pruned).values())
    vars(pruned)["training"] = model.training
    pruned.choose(model.training)
    modes = {path: m.training for path, m in every_path(model)}
    for module, path in walk(pruned).items():
        if path:
            vars(module)["training"] = modes.get(path.removeprefix(solution.captures[0].prefix), model.training)
    return pruned


def modules_apart(model: nn.Module, solution: Solution, paths: Iterable[str]) -> Apart:
    """Those modules of the result, by mode, that do not follow when it is told its mode."""
    capture = solution.captures[0]
    found = capture.apart
    if found is None:
        found = {m: frozenset(capture.prefix + path for path in some) for m, some in apart_from(model).items()}
    return {mode: some.intersection(paths) - {""} for mode, some in found.items()} if any(found.values()) else {}


def cut_tree(values: Mapping[str, Tensor], solution: Solution, made: Mapping[str, list[TensorSlice]]) -> Any:
    """The traced module tree with every tensor cut (or cloned).

    Arguments:
        values: the model's tensors as they are now, by name.
        solution: whose captured tree becomes the result.
        made: the cuts of each tensor, by name.
    """
    capture = solution.captures[0]
    tree = capture.root
    room: Room = {}

    def cut_down(path: str, tensor: Tensor) -> Tensor:
        name = path.removeprefix(capture.prefix)
        return cut(values.get(name, tensor), made.get(name, ()), room)

    with torch.no_grad():
        replace_tensors(tree, cut_down)
    for other in solution.captures[1:]:  # constants that only the other program met
        for name, tensor in named_tensors(other.root):
            if name not in values and not hasattr(tree, name) and name.startswith("_tensor_constant"):
                setattr(tree, name, copy.copy(tensor))
                tree._non_persistent_buffers_set.add(name)
    return tree
