"""Weights that are made from other tensors on every call: hooks, parametrisations, and by hand."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from .registry import conv, features, graph, image, linear, net, parameter, pool

WEIGHT = "parametrizations.weight.original"


def weight_norm_hook(layer):
    """The old spelling, which recomputes the weight in a forward pre-hook; many checkpoints still need it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def chain(a, b):
    def forward(self, x):
        return self.head(pool(self.b(self.a(x).relu()).relu()))

    return net(forward, a=a, b=b, head=linear(20, 5)), image()


# The weight of a removed channel has length zero, and is divided by it: zeroing makes no reference.
@graph(
    "weight_norm_hook",
    args=(weight_norm_hook,),
    stats=True,
    min_removed=0.4,
    targets=("a.weight_g", "a.weight_v", "b.weight_g", "b.weight_v", "a.bias"),
)
@graph(
    "weight_norm",
    args=(parametrizations.weight_norm,),
    stats=True,
    min_removed=0.4,
    targets=(f"a.{WEIGHT}0", f"a.{WEIGHT}1", f"b.{WEIGHT}0", f"b.{WEIGHT}1"),
)
@graph(
    "spectral_norm",
    args=(parametrizations.spectral_norm,),
    min_removed=0.4,
    targets=(
        f"a.{WEIGHT}",
        f"b.{WEIGHT}",
        "a.parametrizations.weight.0._u",
        "b.parametrizations.weight.0._v",
    ),
)
def reparametrised(wrap):
    return chain(wrap(conv(3, 12)), wrap(conv(12, 20)))


@graph(targets=("b.weight_orig", "a.weight_orig", "b.weight_u", "b.weight_v"), min_removed=0.4)
def spectral_norm_hook():
    wrap = nn.utils.spectral_norm
    return chain(wrap(conv(3, 12)), wrap(conv(12, 20)))


@graph(stats=True, targets=(f"one.{WEIGHT}0", f"one.{WEIGHT}1", f"two.{WEIGHT}1"), min_removed=0.4)
def weight_norm_linear():
    """One length for each output in the first layer, one for each input in the second."""

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu())

    one = parametrizations.weight_norm(linear(10, 14))
    two = parametrizations.weight_norm(linear(14, 20), dim=1)
    return net(forward, one=one, two=two, head=linear(20, 5)), features()


class ScaledWeight(nn.Module):
    """Equalised learning rate with a trained scale for each output."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.scale = parameter(outputs, 1)

    def forward(self, weight):
        return weight * self.scale * 0.7


@graph(targets=("a.weight", f"b.{WEIGHT}", "b.parametrizations.weight.0.scale"), min_removed=0.4)
def own_parametrization():
    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())

    b = linear(14, 20)
    parametrize.register_parametrization(b, "weight", ScaledWeight(20))
    return net(forward, a=linear(10, 14), b=b, head=linear(20, 5)), features()


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: the mean and variance over the inputs must see the kept ones only."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@graph(stats=True, targets=("a.weight", "b.weight", "b.bias"), min_removed=0.4)
def weight_standardisation():
    return chain(StandardisedConv(3, 12, 3, padding=1), StandardisedConv(12, 20, 3, padding=1))


class StandardisedByBatchNorm(nn.Conv2d):
    """timm's spelling: the weight goes through batch_norm with its outputs as channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = parameter(outputs, 1, 1, 1)

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * 0.3).view(-1),
            training=True,
            momentum=0.0,
            eps=1e-6,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@graph(stats=True, targets=("a.weight", "b.weight", "b.gain"), min_removed=0.4)
def weight_standardisation_by_batch_norm():
    return chain(StandardisedByBatchNorm(3, 12), StandardisedByBatchNorm(12, 20))


@graph(targets=("a.weight", "b.weight_orig", "b.weight_mask"), min_removed=0.4)
def weight_masked_by_hook():
    """torch.nn.utils.prune: unstructured pruning came before, and its mask is cut like the weight."""
    b = conv(12, 20)
    prune.custom_from_mask(b, "weight", (torch.arange(b.weight.numel()) % 3 > 0).view_as(b.weight))
    return chain(conv(3, 12), b)


@graph(targets=("a.weight", "b.weight", "scale"), min_removed=0.4)
def weight_fake_quantised_by_channel():
    """torch.ao.quantization: weights with a scale for each channel, activations with one for all."""

    def forward(self, x):
        scale = self.scale.float().abs() * 0.01 + 0.01
        weight = torch.fake_quantize_per_channel_affine(self.a.weight, scale, self.zero, 0, -128, 127)
        x = torch.fake_quantize_per_tensor_affine(F.linear(x, weight, self.a.bias).relu(), 0.05, 0, 0, 255)
        return self.head(self.b(x).relu())

    parts = {"a": linear(10, 14), "b": linear(14, 20), "head": linear(20, 5)}
    model = net(forward, **parts)
    model.register_buffer("scale", torch.rand(14) * 0.1 + 0.05)
    model.register_buffer("zero", torch.zeros(14, dtype=torch.int32))
    return model, features()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def weight_fake_quantised():
    def forward(self, x):
        weight = torch.round(self.b.weight / self.step) * self.step
        return self.head(F.linear(self.a(x).relu(), weight, self.b.bias).relu())

    parts = {"a": linear(10, 14), "b": linear(14, 20), "head": linear(20, 5)}
    return net(forward, **parts, step=0.05), features()
