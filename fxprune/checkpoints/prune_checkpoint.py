"""Prune a checkpoint without its model ever being in memory: from `.safetensors` files to others, a tensor at a time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.arguments import checked_call
from fxprune.checkpoints.by_blocks import calibrate_by_blocks
from fxprune.checkpoints.checkpoint import SUFFIX, WEIGHTS, Folder, folder_at
from fxprune.checkpoints.config import CONFIG, architecture, write_config
from fxprune.checkpoints.file import metadata_of
from fxprune.checkpoints.rebuild import CONTENTS
from fxprune.checkpoints.record import Record
from fxprune.checkpoints.stored import INDEX, Entry, Stored, write_one_by_one
from fxprune.criteria.calibration import EVIDENCE_OF_INPUTS
from fxprune.criteria.catalog import resolve
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.module_state import aliases
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, named_tensors
from fxprune.passes.ir.quiet import without_modes
from fxprune.passes.ir.slices import cut_shape
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.passes.rewrite.rewrite import slice_tensor
from fxprune.pipeline import Compilation, Plan
from fxprune.plan import derived_tensors, plan_carried
from fxprune.reports.files import as_path, replacing
from fxprune.same_class.restore import in_class
from fxprune.same_class.stand_ins import StandIns
from fxprune.selection.choice import Choice
from fxprune.selection.options import ASKED, Asked, Options, Ratio

if TYPE_CHECKING:
    from typing_extensions import Unpack

LARGEST_COPIED = 1 << 26  # bytes of a file beside the weights, such as a tokenizer's
WEIGHT_SUFFIXES = (SUFFIX, ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


@checked_call(ASKED)
@without_modes()
def prune_checkpoint(
    source: Folder,
    out: Folder,
    ratio: Ratio | None = None,
    example_inputs: Any = None,
    *,
    model: nn.Module | None = None,
    **asked: Unpack[Asked],
) -> Plan:
    """Prune a checkpoint on disk, one tensor at a time: what `prune` would make of its model, in the memory of a few tensors.

    Arguments:
        source: a folder of transformers' with `config.json` and `model.safetensors` or its shards; or, with `model`, such a
            folder or one `.safetensors` file.
        out: where there is nothing yet. For a folder with a configuration it is a folder that `from_pretrained` reads, if a
            configuration describes the pruned model, and else one that `fxprune.load` reads; with `model` it is a file that
            `fxprune.load(out, model)` reads.
        ratio, example_inputs: as for `prune`; the inputs may be left out where the class of the model has some of its own.
        model: the architecture of the weights, with its parameters on the meta device or not; they are not read.
        asked: as for `prune`, but for `latency` and criteria that take gradients, which need the model in memory (a
            `Calibration` of one may be given); there is no `depth` and no `remove`. With `data` and `wanda` or `flap` (the
            default then), the blocks are read and run one after the other, each on all batches.

    Returns: the plan. Nothing is verified; `fxprune.verify` does it for what can be loaded.

    Raises: PruneError for what cannot be done, and where the tensors of the files are not those of the model; nothing has been
    written then.
    """
    stored, target = Stored.at(as_path(source)), as_path(out)
    if target.exists():
        raise PruneError(f"{target} exists", fix="a path where nothing is yet")
    from_folder = model is None
    if model is None:
        model = architecture(as_path(source), len(stored.forms))
    elif target.suffix != SUFFIX:
        raise PruneError(f"{target} is to hold one file", fix=f"out={str(target) + SUFFIX!r}")
    with entry_point(model) as module:
        pruning = CheckpointPruning(stored, module)
        inputs = ExampleInputs.parse(module.dummy_inputs if from_folder and example_inputs is None else example_inputs, module)
        if from_folder and "use_cache" in inspect.signature(module.forward).parameters:  # caches are not captured
            inputs.kwargs.setdefault("use_cache", False)
        if asked.get("data") is not None and asked.get("criterion") is None:
            asked["criterion"] = "flap"  # gradients would take the model in memory
        options = Options.parse(module, ratio=ratio, **asked)
        spec = resolve(options.criterion)
        if options.measures_latency or spec.score_families is not None or spec.needs not in ("", *EVIDENCE_OF_INPUTS):
            what = (
                "latency is measured"
                if options.measures_latency
                else f"the criterion {options.criterion} looks at more than activations"
            )
            raise PruneError(f"{what}, which takes the model in memory", fix="criterion='flap' with data, or fxprune.prune")
        pruned, configured = pruning.run(options, inputs, from_folder)
    if not from_folder:
        pruning.write_file(target, pruned)
    else:
        with folder_at(target) as folder:
            copy_others(as_path(source), folder)
            if configured is None:
                write_config(folder, pruned, pruned.meta["config"])
                pruning.write_file(folder / WEIGHTS, pruned)
            else:
                pruning.write_shards(folder, pruned)
                configured.save_pretrained(folder)
    found: Plan = plan_carried(pruned)
    return found


class CheckpointPruning:
    """Stored tensors and their architecture on the way to a pruned checkpoint.

    Attributes:
        stored: the tensors.
        names: the name in the model of each stored tensor; of a tied one the first.
        source_of: the name in the files of each tensor of the model that is there.
        model: the architecture, with stand-ins where it had no values and the dtypes that are stored.
        own: its tensors by name.
    """

    def __init__(self, stored: Stored, model: nn.Module) -> None:
        self.stored = stored
        first = aliases(model)
        self.names = {name: first.get(name, name) for name in stored.forms}
        self.source_of: dict[str, str] = {}
        for name, own in self.names.items():
            other = self.source_of.setdefault(own, name)
            if other != name and not torch.equal(stored.read(other), stored.read(name)):
                raise unlike(model, f"{other} and {name} differ, and are one tensor of the model")
        self.check(model)
        swap: dict[int, Tensor] = {}
        known: dict[str, Tensor] = {}
        for name, tensor in named_tensors(model):
            if name not in self.source_of:
                continue
            dtype = stored.forms[self.source_of[name]].dtype
            if not (tensor.is_floating_point() or tensor.is_complex()):
                known[name] = stored.read(self.source_of[name]).clone()
            if dtype != tensor.dtype or not tensor.is_meta:
                made = torch.empty_like(tensor, dtype=dtype, device="meta")
                swap[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        self.stand_ins = StandIns()
        self.model: nn.Module = self.stand_ins.fill(copy_tree(model, swap), known)
        self.own = dict(named_tensors(self.model))

    def check(self, model: nn.Module) -> None:
        """Raise PruneError unless the stored tensors are those of the model."""
        held, derived = dict(named_tensors(model)), set(derived_tensors(model))
        for name, own in self.names.items():
            form = self.stored.forms[name]
            if own not in held:
                raise unlike(model, f"{name} is stored, and the model has no such tensor")
            if tuple(held[own].shape) != form.shape:
                raise unlike(model, f"{name} is stored with shape {form.shape}, not {tuple(held[own].shape)}")
            fractions = [t.is_floating_point or t.is_complex for t in (form.dtype, held[own].dtype)]
            if fractions[0] != fractions[1] or (not fractions[0] and form.dtype != held[own].dtype):
                raise unlike(model, f"{name} is stored as {form.dtype}, not {held[own].dtype}")
        for name, tensor in held.items():
            if name not in self.source_of and name not in derived:
                raise unlike(model, f"{name} is not stored")
            if name not in self.source_of and tensor.is_meta:
                what = f"{name} has no contents on the meta device, and is not stored"
                raise PruneError(what, where=type(model).__name__, fix="the model with its buffers on the CPU")

    def value(self, name: str) -> Tensor:
        """The values of a tensor of the model: those that are stored, or its own."""
        return self.stored.read(self.source_of[name]) if name in self.source_of else self.own[name]

    def run(self, options: Options, inputs: ExampleInputs, from_folder: bool) -> tuple[PrunedModule, Any]:
        """The pruned module, whose parameters are stand-ins, and the configuration that describes it, if one does."""
        inputs.check(self.model)
        options = dataclasses.replace(options, read=self.value)
        while True:
            compilation = Compilation(self.model, inputs, options.coupling)
            if resolve(options.criterion).needs:
                seen = calibrate_by_blocks(self.model, self.value, compilation.couple(), options.criterion, options.data)
                options = dataclasses.replace(options, criterion=seen, data=None)
            with options.gc_paused():
                choice: Choice = compilation.choose(options)
                pruned = compilation.emit(choice, cut=self.stand_ins.cut)
                pruned.meta["chosen"] = options.chosen
            if not from_folder:
                return pruned, None
            made, coupling = in_class(self.model, pruned, inputs, options.coupling)
            if coupling is None:
                return pruned, None if "config" in made.meta["stale"] else made.config
            options = dataclasses.replace(options, coupling=coupling)

    def entry(self, name: str, own: str, plan: Plan) -> Entry:
        """What is left of a tensor of the model, under a name in a file."""
        slices, form = plan.slices.get(own, ()), self.own[own]
        return Entry(name, cut_shape(form.shape, slices), form.dtype, lambda: slice_tensor(self.value(own), slices))

    def write_file(self, path: Path, pruned: PrunedModule) -> None:
        """Write the file that `fxprune.load` reads."""
        plan, contents = plan_carried(pruned), pruned.meta["contents"]
        record = Record.of(pruned, plan).to_dict()
        entries = [
            self.entry(name, name, plan) if name in plan.shapes else kept(name, tensor)
            for name, tensor in named_tensors(pruned)
        ]
        entries += [kept(CONTENTS + name, tensor) for name, tensor in contents.items() if name in plan.shapes]
        write_one_by_one(path, entries, functools.partial(metadata_of, record))

    def write_shards(self, folder: Path, pruned: PrunedModule) -> None:
        """Write what is left of each file under its name, and their index."""
        plan = plan_carried(pruned)
        size = count = 0
        for path, names in self.stored.files.items():
            entries = [self.entry(name, self.names[name], plan) for name in names]
            write_one_by_one(folder / path.name, entries, lambda digests: {"format": "pt"})
            size += sum(math.prod(e.shape) * e.dtype.itemsize for e in entries)
            count += sum(math.prod(e.shape) for e in entries)
        if self.stored.index is not None:
            about = copy.deepcopy(self.stored.index.get("metadata") or {})
            about |= {"total_size": size} | ({"total_parameters": count} if "total_parameters" in about else {})
            with replacing(folder / INDEX) as temporary:
                temporary.write_text(json.dumps({**self.stored.index, "metadata": about}, indent=2))


def kept(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tuple(tensor.shape), tensor.dtype, tensor.detach)


def unlike(model: nn.Module, what: str) -> PruneError:
    return PruneError(
        f"the files are not of this model: {what}",
        where=type(model).__name__,
        fix="what save_pretrained of this class wrote, or model= with the architecture of the files",
    )


def copy_others(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights: the tokenizer, the configuration of generation."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json") or path.name == CONFIG
        if path.is_file() and not is_weights and path.stat().st_size <= LARGEST_COPIED:
            shutil.copyfile(path, folder / path.name)
