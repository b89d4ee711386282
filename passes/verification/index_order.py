"""Random numbers drawn in the order of indices, whatever the layout in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.passes.ir.op_trace import written_by
from fxprune.passes.ir.pytree import map_tensors


def draws_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call draws random numbers; attention that drops nothing is said to, and draws none."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    at = next((i for i, argument in enumerate(func._schema.arguments) if argument.name == "dropout_p"), None)
    return at is None or bool(args[at] if at < len(args) else kwargs.get("dropout_p", 0.0))


def in_index_order(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns that draws random numbers, if it draws them in the order of indices.

    By itself it does so in the order of memory, which may be another in a model with fewer channels.
    """
    plain = map_tensors((args, kwargs), lambda t: t.contiguous() if t.layout is torch.strided else t)
    out = func(*plain[0], **{name: v for name, v in plain[1].items() if not isinstance(v, torch.memory_format)})
    if not func._schema.is_mutable:
        return out
    for at, name in written_by(func):
        given, made = (args[at], plain[0][at]) if at < len(args) else (kwargs.get(name), plain[1].get(name))
        if isinstance(given, Tensor) and given is not made:
            given.copy_(made)
            out = given if out is made else out
    return out


class InIndexOrder(TorchDispatchMode):
    """Random numbers are drawn in the order of indices."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return in_index_order(func, args, kwargs) if draws_numbers(func, args, kwargs) else func(*args, **kwargs)
