"""Pruning inside the training loops of other frameworks; each module here needs one, which an extra installs."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.iterative.pruner import Pruner
from fxprune.iterative.schedules import shares
from fxprune.passes.errors import PruneError
from fxprune.selection.options import Options

# what a callback takes beside its own arguments
PRUNER = {
    name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in inspect.signature(Pruner).parameters.items()
    if name != "model"
}


class MissingExtra(PruneError, ImportError):
    """A framework that an integration needs is not installed; says which extra installs it."""


def required(module: str, extra: str) -> Any:
    """A module of a framework; raises MissingExtra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fix = f"pip install 'fxprune[{extra}]'"
        raise MissingExtra(f"{module} cannot be imported: {error}", where=f"fxprune.integrations.{extra}", fix=fix) from error


def check_every(every: Any) -> int:
    """A number of optimizer steps; raises PruneError for anything else."""
    if type(every) is not int or every < 1:
        raise PruneError(f"every must be a positive number of optimizer steps, not {every!r}", fix="every=100")
    return every


# what names parts of the model, which is there when training begins, or is not for `Options`
OF_THE_MODEL = frozenset(
    "example_inputs only freeze freeze_outputs protect release scopes steps schedule regularizer mask same_class".split()
)


def check_asked(asked: Mapping[str, Any]) -> None:
    """Raise PruneError, before training begins, for arguments of `Pruner` that mean nothing for any model."""
    shares(asked.get("schedule", "linear"), asked.get("steps", 1))
    words = {name: value for name, value in asked.items() if name not in OF_THE_MODEL}
    if isinstance(words.get("ratio"), Mapping):
        del words["ratio"]
    Options.parse(nn.Identity(), **words)


def check_alone(processes: int) -> None:
    """Raise PruneError where several processes train one model."""
    if processes > 1:
        raise PruneError(
            f"{processes} processes train the model, and would each prune it by themselves",
            fix="one process; or prune between two trainings, see fxprune.Pruner",
        )
