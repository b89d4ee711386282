"""Options: the arguments of the public functions, parsed and checked once."""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict

import numpy as np
from torch import Tensor, nn

from fxprune.arguments import is_number, number, shown
from fxprune.criteria.base import Criterion
from fxprune.criteria.calibrated import Calibration
from fxprune.criteria.calibration import read
from fxprune.criteria.catalog import CriterionName, choose_criterion, resolve
from fxprune.criteria.gradient import TokenTaylor
from fxprune.passes.coupling.families import names_family
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_modules, named_parameters, named_tensors
from fxprune.passes.ir.quiet import gc_paused
from fxprune.selection.argument_checks import (
    check_alone,
    check_depth,
    check_experts,
    check_flag,
    check_word,
    is_one_of,
    parse_ratio,
    released,
)
from fxprune.selection.budgets import KINDS, Budget, list_arguments, parse_budget
from fxprune.selection.indices import parse_remove
from fxprune.selection.names import Names, frozen_names, frozen_outputs, near_modules, outside, protected

Ratio = float | Mapping[Any, float]  # by globs and modules
Remove = Mapping[Any, Sequence[int]]  # by layers, tensors and families
Scopes = Mapping[str, str | Sequence[str]]
Freeze = Names
Attention = Literal["heads", "queries", "dims"]
Verify = bool | Literal["auto"]
Depth = bool | Literal["only", "blocks"]
Experts = bool | Literal["only"]
Ranking = Literal["local", "global", "isomorphic"]
Basis = Literal["principal"]
DepthCriterion = Literal["influence", "taylor", "loss", "weights"] | Callable[[Tensor, Tensor], Any]
BudgetName = Literal["params", "macs", "memory", "latency"]

DEFAULT_RATIO = 0.5
DEFAULT = ("token_taylor", TokenTaylor())  # the criterion of a budget where data and a loss are given
STREAMS_LAST = "a residual stream through the whole model goes after all else"
RANKINGS: tuple[Ranking, ...] = ("local", "global", "isomorphic")
CHEAP = 100_000_000  # parameters up to which a few forwards take little time


class Asked(TypedDict, total=False):
    """The arguments of `fxprune.prune`, which documents them, that other functions take as it does."""

    params: float | str | None
    macs: float | str | None
    memory: float | str | None
    latency: float | str | None
    budget: Mapping[BudgetName, float | str] | Mapping[str, float | str] | None
    criterion: CriterionName | str | Criterion | None
    data: Iterable[Any] | None
    loss: Callable[..., Tensor] | None
    ranking: Ranking | None
    scopes: Scopes | None
    floor: float | None
    only: Freeze
    freeze: Freeze
    freeze_outputs: Freeze
    protect: tuple[int, int]
    release: str | Sequence[str]
    round_to: int
    attention: Attention | None
    experts: Experts
    uniform: bool


class AskedOfPrune(Asked, total=False):
    """Those that a few functions take beside `fxprune.prune`."""

    depth: Depth
    depth_criterion: DepthCriterion | None
    basis: Basis | None
    remove: Remove | None
    verify: Verify
    inplace: bool


class Memo:
    """What was scored of a coupling, for the next choice of it."""

    def __init__(self) -> None:
        self.solution: Solution | None = None
        self.found: dict[Any, Any] = {}

    def __call__(self, solution: Solution, key: Hashable, score: Callable[[], Any]) -> Any:
        if self.solution is not solution:
            self.solution, self.found = solution, {}
        if key not in self.found:
            self.found[key] = score()
        return self.found[key]


