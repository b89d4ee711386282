"""Where a budget and repair are all that is asked for: several ways to choose are tried, and the closest result is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.errors import PruneWarning
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import walk
from fxprune.selection.options import Options, is_cheap

OPEN = ("criterion", "ranking", "attention", "basis")  # whoever gives one of them has chosen a way
ELSE = ("scopes", "experts", "uniform", "remove")  # with these other things than channels are asked for
FIRST = "default"
HOW = {"ranking": "global", "attention": "dims", "basis": "principal"}
CRITERIA = ("osscar", "flap", "bn_scale")
WIDTHS, BRANCHES = {"depth": False, "depth_criterion": None}, {"depth": "only"}


class Way(NamedTuple):
    """A way to meet a budget: its options, and the arguments in which it differs from what was asked for."""

    options: Options
    asks: Mapping[str, Any]


def ways_of(model: nn.Module, first: Options, asked: Mapping[str, Any]) -> dict[str, Way]:
    """Ways to meet a budget, by name: `first` alone where more was asked for, or where tries are dear.

    Where residual branches may go, each way is tried with them and without, and branches alone.

    Arguments:
        model: the original.
        first: what `asked` is parsed to.
        asked: the arguments of `prune`.
    """
    ways, depth = {FIRST: Way(first, {})}, asked["depth"]
    if first.budget is None or not first.narrows or any(asked[name] for name in OPEN + ELSE) or not is_cheap(model):
        return ways
    scaled = any(isinstance(module, _BatchNorm) and module.affine for module in walk(model))
    others: dict[str, dict[str, Any]] = {c: {"criterion": c, **HOW} for c in CRITERIA if scaled or c != "bn_scale"}
    if depth:
        others |= {f"{name} without depth": {**how, **WIDTHS} for name, how in others.items()} | {"depth only": BRANCHES}
    for name, how in others.items():
        given = {**asked, "data": first.data, **how}
        given["loss"] = given["loss"] if given["depth"] else None  # scores of branches may look at it
        ways[name] = Way(Options.parse(model, **given), {n: value for n, value in how.items() if value is not None})
    return ways


def closest(make: Callable[[Options], Any], ways: Mapping[str, Way]) -> Any:
    """What comes closest to the original on the samples held out, of what `make` prunes and repairs; `meta["chosen"]` says so.

    Raises: PruneError where none can be made, as of the first.
    """
    errors: dict[str, float] = {}
    failed: list[PruneError] = []
    best = None
    for way, (options, _) in ways.items():
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
        asks = ", ".join(f"{name}={value!r}" for name, value in ways[way].asks.items())
        asks = f" ({asks})" if asks else ""
        beside = ", ".join(f"{other} {errors[other]:.1%}" for other in others)
        said = f"way={way}{asks}, since its output is the closest to the original's: {errors[way]:.1%} off; {beside}"
        best.meta["chosen"] = (*best.meta.get("chosen", ()), said)
    return best
