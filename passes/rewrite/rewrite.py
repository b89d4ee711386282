"""Emit the pruned module: sliced tensors, changed attributes and the rewritten programs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.capture.modules import own_call
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.module_tree import (
    Apart,
    TreeNames,
    every_path,
    fetch,
    has_own_train,
    named_tensors,
    on_meta,
    private_copy,
    replace_tensors,
    walk,
)
from fxprune.passes.ir.program import CapturedProgram, Waiver
from fxprune.passes.ir.pytree import ATOMS
from fxprune.passes.ir.slices import (
    Slicer,
    TensorSlice,
    apply_slices,
    cut_shape,
    fast_index_select,
    in_format_of,
    major_to_minor,
)
from fxprune.passes.rewrite.changes import changed_descriptions
from fxprune.passes.rewrite.nesting import Nesting
from fxprune.passes.rewrite.programs import FlatProgram, Forwards, Program, alike, on_own_model
from fxprune.passes.rewrite.pruned_module import PrunedModule, RewrittenForward
from fxprune.passes.rewrite.rewriter import Rewriter

Cut = Callable[[str, Tensor, Sequence[TensorSlice]], Tensor]


def tensor_cuts(solution: Solution, kept: Tensor, slicer: Slicer | None = None) -> dict[str, list[TensorSlice]]:
    """The slices of each of the model's tensors, by name; raises NotARectangle."""
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
    cut: Cut | None = None,
) -> PrunedModule:
    """The pruned model: a new module that shares nothing with `model`, unless `cut` hands it tensors that do.

    The captured programs of the solution are consumed: using them a second time raises, before anything has changed.

    Arguments:
        model: the original.
        solution: its coupling.
        kept: which labels are kept, shape (labels,).
        slicer: the slices for `kept`, if they have been computed before, with the residual branches that go.
        made: the slices of the model's tensors, likewise.
        values: the model's tensors by name, likewise.
        waiver: guards that need not hold everywhere.
        cut: what becomes of each of the model's tensors, in place of a new one.
    """
    slicer = slicer or Slicer(kept)
    made = tensor_cuts(solution, kept, slicer) if made is None else made
    captures = [capture.take() for capture in solution.captures]
    values = dict(named_tensors(model)) if values is None else values
    device = next((t.device for t in values.values()), torch.device("cpu"))
    constants: dict[str, Tensor] = {}
    programs, attributes, computed = rewrite_graphs(solution, slicer, constants, device, waiver)
    if slicer.removed:
        drop(captures[0].root, slicer.removed.modules, [captures[0].prefix + name for name in slicer.removed.tensors])
    tree = slice_tensors(
        values, solution, {**made, **computed}, cut or (lambda name, tensor, slices: slice_tensor(tensor, slices))
    )
    originals = dict(every_path(model))
    restore_state(originals, tree, solution)
    for path, edits in attributes.items():
        module = captures[0].modules.get(path) or fetch(tree, path)
        for name, value in edits.items():
            object.__setattr__(module, name, value)  # plain numbers, which a module's own __setattr__ has no use for
    for name, data in constants.items():
        tree.register_buffer(name, data.to(device), persistent=False)
    pruned = assemble(model, solution, tree, programs)
    pruned.meta["before"] = changed_descriptions(originals, pruned)
    if os.environ.get("FXPRUNE_STRICT") == "1":
        check_programs(pruned)
    return pruned


def assemble(model: nn.Module, solution: Solution, tree: nn.Module, programs: Mapping[bool, FlatProgram]) -> PrunedModule:
    """The pruned module of a tree with smaller tensors and the flat programs that run on it."""
    captures = solution.captures
    apart = modes_apart(model, solution, walk(tree).values())

    def is_training(path: str, mode: bool) -> bool:
        return mode != (path in apart.get(mode, ()))

    by_mode = {mode: captures[min(mode, len(captures) - 1)] for mode in programs}
    roots, forwards, shared = nest(programs, by_mode, tree, is_training)
    for path, names in shared.items():
        for name in names:
            fetch(tree, path).register_buffer(name, getattr(tree, name), persistent=False)
    flat = {mode: program.program for mode, program in programs.items()}
    own_model, prefix = None, captures[0].prefix
    if prefix:  # the model is one node, a module of the tree: that one is the root of the result
        tree, own_model = (fetch(tree, prefix.removesuffix(".")),) * 2
        roots, flat = ({m: on_own_model(p, prefix.removesuffix(".")) for m, p in some.items()} for some in (roots, flat))
        apart = {mode: frozenset(f"{path}.".removeprefix(prefix)[:-1] for path in some) for mode, some in apart.items()}
    pruned = PrunedModule(tree, roots, flat, forwards, apart, type(model).__name__, own_model)
    pruned._choose(model.training)
    return pruned


