"""Normalisation: per channel, over channels, in groups, by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from .indexing import between
from .registry import buffer, conv, features, graph, image, linear, net, normal, parameter, pool, tokens

AB = ("a.weight", "b.weight")
NORM = (*AB, "norm.weight", "norm.bias")
TRACKED = (*NORM, "norm.running_mean", "norm.running_var")


def after_conv(norm, channels=14):
    return between(lambda self, x: self.norm(x).relu(), channels, channels, norm=norm)


def on_tokens(norm, width=14):
    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x))).relu().mean(1))

    return net(forward, a=linear(10, width), norm=norm, b=linear(width, 20), head=linear(20, 5)), tokens()


@graph(targets=TRACKED, min_removed=0.4)
def batch_norm_2d():
    return after_conv(nn.BatchNorm2d(14))


@graph(targets=TRACKED, min_removed=0.4)
def batch_norm_1d_features():
    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()))

    layers = {"a": linear(10, 14, bias=False), "norm": nn.BatchNorm1d(14), "b": linear(14, 20)}
    return net(forward, **layers, head=linear(20, 5)), features()


@graph(targets=TRACKED, min_removed=0.4)
def batch_norm_1d_sequence():
    def forward(self, x):
        x = self.norm(self.a(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.b(x.relu()).mean(1))

    layers = {"a": linear(10, 14), "norm": nn.BatchNorm1d(14), "b": linear(14, 20), "head": linear(20, 5)}
    return net(forward, **layers), tokens()


@graph(targets=TRACKED, min_removed=0.4)
def batch_norm_3d():
    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()).mean((2, 3, 4)))

    layers = {"a": nn.Conv3d(3, 14, 2), "norm": nn.BatchNorm3d(14), "b": nn.Conv3d(14, 20, 1)}
    return net(forward, **layers, head=linear(20, 5)), normal(2, 3, 3, 4, 5)


@graph(targets=(*AB, "norm.running_mean", "norm.running_var"), min_removed=0.4)
def batch_norm_without_affine():
    return after_conv(nn.BatchNorm2d(14, affine=False))


@graph(targets=("a.weight", "norm.weight", "norm.running_var", "head.weight"), min_removed=0.4)
def batch_norm_after_flatten():
    """Every channel is sixty features of the norm."""

    def forward(self, x):
        return self.head(self.norm(self.a(x).flatten(1)).relu())

    return net(forward, a=conv(3, 7), norm=nn.BatchNorm1d(420), head=linear(420, 5)), image()


@graph(targets=(*AB, "weight", "bias", "mean", "var"), min_removed=0.4)
def batch_norm_frozen():
    """Detection backbones: four buffers and no module."""

    def step(self, x):
        scale = self.weight.view(1, -1, 1, 1) * (self.var.view(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.mean.view(1, -1, 1, 1) * scale)

    names = ("weight", "bias", "mean", "var")
    return between(step, 14, 14, **{name: buffer(14) for name in names})


@graph(targets=(*AB, "mean", "var", "weight"), min_removed=0.4)
def batch_norm_functional():
    def step(self, x):
        return F.batch_norm(x, self.mean, self.var, self.weight, None, False, 0.1, 1e-3).relu()

    return between(step, 14, 14, mean=buffer(14), var=buffer(14), weight=parameter(14))


@graph(targets=(*AB, "norm.weight"), min_removed=0.3)
def batch_norm_before_activation_chain():
    """Pre-activation residual: the norm reads a sum."""

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(self.norm(x).relu())
        return self.head(pool(self.last(x).relu()))

    layers = {"a": conv(3, 14), "norm": nn.BatchNorm2d(14), "b": conv(14, 14), "last": nn.BatchNorm2d(14)}
    return net(forward, **layers, head=linear(14, 5)), image()


@graph(stats=True, targets=NORM, min_removed=0.4)
def layer_norm():
    return on_tokens(nn.LayerNorm(14))


@graph(stats=True, targets=AB, min_removed=0.4)
def layer_norm_without_affine():
    return on_tokens(nn.LayerNorm(14, elementwise_affine=False))


@graph(stats=True, targets=(*AB, "weight", "bias"), min_removed=0.4)
def layer_norm_functional():
    def forward(self, x):
        x = self.a(x)
        x = F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, 1e-6)
        return self.head(self.b(x).relu().mean(1))

    parts = {"a": linear(10, 14), "weight": parameter(14), "bias": parameter(14), "b": linear(14, 20)}
    return net(forward, **parts, head=linear(20, 5)), tokens()


@graph(stats=True, targets=AB, min_removed=0.4)
def layer_norm_functional_literal():
    def forward(self, x):
        return self.head(self.b(F.layer_norm(self.a(x), [14])).relu().mean(1))

    return net(forward, a=linear(10, 14), b=linear(14, 20), head=linear(20, 5)), tokens()


@graph(stats=True, targets=NORM, min_removed=0.4)
def layer_norm_channels_last():
    def step(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return between(step, 14, 14, norm=nn.LayerNorm(14))


@graph(stats=True, targets=(*AB, "weight", "bias"), min_removed=0.4)
def layer_norm_channels_first_by_hand():
    """ConvNeXt's own."""

    def step(self, x):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(var + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]

    return between(step, 14, 14, weight=parameter(14), bias=parameter(14))


