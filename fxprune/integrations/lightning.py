"""Prune while Lightning trains: a callback that takes a step of a `Pruner` every so many optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.arguments import checked_call, shown
from fxprune.integrations import PRUNER, check_alone, check_asked, check_every, required
from fxprune.iterative.pruner import Pruner
from fxprune.passes.errors import PruneError

Callback: Any = required("lightning.pytorch", "lightning").Callback


class PruningCallback(Callback):
    """Prunes a module of a LightningModule in steps, remaps its optimizers, and goes on from a checkpoint.

    `Trainer(callbacks=[PruningCallback("net", every=100, example_inputs=x, params=0.5, steps=4)])` replaces `self.net` after
    100, 200, 300 and 400 optimizer steps; `trainer.fit(module, ckpt_path=...)` of a new LightningModule resumes where the
    checkpoint was written.

    Arguments:
        module: the name of the attribute that holds the model.
        every: the number of optimizer steps between two steps of pruning.
        asked: as for `Pruner`.

    Attributes:
        pruner: the `Pruner`, once training has begun.

    Raises: PruneError where the LightningModule has no such module, or several processes train it.
    """

    @checked_call(PRUNER)
    def __init__(self, module: str, *, every: int, **asked: Any) -> None:
        if not isinstance(module, str):
            raise PruneError(f"module must be the name of an attribute, not {shown(module)}", fix='PruningCallback("net", ...)')
        check_asked(asked)
        self.module, self.every, self.asked = module, check_every(every), asked
        self.pruner: Pruner | None = None
        self._last = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or self.pruner is not None:
            return
        check_alone(trainer.world_size)
        model = getattr(pl_module, self.module, None)
        if not isinstance(model, nn.Module):
            what = f"{type(pl_module).__name__} has no module called {self.module!r}"
            raise PruneError(what, fix="the name of the attribute that holds the model")
        self.pruner = Pruner(model, **self.asked)
        own = pl_module.on_load_checkpoint

        def restore(checkpoint: dict[str, Any]) -> None:
            """Give the module the pruned architecture before its weights are loaded, and be called no more."""
            del pl_module.on_load_checkpoint
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                self._restore(state)
                assert self.pruner is not None
                setattr(pl_module, self.module, self.pruner.model)
            own(checkpoint)

        pl_module.on_load_checkpoint = restore

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        pruner, step = self.pruner, trainer.global_step
        if pruner is None or pruner.done or step == self._last or step % self.every:
            return
        self._last = step
        setattr(pl_module, self.module, pruner.step(getattr(pl_module, self.module)))
        for optimizer in trainer.optimizers:
            pruner.remap_optimizer(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruner is None else {"pruner": self.pruner.state_dict(), "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: `setup` has seen to it that the state is there before the weights are loaded."""

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state and self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
            self._last = state["last"]
