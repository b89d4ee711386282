"""Save a pruned model and load it again: in another process, without example inputs, without pickle.

A checkpoint holds the plan and the tensors that are left. Loading applies the plan to the original architecture, in form
alone, and fills in the tensors; nothing that stands in a file is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from fxprune.arguments import checked_call
from fxprune.checkpoints.config import built_from, config_of, write_config
from fxprune.checkpoints.file import check_digests, opened, write
from fxprune.checkpoints.rebuild import CONTENTS, other_names, rebuilt, rotations_apart, rotations_in, split_contents
from fxprune.checkpoints.record import Record
from fxprune.entry_points import entry_point
from fxprune.module_state import aliases
from fxprune.original_state import left_by_forward
from fxprune.passes.coupling.leaf_labels import is_constant
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import every_tensor, named_modules, named_tensors
from fxprune.passes.ir.quiet import without_modes
from fxprune.pipeline import AnyModule
from fxprune.plan import PlanData, plan_carried
from fxprune.reports.files import as_path, flush, unwritable
from fxprune.same_class.saving import SavePretrained
from fxprune.selection.argument_checks import check_flag

if TYPE_CHECKING:
    from fxprune.pipeline import Pruned

SUFFIX = ".safetensors"
WEIGHTS = f"pruned{SUFFIX}"  # in a folder
Folder = os.PathLike[str] | str


@checked_call()
def save(pruned: nn.Module, path: Folder) -> None:
    """Write a pruned model to a file, or to a folder from which it can be loaded without the original.

    Arguments:
        pruned: what `prune`, `Plan.apply`, `repair` or a `Pruner` returned, trained since or not.
        path: of a file, if it ends in `.safetensors`: it holds every tensor, the plan and the verification. Otherwise of a
            folder, for models of transformers: it holds the original's configuration too.

    What is there is replaced once all is written, and left as it is if anything fails.

    Raises: PruneError where `pruned` was not pruned, has other layers than then or tensors that cannot be stored, the path
    cannot be written, or a folder is asked for of a model that no configuration builds.
    """
    with entry_point(pruned) as module:
        store(module, as_path(path))


def store(module: nn.Module, target: Path) -> None:
    plan = plan_carried(module)
    record, left = Record.of(module, plan).to_dict(), left_by_forward(module, plan)
    tensors = {name: tensor for name, tensor in named_tensors(module) if name not in left}
    tensors |= rotations_apart(record["plan"], plan.basis)
    check_form(module, plan, tensors)
    contents: Any = module.meta
    tensors |= {CONTENTS + name: t for name, t in contents.get("contents", {}).items() if name in plan.shapes}
    if target.suffix == SUFFIX:
        write(target, tensors, record)
        return
    config = config_of(module)
    if config is None:
        what = f"{type(module).__name__} cannot be saved to a folder: no configuration builds the original"
        raise PruneError(what, fix=f"a file: fxprune.save(pruned, {(str(target) if target.name else 'small') + SUFFIX!r})")
    with folder_at(target) as folder:
        write_config(folder, module, config)
        write(folder / WEIGHTS, tensors, record)


def check_form(module: nn.Module, plan: PlanData, tensors: Mapping[str, Tensor]) -> None:
    """Raise PruneError where layers were put in, taken out or given other sizes since: what is loaded is what was pruned."""
    wrong = ""
    for name, tensor in tensors.items():
        if name in plan.shapes and name not in plan.derived and tuple(tensor.shape) != plan.kept_shape(name):
            wrong = wrong or f"{name} has shape {tuple(tensor.shape)}, and pruning left {plan.kept_shape(name)}"
    owners = {name.rpartition(".")[0] for name in plan.shapes}
    names: dict[int, set[str]] = {}
    for name, tensor in every_tensor(module):
        if isinstance(tensor, nn.Parameter):
            names.setdefault(id(tensor), set()).add(name)
    for every in names.values() if plan.basis is None else ():
        if every.isdisjoint(plan.shapes) and owners.isdisjoint(name.rpartition(".")[0] for name in every):
            wrong = wrong or f"{min(every)} was not there when it was pruned"
    for path, inner in named_modules(module):
        gone = [name for name, held in inner._parameters.items() if held is None and f"{path}.{name}" in plan.shapes]
        wrong = wrong or (f"{path}.{gone[0]} was there when it was pruned" if gone else "")
    if wrong:
        raise PruneError(
            f"the model was changed since it was pruned: {wrong}",
            where=type(module).__name__,
            fix="torch.save(model, path) stores it as it is; or save what was pruned, and change it once it is loaded",
        )


SavePretrained.save = staticmethod(save)


@overload
def load(
    path: Folder, model: nn.Module | None = None, *, same_class: Literal[False] = False, example_inputs: Any = None
) -> Pruned: ...


@overload
def load(path: Folder, model: AnyModule, *, same_class: Literal[True], example_inputs: Any = None) -> AnyModule: ...


@overload
def load(path: Folder, model: nn.Module | None = None, *, same_class: bool, example_inputs: Any = None) -> nn.Module: ...


@checked_call()
@without_modes()
def load(path: Folder, model: nn.Module | None = None, *, same_class: bool = False, example_inputs: Any = None) -> Any:
    """Read what `save` wrote: a model whose outputs equal those of the saved one bit by bit.

    >>> import tempfile, torch, fxprune
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> x = torch.randn(1, 4)
    >>> small = fxprune.prune(net, 0.5, example_inputs=x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(small, f"{folder}/small.safetensors")
    ...     again = load(f"{folder}/small.safetensors", nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    >>> torch.equal(again(x), small(x))
    True

    Arguments:
        path: of the file or of the folder.
        model: the original architecture, with any values, or on the meta device. It may be left out for a folder, whose
            configuration builds it. It is not touched; the result has the dtypes of what was saved, on the model's device.
        same_class: return a module of the original's class, as `prune` does with it, whichever of the two was saved.
        example_inputs: as for `prune`; only where the plan cannot describe those that it was made with.

    Raises: PruneError that says what differs, for a file that is damaged or no checkpoint, or a model that it does not fit;
    before memory is spent on its tensors.
    """
    check_flag("same_class", same_class)
    source = as_path(path)
    folder = source if source.is_dir() else None
    if folder and (folder / "config.json").exists() and not (folder / WEIGHTS).exists():
        fix = f"from_pretrained({str(path)!r}) of its class, where the configuration describes the model"
        raise PruneError(f"{source} has a configuration, and no {WEIGHTS}", fix=fix)
    with opened(source / WEIGHTS if folder else source) as (found, data, size):
        record = Record.from_dict(data, size, rotations_in(found))
        tensors, contents = split_contents(record.plan, found)
        check_digests(source, found, data.get("digests"))
        if model is None:
            if folder is None:
                raise PruneError(f"{source} has no configuration to build the model from", fix="load(path, model)")
            model = built_from(folder, record.plan)
        with entry_point(model) as unrotated:
            original, plan = record.plan.in_basis(unrotated)
            signed, record = record.plan, dataclasses.replace(record, plan=plan)
            made = rebuilt(original, record, tensors, contents, same_class, example_inputs)
            if same_class != record.graph:
                stored, own_constants = without_other_constants(tensors, made)
                free = {*record.plan.derived, *left_by_forward(made, record.plan)}  # what a forward makes may not be there yet
                record.state.fill(made, stored, free=free | own_constants)
            else:  # the other kind of module may hold a tied tensor under another name, and lack what its forward does not use
                names = other_names(original, tensors, made)
                first = aliases(original)
                own = {names[name]: t for name, t in tensors.items() if first.get(name, name) in record.plan.shapes}
                constants = [name for name, _ in named_tensors(made) if name not in own]  # its programs have made their own
                record.state.renamed(names).fill(made, own, free=[*record.plan.shapes, *constants])
        made.meta.update(record.meta)
        if signed.basis is not None:
            made.meta["plan"] = signed
        made.meta["contents"] = {name: tensor.clone() for name, tensor in contents.items()}
        return made


def without_other_constants(tensors: Mapping[str, Tensor], made: nn.Module) -> tuple[Mapping[str, Tensor], set[str]]:
    """What is stored without the constants of its programs, if those of a model have others, and the names of the latter.

    They differ where code remembers what it computes: what a program computed then, it finds now. They come of code alone, so
    those of the rebuilt model are right; one by one they could not be told apart, as they are numbered.
    """
    mine = {name for name, _ in named_tensors(made) if is_constant(name)}
    if mine == {name for name in tensors if is_constant(name)}:
        return tensors, set()
    return {name: tensor for name, tensor in tensors.items() if not is_constant(name)}, mine


@contextlib.contextmanager
def folder_at(target: Path) -> Iterator[Path]:
    """A folder to write to: one that is there, or a new one that is there once all is written."""
    if target.exists():
        yield target
        return
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", dir=target.parent))
    except OSError as error:
        raise unwritable(target, error) from error
    try:
        yield made
        os.chmod(made, 0o755)
        os.replace(made, target)
        flush(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
