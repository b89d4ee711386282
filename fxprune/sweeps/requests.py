"""What a sweep is asked for: the points that budgets, criteria, rankings and other alternatives make together."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from fxprune.api import prune
from fxprune.arguments import did_you_mean, shown
from fxprune.criteria.base import label
from fxprune.passes.errors import PruneError
from fxprune.selection.budgets import KINDS
from fxprune.selection.options import Options
from fxprune.sweeps.evaluator import Request

BUDGETS = "budgets={'macs': [0.5, 0.25]}, or budgets=[{'macs': 0.5}, {'latency': '20ms'}]"
AMOUNTS = ("ratio", *KINDS)
OWN = {"model", "example_inputs", "remove", "inplace", "budget", "repair", "same_class", "data", "loss", *AMOUNTS}
PASSED = {name: p for name, p in inspect.signature(prune).parameters.items() if name not in OWN}
VARIED = [name for name in ("criterion", "ranking", "depth", "attention", "basis") if name in PASSED]  # one value, or several
UNTOLD = {"data", "loss", "read", "combine", "memo", "speeds", "chosen", "coupling", "remove", "verify"}


def requests_of(model: nn.Module, budgets: Any, asked: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[Request]:
    """The points, budget by budget within each combination of the other alternatives.

    Arguments:
        budgets: as `sweep` takes them.
        asked: arguments of `prune`, of which those in `VARIED` may be lists of alternatives.
        evidence: data and loss.

    Raises: PruneError for what `prune` would refuse without a look at the coupling.
    """
    amounts = list(list_budgets(budgets))
    names = [name for name in VARIED if asked.get(name) is not None]
    alternatives = [listed(name, asked[name]) for name in names]
    rest = {name: value for name, value in asked.items() if name not in names}
    found: dict[tuple[Any, ...], Request] = {}
    for values in itertools.product(*alternatives):
        varied = dict(zip(names, values, strict=True))
        for kind, amount in amounts:
            limit = {"ratio": amount} if kind == "ratio" else {"budget": {kind: amount}}
            how = {**limit, **rest, **varied}
            request = request_of(model, how, evidence, [n for n, a in zip(names, alternatives, strict=True) if len(a) > 1])
            functions = [id(v) for v in values if callable(v) and not dataclasses.is_dataclass(v)]  # whose names say little
            found.setdefault((json.dumps(described(request.options), sort_keys=True), *functions), request)
    return list(found.values())


def request_of(model: nn.Module, how: Mapping[str, Any], evidence: Mapping[str, Any], told: Iterable[str] = ()) -> Request:
    """One point; `told` are the arguments that tell it apart from others."""
    options = Options.parse(model, **how, **evidence)
    budget = options.budget
    size = {"ratio": options.ratio} if budget is None else {budget.kind: budget.amount}
    others = {name: text_of(how[name]) for name in told if name not in ("criterion", "ranking")}
    return Request({**size, "criterion": text_of(options.criterion), "ranking": options.ranking, **others}, how, options)


def list_budgets(budgets: Any) -> Iterator[tuple[str, Any]]:
    """The budgets one by one: kind and amount."""
    given = [budgets] if isinstance(budgets, Mapping) else budgets
    if not isinstance(given, list | tuple) or not given or not all(isinstance(b, Mapping) and b for b in given):
        raise PruneError(f"budgets must say what kind and how much, not {shown(budgets)}", fix=BUDGETS)
    for budget in given:
        for kind, amounts in budget.items():
            if kind not in AMOUNTS:
                raise PruneError(
                    f"there is no budget of {shown(kind)}", fix=f"{did_you_mean(kind, AMOUNTS)}one of {', '.join(AMOUNTS)}"
                )
            for amount in listed(kind, amounts):
                yield kind, amount


def listed(name: str, value: Any) -> list[Any]:
    """Alternatives: those of a list or a tuple, or a value alone; raises PruneError where there are none."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        raise PruneError(f"{name} holds no alternatives", fix=f"leave {name} out, or one value or several")
    return found


def text_of(value: Any) -> Any:
    """A value as JSON can hold it and a reader knows it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): text_of(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [text_of(v) for v in value]
    return repr(value) if dataclasses.is_dataclass(value) else label(value)


def described(options: Options) -> dict[str, Any]:
    """All that decides what is chosen, as JSON-ready data."""
    own = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in UNTOLD}
    coupling = {f.name: getattr(options.coupling, f.name) for f in dataclasses.fields(options.coupling)}
    data: dict[str, Any] = json.loads(json.dumps(text_of({**own, **coupling})))
    return data
