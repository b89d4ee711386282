"""Shrink: the new GraphModule, with cut tensors, changed attributes and the rewritten programs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.passes.couple import Solution
from fxprune.passes.guards import Waiver
from fxprune.passes.kept import Cut, Cutter, cut_shape, picked
from fxprune.passes.pruned import Program, PrunedModule
from fxprune.passes.rewrite import Rewriter
from fxprune.passes.tree import Apart, apart_from, every_path, fetch, named_tensors, replace_tensors, walk


def tensor_cuts(solution: Solution, kept: Tensor, cutter: Cutter | None = None) -> dict[str, list[Cut]]:
    """How each of the model's tensors is cut, by name; raises NotARectangle."""
    cutter = cutter or Cutter(kept)
    return {name: cutter(labels, solution.shapes[name]) for name, labels in solution.leaves.items()}


def shrink(
    model: nn.Module,
    solution: Solution,
    kept: Tensor,
    cutter: Cutter | None = None,
    *,
    made: Mapping[str, list[Cut]] | None = None,
    values: Mapping[str, Tensor] | None = None,
    waiver: Waiver | None = None,
) -> PrunedModule:
    """The pruned model: a new module that shares nothing with `model`. The captures of the solution are used up.

    Arguments: `made`, the cuts of the model's tensors, and `values`, these tensors by name, where they are known already;
    `waiver`, guards that need not hold everywhere.
    """
    cutter = cutter or Cutter(kept)
    made = tensor_cuts(solution, kept, cutter) if made is None else made
    constants: dict[str, Tensor] = {}
    values = dict(named_tensors(model)) if values is None else values
    device = next((t.device for t in values.values()), torch.device("cpu"))
    programs: dict[bool, fx.Graph | Program] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for which in range(len(solution.captures)):
        rewriter = Rewriter(solution, which, cutter, constants, device, waiver)
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


def cut_tree(values: Mapping[str, Tensor], solution: Solution, made: Mapping[str, list[Cut]]) -> Any:
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


Room = dict[torch.dtype, Tensor]  # memory for what is wanted for a moment: fresh memory takes longer than copying into it

LARGE = 1 << 22  # elements of a tensor that is cut a block at a time
BLOCK = 1 << 20  # elements of such a block: what one cut leaves is still in the cache for the next
RUN = 4  # elements that lie together from which on
MANY = 1 << 17  # elements are cut along two dimensions at once


def cut(source: Tensor, cuts: Sequence[Cut], room: Room) -> Tensor:
    """A new tensor with what the cuts leave of one; a parameter where that is one."""
    new = source.data
    if len(cuts) > 1 and cuts[0].dims == (0,) and new.is_cpu:
        if new.numel() > LARGE:
            new = in_blocks(new, cuts, room)
        elif has_runs(new, cuts):
            new = runs_of(new, cuts[0].keep, cuts[1].keep)
        else:
            new = rows_of(new, cuts[0].keep, room)
            for each in cuts[1:]:
                new = each.take(new)
            new = new.contiguous()
    else:
        for each in cuts:
            new = each.take(new)
        new = new.contiguous() if cuts else new.clone()
    return nn.Parameter(new, requires_grad=source.requires_grad) if isinstance(source, nn.Parameter) else new


def has_runs(source: Tensor, cuts: Sequence[Cut]) -> bool:
    """Whether a large tensor is cut along its first two dimensions, and enough lies together along the others."""
    if source.numel() < MANY or len(cuts) != 2 or cuts[1].dims != (1,) or not source.is_contiguous():
        return False
    return source.numel() >= RUN * source.shape[0] * source.shape[1]


def runs_of(source: Tensor, rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """What lies at some rows and columns, read once and written once."""
    width, run = source.shape[1], source[0, 0].numel()
    at = (rows * width).unsqueeze(1).add(columns).view(-1)
    if out is None:
        out = source.new_empty(len(rows), len(columns), *source.shape[2:])
    torch.index_select(source.view(-1, run), 0, at, out=out.view(-1, run))
    return out


def rows_of(source: Tensor, rows: Tensor, room: Room) -> Tensor:
    """Some rows of a tensor, for a moment: the next call may write over them."""
    size = len(rows) * source[0].numel()
    if source.dtype not in room or room[source.dtype].numel() < size:
        room[source.dtype] = source.new_empty(max(size, BLOCK))
    return torch.index_select(source, 0, rows, out=room[source.dtype][:size].view(len(rows), *source.shape[1:]))


def in_blocks(source: Tensor, cuts: Sequence[Cut], room: Room) -> Tensor:
    """What cuts leave, the first of them along the first dimension, without a second large tensor on the way."""
    made = source.new_empty(cut_shape(source.shape, cuts))
    step = max(1, BLOCK * len(source) // source.numel())
    *between, last = cuts[1:]
    runs = has_runs(source, cuts)
    for rows, place in zip(cuts[0].keep.split(step), made.split(step), strict=True):
        if runs:
            runs_of(source, rows, last.keep, place)
            continue
        part = rows_of(source, rows, room)
        for each in between:
            part = each.take(part)
        if len(last.dims) == 1:
            picked(part, last.dims[0], last.keep, place)
        else:
            place.copy_(last.take(part))
    return made
