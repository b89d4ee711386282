"""Configurations in checkpoints: models of transformers are built from theirs, without weights and without code of others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.checkpoints.file import read_json
from fxprune.original_state import FOLDER, at_most
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.plan import PlanData
from fxprune.reports.files import one_line, replacing

CONFIG, GENERATION = "config.json", "generation_config.json"
MOST_BYTES = 1 << 22  # of a configuration
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")  # other names are downloaded
KEY = "fxprune_attention"
WEIGHTS_KEY = "transformers_weights"  # a name of a file, which from_pretrained repeats where it is none


def config_of(pruned: nn.Module) -> Any:
    """The configuration that builds the original of a pruned model; None where there is none."""
    return getattr(pruned, "meta", {}).get("config")


def write_config(folder: Path, pruned: nn.Module, config: Any) -> None:
    """Write the original's configuration, and what the pruned model knows of generation, to a folder."""
    config = copy.deepcopy(config)
    setattr(config, KEY, getattr(config, "_attn_implementation", None))
    setattr(config, WEIGHTS_KEY, "none, this folder is loaded by fxprune.load(folder)")
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(config.to_json_string())
    generation: Any = getattr(pruned, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        with replacing(folder / GENERATION) as temporary:
            temporary.write_text(generation.to_json_string())


def built_from(folder: Path, plan: PlanData) -> nn.Module:
    """The original architecture by the configuration in a folder: parameters on the meta device, buffers with their contents.

    Raises: PruneError where there is none, or it builds a model that the plan is not for; before memory is spent.
    """
    most = len(plan.shapes) + (len(plan.basis.steps) if plan.basis is not None else 0)  # which a rotated model may lack
    with Building(folder) as building:
        with at_most(most), torch.device("meta"):
            model = building.build()
        rotated, there = plan.in_basis(model)
        there.check(rotated)
        if any(not (t.is_floating_point() or t.is_complex()) for _, t in named_tensors(model)):
            model = building.without_memory(most)
        building.add_generation(model)
    return model


def architecture(folder: Path, most: int) -> nn.Module:
    """The same for a checkpoint of transformers' with at most so many tensors."""
    with Building(folder) as building:
        model = building.without_memory(most)
        building.add_generation(model)
    return model.eval()


class Building:
    """The class and the configuration in a folder; whatever goes wrong with them is a PruneError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fail(self, why: str) -> PruneError:
        return PruneError(f"no model can be built from {self.folder / CONFIG}: {why}", fix=FOLDER)

    def __enter__(self) -> Building:
        self.data = read_json(self.folder / CONFIG, MOST_BYTES, self.fail)
        try:
            import transformers
        except ImportError as error:
            raise PruneError("the folder holds a model of transformers, which is not installed", fix="fxprune[hf]") from error
        self.transformers: Any = transformers
        names = self.data.get("architectures") if isinstance(self.data, dict) else None
        name = names[0] if isinstance(names, list) and len(names) == 1 else None
        kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class is not None):
            raise self.fail(f"transformers has no model {str(name)[:40]!r}")
        self.kind: Any = kind
        self.attention, _ = self.data.pop(KEY, None), self.data.pop(WEIGHTS_KEY, None)
        if self.attention is not None and self.attention not in ATTENTION:
            raise self.fail(f"there is no attention {str(self.attention)[:40]!r}")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, PruneError):  # whatever a class makes of what is none
            raise self.fail(f"{type(error).__name__}: {one_line(error)}") from error

    def build(self) -> nn.Module:
        config = self.kind.config_class.from_dict(copy.deepcopy(self.data))
        if self.attention is not None:
            config._attn_implementation = self.attention
        made: nn.Module = self.kind(config)
        return made

    def without_memory(self, most: int) -> nn.Module:
        with at_most(most, on_meta=True):
            return self.build()

    def add_generation(self, model: nn.Module) -> None:
        if (self.folder / GENERATION).exists() and hasattr(model, "generation_config"):
            generation = read_json(self.folder / GENERATION, MOST_BYTES, self.fail)
            vars(model)["generation_config"] = self.transformers.GenerationConfig.from_dict(generation)