@graph(stats=True, targets=NORM, min_removed=0.4)
def layer_norm_over_channels_and_space():
    return after_conv(nn.LayerNorm([14, 6, 10]))


@graph(stats=True, targets=NORM, min_removed=0.4)
def group_norm():
    return after_conv(nn.GroupNorm(4, 20), 20)


@graph(stats=True, targets=NORM, min_removed=0.4)
def group_norm_one_group():
    return after_conv(nn.GroupNorm(1, 14))


@graph(targets=NORM, min_removed=0.4)
def group_norm_of_single_channels():
    return after_conv(nn.GroupNorm(14, 14))


@graph(stats=True, targets=(*NORM, "c.weight"), min_removed=0.4)
def group_norm_meets_group_conv():
    """Groups of four in the norm, of ten in the convolution."""

    def step(self, x):
        return self.c(self.norm(x)).relu()

    return between(step, 20, 20, norm=nn.GroupNorm(5, 20), c=conv(20, 20, groups=2))


@graph(stats=True, targets=(*AB, "weight"), min_removed=0.4)
def group_norm_by_hand():
    def step(self, x):
        b, c, h, w = x.shape
        x = x.view(b, 4, -1)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x.view(b, c, h, w) * self.weight

    return between(step, 20, 20, weight=parameter(20, 1, 1))


@graph(targets=NORM, min_removed=0.4)
def instance_norm():
    return after_conv(nn.InstanceNorm2d(14, affine=True))


@graph(targets=TRACKED, min_removed=0.4)
def instance_norm_with_running_statistics():
    return after_conv(nn.InstanceNorm2d(14, affine=True, track_running_stats=True))


@graph(targets=AB, min_removed=0.4)
def instance_norm_functional_style():
    """AdaIN: one image's statistics on the other, channel by channel."""

    def forward(self, x, style):
        x, style = self.a(x), self.a(style)
        x = F.instance_norm(x) * style.std((2, 3), keepdim=True) + style.mean((2, 3), keepdim=True)
        return self.head(pool(self.b(x).relu()))

    model = net(forward, a=conv(3, 14), b=conv(14, 20), head=linear(20, 5))
    return model, (image(), image(seed=3))


@graph(stats=True, targets=(*AB, "norm.weight"), min_removed=0.4)
def rms_norm():
    return on_tokens(nn.RMSNorm(14))


@graph(stats=True, targets=(*AB, "weight"), min_removed=0.4)
def rms_norm_by_hand():
    def forward(self, x):
        x = self.a(x)
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.head(self.b(x).relu().mean(1))

    parts = {"a": linear(10, 14), "weight": parameter(14), "b": linear(14, 20), "head": linear(20, 5)}
    return net(forward, **parts), tokens()


@graph(stats=True, targets=(*AB, "gamma", "beta"), min_removed=0.4)
def global_response_norm():
    """ConvNeXt v2: a norm over space, divided by its mean over channels."""

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        size = x.norm(p=2, dim=(1, 2), keepdim=True)
        size = size / (size.mean(dim=-1, keepdim=True) + 1e-6)
        x = x + torch.addcmul(self.beta.view(1, 1, 1, -1), self.gamma.view(1, 1, 1, -1), x * size)
        return self.head(self.b(x).relu().mean((1, 2)))

    parts = {"a": conv(3, 14), "gamma": parameter(14), "beta": parameter(14), "b": linear(14, 20)}
    return net(forward, **parts, head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def unit_length_channels():
    return between(lambda self, x: F.normalize(x, dim=1) * self.scale, 14, 14, scale=parameter(1))


@graph("prelu_for_each_channel", args=(14,), targets=(*AB, "act.weight"), min_removed=0.4)
@graph("prelu_single", args=(1,), targets=AB, min_removed=0.4)
def prelu(slopes):
    def forward(self, x):
        return self.head(pool(self.b(self.act(self.a(x)))))

    layers = {"a": conv(3, 14), "act": nn.PReLU(slopes), "b": conv(14, 20), "head": linear(20, 5)}
    return net(forward, **layers), image()


@graph(stats=True, targets=("a.weight", "scale", "b.weight"), min_removed=0.4)
def group_norm_over_positions_of_a_parameter():
    """Positions that are copies, scaled apart by a parameter, may go: statistics then run over those that are left."""

    def forward(self, x):
        x = self.a(x)[:, :, None, None].expand(-1, -1, 4, 6) * self.scale
        return self.head(self.b(self.norm(x).relu().mean((2, 3))))

    parts = {"a": linear(10, 14), "scale": parameter(4, 6), "norm": nn.GroupNorm(1, 14), "b": linear(14, 20)}
    return net(forward, **parts, head=linear(20, 5)), features()
