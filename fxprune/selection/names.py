"""Modules and families by name: what `only`, `freeze`, `freeze_outputs` and `protect` keep of a model, with the reason."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.arguments import shown
from fxprune.passes.coupling.families import names_family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import children_of, every_path, named_parameters, named_tensors

NOT_ALL_IN = "is not all in only="  # the reason why a family stays, and what was asked for
Names = str | nn.Module | Sequence[str | nn.Module]


def near_modules(glob: str, modules: Sequence[str]) -> str:
    close = difflib.get_close_matches(glob, [m for m in modules if m], n=3, cutoff=0.4)
    return f"one of the names of model.named_modules(){', such as ' + ', '.join(close) if close else ''}"


def paths_of(model: nn.Module, item: Any, argument: str) -> list[str]:
    """The names of a module, or of those that a glob matches; raises PruneError where there are none."""
    modules = dict(every_path(model))
    if isinstance(item, str):
        paths = [path for path in modules if fnmatch.fnmatchcase(path, item)]
        if not paths:
            raise PruneError(f"the glob {item!r} in {argument} matches no module", fix=near_modules(item, list(modules)))
        return paths
    if not isinstance(item, nn.Module):
        raise PruneError(
            f"{argument} names {shown(item)}, which is neither a glob nor a module", fix=f"{argument}='layer1', or model.layer1"
        )
    paths = [path for path, module in modules.items() if module is item]
    if not paths:
        raise PruneError(f"{argument} names a {type(item).__name__} that is not part of the model", fix="model.layer1")
    return paths


def each_item(given: Any) -> list[Any]:
    alone = isinstance(given, str | nn.Module | Tensor | np.ndarray | Mapping)
    return [given] if alone or not isinstance(given, Iterable) else list(given)


def frozen_names(model: nn.Module, freeze: Any) -> dict[str, str]:
    """Names of the tensors that stay by request, and texts that name families, with the reason."""
    frozen: dict[str, str] = {}
    for item in each_item(freeze):
        if isinstance(item, str) and names_family(item, {name: t.shape for name, t in named_tensors(model)}):
            frozen[item] = f"is frozen by freeze={item!r}"
            continue
        paths = paths_of(model, item, "freeze")
        why = (
            f"is frozen by freeze={item!r}"
            if isinstance(item, str)
            else f"is frozen by freeze={type(item).__name__} ({paths[0]})"
        )
        for path in paths:
            inside = {id(t) for _, t in named_tensors(model.get_submodule(path))}
            frozen.update({name: why for name, t in named_tensors(model) if id(t) in inside})
    return frozen


# layers whose weights have their outputs in the second dimension
OUTPUTS_SECOND = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)


def frozen_outputs(model: nn.Module, layers: Any) -> dict[str, str]:
    """The output dimensions of the tensors of some layers, as texts that name the families there, with the reason."""
    frozen: dict[str, str] = {}
    for item in each_item(layers):
        names = {id(t): name for name, t in named_tensors(model)}
        found: dict[str, str] = {}
        for path in paths_of(model, item, "freeze_outputs"):
            for inner, module in model.get_submodule(path).named_modules(prefix=path):
                for tensor in module.parameters(recurse=False):
                    dim = int(isinstance(module, OUTPUTS_SECOND) and tensor.dim() > 1)
                    found[f"{names[id(tensor)]}:{dim}"] = f"is frozen by freeze_outputs={inner!r}"
        if not found:
            what = f"freeze_outputs names {item if isinstance(item, str) else type(item).__name__!r}, which has no parameters"
            raise PruneError(what, fix="freeze_outputs=[model.fc], a layer with a weight")
        frozen.update(found)
    return frozen


def outside(model: nn.Module, only: Any) -> dict[str, str]:
    """The names of the parameters that lie in none of some modules, with the reason; nothing where no modules are named.

    A family stays where any of its parameters does: so families take part all of whose parameters lie in the modules.
    """
    items = each_item(only)
    if not items:
        return {}
    modules = [model.get_submodule(path) for item in items for path in paths_of(model, item, "only")]
    inside = {id(parameter) for module in modules for parameter in named_parameters(module).values()}
    said = ", ".join(repr(item) if isinstance(item, str) else type(item).__name__ for item in items)
    found = named_parameters(model)
    if not any(id(parameter) in inside for parameter in found.values()):
        raise PruneError(f"the modules in only={said} have no parameters", fix="a module with layers, such as only='*mlp*'")
    return {name: f"{NOT_ALL_IN}{said}" for name, parameter in found.items() if id(parameter) not in inside}


def protected(model: nn.Module, protect: Any) -> dict[str, str]:
    """Texts that name the families within the first and the last blocks, with the reason.

    Raises: PruneError for what is no pair of counts, or a model without so many blocks.
    """
    pair = isinstance(protect, tuple | list) and len(protect) == 2
    if not pair or not all(type(n) is int and n >= 0 for n in protect):
        raise PruneError(f"protect must be two counts, of first and of last blocks, not {shown(protect)}", fix="protect=(2, 1)")
    first, last = protect
    frozen: dict[str, str] = {}
    chains = list(block_chains(model)) if first or last else []
    if (first or last) and not any(len(chain) > first + last for chain in chains):
        have = f"lists of {', '.join(str(len(chain)) for chain in chains)} blocks" if chains else "no list of blocks"
        what = f"protect={protect!r} leaves no block to prune: the model has {have}"
        raise PruneError(what, fix="fewer blocks, or freeze= with the modules that stay")
    for chain in chains:
        for which, count, paths in (("first", first, chain[:first]), ("last", last, chain[len(chain) - last :])):
            blocks = f"{count} blocks" if count > 1 else "block"
            frozen.update({f"{path}/": f"is in {path}, of the {which} {blocks} (protect={protect!r})" for path in paths})
    return frozen


def block_chains(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the blocks of a model, in chains: two or more modules of one class, with layers of their own, in one list.

    Lists are `ModuleList`s and `Sequential`s; those that lie side by side in one module, as the stages of a ResNet do, are one
    chain. What lies within a block is no chain of its own, save where the blocks are stages: modules with a `Sequential` of
    blocks. A plain `Sequential` is a block in a list that has no others.
    """
    chains = list(chains_within(model, ""))
    own = [] if chains or not isinstance(model, LISTS) else blocks_of(model) or sequentials_of(model)
    yield from chains
    if own:
        yield own


