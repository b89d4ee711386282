"""Ops that torch does not have: what they do to channels, said in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from fxprune.passes.errors import PruneError
from fxprune.passes.ops import pointwise
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.custom import moved_call, movement
from fxprune.passes.ops.registry import FOUND, HANDLERS, MASKED, RULES, Handler, Masked, Rule, load, masked_form, named, rule

Kind = Literal["movement", "pointwise", "frozen"]


def register_op(
    op: Any,
    kind: Kind | None = None,
    *,
    like: str | None = None,
    why: str = "goes through an op that is registered as frozen",
    handler: Handler | None = None,
    masked: Masked | None = None,
) -> Callable[[Rule], Rule]:
    """Say what an op of your own does, so that channels are followed through it.

    >>> @torch.library.custom_op("demo::backwards", mutates_args=())
    ... def backwards(x: torch.Tensor, dim: int) -> torch.Tensor:
    ...     return x.flip(dim)
    >>> _ = backwards.register_fake(lambda x, dim: torch.empty_like(x))
    >>> _ = register_op(backwards, "movement")

    Arguments:
        op: the op, or its name with the namespace, such as `"demo::backwards"`.
        kind: `movement` for elements of one tensor in other places: the op is run on labels, and becomes a gather where
            what is left needs another order; `pointwise` for one output element from those at the same place, under
            broadcasting; `frozen` for one whose inputs stay whole, for the reason `why`, which completes "it ...".
        like: an op of torch that takes the same arguments and treats channels the same way, such as `"aten::mm"` for a
            contraction or `"aten::mean"` for a reduction.
        handler: what the call becomes where its tensors shrink (see `passes/sizes.py`).
        masked: what the op computes of the elements that are kept (see `MASKED` in `passes/masked.py`).

    Returns: without `kind` and `like`, a decorator for a rule of your own: labels in, labels out.

    Raises: PruneError for a kind or an op that is not known.
    """
    load()
    FOUND.clear()
    name = name_of(op)
    if kind is not None and kind not in ("movement", "pointwise", "frozen"):
        raise PruneError(f"an op's kind is not {kind!r}", where=name, fix="kind='movement', 'pointwise' or 'frozen', or like=")
    if kind is not None and like is not None:
        raise PruneError("an op has a kind or is like another, not both", where=name, fix=f"like={like!r} alone")
    if handler is not None or kind == "movement":
        file_handler(name, handler or moved_call)
    if masked is not None:
        MASKED[name] = masked
    if like is not None:
        RULES[name] = as_another(name, like)
    elif kind == "movement":
        RULES[name] = movement
    elif kind == "pointwise":
        RULES[name] = pointwise.pointwise
    elif kind == "frozen":
        RULES[name] = stopped(why)
    return rule(name)


def name_of(op: Any) -> str:
    """The name of an op, with its namespace."""
    name = op if isinstance(op, str) else getattr(op, "_qualname", None) or getattr(getattr(op, "_schema", None), "name", None)
    if not isinstance(name, str) or "::" not in name:
        raise PruneError(f"{op!r} is neither an op nor the name of one", fix='"namespace::name"')
    return name


def file_handler(name: str, handler: Handler) -> None:
    """A handler for every overload of an op, by its name in a captured graph."""
    namespace, _, base = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    for overload in packet.overloads() if packet is not None else ["default"]:
        HANDLERS[f"{base}.{overload}"] = handler


def as_another(name: str, like: str) -> Rule:
    """The rule and the masked form of another op, which sees this one under its own name."""
    other = named(like)
    if other is None:
        raise PruneError(f"there is no rule for {like!r} that {name} could have too", where=name, fix='like="aten::mean"')
    form = masked_form(like)
    if form is not None:
        MASKED[name] = lambda masker, call, args, kwargs: form(masker, call.under(like), args, kwargs)
    return lambda call: other(call.under(like))


def stopped(why: str) -> Rule:
    def rule(call: RuleContext) -> Any:
        for ref in call.inputs:
            call.freeze(call.labels(ref), why)
        return [()] * len(call.outputs)

    return rule
