"""Likeness: whether a layer of torch's own is just like one that was looked at before.

Attention of torch asks which mode it is in, so that it is captured in both, only to find that it does the same. What is found
of one layer holds for the next that is like it in all that its forward could have looked at: its class, attributes and inner
layers, the form of its tensors and of its arguments, and which of these are one and the same. What code that is not torch's
looks at is not known: modules with hooks, or with a forward of somebody else's, are like none.
"""

from __future__ import annotations

import functools
import marshal
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fxprune.passes.capture.proxy import ValueProxy, unwrap
from fxprune.passes.capture.training_flag import TrainingFlag
from fxprune.passes.ir.meta_tensors import PLAIN_TENSORS
from fxprune.passes.ir.pytree import ATOMS, iterate

FIXED = ATOMS | {type(Ellipsis), torch.memory_format, torch.layout}
# what every module holds beside attributes of its own: containers, which are empty in a layer that does nothing but its forward
EVERY = frozenset(vars(nn.Module())) - {"training"}
EMPTY = EVERY - {"_parameters", "_buffers", "_modules", "_is_full_backward_hook"}


class Unlike(Exception):
    """More may matter than can be told."""


def likeness(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """All that may decide what a module's forward does with these arguments; None where that is not known."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch._C._is_any_autocast_enabled():
        return None
    if torch._C._is_torch_function_mode_enabled() or nn.modules.module._has_any_global_hook():
        return None
    given = list(iterate((args, kwargs)))
    if any(type(v) is TrainingFlag for v in given):
        return None
    places: dict[int, int] = {}
    numbers = {id(v): i for i, v in enumerate(given) if type(v) is ValueProxy}
    same = [numbers.get(id(v)) for v in given]
    try:
        parts = [*of_layer(module, places), *of_values((*unwrap(args), unwrap(kwargs)), places)]
    except Unlike:
        return None
    return (*parts, *same)


def of_layer(module: nn.Module, places: dict[int, int]) -> list[Any]:
    """What a layer of torch is and holds; raises Unlike for another module, and for one with hooks or a forward of its own."""
    kind: Any = type(module)
    held = vars(module)
    if not (is_torchs(kind, kind.forward) and held.keys() >= EVERY and not any(held[name] for name in EMPTY)):
        raise Unlike
    own = {name: value for name, value in held.items() if name not in EVERY}
    try:
        parts: list[Any] = [kind, marshal.dumps(own, 0)]  # which tells 1 from True and 1.0
    except ValueError as error:
        raise Unlike from error
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        parts += [name, *of_values([tensor], places)]
    for name, child in module._modules.items():
        parts += [name, *(of_layer(child, places) if child is not None else [None])]
    return parts


def of_values(values: Iterable[Any], places: dict[int, int]) -> list[Any]:
    """What there is to see of values, tensors by their form; raises Unlike for what is more than that."""
    parts: list[Any] = []
    for x in values:
        kind = type(x)
        parts.append(kind)
        if kind in PLAIN_TENSORS:
            if not x.is_meta or x.layout is not torch.strided or x.is_conj() or x.is_neg() or vars(x):
                raise Unlike  # it has contents, or is not what it seems
            parts += [x.shape, x.stride(), x.dtype, x.storage_offset(), x.requires_grad, places.setdefault(id(x), len(places))]
        elif kind in FIXED:
            parts.append(repr(x))
        elif kind in (tuple, list, torch.Size):
            parts += [len(x), *of_values(x, places)]
        elif kind is dict:
            parts += [len(x), *map(repr, x), *of_values(x.values(), places)]
        else:
            raise Unlike
    return parts


@functools.lru_cache(maxsize=4096)
def is_torchs(kind: Any, forward: Any) -> bool:
    """Whether all that layers of a class do is written in torch.nn.

    What a function says of itself can be copied; where it looks up names cannot.
    """
    if issubclass(kind, nn.RNNBase | nn.RNNCellBase) or type(forward) is not types.FunctionType:
        return False  # kernels of recurrent layers are chosen at the time (`plain_rnn`)
    home = forward.__globals__.get("__name__", "")
    return home.startswith("torch.") and all(k.__module__.split(".")[0] in ("torch", "builtins") for k in kind.__mro__)
