"""Checks of single arguments, which know no others."""

from __future__ import annotations

import glob as globbing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fxprune.arguments import did_you_mean, is_number, number, shown
from fxprune.criteria.branches import SCORES
from fxprune.passes.errors import PruneError
from fxprune.selection.names import paths_of

REMOVES = "ratio=0.5 removes half of every family"


def check_alone(**others: Any) -> None:
    """Raise PruneError where something that says how much goes, or how it is ranked, is given beside `remove`."""
    unused = {"round_to": 1, "depth": False, "uniform": False}
    for name, value in others.items():
        if name != "verify" and not (value is None or (name in unused and is_default(value, unused[name]))):
            what = f"{name} is given with remove, which says exactly what goes"
            raise PruneError(what, fix=f"leave {name} out, or prune twice: prune(prune(model, remove=...), {name}=...)")


def is_default(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def is_one_of(value: Any, words: Sequence[str]) -> bool:
    return isinstance(value, str) and value in words


def check_word(argument: str, value: Any, words: Sequence[str]) -> None:
    """Raise PruneError where an argument is none of the words that it may be."""
    if not is_one_of(value, words):
        listed = f"one of {', '.join(words)}" if len(words) > 2 else " or ".join(map(repr, words))
        near = did_you_mean(value, words)
        raise PruneError(f"{argument} must be {listed}, not {shown(value)}", fix=near.rstrip() or f"{argument}={words[0]!r}")


def check_flag(argument: str, value: Any) -> None:
    """Raise PruneError for what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise PruneError(f"{argument} must be True or False, not {shown(value)}", fix=f"{argument}=True")


def check_experts(experts: Any) -> None:
    """Raise PruneError for what means nothing as `experts`."""
    if not isinstance(experts, bool) and not is_one_of(experts, ("only",)):
        raise PruneError(f"experts must be True, False or 'only', not {shown(experts)}", fix="experts='only'")


def parse_ratio(model: nn.Module, ratio: Any) -> float | dict[str, float]:
    """The share to remove, or shares by glob in the order given, modules by their names."""
    ratio = number(ratio)
    listed = list(ratio.values()) if isinstance(ratio, Mapping) else ratio if isinstance(ratio, list | tuple) else [ratio]
    if any(isinstance(v, Tensor | np.ndarray) and v.ndim > 0 for v in listed):
        raise PruneError(
            f"ratio is a {type(ratio).__name__}: example inputs come after it",
            fix="prune(model, 0.5, x), or example_inputs=x with a budget such as macs=0.5",
        )
    if isinstance(ratio, nn.Module):
        raise PruneError(f"ratio is a {type(ratio).__name__}, not a share", fix="ratio={model.layer1: 0.5}")
    if not isinstance(ratio, Mapping):
        if share_of(ratio, "ratio") == 0:
            raise PruneError(f"ratio={shown(ratio)} removes nothing", fix=REMOVES)
        return float(ratio)
    named: dict[str, float] = {}
    for key, value in ratio.items():
        if not isinstance(key, str | nn.Module):
            raise PruneError(f"ratio names {shown(key)}, which is no glob over module names", fix="ratio={'layer1': 0.5}")
        globs = [key] if isinstance(key, str) else [globbing.escape(p) or "*" for p in paths_of(model, key, "ratio")]
        for glob in globs:
            named.setdefault(glob, share_of(number(value), f"ratio[{glob!r}]"))
    if not any(named.values()):
        what = (
            "every share in ratio is 0, which removes nothing" if named else "ratio is an empty mapping, which removes nothing"
        )
        raise PruneError(what, fix="ratio={'layer1': 0.5}, or ratio=0.5")
    return named


def share_of(value: Any, what: str) -> Any:
    """A share to remove; raises PruneError for what is none."""
    if not is_number(value) or not 0 <= value < 1:
        raise PruneError(f"{what} must be a number in [0, 1), not {shown(value)}", fix=REMOVES)
    return value


def released(release: Any) -> tuple[str, ...]:
    """Globs over the names of outputs whose channels may go."""
    globs = [release] if isinstance(release, str) else release
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise PruneError(f"release must be globs over names of outputs, not {shown(release)}", fix="release='hidden_states'")
    return tuple(globs)


def check_depth(depth: Any, how: Any, data: Any) -> None:
    """Raise PruneError for what means nothing with residual branches; `how` is the `depth_criterion`."""
    if not isinstance(depth, bool) and not is_one_of(depth, ("only", "blocks")):
        raise PruneError(f"depth must be True, False, 'only' or 'blocks', not {depth!r}", fix="depth='only'")
    if how is not None and not depth:
        raise PruneError("depth_criterion is given without depth", fix="depth=True, or depth='only'")
    if isinstance(how, str) or not (how is None or callable(how)):
        check_word("depth_criterion", how, SCORES)
    if how not in (None, "weights") and data is None:
        raise PruneError(f"depth_criterion={how!r} looks at data", fix="data=[(images, labels), ...]")
