"""Configurations in checkpoints: models of transformers are built from theirs, without weights and without code of others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.checkpoints.file import one_line, read_json, replacing
from fxprune.original_state import FOLDER, at_most
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.plan import PlanData

CONFIG, GENERATION = "config.json", "generation_config.json"
MOST_BYTES = 1 << 22  # of a configuration
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")  # other names are downloaded
KEY = "fxprune_attention"


def config_of(pruned: nn.Module) -> Any:
    """The configuration that builds the original of a pruned model; None where there is none."""
    return getattr(pruned, "meta", {}).get("config")


def write_config(folder: Path, pruned: nn.Module, config: Any) -> None:
    """Write the original's configuration, and what the pruned model knows of generation, to a folder."""
    config = copy.deepcopy(config)
    setattr(config, KEY, getattr(config, "_attn_implementation", None))
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

    def fail(why: str) -> PruneError:
        return PruneError(f"no model can be built from {folder / CONFIG}: {why}", fix=FOLDER)

    data = read_json(folder / CONFIG, MOST_BYTES, fail)
    try:
        import transformers
    except ImportError as error:
        raise PruneError("the folder holds a model of transformers, which is not installed", fix="fxprune[hf]") from error
    names = data.get("architectures") if isinstance(data, dict) else None
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class is not None):
        raise fail(f"transformers has no model {str(name)[:40]!r}")
    attention = data.pop(KEY, None)
    if attention is not None and attention not in ATTENTION:
        raise fail(f"there is no attention {str(attention)[:40]!r}")
    try:
        config = kind.config_class.from_dict(data)
        if attention is not None:
            config._attn_implementation = attention
        with at_most(len(plan.shapes)), torch.device("meta"):
            model: nn.Module = kind(copy.deepcopy(config))
        plan.check(model)
        if any(not (t.is_floating_point() or t.is_complex()) for _, t in named_tensors(model)):
            with at_most(len(plan.shapes), on_meta=True):
                model = kind(copy.deepcopy(config))
        if (folder / GENERATION).exists() and hasattr(model, "generation_config"):
            generation = read_json(folder / GENERATION, MOST_BYTES, fail)
            vars(model)["generation_config"] = transformers.GenerationConfig.from_dict(generation)
    except PruneError:
        raise
    except Exception as error:  # whatever a class makes of a configuration that is none
        raise fail(f"{type(error).__name__}: {one_line(error)}") from error
    return model