@dataclass(frozen=True, slots=True)
class Options:
    """What to remove and what to keep, as the arguments of `prune` say it.

    Attributes:
        ratio: the share of units to remove, or shares by glob; not read where there is a budget.
        budget: what may stay, if it was asked for by cost.
        criterion, ranking, scopes, floor, round_to, data, loss, verify, depth, depth_criterion, remove, basis: as for
            `prune`.
        coupling: what the coupling has to know of them.
        read: where scores find the values of a parameter, by its name, if not in the model.
        combine: makes one score of each unit of those that several processes have, if there are several.
        spares: whether a residual stream through the whole model is taken after all else.
        weighs: whether units compete by their score for what they cost, though it is not one of `LOSS`.
        rescore: makes scores of those of the criterion, for a coupling, if anything else is known of its units.
        chosen: sentences on what was chosen where nothing was asked for.
        memo: what was scored, for choices that share it.
        speeds: how fast families and residual branches, by name, lose units for a budget; by default their scores decide.
    """

    ratio: float | Mapping[str, float] = DEFAULT_RATIO
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
    read: Callable[[str], Tensor] | None = None
    combine: Callable[[np.ndarray], np.ndarray] | None = None
    rescore: Callable[[Solution, np.ndarray], np.ndarray] | None = None
    spares: bool = False
    weighs: bool = False
    chosen: tuple[str, ...] = ()
    depth: Depth = False
    depth_criterion: str | Callable[..., Any] | None = None
    remove: Remove | None = None
    memo: Memo | None = None
    speeds: Mapping[str, float] | None = None
    basis: str | None = None

    @classmethod
    def parse(
        cls,
        model: nn.Module,
        *,
        ratio: Ratio | None = None,
        budget: Mapping[Any, float | str] | None = None,
        only: Freeze = (),
        freeze: Freeze = (),
        freeze_outputs: Freeze = (),
        protect: tuple[int, int] = (0, 0),
        release: str | Sequence[str] = (),
        attention: Attention | None = None,
        experts: Experts = False,
        criterion: str | Criterion | None = None,
        ranking: Ranking | None = None,
        data: Iterable[Any] | None = None,
        loss: Callable[..., Tensor] | None = None,
        uniform: bool = False,
        remove: Remove | None = None,
        **others: Any,
    ) -> Options:
        """Options from the arguments of a public function; `others` are budgets and attributes. Raises PruneError."""
        share = parse_ratio(model, DEFAULT_RATIO if ratio is None else ratio)
        attention = "heads" if attention is None else attention
        check_word("attention", attention, ("heads", "queries", "dims"))
        limit = parse_budget({kind: others.pop(kind, None) for kind in KINDS if kind in Asked.__annotations__}, budget)
        if limit is not None and ratio is not None:
            raise PruneError(f"ratio and {limit.kind} are both given", fix=list_arguments())
        given = parse_remove(remove)
        if given is not None:
            scored = {"criterion": criterion, "ranking": ranking, "data": data, "loss": loss, "uniform": uniform}
            check_alone(ratio=ratio, **({limit.kind: limit} if limit else {}), **scored, **others)
        frozen = outside(model, only) | protected(model, protect)
        frozen |= frozen_names(model, freeze) | frozen_outputs(model, freeze_outputs)
        check_flag("uniform", uniform)
        check_experts(experts)
        choices = experts or given is not None  # what is named by index is asked for
        coupling = CouplingOptions(CouplingOptions.heads_of(attention), frozen, released(release), uniform, choices)
        for name in ("floor", "round_to"):
            others[name] = number(others.get(name, {"floor": None, "round_to": 1}[name]))
        options = cls(share, limit, coupling=coupling, data=data, loss=loss, remove=given, **others)
        options = options.with_defaults(model, criterion, ranking)
        check_values(options)
        check_globs(model, options)
        return options

    @property
    def experts(self) -> Experts:
        """Whether experts are asked for, other than by index."""
        choices = self.coupling.choices if self.remove is None else False
        return "only" if choices == "only" else bool(choices)

    def with_defaults(self, model: nn.Module, criterion: str | Criterion | None, ranking: Ranking | None) -> Options:
        """The same with a criterion and a ranking: those that are asked for, or the ones that do least harm."""
        data, weighs, chosen = self.data, False, []
        open_budget = ranking is None and self.budget is not None
        if self.remove is not None:  # nothing is scored
            return self
        if criterion is None:
            if self.experts == "only" and data is not None:
                criterion, why = "reap", "there are data, and experts alone may go"
            else:
                criterion, data, why = choose_criterion(model, data, self.loss)
            chosen.append(f"criterion={criterion!r}, since {why}")
            weighs = criterion == "token_taylor" and open_budget
            criterion = TokenTaylor(normalise="none") if weighs else criterion  # as it was measured on language models
        elif isinstance(criterion, Calibration) and criterion.criterion in DEFAULT and open_budget:
            weighs, criterion = True, criterion.of(TokenTaylor(normalise="none"))
        looks = weighs or (bool(chosen) and data is not None)
        if open_budget:
            how = "score for what it costs" if weighs else "normalised score"
            chosen.append(f"units of all layers compete by their {how}" if looks else "all families lose the same share")
        spares = open_budget and self.scopes is None and self.basis is None
        chosen += [STREAMS_LAST] if spares else []
        ranking = ("global" if looks and self.budget is not None else "local") if ranking is None else ranking
        return replace(
            self, criterion=criterion, ranking=ranking, data=data, spares=spares, weighs=weighs, chosen=tuple(chosen)
        )

    def scored(self, solution: Solution, what: str, score: Callable[[], Any]) -> Any:
        """What `score` returns, or returned for another choice of the same coupling by the same criterion."""
        if self.memo is None:
            return score()
        which = self.criterion if isinstance(self.criterion, str) else id(self.criterion)
        aims = self.depth_criterion == "loss" or resolve(self.criterion).score_families is not None  # see `aims`, `Target.use`
        aim = (self.budget, repr(self.ratio)) if aims else None
        return self.memo(solution, (what, which, self.depth_criterion, aim), score)

    @property
    def narrows(self) -> bool:
        """Whether anything but residual branches may go."""
        return isinstance(self.depth, bool)

    @property
    def competes(self) -> bool:
        """Whether families compete for what stays."""
        return self.ranking != "local" or self.scopes is not None or self.budget is not None

    @property
    def scale(self) -> str:
        """How the scores by which families compete were normalised; "none" where no score decides."""
        by_score = (self.ranking != "local" or self.scopes is not None) and self.speeds is None
        return resolve(self.criterion).normalise if by_score else "none"

    @property
    def reads_weights(self) -> bool:
        """Whether selection looks at the values of parameters."""
        return self.remove is None and resolve(self.criterion).score_units is None

    @property
    def measures_latency(self) -> bool:
        return self.budget is not None and self.budget.kind == "latency"

    @property
    def runs_the_model(self) -> bool:
        """Whether selection runs forwards of the model, on data or by the clock."""
        return self.data is not None or self.measures_latency

    def held(self) -> Options:
        """The same with batches that can be read again, also where a generator yields them."""
        return replace(self, data=list(read(self.data))) if isinstance(self.data, Iterator) else self

    @property
    def needs_weights(self) -> bool:
        """Whether the model must not be on the meta device."""
        return self.reads_weights or self.runs_the_model or self.verify is True

    def verifies(self, model: nn.Module) -> bool:
        """Whether to compare the result with the original: `auto` does where a forward is cheap."""
        return is_cheap(model) if self.verify == "auto" else self.verify

    def gc_paused(self) -> contextlib.AbstractContextManager[None]:
        """Pause the garbage collector during a selection, unless it runs the model."""
        return contextlib.nullcontext() if self.runs_the_model else gc_paused()


