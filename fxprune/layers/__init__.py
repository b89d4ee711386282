"""Channels of one layer alone, by index: `remove_outputs`, `remove_inputs`, `remove_heads`.

Nothing that is coupled to the layer follows, so that the model around it has to be cut as well; `fxprune.prune(model,
example_inputs=x, remove={...})` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxprune.arguments import checked_call
from fxprune.entry_points import entry_point
from fxprune.layers.alone import remove_alone
from fxprune.layers.calls import how_called
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.quiet import without_modes
from fxprune.selection.argument_checks import check_flag
from fxprune.selection.indices import parse_indices, spelled

__all__ = ["remove_heads", "remove_inputs", "remove_outputs"]
Layer = TypeVar("Layer", bound=nn.Module | Tensor)  # torch says that the weight of a layer is a Tensor


@checked_call()
@without_modes()
def remove_outputs(layer: Layer, indices: Sequence[int], *, dim: int | None = None, inplace: bool = False) -> Layer:
    """A layer without some of its output channels.

    >>> small = remove_outputs(nn.Conv2d(3, 8, 3), [0, 5])
    >>> small.weight.shape, small.out_channels
    (torch.Size([6, 3, 3, 3]), 6)

    Arguments:
        layer: convolutions (transposed, grouped and depthwise ones), Linear, Bilinear, Embedding, PReLU, normalisations,
            recurrent layers and cells (units of the hidden state, in all layers and directions), MultiheadAttention, or one
            parameter.
            Where an output has an input of its own (depthwise, normalisation, PReLU), that goes, too.
        indices: the channels that go, each once.
        dim: of a parameter the dimension, 0 by default; of a LayerNorm the dimension of `normalized_shape`.
        inplace: change the layer itself, whose parameters stay the same objects, in place of a copy.

    Raises: PruneError for indices that cannot go, or not alone (groups of a convolution lose equally many).
    """
    check_flag("inplace", inplace)
    given: Any = layer
    if isinstance(given, nn.Parameter):
        return without(given, indices, 0 if dim is None else dim, inplace=inplace)
    with entry_point(given):
        call = how_called(given, dim)
        return remove_alone(given, call, dict.fromkeys(call.outputs, indices), inplace=inplace)


@checked_call()
@without_modes()
def remove_inputs(layer: Layer, indices: Sequence[int], *, dim: int | None = None, inplace: bool = False) -> Layer:
    """A layer without some of its input channels.

    >>> remove_inputs(nn.Linear(6, 2), [1, 2]).weight.shape
    torch.Size([2, 4])

    Of a MultiheadAttention the channels of the query go, and of keys and values where they are as wide. An embedding has no
    input channels.

    Arguments: as for `remove_outputs`; the dimension of a parameter is 1 by default, and of a Bilinear 1 is its first input
    and 2 its second.
    """
    check_flag("inplace", inplace)
    given: Any = layer
    if isinstance(given, nn.Parameter):
        return without(given, indices, min(1, given.dim() - 1) if dim is None else dim, inplace=inplace)
    with entry_point(given):
        call = how_called(given, dim)
        if not call.inputs:
            what = f"a layer of type {type(layer).__name__} has no input channels"
            raise PruneError(what, fix="fxprune.layers.remove_outputs(layer, indices)")
        return remove_alone(given, call, dict.fromkeys(call.inputs, indices), inplace=inplace)


@checked_call()
@without_modes()
def remove_heads(
    layer: nn.MultiheadAttention, heads: Sequence[int], *, embedding: Sequence[int] = (), inplace: bool = False
) -> nn.MultiheadAttention:
    """A MultiheadAttention without some of its heads.

    >>> small = remove_heads(nn.MultiheadAttention(8, 2), [1], embedding=[4, 5, 6, 7])
    >>> small.embed_dim, small.num_heads, small.out_proj.weight.shape
    (4, 1, torch.Size([4, 4]))

    Arguments:
        layer: its keys and values are as wide as its queries, if `embedding` is given.
        heads: the heads that go, each once.
        embedding: channels of inputs and outputs that go with them. Where they are as many as the channels of the heads, the
            result has the forward of its class; else a program as its forward, which takes no masks.
        inplace: as for `remove_outputs`.
    """
    check_flag("inplace", inplace)
    with entry_point(layer):
        given: nn.Module = layer
        if not isinstance(given, nn.MultiheadAttention):
            what = f"heads are those of a MultiheadAttention, and this is a {type(given).__name__}"
            raise PruneError(what, fix="prune(model, example_inputs=x, remove={family: [2]}) removes heads of any attention")
        gone = parse_indices(heads, "heads", layer)
        if gone[-1] >= layer.num_heads:
            raise PruneError(f"the layer has {layer.num_heads} heads, and none with number {gone[-1]}", fix="heads=[0]")
        call, width = how_called(layer), layer.head_dim
        asked: dict[str, Sequence[int]] = {"layer.out_proj:1": [h * width + i for h in gone for i in range(width)]}
        if embedding != ():
            channels = parse_indices(embedding, "embedding", layer)
            asked |= dict.fromkeys([*call.inputs, *call.outputs], channels)
        return remove_alone(layer, call, asked, inplace=inplace)


def without(parameter: nn.Parameter, indices: Sequence[int], dim: int, *, inplace: bool) -> Any:
    """A parameter without some indices of a dimension."""
    gone = parse_indices(indices, "indices", f"a parameter of shape {tuple(parameter.shape)}")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -parameter.dim() <= dim < parameter.dim():
        raise PruneError(f"the parameter has {parameter.dim()} dimensions, and dim is {dim!r}", fix="dim=0")
    size = parameter.shape[dim]
    if gone[-1] >= size or len(gone) == size:
        what = f"index {gone[-1]} of {size}" if gone[-1] >= size else f"all of {spelled(gone)}"
        raise PruneError(f"a parameter cannot lose {what} of dimension {dim}", fix=f"some of the indices 0-{size - 1}")
    kept = torch.tensor(sorted(set(range(size)) - set(gone)), device=parameter.device)
    taken = lambda t: t.detach().index_select(dim, kept)  # noqa: E731
    made = parameter if inplace else nn.Parameter(parameter.detach(), parameter.requires_grad)
    grad: Tensor | None = parameter.grad
    if inplace:
        made.grad = None
    made.data = taken(parameter)
    if grad is not None and inplace:
        made.grad = taken(grad)
    return made
