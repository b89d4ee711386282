"""Where a budget and repair are all that is asked for: several ways to choose are tried, and the closest result is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.errors import PruneWarning
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import walk
from fxprune.selection.options import Options, is_cheap

OPEN = ("criterion", "ranking", "attention", "basis")  # whoever gives one of them has chosen a way
ELSE = ("scopes", "depth", "experts", "uniform", "remove")  # with these other things than channels are asked for
FIRST = "default"
HOW = {"ranking": "global", "attention": "dims", "basis": "principal"}
CRITERIA = ("osscar", "flap", "bn_scale")


def ways_of(model: nn.Module, first: Options, asked: Mapping[str, Any]) -> dict[str, Options]:
    """Ways to meet a budget, by name: `first` alone where more was asked for, or where tries are dear.

    Arguments:
        model: the original.
        first: what `asked` is parsed to.
        asked: the arguments of `prune`.
    """
    ways, budget = {FIRST: first}, first.budget
    if budget is None or budget.measured or any(asked[name] for name in OPEN + ELSE) or not is_cheap(model):
        return ways
    scaled = any(isinstance(module, _BatchNorm) and module.affine for module in walk(model))
    for criterion in CRITERIA:
        if scaled or criterion != "bn_scale":
            how = {**asked, **HOW, "criterion": criterion, "data": first.data, "loss": None}
            ways[criterion] = Options.parse(model, **how)
    return ways


def closest(make: Callable[[Options], Any], ways: Mapping[str, Options]) -> Any:
    """What comes closest to the original on the samples held out, of what `make` prunes and repairs; `meta["chosen"]` says so.

    Raises: PruneError where none can be made, as of the first.
    """
    errors: dict[str, float] = {}
    failed: list[PruneError] = []
    best = None
    for way, options in ways.items():
        with warnings.catch_warnings():
            if errors or failed:  # nobody asked for what is tried
                warnings.simplefilter("ignore", PruneWarning)
            try:
                made = make(options)
            except PruneError as error:
                failed.append(error)
                continue
        off = made.meta["repair"].error[1]
        errors[way] = off if math.isfinite(off) else math.inf
        best = made if way == min(errors, key=errors.__getitem__) else best
    if best is None:
        raise failed[0]
    way, *others = sorted(errors, key=errors.__getitem__)
    if others:
        asks = "" if way == FIRST else f" (criterion={way!r}, {', '.join(f'{k}={v!r}' for k, v in HOW.items())})"
        beside = ", ".join(f"{other} {errors[other]:.1%}" for other in others)
        said = f"way={way}{asks}, since its output is the closest to the original's: {errors[way]:.1%} off; {beside}"
        best.meta["chosen"] = (*best.meta.get("chosen", ()), said)
    return best