def nest(
    programs: Mapping[bool, FlatProgram],
    captures: Mapping[bool, CapturedProgram],
    root: nn.Module,
    flag: Callable[[str, bool], bool],
) -> tuple[dict[bool, Program], Forwards, dict[str, set[str]]]:
    """The programs of the root by mode, those of modules with a rewritten forward, and the root's tensors that each refers to.

    Arguments:
        programs: the flat programs, by mode.
        captures: the captured programs they come of.
        root: the pruned module tree.
        flag: whether the module at a path is in training where the root is in a mode.
    """
    tree, inline = TreeNames(root), frozenset[str]()
    while True:
        runs = {m: Nesting(flat, captures[m].results, captures[m].module_calls, tree, inline) for m, flat in programs.items()}
        touched = set().union(*(run.touched for run in runs.values()))
        for run in runs.values():
            run.touched = touched  # what keeps its forward does so in both modes
        roots = {mode: run.run() for mode, run in runs.items()}
        changed = {path for run in runs.values() for path in run.rewritten}
        changed |= {outer for run in runs.values() for path in changed for outer in run.around.get(path, ())}
        forwards: Forwards = {path: {} for path in changed if any(path in run.found for run in runs.values())}
        several = {path for path in forwards if does_more(tree.modules[path])}
        for mode, run in runs.items():
            for path in forwards:
                for program in run.found.get(path, ()):
                    if not alike(forwards[path].setdefault(flag(path, mode), program), program):
                        several.add(path)
        if not several:
            shared: dict[str, set[str]] = {}
            for run in runs.values():
                for path, names in run.shared.items():
                    if path in forwards:
                        shared.setdefault(path, set()).update(names)
            return roots, forwards, shared
        inline |= several


def does_more(module: nn.Module) -> bool:
    """Whether a call of a module computes what is among the lines of its program, but is none of its forward's."""
    return bool(module._forward_hooks or module._forward_pre_hooks or own_call(type(module)))


def rewrite_graphs(
    solution: Solution, slicer: Slicer, constants: dict[str, Tensor], device: torch.device, waiver: Waiver | None
) -> tuple[dict[bool, FlatProgram], dict[str, dict[str, Any]], dict[str, list[TensorSlice]]]:
    """The pruned programs, by whether they are for training; the attributes that change, by module path; and the slices of
    weights that hooks compute, by name.

    Index tensors that the programs refer to are added to `constants`.
    """
    programs: dict[bool, FlatProgram] = {}
    attributes: dict[str, dict[str, Any]] = {}
    computed: dict[str, list[TensorSlice]] = {}
    for which in range(len(solution.captures)):
        rewriter = Rewriter(solution, which, slicer, constants, device, waiver)
        found = rewriter.run()
        programs |= {True: found[False]} if which else found
        for path, edits in rewriter.attributes.items():
            attributes.setdefault(path, {}).update(edits)
        computed |= rewriter.layers.computed
    return programs, attributes, computed


def check_programs(pruned: PrunedModule) -> None:
    """Postconditions of a rewrite: every program is well formed, and what it refers to exists."""
    held = vars(pruned)
    held["_graph"].lint()
    found: list[tuple[nn.Module, Program]] = [
        (pruned, program) for program in (*held["_programs"].values(), *held["_flat"].values())
    ]
    for module in walk(pruned):
        forward = vars(module).get("forward")
        found += [(module, program) for program in forward.programs.values()] if isinstance(forward, RewrittenForward) else []
    for module, program in found:
        graph = program.graph()
        graph.owning_module = module  # type: ignore[assignment]  # where the targets of its nodes are looked up
        graph.lint()


def drop(root: nn.Module, modules: Iterable[str], tensors: Iterable[str]) -> None:
    """Delete modules, by their paths, and tensors, by name, from a tree, under all names that they have there."""
    gone = {id(fetch(root, path)) for path in modules} | {id(fetch(root, name)) for name in tensors}
    for module in walk(root):
        for held in (module._modules, module._parameters, module._buffers, vars(module)):
            for name in [name for name, value in held.items() if id(value) in gone]:
                del held[name]


