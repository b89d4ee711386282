"""Parameters and buffers outside standard layers, shared ones, and weights that are computed."""

import torch
from torch import nn
from torch.nn import functional as F

from .registry import (
    buffer,
    conv,
    features,
    graph,
    image,
    linear,
    net,
    normal,
    parameter,
    pool,
    tokens,
)

AB = ("a.weight", "b.weight")


@graph(targets=("one", "two", "shift"), min_removed=0.4)
def matmul_with_parameters():
    def forward(self, x):
        return (x @ self.one + self.shift).relu() @ self.two

    return net(forward, one=parameter(10, 14), shift=parameter(14), two=parameter(14, 5)), tokens()


@graph(targets=("one", "two"), min_removed=0.4)
def einsum_with_parameters():
    def forward(self, x):
        x = torch.einsum("bchw,dc->bdhw", x, self.one).relu()
        return torch.einsum("bdhw,dk->bk", x, self.two)

    return net(forward, one=parameter(14, 3), two=parameter(14, 5)), image()


@graph(targets=("one", "two"), min_removed=0.4)
def einsum_over_two_dimensions():
    def forward(self, x):
        x = torch.einsum("b n c, c h d -> b h n d", x, self.one).relu()
        return torch.einsum("...hnd,hdk->...nk", x, self.two)

    return net(forward, one=parameter(10, 5, 7), two=parameter(5, 7, 3)), tokens()


@graph(targets=("a.weight", "kernel"), min_removed=0.4)
def tensordot_with_parameter():
    def forward(self, x):
        x = self.a(x).relu()
        return self.head(torch.tensordot(x, self.kernel, dims=([1, 3], [1, 0])).mean(1))

    return net(forward, a=conv(3, 12), kernel=parameter(10, 12, 20), head=linear(20, 5)), image()


@graph(targets=("a.weight", "weight", "shift"), min_removed=0.4)
def addmm_with_parameters():
    def forward(self, x):
        return self.head(torch.addmm(self.shift, self.a(x).relu(), self.weight, beta=0.5).relu())

    parts = {"a": linear(10, 14), "weight": parameter(14, 20), "shift": parameter(20)}
    return net(forward, **parts, head=linear(20, 5)), features()


@graph(targets=("a.weight", "weight", "shift"), min_removed=0.3)
def baddbmm_for_each_position():
    def forward(self, x):
        x = self.a(x).relu().transpose(0, 1)
        x = torch.baddbmm(self.shift, x, self.weight).transpose(0, 1)
        return self.head(x.relu().mean(1))

    parts = {"a": linear(10, 14), "weight": parameter(7, 14, 20), "shift": parameter(1, 1, 20)}
    return net(forward, **parts, head=linear(20, 5)), tokens()


@graph(targets=("a.weight", "b.weight", "pair.weight", "pair.bias"), min_removed=0.4)
def bilinear():
    def forward(self, x, y):
        return self.head(self.pair(self.a(x), self.b(y)).relu())

    layers = {"a": linear(10, 7), "b": linear(9, 11), "pair": nn.Bilinear(7, 11, 14), "head": linear(14, 5)}
    return net(forward, **layers), (features(), features(9))


@graph(targets=("a.weight", "shared.weight", "shared.bias"), min_removed=0.4)
def layer_called_twice():
    def forward(self, x):
        x = self.a(x)
        return self.head(self.shared(self.shared(x).relu()).relu())

    return net(forward, a=linear(10, 14), shared=linear(14, 14), head=linear(14, 5)), features()


@graph(targets=("a.weight", "shared.weight", "large.weight", "small.weight"), min_removed=0.4)
def conv_shared_by_levels():
    """A detection head's convolution, applied to two levels of a pyramid."""

    def forward(self, x):
        x = self.a(x).relu()
        large, small = self.large(x), self.small(x)
        return [self.head(self.shared(level).relu()) for level in (large, small)]

    layers = {"a": conv(3, 12), "large": conv(12, 9), "small": conv(12, 9, stride=2), "shared": conv(9, 14)}
    return net(forward, **layers, head=conv(14, 5)), image()


@graph(targets=("encoder.weight", "encoder.bias"), min_removed=0.3)
def autoencoder_tied():
    def forward(self, x):
        x = self.encoder(x).tanh()
        return F.linear(x, self.encoder.weight.t(), self.shift)

    return net(forward, encoder=linear(10, 14), shift=parameter(10)), features()


@graph(targets=("a.weight", "down.weight", "up.weight"), min_removed=0.4)
def low_rank():
    def forward(self, x):
        return self.head(self.up(self.down(self.a(x).relu())).relu())

    layers = {"a": linear(10, 14), "down": linear(14, 6, bias=False), "up": linear(6, 20)}
    return net(forward, **layers, head=linear(20, 5)), features()


@graph(targets=("a.weight", "u", "v"), min_removed=0.4)
def low_rank_weight_computed():
    """LoRA, merged: the weight is a sum of a matrix and a product of two."""

    def forward(self, x):
        weight = self.b.weight + 0.5 * (self.u @ self.v)
        return self.head(F.linear(self.a(x).relu(), weight, self.b.bias).relu())

    parts = {"a": linear(10, 14), "b": linear(14, 20), "u": parameter(20, 6), "v": parameter(6, 14)}
    return net(forward, **parts, head=linear(20, 5)), features()


