"""From a model to its coupling: capture it, without values first, and couple its channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.passes.capture.programs import programs
from fxprune.passes.coupling.couple import couple_channels
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import NeedsValues, PruneError, surface
from fxprune.passes.ir.module_tree import on_meta
from fxprune.passes.ir.options import CouplingOptions
from fxprune.passes.ir.quiet import uncollected, unobserved


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    coupling_options: CouplingOptions,
    frozen_modules: Mapping[str, str] | None = None,
) -> Solution:
    """Trace and couple: in evaluation mode, and in training mode too where the program asks which one it is in."""
    with unobserved(model), uncollected():
        try:
            found = programs(model, args, kwargs, on_meta)
        except Exception as error:  # the program reads values, or runs code that knows nothing of meta tensors
            surface(error)
            found = None
        if found is not None:
            coupling_options.check([name for capture in found for name, _ in capture.outputs])
            try:
                return couple_channels(found, coupling_options, frozen_modules)
            except NeedsValues:  # the contents of a constant
                pass
            except Exception as error:
                surface(error, ours=True)
        found = programs(model, args, kwargs, None)
        coupling_options.check([name for capture in found for name, _ in capture.outputs])
        try:
            return couple_channels(found, coupling_options, frozen_modules)
        except PruneError:
            raise
        except Exception as error:
            surface(error, ours=True)
            raise PruneError(
                f"the model's program cannot be followed: {type(error).__name__}: {error}",
                where=type(model).__name__,
                fix="report it with the model; what it does to tensors there is beyond the compiler",
            ) from error


def describe_capture(solution: Solution) -> str:
    """How the model was captured, in a phrase."""
    opaque, note = solution.captures[0].opaque, solution.captures[0].note
    how = "opaque: " + ", ".join(f"{path or 'the root'} ({why})" for path, why in opaque.items()) if opaque else "symbolic"
    return f"{how}; {note}" if note else how
