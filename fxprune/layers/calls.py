"""How a layer is called: the shapes of its inputs, where their channels are, and where those of the output are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.passes.errors import PruneError


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a layer is called with.

    Attributes:
        shapes: of its inputs; none for a layer that takes indices.
        dim: the dimension of their channels; -1 for the last one.
        width: how many channels its output has.
        places: of units of its outputs (see `remove` of `prune`), where that is not what the linear layer behind it reads.
        goes: the number of the one input whose channels go, where those of others never go with them.
    """

    shapes: tuple[tuple[int, ...], ...]
    dim: int
    width: int
    places: tuple[str, ...] = ()
    goes: int | None = None

    @property
    def inputs(self) -> list[str]:
        """The places of input channels that can go together."""
        if self.goes is not None:
            return [f"inputs.{self.goes}"]
        first = self.shapes[0][self.dim] if self.shapes else 0
        alike = [i for i, shape in enumerate(self.shapes) if shape[self.dim] == first]
        return [f"inputs.{i}" for i in alike]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The places of output channels."""
        return self.places or ("outputs:1",)


def convolution(m: Any) -> LayerCall:
    sizes = [d * (k - 1) + 2 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    return LayerCall(((1, m.in_channels, *sizes),), 1, m.out_channels)


def linear(m: Any) -> LayerCall:
    return LayerCall(((2, m.in_features),), -1, m.out_features)


def channels_second(width: str, ndim: Callable[[Any], int]) -> Callable[[Any], LayerCall]:
    """A layer with as many outputs as inputs, in the second dimension; `width` is the attribute that counts them."""
    return lambda m: LayerCall(((2, getattr(m, width), *[3] * (ndim(m) - 2)),), 1, getattr(m, width))


def spatial(m: Any) -> int:
    """The dimensions of the input of a normalisation whose class ends in 1d, 2d or 3d; 4 for others."""
    return next((int(n) + 2 for n in "123" if any(k.__name__.endswith(f"{n}d") for k in type(m).__mro__)), 4)


def recurrent(m: Any) -> LayerCall:
    ends = [f"{layer}{way}" for layer in range(m.num_layers) for way in (("", "_reverse") if m.bidirectional else ("",))]
    places = [f"layer.weight_hr_l{e}:0" if m.proj_size else f"layer.weight_hh_l{e}:1" for e in ends]
    width = (m.proj_size or m.hidden_size) * (2 if m.bidirectional else 1)
    return LayerCall(((2, 3, m.input_size),), -1, width, tuple(places))


def cell(m: Any) -> LayerCall:
    return LayerCall(((2, m.input_size),), -1, m.hidden_size, ("layer.weight_hh:1", "outputs:1"))


def attention(m: Any) -> LayerCall:
    return LayerCall(tuple((2, 2, n) for n in (m.embed_dim, m.kdim, m.vdim)), -1, m.embed_dim)


def embedding(m: Any) -> LayerCall:
    return LayerCall((), -1, m.embedding_dim)


CALLS: list[tuple[Any, Callable[[Any], LayerCall]]] = [
    (nn.modules.conv._ConvNd, convolution),
    (nn.Linear, linear),
    (nn.modules.batchnorm._NormBase, channels_second("num_features", spatial)),
    (nn.GroupNorm, channels_second("num_channels", lambda m: 4)),
    (nn.PReLU, channels_second("num_parameters", lambda m: 3)),
    (nn.RNNBase, recurrent),
    (nn.RNNCellBase, cell),
    (nn.MultiheadAttention, attention),
    (nn.Embedding | nn.EmbeddingBag, embedding),
]


def how_called(layer: nn.Module, dim: int | None = None) -> LayerCall:
    """How a layer is called; raises PruneError for a kind that is not known. `dim` is that of a `normalized_shape`."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        sizes = tuple(layer.normalized_shape)
        chosen = len(sizes) - 1 if dim is None and len(sizes) == 1 else dim
        if not isinstance(chosen, int) or isinstance(chosen, bool) or not -len(sizes) <= chosen < len(sizes):
            what = f"dim must be that of channels in normalized_shape={sizes}, not {dim!r}"
            raise PruneError(what, where=type(layer).__name__, fix="dim=0")
        return LayerCall(((2, *sizes),), 1 + chosen % len(sizes), sizes[chosen])
    if isinstance(layer, nn.Bilinear) and dim in (None, 1, 2):
        shapes = ((2, layer.in1_features), (2, layer.in2_features))
        return LayerCall(shapes, -1, layer.out_features, goes=0 if dim is None else dim - 1)
    if dim is not None:
        what = f"dim is for parameters and layers with a normalized_shape, not for a {type(layer).__name__}"
        raise PruneError(what, fix="leave dim out")
    for kind, call in CALLS:
        if isinstance(layer, kind):
            return call(layer)
    raise PruneError(
        f"fxprune.layers does not know how a {type(layer).__name__} is called",
        fix="fxprune.prune(model, example_inputs=x, remove={'layer': [2]}) works for any layer in a model",
    )
