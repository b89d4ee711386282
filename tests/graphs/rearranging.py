"""Shuffles, patches, repeats and padding: where a channel goes when it moves through space."""

import torch
from torch import nn
from torch.nn import functional as F

from .indexing import between
from .registry import conv, features, graph, image, linear, net, parameter, pool

A = ("a.weight",)
AB = ("a.weight", "b.weight")


@graph(targets=AB, min_removed=0.4)
def pixel_shuffle():
    return between(lambda self, x: F.pixel_shuffle(x, 2), 28, 7)


@graph(targets=AB, min_removed=0.4)
def pixel_unshuffle():
    return between(lambda self, x: F.pixel_unshuffle(x, 2), 9, 36)


@graph(targets=(*AB, "c.weight"), min_removed=0.4)
def pixel_shuffle_and_back():
    def step(self, x):
        return self.down(self.c(self.up(x)))

    parts = {"up": nn.PixelShuffle(2), "c": conv(5, 6), "down": nn.PixelUnshuffle(2)}
    return between(step, 20, 24, **parts)


@graph(targets=AB, min_removed=0.4)
def channel_shuffle_view():
    def step(self, x):
        b, c, h, w = x.shape
        return x.view(b, 3, c // 3, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)

    return between(step, 15, 15)


@graph(targets=AB, min_removed=0.4)
def channel_shuffle_module():
    return between(lambda self, x: self.shuffle(x), 15, 15, shuffle=nn.ChannelShuffle(5))


@graph(targets=(*AB, "first.weight", "depth.weight", "last.weight"), min_removed=0.4)
def channel_shuffle_between_groups():
    """ShuffleNet v1: grouped, shuffled, depthwise, grouped."""

    def step(self, x):
        return self.last(self.depth(F.channel_shuffle(self.first(x), 3)).relu())

    first, depth = conv(12, 24, 1, groups=3), conv(24, 24, groups=24)
    return between(step, 12, 18, first=first, depth=depth, last=conv(24, 18, 1, groups=3))


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half of the channels pass by, and both halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.one = conv(half, half, 1)
        self.two = conv(half, half, groups=half)
        self.three = conv(half, half, 1)

    def forward(self, x):
        passed, x = x.chunk(2, dim=1)
        x = torch.cat((passed, self.three(self.two(self.one(x).relu())).relu()), dim=1)
        b, c, h, w = x.size()
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


@graph(targets=(*AB, "units.0.one.weight", "units.1.three.weight", "units.2.two.weight"), min_removed=0.3)
def shuffle_unit_chain():
    units = nn.Sequential(ShuffleUnit(20), ShuffleUnit(20), ShuffleUnit(20))
    return between(lambda self, x: self.units(x), 20, 20, units=units)


@graph(targets=("a.weight", "kernel"), min_removed=0.4)
def image_to_columns():
    def forward(self, x):
        x = F.unfold(self.a(x).relu(), 3, padding=1)
        return self.head((self.kernel @ x).mean(2))

    return net(forward, a=conv(3, 7), kernel=parameter(20, 63), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def image_to_columns_and_back():
    def step(self, x):
        columns = F.unfold(x, (2, 5), stride=(2, 5)).tanh()
        return F.fold(columns, (6, 10), (2, 5), stride=(2, 5))

    return between(step, 7, 7)


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def image_to_columns_as_tokens():
    """T2T-ViT: overlapping patches of features become tokens."""

    def forward(self, x):
        x = nn.Unfold(3, stride=2, padding=1)(self.a(x)).transpose(1, 2)
        return self.head(self.b(x).relu().mean(1))

    return net(forward, a=conv(3, 7), b=linear(63, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def tensor_unfold():
    """Sliding windows along the width, each flattened with the channels."""

    def step(self, x):
        return x.unfold(3, 4, 3).permute(0, 1, 4, 2, 3).flatten(1, 2)

    return between(step, 7, 28)


@graph(targets=AB, min_removed=0.4)
def tensor_unfold_channels_sum():
    """Overlapping windows of two neighbours along channels, taken apart again by parity."""

    def step(self, x):
        windows = x.unfold(1, 2, 2)
        return windows[..., 0] * windows[..., 1]

    return between(step, 14, 7)


@graph(targets=AB, min_removed=0.4)
def repeat():
    return between(lambda self, x: x.repeat(1, 3, 1, 1), 7, 21)


@graph(targets=AB, min_removed=0.4)
def tile_then_bias():
    def step(self, x):
        return torch.tile(x, (2, 1, 1)) + self.shift

    return between(step, 7, 14, shift=parameter(14, 1, 1))


@graph(targets=AB, min_removed=0.4)
def repeat_interleave():
    return between(lambda self, x: x.repeat_interleave(3, dim=1), 7, 21)


@graph(targets=AB, min_removed=0.4)
def expand_then_flatten():
    def step(self, x):
        return x.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2)

    return between(step, 7, 21)


@graph(targets=AB, min_removed=0.4)
def expand_map_from_vector():
    def forward(self, x):
        x = self.a(x)[:, :, None, None].expand(-1, -1, 4, 5)
        return self.head(pool(self.b(x).relu()))

    return net(forward, a=linear(10, 14), b=conv(14, 20), head=linear(20, 5)), features()


@graph(targets=("a.weight", "b.weight"), min_removed=0.2)
def shortcut_padded_on_one_side():
    """ResNet option A: a strided identity, padded with zero channels at the end."""

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 11))
        return self.head(pool(y.relu()))

    return net(forward, a=conv(3, 12), b=conv(12, 23, stride=2), head=linear(23, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.2)
def shortcut_padded_on_both_sides():
    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 5), "constant", 0)
        return self.head(pool(y.relu()))

    return net(forward, a=conv(3, 12), b=conv(12, 21, stride=2), head=linear(21, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.2)
def shortcut_padded_by_cat_of_zeros():
    def forward(self, x):
        x = self.a(x).relu()
        y = torch.cat([x, x.new_zeros(x.shape[0], 7, *x.shape[2:])], 1)
        return self.head(pool((self.b(x) + y).relu()))

    return net(forward, a=conv(3, 12), b=conv(12, 19), head=linear(19, 5)), image()


@graph(targets=AB, min_removed=0.4)
def crop_channels_by_negative_pad():
    return between(lambda self, x: F.pad(x, (0, 0, 0, 0, -2, -3)), 14, 9)


@graph(targets=AB, min_removed=0.4)
def space_to_depth():
    def step(self, x):
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(b, c * 4, h // 2, w // 2)

    return between(step, 7, 28)


@graph(targets=AB, min_removed=0.4)
def depth_to_space():
    def step(self, x):
        b, c, h, w = x.shape
        x = x.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(b, c // 4, h * 2, w * 2)

    return between(step, 28, 7)


@graph(targets=AB, min_removed=0.4)
def patch_merging_by_slices():
    """Swin: the four corners of every 2x2 patch, joined along channels."""

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2, :]]
        return self.head(self.b(torch.cat(corners, -1)).relu().mean((1, 2)))

    return net(forward, a=conv(3, 7), b=linear(28, 20, bias=False), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def patch_merging_by_permute():
    """(b (h p) (w q) c) -> (b (h w) (q p c)), in six dimensions."""

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5)
        return self.head(self.b(x.reshape(b, -1, 4 * c)).relu().mean(1))

    return net(forward, a=conv(3, 7), b=linear(28, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def patch_expanding():
    """Swin-UNet: a linear's outputs become a 2x2 patch of fewer channels."""

    def forward(self, x):
        x = self.a(x.permute(0, 2, 3, 1))
        b, h, w, _ = x.shape
        x = x.view(b, h, w, 2, 2, 7).permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 7)
        return self.head(self.b(x).relu().mean((1, 2)))

    return net(forward, a=linear(3, 28), b=linear(7, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def shift_groups_of_channels():
    """S2-MLP: every quarter of the channels moves one pixel in its own direction."""

    def step(self, x):
        p, q, r, s = x.chunk(4, 1)
        return torch.cat([p.roll(1, 2), q.roll(-1, 2), r.roll(1, 3), s.roll(-1, 3)], 1)

    return between(step, 20, 20)


@graph(stats=True, targets=("a.weight", "b.weight", "c.weight"), min_removed=0.4)
def groups_gated_whole_and_their_maxima():
    """A gate for each group makes the group one unit; its maximum over the group goes with it."""

    def forward(self, x):
        x = self.a(x).unflatten(1, (6, 4)) * self.gate.view(6, 1)
        return self.head(torch.cat([self.b(x.amax(2)).relu(), self.c(x.flatten(1)).relu()], 1))

    parts = {"a": linear(10, 24), "gate": parameter(6), "b": linear(6, 12), "c": linear(24, 12)}
    return net(forward, **parts, head=linear(24, 5)), features()


@graph(stats=True, targets=("a.weight", "b.weight"), min_removed=0.4)
def groups_normalised_by_hand():
    """The statistic of a group goes back to the channels of its group, which go one by one."""

    def forward(self, x):
        x = self.a(x).unflatten(1, (6, 4))
        x = (x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 0.1)
        return self.head(self.b(x.flatten(1)).relu())

    return net(forward, a=linear(10, 24), b=linear(24, 20), head=linear(20, 5)), features()