def is_cheap(model: nn.Module) -> bool:
    """Whether a few forwards of a model take little time."""
    return sum(math.inf if p.is_meta else p.numel() for p in named_parameters(model).values()) <= CHEAP


def check_values(options: Options) -> None:
    """Raise PruneError for what means nothing, whatever the model."""
    round_to, floor, scopes = options.round_to, options.floor, options.scopes
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise PruneError(f"round_to must be a positive integer, not {shown(round_to)}", fix="round_to=8")
    if not isinstance(options.verify, bool) and not is_one_of(options.verify, ("auto",)):
        raise PruneError(f"verify must be True, False or 'auto', not {shown(options.verify)}", fix="verify='auto'")
    check_word("ranking", options.ranking, RANKINGS)
    if options.basis is not None:
        check_word("basis", options.basis, ("principal",))
        if options.data is None:
            raise PruneError("basis='principal' looks at data", fix="data=[(images, labels), ...]; labels are not needed")
    check_depth(options.depth, options.depth_criterion, options.data)
    if floor is not None and (not is_number(floor) or not 0 <= floor <= 1):
        raise PruneError(f"floor must be a number in [0, 1], not {shown(floor)}", fix="floor=0.1 keeps a tenth")
    globs = list(scopes.values()) if isinstance(scopes, Mapping) else []
    lists = [[some] if isinstance(some, str) else some for some in globs]
    named = all(isinstance(some, list | tuple) and all(isinstance(glob, str) for glob in some) for some in lists)
    if scopes is not None and not (globs and named):
        what = f"scopes must name globs, not {shown(scopes)}"
        raise PruneError(what, fix="scopes={'early': ['layer1', 'layer2']}")
    resolve(options.criterion)


def check_globs(model: nn.Module, options: Options) -> None:
    scopes = options.scopes or {}
    modules = [name for name, _ in named_modules(model)] if scopes or isinstance(options.ratio, Mapping) else []
    globs = [("ratio", glob) for glob in options.ratio if glob not in scopes] if isinstance(options.ratio, Mapping) else []
    globs += [("scopes", glob) for some in scopes.values() for glob in ([some] if isinstance(some, str) else some)]
    shapes = {name: tensor.shape for name, tensor in named_tensors(model)} if globs else {}
    for argument, glob in globs:
        if not any(fnmatch.fnmatchcase(name, glob) for name in modules) and not names_family(glob, shapes):
            raise PruneError(f"the glob {glob!r} in {argument} matches no module", fix=near_modules(glob, modules))


def asked_parameters() -> dict[str, inspect.Parameter]:
    """What `Asked` stands for in a signature, with the values by default."""
    known = {f.name: f.default for f in fields(Options) if f.name in Asked.__annotations__}
    known |= {p.name: p.default for p in inspect.signature(Options.parse).parameters.values()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    said = {name: getattr(a, "__forward_arg__", a) for name, a in Asked.__annotations__.items()}
    return {n: inspect.Parameter(n, keyword, default=known.get(n), annotation=a) for n, a in said.items()}


ASKED = asked_parameters()