@graph(targets=("a.weight", "b.weight", "gate"), min_removed=0.4)
def linear_weight_times_gate():
    def forward(self, x):
        x = F.linear(self.a(x).relu(), self.b.weight * self.gate.sigmoid(), self.b.bias)
        return self.head(x.relu())

    parts = {"a": linear(10, 14), "b": linear(14, 20), "gate": parameter(14), "head": linear(20, 5)}
    return net(forward, **parts), features()


@graph(targets=(*AB, "gamma", "beta"), min_removed=0.4)
def layer_scale():
    def forward(self, x):
        x = self.a(x)
        x = x + self.gamma * self.b(x.relu()) + self.beta
        return self.head(x)

    parts = {"a": linear(10, 14), "b": linear(14, 14), "gamma": parameter(14), "beta": parameter(1, 1, 14)}
    return net(forward, **parts, head=linear(14, 5)), tokens()


@graph(targets=(*AB, "shift", "scale"), min_removed=0.4)
def buffers_for_each_channel():
    def forward(self, x):
        x = (self.a(x) - self.shift) * self.scale[None, :, None, None]
        return self.head(pool(self.b(x.relu())))

    parts = {"a": conv(3, 12), "b": conv(12, 20), "shift": buffer(1, 12, 1, 1), "scale": buffer(12)}
    return net(forward, **parts, head=linear(20, 5)), image()


@graph(targets=("a.weight", "affine.0", "affine.1"), min_removed=0.4)
def parameter_list():
    def forward(self, x):
        x = self.a(x)
        for scale in self.affine:
            x = (x * scale).tanh()
        return self.head(x)

    affine = nn.ParameterList([parameter(14), parameter(1, 14)])
    return net(forward, a=linear(10, 14), affine=affine, head=linear(14, 5)), features()


@graph(targets=("a.weight", "table"), min_removed=0.4)
def parameter_cut_and_joined():
    """One flat parameter holds a scale and a shift."""

    def forward(self, x):
        scale, shift = self.table.split(14)
        return self.head((self.a(x) * scale + shift).relu())

    return net(forward, a=linear(10, 14), table=parameter(28), head=linear(14, 5)), features()


@graph(targets=("a.weight", "table"), min_removed=0.4)
def parameter_reshaped():
    def forward(self, x):
        x = self.a(x) + self.table.view(7, 14)
        return self.head(x.relu().mean(1))

    return net(forward, a=linear(10, 14), table=parameter(98), head=linear(14, 5)), tokens()


@graph(targets=("a.weight", "place"), min_removed=0.4)
def position_map_interpolated():
    def forward(self, x):
        x = self.a(x)
        place = F.interpolate(self.place, x.shape[-2:], mode="bilinear", align_corners=False)
        return self.head((x + place).relu())

    return net(forward, a=conv(3, 12), place=parameter(1, 12, 4, 5), head=conv(12, 5, 1)), image()


@graph(targets=("a.weight", "centres"), min_removed=0.4)
def distances_to_centres():
    """Prototype network: squared distances, so both sides must keep the same dimensions."""

    def forward(self, x):
        x = self.a(x)
        return -(x.unsqueeze(1) - self.centres.unsqueeze(0)).square().sum(-1)

    return net(forward, a=linear(10, 14), centres=parameter(5, 14)), features()


@graph(targets=("a.weight", "codes"), min_removed=0.4)
def distances_to_a_codebook():
    """From 26 rows on `cdist` computes distances by a product."""

    def forward(self, x):
        return torch.cdist(self.a(x), self.codes)

    return net(forward, a=linear(10, 14), codes=parameter(26, 14)), features()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def cosine_classifier():
    def forward(self, x):
        x = F.normalize(self.a(x).relu(), dim=-1)
        return F.linear(x, F.normalize(self.head.weight, dim=1)) * 16.0

    return net(forward, a=linear(10, 14), head=linear(14, 5)), features()


@graph(targets=("mix", "a.weight", "head.weight"), min_removed=0.3)
def kronecker_weight():
    """Mixing within a channel by a broadcast product: (out, 1) * (1, in) * (out, in)."""

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(x @ (self.rows[:, None] * self.mix * self.columns[None]).t())

    parts = {"rows": parameter(20), "columns": parameter(14), "mix": parameter(20, 14)}
    return net(forward, a=linear(10, 14), **parts, head=linear(20, 5)), normal(3, 10)


@graph(targets=("a.weight", "weight", "head.weight"), min_removed=0.4)
def bmm_of_tokens_with_an_expanded_weight():
    """Tokens are made of channels, and each has its own. Copies of a weight along tokens are no heads."""

    def forward(self, x):
        x = self.a(x).view(-1, 12, 4).permute(2, 0, 1)
        x = torch.bmm(x, self.weight.expand(4, -1, -1)).relu()
        return self.head(x.mean(0))

    return net(forward, a=linear(10, 48), weight=parameter(1, 12, 20), head=linear(20, 5)), features()
