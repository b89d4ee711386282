"""Pruning inside the training loops of other frameworks; each module here needs one, which an extra installs."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from fxprune.iterative.pruner import Pruner
from fxprune.passes.errors import PruneError

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


def check_alone(processes: int) -> None:
    """Raise PruneError where several processes train one model."""
    if processes > 1:
        raise PruneError(
            f"{processes} processes train the model, and would each prune it by themselves",
            fix="one process; or prune between two trainings, see fxprune.Pruner",
        )
