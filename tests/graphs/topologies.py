"""How blocks are wired: residual chains, growth, branches, pyramids."""

import torch
from torch import nn
from torch.nn import functional as F

from .registry import conv, features, graph, image, linear, net, pool

AB = ("a.weight", "b.weight")


class Residual(nn.Module):
    """Bottleneck with an optional strided shortcut."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.one, self.norm1 = conv(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.two, self.norm2 = conv(middle, middle, 3, stride=stride, bias=False), nn.BatchNorm2d(middle)
        self.three, self.norm3 = conv(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        same = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.norm1(self.one(x)), inplace=True)
        x = self.norm3(self.three(F.relu(self.norm2(self.two(x)))))
        x += same
        return F.relu(x)


@graph(
    targets=("a.weight", "blocks.0.one.weight", "blocks.1.shortcut.0.weight", "blocks.2.norm3.running_var"),
    min_removed=0.5,
)
def residual_bottlenecks():
    def forward(self, x):
        return self.head(pool(self.blocks(self.a(x))))

    blocks = nn.Sequential(Residual(14, 9, 14), Residual(14, 11, 22, stride=2), Residual(22, 7, 22))
    return net(forward, a=conv(3, 14), blocks=blocks, head=linear(22, 5)), image()


@graph(targets=("stem.weight", "one.weight", "two.weight", "three.weight"), min_removed=0.4)
def residual_chain():
    def forward(self, x):
        x = self.stem(x)
        for layer in (self.one, self.two, self.three):
            x = x + layer(x.relu())
        return self.head(x)

    layers = {name: linear(14, 14) for name in ("one", "two", "three")}
    return net(forward, stem=linear(10, 14), **layers, head=linear(14, 5)), features()


@graph(targets=("x.weight", "y.weight", "z.weight"), min_removed=0.4)
def residuals_that_share_a_family():
    """a + b and b + c tie all three, in whatever order they come."""

    def forward(self, x):
        p, q, r = self.x(x), self.y(x), self.z(x)
        return self.head((p + q).relu()) + self.head((q * r).relu())

    layers = {name: linear(10, 14) for name in "xyz"}
    return net(forward, **layers, head=linear(14, 5)), features()


@graph(
    targets=("stem.weight", "grow.0.weight", "grow.1.weight", "grow.2.weight", "norms.2.weight"),
    min_removed=0.4,
)
def dense_block():
    def forward(self, x):
        maps = [self.stem(x)]
        for norm, layer in zip(self.norms, self.grow, strict=True):
            maps.append(layer(norm(torch.cat(maps, 1)).relu()))
        return self.head(pool(self.last(torch.cat(maps, 1)).relu()))

    widths = (7, 12, 17)
    grow, norms = nn.ModuleList(conv(w, 5) for w in widths), nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
    layers = {"stem": conv(3, 7), "grow": grow, "norms": norms, "last": nn.BatchNorm2d(22)}
    return net(forward, **layers, head=linear(22, 5)), image()


@graph(targets=("a.weight", "one.weight", "three_down.weight", "three.weight", "pooled.weight"), min_removed=0.5)
def inception():
    def forward(self, x):
        x = self.a(x).relu()
        three = self.three(self.three_down(x).relu())
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        return self.head(self.last(torch.cat([self.one(x), three, pooled, F.avg_pool2d(x, 3, 1, 1)], 1).relu()))

    branches = {
        "one": conv(12, 7, 1),
        "three_down": conv(12, 9, 1),
        "three": conv(9, 11),
        "pooled": conv(12, 5, 1),
    }
    return net(forward, a=conv(3, 12), **branches, last=conv(35, 14, 1), head=conv(14, 5, 1)), image()


@graph(targets=("down.weight", "deep.weight", "bottom.weight", "up.weight", "join.weight"), min_removed=0.5)
def unet():
    def forward(self, x):
        wide = self.down(x).relu()
        deep = self.bottom(self.deep(F.max_pool2d(wide, 2)).relu()).relu()
        x = torch.cat([wide, self.up(deep)], 1)
        return self.head(self.join(x).relu())

    layers = {"down": conv(3, 12), "deep": conv(12, 20), "bottom": conv(20, 22), "join": conv(21, 14)}
    return net(forward, **layers, up=nn.ConvTranspose2d(22, 9, 2, stride=2), head=conv(14, 5, 1)), image()


@graph(targets=("c1.weight", "c2.weight", "side1.weight", "side2.weight", "smooth.weight"), min_removed=0.5)
def feature_pyramid():
    def forward(self, x):
        one = self.c1(x).relu()
        two = self.c2(one).relu()
        top = self.side2(two)
        low = self.side1(one) + F.interpolate(top, size=one.shape[-2:], mode="nearest")
        return {"low": self.head(self.smooth(low)), "top": self.head(self.smooth(top))}

    layers = {
        "c1": conv(3, 12),
        "c2": conv(12, 20, stride=2),
        "side1": conv(12, 14, 1),
        "side2": conv(20, 14, 1),
    }
    return net(forward, **layers, smooth=conv(14, 9), head=conv(9, 5, 1)), image()


@graph(targets=("fast.weight", "slow.weight", "to_slow.weight", "to_fast.weight"), min_removed=0.4)
def two_resolutions_exchange():
    """HRNet: every branch receives every other, resized."""

    def forward(self, x):
        fast, slow = self.fast(x).relu(), self.slow(x).relu()
        size = fast.shape[-2:]
        mixed_fast = (fast + F.interpolate(self.to_fast(slow), size=size, mode="bilinear")).relu()
        mixed_slow = (slow + self.to_slow(fast)).relu()
        up = F.interpolate(mixed_slow, size=size)
        return self.head(torch.cat([mixed_fast, up], 1))

    layers = {"fast": conv(3, 7), "slow": conv(3, 14, stride=2), "to_slow": conv(7, 14, stride=2)}
    return net(forward, **layers, to_fast=conv(14, 7, 1), head=conv(21, 5, 1)), image()


@graph(targets=AB, min_removed=0.4)
def siamese():
    def forward(self, x, y):
        u, v = self.b(self.a(x).relu()), self.b(self.a(y).relu())
        return self.head(torch.cat([u, v, (u - v).abs(), u * v], -1))

    return net(forward, a=linear(10, 14), b=linear(14, 9), head=linear(36, 5)), (features(), features(seed=5))


@graph(targets=("a.weight", "b.weight", "c.weight"), min_removed=0.4)
def auxiliary_output():
    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.head(pool(self.c(x))), self.head_aux(pool(x))

    layers = {"a": conv(3, 12), "b": conv(12, 14), "c": conv(14, 20)}
    return net(forward, **layers, head=linear(20, 5), head_aux=linear(14, 3)), image()


@graph(targets=("stem.weight", "layer.weight", "gate.weight"), min_removed=0.4)
def unrolled_recurrence():
    """The same convolution three times, with a convolutional gate."""

    def forward(self, x):
        state = self.stem(x)
        for _ in range(3):
            gate = self.gate(state).sigmoid()
            state = gate * state + (1 - gate) * self.layer(state).tanh()
        return self.head(state)

    return net(forward, stem=conv(3, 14), layer=conv(14, 14), gate=conv(14, 14, 1), head=conv(14, 5, 1)), image()


@graph(targets=("a.weight", "gru.weight", "candidate.weight"), min_removed=0.4)
def convolutional_gru():
    """Both gates from one convolution over the input joined with the state."""

    def forward(self, x):
        state = torch.zeros_like(self.a(x))
        for step in (x, x.flip(3)):
            step = self.a(step).relu()
            update, reset = self.gru(torch.cat([step, state], 1)).sigmoid().split(14, 1)
            fresh = self.candidate(torch.cat([step, reset * state], 1)).tanh()
            state = (1 - update) * state + update * fresh
        return self.head(state)

    layers = {"a": conv(3, 14), "gru": conv(28, 28), "candidate": conv(28, 14), "head": conv(14, 5, 1)}
    return net(forward, **layers), image()


@graph(targets=("tokens_in.weight", "channels_in.weight", "stem.weight", "tokens_out.weight"), min_removed=0.4)
def mixer_without_norm():
    """MLP-Mixer: tokens are mixed by a linear layer over the transposed map."""

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens_out(self.tokens_in(x.transpose(1, 2)).relu()).transpose(1, 2)
        x = x + self.channels_out(self.channels_in(x).relu())
        return self.head(x.mean(1))

    tokens = {"tokens_in": linear(15, 9), "tokens_out": linear(9, 15)}
    channels = {"channels_in": linear(14, 22), "channels_out": linear(22, 14)}
    return net(forward, stem=nn.Conv2d(3, 14, 2, 2), **tokens, **channels, head=linear(14, 5)), image()
