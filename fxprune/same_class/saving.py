"""`save_pretrained` of a pruned model of transformers that no configuration describes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fxprune.passes.errors import PruneError


class SavePretrained:
    """Writes the original's configuration, the plan and the tensors to a folder, as `fxprune.save` does.

    Attributes:
        module: the pruned model.
        save: `fxprune.save`, which is built on this package and sets it.
    """

    save: ClassVar[Callable[[nn.Module, Any], None]]

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Write to a folder that `fxprune.load` reads; raises PruneError for what cannot be written so.

        Arguments: as for `save_pretrained` of transformers; `state_dict` may only be the model's own.
        """
        if any(options.get(name) for name in ("push_to_hub", "variant")) or not self.is_own(state_dict):
            raise PruneError(
                "a pruned model that no configuration describes is saved to a folder, with its own values",
                where=type(self.module).__name__,
                fix="model.save_pretrained(folder), or prune with uniform=True",
            )
        if is_main_process:
            importlib.import_module("fxprune.checkpoints.checkpoint")  # which sets `save`, and need not have been used before
            SavePretrained.save(self.module, save_directory)

    def is_own(self, given: dict[str, Any] | None) -> bool:
        own = self.module.state_dict()
        return given is None or (
            given.keys() == own.keys() and all(torch.equal(t.to(own[n]), own[n]) for n, t in given.items())
        )
