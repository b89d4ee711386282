"""Operations on space that let every channel pass."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import ops

from .indexing import between
from .registry import conv, graph, linear, net, normal, parameter, pool, tokens

AB = ("a.weight", "b.weight")


def corners(x):
    """Pooled to 2x2 and flattened, to see more than an average."""
    return F.adaptive_avg_pool2d(x, 2).repeat_interleave(3, 2).repeat_interleave(5, 3)


@graph("max_pool", args=(lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),), targets=AB, min_removed=0.4)
@graph(
    "avg_pool",
    args=(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),),
    targets=AB,
    min_removed=0.4,
)
@graph("adaptive_avg_pool", args=(corners,), targets=AB, min_removed=0.4)
@graph("adaptive_max_pool", args=(lambda x: F.adaptive_max_pool2d(x, (3, 4)),), targets=AB, min_removed=0.4)
@graph("power_pool", args=(lambda x: F.lp_pool2d(x, 2, 2),), targets=AB, min_removed=0.4)
@graph("nearest", args=(lambda x: F.interpolate(x, scale_factor=2),), targets=AB, min_removed=0.4)
@graph("bicubic", args=(lambda x: F.interpolate(x, (7, 9), mode="bicubic"),), targets=AB, min_removed=0.4)
@graph(
    "spatial_padding",
    args=(lambda x: F.pad(F.pad(x, (1, 0, 2, 1), mode="reflect"), (0, 3), value=1.5),),
    targets=AB,
    min_removed=0.4,
)
@graph(
    "space_flipped",
    args=(lambda x: x.flip(2, 3).transpose(2, 3).rot90(1, (2, 3)),),
    targets=AB,
    min_removed=0.4,
)
def passes_channels(step):
    return between(lambda self, x: step(x), 14, 14)


@graph("pool_1d", args=(lambda x: F.max_pool1d(x, 2) - F.avg_pool1d(x, 2),), targets=AB, min_removed=0.3)
@graph("resized_1d", args=(lambda x: F.interpolate(x, size=9, mode="linear"),), targets=AB, min_removed=0.3)
def passes_channels_1d(step):
    def forward(self, x):
        return self.head(self.b(step(self.a(x))).relu().mean(2))

    return net(forward, a=nn.Conv1d(7, 14, 1), b=nn.Conv1d(14, 20, 1), head=linear(20, 5)), tokens(10)


@graph(targets=AB, min_removed=0.3)
def pool_3d():
    def forward(self, x):
        x = F.interpolate(F.max_pool3d(self.a(x).relu(), 2), scale_factor=2.0, mode="trilinear")
        return self.head(self.b(x).mean((2, 3, 4)))

    return net(forward, a=nn.Conv3d(3, 14, 1), b=nn.Conv3d(14, 20, 1), head=linear(20, 5)), normal(2, 3, 4, 4, 5)


@graph(targets=AB, min_removed=0.4)
def max_unpool():
    """The places of the maxima travel beside the values."""

    def step(self, x):
        small, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(small.tanh(), places, 2) + x

    return between(step, 14, 14)


@graph(targets=(*AB, "locate.weight"), min_removed=0.4)
def spatial_transformer():
    def step(self, x):
        theta = self.locate(pool(x)).tanh().view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    return between(step, 14, 14, locate=linear(14, 6))


@graph(targets=(*AB, "offset.weight"), min_removed=0.4)
def warp_by_flow():
    def step(self, x):
        flow = self.offset(x).permute(0, 2, 3, 1).tanh()
        return F.grid_sample(x, flow, mode="bilinear", padding_mode="border", align_corners=True)

    return between(step, 14, 14, offset=conv(14, 2))


@graph(targets=AB, min_removed=0.4)
def region_pooling():
    def step(self, x):
        boxes = x.new_tensor([[0, 0, 0, 5, 4], [1, 2, 1, 9, 5], [0, 3, 0, 8, 3]])
        return ops.roi_align(x, boxes, output_size=(2, 3), spatial_scale=1.0, sampling_ratio=2)

    return between(step, 14, 14)


@graph(targets=("after.weight", "b.weight"), min_removed=0.1)
def deformable_convolution():
    """A kernel the dispatcher names but whose inside it does not show."""

    def step(self, x):
        return self.after(self.deform(x, self.offset(x).tanh()).relu()).relu()

    deform, offset = ops.DeformConv2d(7, 9, 3, padding=1), conv(7, 18)
    return between(step, 7, 14, deform=deform, offset=offset, after=conv(9, 14))


@graph(targets=AB, min_removed=0.4)
def dropout_of_every_kind():
    def step(self, x):
        x = F.dropout(self.maps(self.units(x)), 0.3, self.training)
        return F.alpha_dropout(x, 0.2, training=self.training)

    return between(step, 14, 14, units=nn.Dropout(0.4), maps=nn.Dropout2d(0.1))


class StochasticDepth(nn.Module):
    """One random number an image; nothing happens in eval mode."""

    def forward(self, x):
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8)
        return x * keep / 0.8


@graph(targets=(*AB, "inner.weight"), min_removed=0.4)
def stochastic_depth():
    def step(self, x):
        return x + self.drop(self.inner(x))

    return between(step, 14, 14, inner=conv(14, 14), drop=StochasticDepth())


@graph(targets=AB, min_removed=0.4)
def torchvision_stochastic_depth():
    def step(self, x):
        return x + ops.stochastic_depth(x.tanh(), 0.2, "row", self.training)

    return between(step, 14, 14)


@graph(targets=(*AB, "filter"), min_removed=0.4)
def fourier_filter():
    """GFNet: a learned complex filter for each channel, stored as real pairs."""

    def step(self, x):
        spectrum = torch.fft.rfft2(x, dim=(2, 3), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(spectrum, s=x.shape[-2:], dim=(2, 3), norm="ortho")

    return between(step, 14, 14, filter=parameter(14, 6, 6, 2))


@graph(targets=("a.weight", "b.weight"), min_removed=0.3)
def fourier_over_tokens():
    """FNet's mixing, along tokens only."""

    def forward(self, x):
        x = self.a(x)
        return self.head(self.b(x + torch.fft.fft(x, dim=1).real).relu())

    return net(forward, a=linear(10, 14), b=linear(14, 20), head=linear(20, 5)), tokens()