def restore_state(modules: Mapping[str, nn.Module], tree: nn.Module, solution: Solution) -> None:
    """Give the modules of the pruned tree the modes, flags and numbers of the original's: forwards ran on them at capture.

    Arguments:
        modules: those of the original, by path.
    """
    prefix = solution.captures[0].prefix
    for module, path in walk(tree).items():
        own, original = vars(module), modules.get(path.removeprefix(prefix))
        was = {} if original is None else vars(original)
        for name in [k for k, v in own.items() if type(v) in ATOMS and was.get(k, v) is not v]:
            if type(was[name]) in ATOMS:
                own[name] = was[name]
        evaluates = path in solution.captures[0].evaluating
        own["training"] = not evaluates and (modules[""] if original is None else original).training


def modes_apart(model: nn.Module, solution: Solution, paths: Iterable[str]) -> Apart:
    """The modules of the result, by mode, that keep their own mode when the module is told another."""
    capture = solution.captures[0]
    found = capture.apart
    if found is None:
        found = {m: frozenset(capture.prefix + path for path in some) for m, some in apart_from(model).items()}
    found = {mode: some | capture.evaluating if mode else some for mode, some in found.items()}
    return {mode: some.intersection(paths) - {""} for mode, some in found.items()} if any(found.values()) else {}


def slice_tensors(values: Mapping[str, Tensor], solution: Solution, made: Mapping[str, list[TensorSlice]], cut: Cut) -> Any:
    """The captured module tree with every tensor sliced, or cloned where all of it stays.

    Arguments:
        values: the model's tensors as they are now, by name.
        solution: whose captured tree becomes the result.
        made: the slices of each tensor, by name.
        cut: from a name, a tensor and its slices to what is left of it.
    """
    capture = solution.captures[0]
    tree = capture.root

    def sliced(path: str, tensor: Tensor) -> Tensor:
        name = path.removeprefix(capture.prefix)
        return cut(name, values[name], made.get(name, ())) if name in values else slice_tensor(tensor, made.get(name, ()))

    with torch.no_grad():
        replace_tensors(tree, sliced)
    for other in solution.captures[1:]:  # constants that only the other program met
        for name, tensor in named_tensors(other.root):
            if name not in values and not hasattr(tree, name) and name.startswith("_tensor_constant"):
                setattr(tree, name, copy.copy(tensor))
                tree._non_persistent_buffers_set.add(name)
    return tree


LARGE = 1 << 18  # elements of a tensor from which on it is sliced a block of rows at a time
BLOCK = 1 << 17  # elements a thread of such a block, so that the next slice finds it in the cache


def slice_tensor(source: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
    """A new dense tensor with what slices leave of one, in its memory format; a parameter where that is one."""
    data = source.data
    if not slices:
        new = data.clone()
    elif data.is_cpu and data.numel() > LARGE and (len(slices) > 1 or 0 not in slices[0].dims) and by_rows(slices):
        new = slice_in_blocks(data, slices)
    else:
        new = in_format_of(data, apply_slices(slices, data))
    return nn.Parameter(new, requires_grad=source.requires_grad) if isinstance(source, nn.Parameter) else new


def slice_in_blocks(source: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
    """The same without a second large tensor on the way, which `gather` makes of its index, too."""
    made = torch.empty_permuted(cut_shape(source.shape, slices), major_to_minor(source), dtype=source.dtype)
    rows_per_block = max(1, BLOCK * torch.get_num_threads() * len(source) // source.numel())
    first = slices[0].dims == (0,)
    blocks = slices[0].keep.split(rows_per_block) if first else source.split(rows_per_block)
    *others, last = slices[first:]
    for block, place in zip(blocks, made.split(rows_per_block), strict=True):
        part = source.index_select(0, block) if first else block
        if len(last.dims) == 1 and place.is_contiguous():
            fast_index_select(apply_slices(others, part), last.dims[0], last.keep, place)
        else:
            place.copy_(apply_slices(slices[first:], part))
    return made


def by_rows(slices: Sequence[TensorSlice]) -> bool:
    """Whether rows can be sliced one by one: only the first slice may take some of them, and alone."""
    return all(0 not in cut.dims for cut in slices[slices[0].dims == (0,) :])


def apart_from(model: nn.Module) -> Apart:
    """The modules that do not follow when a model is told its mode; `train` is called on copies without contents."""
    found: Apart = {}
    for mode in (False, True) if has_own_train(walk(model)) else ():
        copied = private_copy(model, on_meta)
        try:
            copied.train(mode)
        except Exception:  # one that knows one mode alone
            continue
        found[mode] = frozenset(path for path, m in every_path(copied) if m.training != mode)
    return found
