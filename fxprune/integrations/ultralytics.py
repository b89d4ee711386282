"""Prune a YOLO of ultralytics, and train and export what is left of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fxprune.api import prune as pruned
from fxprune.integrations import required
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import walk

required("ultralytics", "ultralytics")
SPLIT = "forward_split"  # of blocks: their forward, written otherwise, which the exporter puts in its place


def prune(yolo: Any, ratio: Any = None, example_inputs: Any = None, **asked: Any) -> Any:
    """A `YOLO` with a smaller model, whose `predict`, `val`, `export` and `save` are as before; to train it see `trainer`.

    Arguments:
        yolo: an `ultralytics.YOLO`; it is not touched.
        example_inputs: images, shape (batch, 3, height, width).
        ratio, asked: as for `fxprune.prune`, but `same_class`.

    Raises: PruneError as `fxprune.prune` does.
    """
    if not isinstance(getattr(yolo, "model", None), nn.Module):
        raise PruneError(f"{type(yolo).__name__} holds no model that can be pruned", fix="YOLO('yolo11n.pt')")
    made = copy.copy(yolo)
    vars(made)["_modules"] = dict(yolo._modules)
    model = copy.deepcopy(yolo.model).requires_grad_()
    made.model = pruned(model, ratio, example_inputs, same_class=True, **asked)
    for module in walk(made.model):
        if hasattr(module, SPLIT):  # it takes its width from an attribute that forward does not read, and halves from one width
            vars(module)[SPLIT] = module.forward
    made.predictor = made.trainer = None
    made.ckpt = {}
    return made


def trainer(yolo: Any) -> type:
    """A trainer for `yolo.train(trainer=trainer(yolo), data=...)` that keeps the architecture; the usual one builds its own.

    Raises: PruneError in training where the data has another number of classes than the model.
    """
    model, base = yolo.model, yolo.task_map[yolo.task]["trainer"]

    class PrunedTrainer(base):  # type: ignore[misc,valid-type]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            made, data = copy.deepcopy(model).float(), getattr(self, "data", None) or {}
            count = getattr(made, "nc", None) or made.yaml.get("nc")
            if count is not None and data.get("nc", count) != count:
                what = f"the pruned model tells {count} classes apart, and the data has {data['nc']}"
                raise PruneError(what, fix="train the original on this data first, and prune that")
            return made

    return PrunedTrainer
