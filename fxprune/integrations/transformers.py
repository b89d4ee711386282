"""Prune while the Trainer of transformers trains: a callback that takes a step of a `Pruner` every so many optimizer steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fxprune.arguments import checked_call
from fxprune.integrations import PRUNER, check_alone, check_asked, check_every, required
from fxprune.iterative.pruner import Pruner
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors

TrainerCallback: Any = required("transformers", "hf").TrainerCallback
STATE, WEIGHTS = "pruner.pt", "model.safetensors"  # in a checkpoint


class PruningCallback(TrainerCallback):
    """Prunes the model of a Trainer in steps, in place, remaps its optimizer, and writes what resuming needs to checkpoints.

    `Trainer(model, ..., callbacks=[PruningCallback(every=100, example_inputs=x, params=0.5, steps=4)])`. The loop holds the
    model itself, so that it stays the object that it is, of its class, and what it holds is replaced. To resume, hand the
    callback of a new process the model and the checkpoint before the Trainer is made:

        callback.resume(model, "out/checkpoint-200")
        Trainer(model, ..., callbacks=[callback]).train(resume_from_checkpoint="out/checkpoint-200")

    Arguments:
        every: the number of optimizer steps between two steps of pruning.
        asked: as for `Pruner`, but `same_class` and `mask`.

    Attributes:
        pruner: the `Pruner`, once training has begun.

    Raises: PruneError where several processes train the model.
    """

    @checked_call(PRUNER)
    def __init__(self, *, every: int, **asked: Any) -> None:
        if taken := asked.keys() & {"same_class", "mask"}:
            raise PruneError(f"{taken.pop()} is not for the callback to be told: the model keeps its class", fix="leave it out")
        check_asked(asked)
        self.every, self.asked = check_every(every), asked
        self.pruner: Pruner | None = None

    @checked_call()
    def resume(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Give a model of the original architecture, in place, the form and the values of the model of a checkpoint.

        Raises: PruneError where there is no state of pruning in the folder, or it is of another model or request.
        """
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise PruneError(f"{path} does not exist", fix="a checkpoint that was written with this callback")
        state = torch.load(path, map_location="cpu", weights_only=True)
        config: Any = getattr(model, "config", None)
        if state["use_cache"] is not None:  # the Trainer sets it before training begins, and the program is another one then
            config.use_cache = state["use_cache"]
        pruner = self._begin(model)
        pruner.load_state_dict(state["pruner"])
        take_over(model, pruner.model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any) -> None:
        check_alone(args.world_size)
        if self.pruner is None:
            self._begin(model)

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any = None, **others: Any
    ) -> None:
        pruner = self.pruner
        if pruner is None or pruner.done or state.global_step % self.every:
            return
        before = list(named_parameters(model).values())  # the optimizer knows them by identity
        take_over(model, pruner.step(model))
        if optimizer is not None:
            pruner.remap_optimizer(getattr(optimizer, "optimizer", optimizer))
        del before

    def on_save(self, args: Any, progress: Any, control: Any, *, model: nn.Module, **others: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{progress.global_step}"
        if self.pruner is None or not folder.is_dir():
            return
        held = self.pruner.model
        self.pruner.model = model  # which has trained on
        try:
            state = {
                "pruner": self.pruner.state_dict(),
                "use_cache": getattr(getattr(model, "config", None), "use_cache", None),
            }
            torch.save(state, folder / STATE)
        finally:
            self.pruner.model = held
        if not list(folder.glob("model*.safetensors*")):  # of a model that no configuration describes: what the Trainer reads
            save_file({name: t.contiguous() for name, t in named_tensors(model)}, folder / WEIGHTS, {"format": "pt"})

    def _begin(self, model: nn.Module) -> Pruner:
        self.pruner = Pruner(copy.deepcopy(model), same_class=True, **self.asked)
        return self.pruner


def take_over(model: nn.Module, made: nn.Module) -> None:
    """Have a model hold what another one of its class does: modules, parameters, attributes and configuration.

    Raises: PruneError where something has wrapped the forward of the model, and the other one has its own.
    """
    held, wrapped = dict(vars(made)), vars(model).get("forward")
    kept = {name: v for name, v in vars(model).items() if name == "forward" or "hooks" in name}
    if wrapped is not None and "forward" in held and getattr(wrapped, "programs", None) is None:
        raise PruneError(
            "the forward of the model is wrapped, and the pruned model needs one of its own",
            where=type(model).__name__,
            fix="train it in full precision, or prune with uniform=True",
        )
    if wrapped is not None and getattr(wrapped, "programs", None) is not None:
        del kept["forward"]
    for value in held.values():
        if getattr(value, "module", None) is made:  # a program as forward, or what saves it
            value.module = model
    vars(model).clear()
    vars(model).update({**held, **kept, "training": held["training"]})
