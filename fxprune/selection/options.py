"""Options: the arguments of the public functions, parsed and checked once."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from torch import Tensor, nn

from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import resolve
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors
from fxprune.passes.ir.quiet import gc_paused
from fxprune.selection.budgets import KINDS, Budget, list_arguments, parse_budget

Ratio = float | Mapping[str, float]
Scopes = Mapping[str, str | Sequence[str]]
Freeze = str | nn.Module | Sequence[str | nn.Module]
Attention = Literal["heads", "dims"]
Verify = bool | Literal["auto"]

DEFAULT_RATIO = 0.5
RANKINGS = ("local", "global", "isomorphic")
CHEAP = 100_000_000  # parameters up to which a few forwards take little time


class Asked(TypedDict, total=False):
    """The arguments of `fxprune.prune`, which documents them, that other functions take as it does."""

    params: float | None
    macs: float | None
    memory: float | None
    latency: float | str | None
    budget: Mapping[str, float | str] | None
    criterion: str | Criterion
    data: Iterable[Any] | None
    loss: Callable[..., Tensor] | None
    ranking: Literal["local", "global", "isomorphic"]
    scopes: Scopes | None
    floor: float | None
    freeze: Freeze
    release: str | Sequence[str]
    round_to: int
    attention: Attention


@dataclass(frozen=True, slots=True)
class Options:
    """What to remove and what to keep, as the arguments of `prune` say it.

    Attributes:
        ratio: the share of units to remove, or shares by glob; not read where there is a budget.
        budget: what may stay, if it was asked for by cost.
        criterion, ranking, scopes, floor, round_to, data, loss, verify: as for `prune`.
        coupling: what the coupling has to know of them.
    """

    ratio: Ratio = DEFAULT_RATIO
    budget: Budget | None = None
    criterion: str | Criterion = "magnitude"
    ranking: str = "local"
    scopes: Scopes | None = None
    floor: float | None = None
    round_to: int = 1
    data: Iterable[Any] | None = None
    loss: Callable[..., Tensor] | None = None
    coupling: CouplingOptions = field(default_factory=CouplingOptions)
    verify: Verify = "auto"

    @classmethod
    def parse(
        cls,
        model: nn.Module,
        *,
        ratio: Ratio | None = None,
        budget: Mapping[str, float | str] | None = None,
        freeze: Freeze = (),
        release: str | Sequence[str] = (),
        attention: Attention = "heads",
        **others: Any,
    ) -> Options:
        """Options from the arguments of a public function; `others` are budgets and attributes. Raises PruneError."""
        unknown = [name for name in others if name not in Asked.__annotations__ and name != "verify"]
        if unknown:
            raise PruneError(
                f"there is no argument {unknown[0]!r}", fix=f"one of those of prune: {', '.join(Asked.__annotations__)}"
            )
        check_ratio(DEFAULT_RATIO if ratio is None else ratio)
        if not is_one_of(attention, ("heads", "dims")):
            raise PruneError(f"attention must be 'heads' or 'dims', not {attention!r}", fix="attention='heads'")
        limit = parse_budget({kind: others.pop(kind, None) for kind in KINDS if kind in Asked.__annotations__}, budget)
        if limit is not None and ratio is not None:
            raise PruneError(f"ratio and {limit.kind} are both given", fix=list_arguments())
        coupling = CouplingOptions(attention == "heads", frozen_names(model, freeze), released(release))
        options = cls(DEFAULT_RATIO if ratio is None else ratio, limit, coupling=coupling, **others)
        check_values(options)
        check_globs(model, options)
        return options

    @property
    def competes(self) -> bool:
        """Whether families compete for what stays."""
        return self.ranking != "local" or self.scopes is not None or self.budget is not None

    @property
    def reads_weights(self) -> bool:
        """Whether selection looks at the values of parameters."""
        return resolve(self.criterion).score_units is None

    @property
    def measures_latency(self) -> bool:
        return self.budget is not None and self.budget.kind == "latency"

    @property
    def runs_the_model(self) -> bool:
        """Whether selection runs forwards of the model, on data or by the clock."""
        return self.data is not None or self.measures_latency

    @property
    def needs_weights(self) -> bool:
        """Whether the model must not be on the meta device."""
        return self.reads_weights or self.runs_the_model or self.verify is True

    def verifies(self, model: nn.Module) -> bool:
        """Whether to compare the result with the original: `auto` does where a forward is cheap."""
        if self.verify != "auto":
            return self.verify
        return sum(math.inf if p.is_meta else p.numel() for p in named_parameters(model).values()) <= CHEAP

    def gc_paused(self) -> contextlib.AbstractContextManager[None]:
        """Pause the garbage collector during a selection, unless it runs the model."""
        return contextlib.nullcontext() if self.runs_the_model else gc_paused()


def is_one_of(value: Any, words: Sequence[str]) -> bool:
    return isinstance(value, str) and value in words


def check_ratio(ratio: Any) -> None:
    named = dict(ratio) if isinstance(ratio, Mapping) else {"": ratio}
    if not named:
        raise PruneError("ratio is an empty mapping, which removes nothing", fix="ratio={'layer1': 0.5}, or ratio=0.5")
    for glob, value in named.items():
        if not isinstance(glob, str):
            raise PruneError(f"ratio names {glob!r}, which is no glob over module names", fix="ratio={'layer1': 0.5}")
        ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        if not ok:
            what = f"ratio[{glob!r}]" if glob else "ratio"
            raise PruneError(f"{what} must be a number in [0, 1), not {value!r}", fix="ratio=0.5 removes half of every family")


def check_values(options: Options) -> None:
    """Raise PruneError for what means nothing, whatever the model."""
    round_to, floor, scopes = options.round_to, options.floor, options.scopes
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise PruneError(f"round_to must be a positive integer, not {round_to!r}", fix="round_to=8")
    if not isinstance(options.verify, bool) and not is_one_of(options.verify, ("auto",)):
        raise PruneError(f"verify must be True, False or 'auto', not {options.verify!r}", fix="verify='auto'")
    if not is_one_of(options.ranking, RANKINGS):
        raise PruneError(f"ranking must be one of {', '.join(RANKINGS)}, not {options.ranking!r}", fix="ranking='local'")
    if floor is not None:
        number = isinstance(floor, int | float) and not isinstance(floor, bool)
        if not number or not 0 <= floor <= 1:
            raise PruneError(f"floor must be a number in [0, 1], not {floor!r}", fix="floor=0.1 keeps a tenth")
    globs = list(scopes.values()) if isinstance(scopes, Mapping) else []
    lists = [[some] if isinstance(some, str) else some for some in globs]
    named = all(isinstance(some, list | tuple) and all(isinstance(glob, str) for glob in some) for some in lists)
    if scopes is not None and not (globs and named):
        what = f"scopes must name globs, not {scopes!r}"
        raise PruneError(what, fix="scopes={'early': ['layer1', 'layer2']}")
    resolve(options.criterion)


def check_globs(model: nn.Module, options: Options) -> None:
    scopes = options.scopes or {}
    modules = [name for name, _ in model.named_modules()] if scopes or isinstance(options.ratio, Mapping) else []
    globs = [("ratio", glob) for glob in options.ratio if glob not in scopes] if isinstance(options.ratio, Mapping) else []
    globs += [("scopes", glob) for some in scopes.values() for glob in ([some] if isinstance(some, str) else some)]
    for argument, glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in modules):
            raise PruneError(f"the glob {glob!r} in {argument} matches no module", fix=did_you_mean(glob, modules))


def did_you_mean(glob: str, modules: Sequence[str]) -> str:
    close = difflib.get_close_matches(glob, [m for m in modules if m], n=3, cutoff=0.4)
    return f"one of the names of model.named_modules(){', such as ' + ', '.join(close) if close else ''}"


def released(release: Any) -> tuple[str, ...]:
    """Globs over the names of outputs whose channels may go."""
    globs = [release] if isinstance(release, str) else release
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise PruneError(f"release must be globs over names of outputs, not {release!r}", fix="release='hidden_states'")
    return tuple(globs)


def frozen_names(model: nn.Module, freeze: Any) -> dict[str, str]:
    """Names of the tensors that stay by request, with the reason."""
    items = [freeze] if isinstance(freeze, str | nn.Module) or not isinstance(freeze, Iterable) else list(freeze)
    for item in items:
        if not isinstance(item, str | nn.Module):
            raise PruneError(
                f"freeze names {item!r}, which is neither a glob nor a module", fix="freeze='layer1', or model.layer1"
            )
    frozen: dict[str, str] = {}
    if not items:
        return frozen
    modules = dict(model.named_modules())
    for item in items:
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
            frozen.update({name: why for name, t in named_tensors(model) if id(t) in inside})
    return frozen
