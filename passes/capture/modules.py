"""Layers of torch.nn, which are nodes of the graph; so are the stubs of torch's quantization, which mark places."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

# Modules of torch.nn whose forward holds sizes as literals or insists on relations that pruning changes.
TRACED_THROUGH = (
    nn.Sequential,
    nn.Unflatten,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.ChannelShuffle,
    nn.modules.padding._ConstantPadNd,
)


STANDARD = ("torch.nn.", "torch.ao.nn.", "torch.ao.quantization.stubs")


@functools.lru_cache(maxsize=4096)
def is_standard(kind: type) -> bool:
    """Whether layers of a class are nodes of the program."""
    return kind.__module__.startswith(STANDARD) and not issubclass(kind, TRACED_THROUGH)


@functools.lru_cache(maxsize=4096)
def parameters(kind: type) -> tuple[str, ...]:
    """The names of the arguments that the forward of a class takes by position, in order."""
    found = list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    return tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)


def by_position(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer, by position as far as they are given without a gap."""
    left = dict(kwargs)
    for name in parameters(type(module))[len(args) :]:  # type: ignore[arg-type]
        if name not in left:
            break
        args = (*args, left.pop(name))
    return args, left