@graph(targets=("a.weight", "real", "imaginary"), min_removed=0.4)
def fourier_mixing_of_channels():
    """FNO: at every frequency the channels are mixed by a complex matrix."""

    def forward(self, x):
        x = self.a(x).permute(0, 2, 1)
        spectrum = torch.fft.rfft(x, dim=2)[..., :3]
        weight = torch.complex(self.real, self.imaginary)
        mixed = torch.einsum("bif,iof->bof", spectrum, weight)
        return self.head(torch.fft.irfft(mixed, n=7, dim=2).permute(0, 2, 1).relu())

    parts = {"a": linear(10, 14), "real": parameter(14, 20, 3), "imaginary": parameter(14, 20, 3)}
    return net(forward, **parts, head=linear(20, 5)), tokens()


@graph(targets=AB, min_removed=0.3)
def tokens_pooled_as_a_map():
    """PVT: keys and values from a map that is made smaller."""

    def forward(self, x):
        b = x.shape[0]
        x = self.a(x)
        y = x.permute(0, 2, 1).reshape(b, -1, 3, 4)
        y = F.adaptive_avg_pool2d(y, 2).reshape(b, -1, 4).permute(0, 2, 1)
        weight = (x @ self.b(y).transpose(1, 2) * 0.2).softmax(-1)
        return self.head(weight @ y)

    return net(forward, a=linear(10, 14), b=linear(14, 14), head=linear(14, 5)), tokens(10, 12)


@graph(targets=AB, min_removed=0.3)
def nested_upsample_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return between(lambda self, x: self.blur(self.up(x))[:, :, 1:-1, ::2], 14, 14, up=up, blur=nn.AvgPool2d(2, 1))
