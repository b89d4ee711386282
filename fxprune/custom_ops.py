"""Ops of one's own: their specification, for channels to be followed through them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from fxprune.arguments import checked_call, shown
from fxprune.errors import PruneWarning
from fxprune.passes.errors import PruneError
from fxprune.passes.ops.call import frozen
from fxprune.passes.ops.index_maps import moved_call, movement
from fxprune.passes.ops.pointwise import POINTWISE
from fxprune.passes.ops.registry import UNKNOWN, Masked, OpSpec, Rewrite, Rule, SizeArguments, as_another, named, register

FLAGS = ("always", "moves", "views", "heads", "normalizes")
FIELDS = {
    f.name: inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in dataclasses.fields(OpSpec)
}
Kind = Literal["movement", "pointwise", "frozen"]


@checked_call(FIELDS)
def register_op(
    op: Any,
    kind: Kind | None = None,
    *,
    like: str | None = None,
    why: str = "goes through an op that is registered as frozen",
    handler: Rewrite | None = None,
    masked: Masked | None = None,
    **fields: Any,
) -> Callable[[Rule], Rule]:
    """Say what an op of your own does, so that channels are followed through it.

    >>> @torch.library.custom_op("demo::backwards", mutates_args=())
    ... def backwards(x: torch.Tensor, dim: int) -> torch.Tensor:
    ...     return x.flip(dim)
    >>> _ = backwards.register_fake(lambda x, dim: torch.empty_like(x))
    >>> _ = register_op(backwards, "movement")

    Arguments:
        op: the op, or its name with the namespace, such as `"demo::backwards"`; an overload stands for all of the op.
        kind: `movement` for elements of one tensor in other places: the op is run on labels, and becomes a gather where
            what is left needs another order; `pointwise` for one output element from those at the same place, under
            broadcasting; `frozen` for one whose inputs stay whole, for the reason `why`, which completes "it ...".
        like: an op of torch that takes the same arguments in the same order and treats channels the same way, such as
            `"aten::mm"` for a contraction or `"aten::mean"` for a reduction. All that is known of it holds for yours:
            labels, masked form, products (Wanda, FLAP, Fisher and `repair` see them) and multiply-accumulates.
        handler: what the call becomes where its tensors shrink: `rewrite` of `fxprune.passes.ops.registry.OpSpec`.
        masked: what the op computes of the elements that are kept: `masked` of `OpSpec`.
        fields: any other field of `OpSpec`, such as `products` or `macs`.

    Returns: without `kind` and `like`, a decorator for a label rule of your own.

    Raises: PruneError for a kind, an op or a field that is not known.
    """
    name = name_of(op)
    if kind is not None and kind not in ("movement", "pointwise", "frozen"):
        fix = "kind='movement', 'pointwise' or 'frozen', or like="
        raise PruneError(f"an op's kind is not {shown(kind)}", where=name, fix=fix)
    if kind is not None and like is not None:
        raise PruneError("an op has a kind or is like another, not both", where=name, fix=f"like={shown(like)} alone")
    if not isinstance(why, str):
        raise PruneError(f"why is a reason in words, not {shown(why)}", where=name, fix='why="mixes channels"')
    for field, value in {"handler": handler, "masked": masked, **fields}.items():
        check_field(name, field, value)
    given = fields | {k: v for k, v in {"rewrite": handler, "masked": masked}.items() if v is not None}
    made = dataclasses.replace(specification(name, kind, like, why), **given)
    if not overloads(name):
        warnings.warn(f"there is no op {name} so far: its definition comes first", PruneWarning, stacklevel=3)
    register(name, made)

    @checked_call()
    def rule(function: Rule) -> Rule:
        check_field(name, "labels", function)
        register(name, dataclasses.replace(named(name), labels=function))
        return function

    return rule


def check_field(name: str, field: str, value: Any) -> None:
    """Raise PruneError for what cannot be the field of a specification."""
    fits: bool = value is None or callable(value)
    kind = "a function"
    if field in FLAGS:
        fits, kind = isinstance(value, bool), "True or False"
    elif field == "sizes":
        fits, kind = value is None or isinstance(value, SizeArguments), "of type SizeArguments"
    if not fits and field != "recorded_as":
        fix = f"the fields of {OpSpec.__module__}.{OpSpec.__name__} are described there"
        raise PruneError(f"{field} must be {kind}, not {shown(value)}", where=name, fix=fix)


def specification(name: str, kind: Kind | None, like: str | None, why: str) -> OpSpec:
    """What is known of an op of a kind, or like another one."""
    if isinstance(like, str) and named(like).labels is None and is_pointwise(like):
        return POINTWISE
    if like is not None:
        return as_another(spec_like(name, like), function_like(name, like))
    if kind == "movement":
        return OpSpec(movement, moved_call, moves=True)
    if kind == "pointwise":
        return POINTWISE
    return OpSpec(frozen(why)) if kind == "frozen" else UNKNOWN


def name_of(op: Any) -> str:
    """The name of an op, with its namespace."""
    if isinstance(op, torch._ops.OpOverloadPacket):
        return str(op._qualified_op_name)
    name = op if isinstance(op, str) else getattr(op, "_qualname", None) or getattr(getattr(op, "_schema", None), "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"\w+::\w+(\.\w+)?", name):
        raise PruneError(f"{shown(op)} is neither an op nor the name of one", fix='"namespace::name"')
    return name.partition(".")[0]  # all overloads of an op have one specification


def spec_like(name: str, like: str) -> OpSpec:
    if not isinstance(like, str):
        raise PruneError(f"like is the name of an op of torch, not {shown(like)}", where=name, fix='like="aten::mean"')
    found = named(like)
    if found.labels is None:
        raise PruneError(f"there is no rule for {shown(like)} that {name} could have too", where=name, fix='like="aten::mean"')
    return found


def is_pointwise(name: str) -> bool:
    """Whether torch says of an op that it computes each element from those at the same place."""
    return "::" in name and any(torch.Tag.pointwise in overload.tags for overload in overloads(name))


def overloads(name: str) -> list[Any]:
    """The dispatcher functions of an op, by its name with the namespace."""
    namespace, _, base = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    return [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]


def function_like(name: str, like: str) -> Any:
    """The overload of an op whose arguments are most like those of another one."""
    own = [[str(a.type) for a in f._schema.arguments] for f in overloads(name)]

    def unlike(func: Any) -> int:
        types = [str(a.type) for a in func._schema.arguments]
        return min((sum(a != b for a, b in zip(mine, types)) + max(0, len(mine) - len(types)) for mine in own), default=0)

    return min(overloads(like), key=unlike)
