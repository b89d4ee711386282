"""The tracer: an FX tracer that evaluates every node as it is made, and decides which modules are nodes."""

from __future__ import annotations

import functools

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


@functools.lru_cache(maxsize=4096)
def is_standard(kind: type) -> bool:
    """Whether layers of a class are nodes of the program."""
    return kind.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not issubclass(kind, TRACED_THROUGH)