def chains_within(model: nn.Module, prefix: str) -> Iterator[list[str]]:
    chain: list[str] = []
    for name, child in children_of(model).items():
        path = f"{prefix}{name}"
        parts = children_of(child).values()
        inside = [c for part in parts for c in (part, *children_of(part).values()) if isinstance(c, nn.Sequential)]
        if not isinstance(child, LISTS):
            yield from chains_within(child, f"{path}.")
        elif any(blocks_of(c) for c in inside):  # stages
            chain += [p for found in chains_within(child, f"{path}.") for p in found]
        else:
            chain += [f"{path}.{block}" for block in blocks_of(child) or sequentials_of(child)]
    if chain:
        yield chain


LISTS = (nn.ModuleList, nn.Sequential)


def blocks_of(container: nn.Module) -> list[str]:
    """Names in a list of the modules with layers of their own that share their class with another one."""
    children = children_of(container)
    kinds = [type(c) if children_of(c) and not isinstance(c, LISTS) else None for c in children.values()]
    return [name for name, kind in zip(children, kinds, strict=True) if kind is not None and kinds.count(kind) > 1]


def sequentials_of(container: nn.Module) -> list[str]:
    """Names in a list of the plain `Sequential`s with layers in them, if there are several."""
    found = [name for name, c in children_of(container).items() if type(c) is nn.Sequential and children_of(c)]
    return found if len(found) > 1 else []
