"""What every public function does around its work: compiled code runs as plain Python, and faults are PruneErrors."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxprune.model_kinds import unwrapped
from fxprune.passes.errors import PruneError

# what Python and torch raise for what nobody foresaw; running out of memory is not among it
FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, pickle.PickleError)


@contextlib.contextmanager
def entry_point(model: Any) -> Iterator[nn.Module]:
    """The surroundings of a public function, which get the module to prune: the model, or what a wrapper holds.

    Raises: PruneError for what cannot be pruned, and in place of any error that says nothing of what to do. Where
    `FXPRUNE_STRICT=1` is set, as it is in tests, such errors are let out as they are.
    """
    with uncompiled():
        try:
            yield unwrapped(model)
        except FAULTS as error:
            if isinstance(error, torch.OutOfMemoryError) or os.environ.get("FXPRUNE_STRICT") == "1":
                raise
            raise PruneError(
                f"fxprune failed with {type(error).__name__}: {error}",
                fix="report it with the model and the arguments; freeze= the module it names, if it names one",
            ) from error


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run what `torch.compile` returned as the Python that it was given; a compiled graph cannot be followed."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # nothing was compiled in this process
        yield
        return
    with torch.compiler.set_stance("force_eager"), dynamo.config.patch(error_on_nested_fx_trace=False):
        yield
