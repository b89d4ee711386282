"""Repair as the last stage of `prune`: what is asked for, checked before anything is done, and what holds by default."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.arguments import called_here, shown
from fxprune.criteria.calibration import BATCHES, check_batches, parse_batch, read
from fxprune.passes.errors import PruneError
from fxprune.repairs.merge import NAME as MERGE
from fxprune.repairs.refit import NAME as REFIT
from fxprune.repairs.repair import Method, asked, default_methods, repair

Repairs = bool | Method | str | Sequence[Method | str] | Mapping[str, Any]
WAYS = "repair=True, the name of a method, or arguments of fxprune.repair such as {'method': 'refit', 'held_out': 0.2}"


@dataclass(frozen=True)
class RepairRequest:
    """What `prune(..., repair=...)` asks for.

    Attributes:
        arguments: of `fxprune.repair`.
        data: batches that can be read again and again; None for a method that looks at none.
    """

    arguments: Mapping[str, Any]
    data: Iterable[Any] | None

    @classmethod
    def parse(cls, given: Any, data: Any, *, inplace: bool = False, alone: bool = True) -> RepairRequest | None:
        """What is asked for, or None where nothing is; raises PruneError for what means nothing, or cannot be done."""
        if given is False or given is None:
            return None
        arguments = arguments_of(given)
        if data is None and arguments.get("method") not in (MERGE, (MERGE,), [MERGE]):
            raise PruneError("repair looks at data, and there are none", fix=f"{BATCHES}; repair={MERGE!r} does without")
        if inplace:
            what = "repair compares the result with the original, which inplace=True uses up"
            raise PruneError(what, fix="inplace=False, or repair=False")
        if not alone:
            what = "repair in several processes would leave each with a model of its own"
            raise PruneError(what, fix="prune, then fxprune.repair in one process, and hand its parameters to the others")
        if data is None:
            return cls(arguments, None)
        check_batches(data)
        return cls(arguments, list(read(data)) if iter(data) is data else data)

    def apply(self, model: nn.Module, pruned: nn.Module) -> Any:
        """The repaired copy, with what was chosen for it in `meta`."""
        made: Any = repair(model, pruned, self.data, **self.arguments)
        if self.arguments.get("method") is None and self.data is not None:
            methods, why = default_methods(parse_batch(next(iter(self.data))))
            made.meta["chosen"] = (*made.meta.get("chosen", ()), f"repair by {' and '.join(methods)}, since {why}")
        return made


def arguments_of(given: Any) -> dict[str, Any]:
    """The arguments of `fxprune.repair` that are asked for."""
    if isinstance(given, Mapping):
        arguments = dict(given)
    elif isinstance(given, str | list | tuple):
        arguments = {"method": given}
    elif given is True:
        arguments = {}
    else:
        raise PruneError(f"repair must be True or False, or say how, not {shown(given)}", fix=WAYS)
    parameters = inspect.signature(repair).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in arguments:
        if name not in known:
            raise PruneError(f"repair has no argument {shown(name)}", fix=called_here(str(name), known))
    values = {**known, **arguments}
    asked(REFIT if values["method"] is None else values["method"], values["ridge"], values["held_out"])
    return arguments
