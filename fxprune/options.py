"""Requests: what to remove, checked as far as they can be without looking at the model."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import find
from fxprune.criteria.unit_scores import asked
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.options import CouplingOptions
from fxprune.selection.budgets import FIX, Budget, budget_of

Ratio = float | Mapping[str, float]
Scopes = Mapping[str, str | Sequence[str]]
HALF = float("0.5")  # the default ratio; this very object says that none was asked for
RANKINGS = ("local", "global", "isomorphic")


@dataclass(slots=True)
class Options:
    """What to remove, as the arguments of `prune` say it."""

    ratio: Ratio
    budgets: Mapping[str, float | str | None]
    criterion: str | Criterion
    ranking: str
    scopes: Scopes | None
    floor: float | None
    round_to: int
    data: Any
    loss: Any
    budget: Budget | None = field(init=False, default=None)

    def check(self) -> None:
        """Raise PruneError for what means nothing, whatever the model; sets `budget`."""
        self.budget = budget_of(self.budgets)
        if self.budget is not None and self.ratio is not HALF:
            raise PruneError(f"ratio and {self.budget.kind} are both given", fix=FIX)
        if self.ranking not in RANKINGS:
            raise PruneError(f"ranking must be one of {', '.join(RANKINGS)}, not {self.ranking!r}", fix="ranking='local'")
        if self.floor is not None:
            number = isinstance(self.floor, int | float) and not isinstance(self.floor, bool)
            if not number or not math.isfinite(self.floor) or not 0 <= self.floor <= 1:
                raise PruneError(f"floor must be a number in [0, 1], not {self.floor!r}", fix="floor=0.1 keeps a tenth")
        if self.scopes is not None and not (isinstance(self.scopes, Mapping) and self.scopes):
            what = f"scopes must name globs, not {self.scopes!r}"
            raise PruneError(what, fix="scopes={'early': ['layer1', 'layer2']}")
        asked(find(self.criterion))

    @property
    def competes(self) -> bool:
        return self.ranking != "local" or self.scopes is not None or self.budget is not None

    @property
    def reads_weights(self) -> bool:
        """Whether choosing looks at the values of parameters."""
        return not hasattr(find(self.criterion), "units")

    @property
    def runs_the_model(self) -> bool:
        """Whether choosing takes forwards of the model, on data or by the clock."""
        return self.data is not None or (self.budget is not None and self.budget.kind == "latency")


Freeze = str | nn.Module | Sequence[str | nn.Module]
Attention = Literal["heads", "dims"]


def check_attention(attention: str) -> None:
    if attention not in ("heads", "dims"):
        raise PruneError(f"attention must be 'heads' or 'dims', not {attention!r}", fix="attention='heads'")


def check_request(model: Any, options: Options, attention: str, verify: Any) -> None:
    if not isinstance(model, nn.Module):
        raise PruneError(f"model is of type {type(model).__name__}, not a torch.nn.Module", fix="pass the module itself")
    ratio, round_to = options.ratio, options.round_to
    named = dict(ratio) if isinstance(ratio, Mapping) else {"": ratio}
    if not named:
        raise PruneError("ratio is an empty mapping, which removes nothing", fix="ratio={'layer1': 0.5}, or ratio=0.5")
    for glob, value in named.items():
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1
        if not ok:
            what = f"ratio[{glob!r}]" if glob else "ratio"
            raise PruneError(
                f"{what} must be a number in [0, 1), not {value!r}",
                fix="ratio=0.5 removes half of every family",
            )
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise PruneError(f"round_to must be a positive integer, not {round_to!r}", fix="round_to=8")
    check_attention(attention)
    if verify not in (True, False, "auto"):
        raise PruneError(f"verify must be True, False or 'auto', not {verify!r}", fix="verify='auto'")
    options.check()
    check_globs(model, options)


def check_globs(model: nn.Module, options: Options) -> None:
    scopes = options.scopes or {}
    modules = [name for name, _ in model.named_modules()] if scopes or isinstance(options.ratio, Mapping) else []
    asked = [("ratio", glob) for glob in options.ratio if glob not in scopes] if isinstance(options.ratio, Mapping) else []
    asked += [("scopes", glob) for globs in scopes.values() for glob in ([globs] if isinstance(globs, str) else globs)]
    for argument, glob in asked:
        if not any(fnmatch.fnmatchcase(name, glob) for name in modules):
            raise PruneError(f"the glob {glob!r} in {argument} matches no module", fix=did_you_mean(glob, modules))


def did_you_mean(glob: str, modules: Sequence[str]) -> str:
    close = difflib.get_close_matches(glob, [m for m in modules if m], n=3, cutoff=0.4)
    return f"one of the names of model.named_modules(){', such as ' + ', '.join(close) if close else ''}"


def terms_of(model: nn.Module, attention: Attention, freeze: Freeze, release: str | Sequence[str]) -> CouplingOptions:
    """What may go of a model and what may not; raises PruneError for what means nothing."""
    globs = [release] if isinstance(release, str) else release
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise PruneError(f"release must be globs over names of outputs, not {release!r}", fix="release='hidden_states'")
    return CouplingOptions(attention == "heads", frozen_names(model, freeze), tuple(globs))


def frozen_names(model: nn.Module, freeze: Freeze) -> dict[str, str]:
    """Names of the tensors that stay by request, with the reason."""
    asked = [freeze] if isinstance(freeze, str | nn.Module) or not isinstance(freeze, Iterable) else list(freeze)
    for item in asked:
        if not isinstance(item, str | nn.Module):
            raise PruneError(
                f"freeze names {item!r}, which is neither a glob nor a module", fix="freeze='layer1', or model.layer1"
            )
    keep: dict[str, str] = {}
    if not asked:
        return keep
    modules = dict(model.named_modules())
    for item in asked:
        if isinstance(item, nn.Module):
            paths = [path for path, m in modules.items() if m is item]
            if not paths:
                raise PruneError(f"freeze names a {type(item).__name__} that is not part of the model", fix="model.layer1")
            why = f"is frozen by freeze={type(item).__name__} ({paths[0]})"
        else:
            paths = [path for path in modules if fnmatch.fnmatchcase(path, item)]
            if not paths:
                raise PruneError(f"the glob {item!r} in freeze matches no module", fix=did_you_mean(item, list(modules)))
            why = f"is frozen by freeze={item!r}"
        for path in paths:
            inside = {id(t) for _, t in named_tensors(modules[path])}
            keep.update({name: why for name, t in named_tensors(model) if id(t) in inside})
    return keep
