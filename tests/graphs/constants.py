"""Sizes written as literals, and tensors made from sizes."""

import torch

from .indexing import between
from .registry import conv, features, graph, image, linear, net, parameter, pool, tokens

A = ("a.weight",)
AB = ("a.weight", "b.weight")


@graph(targets=AB, min_removed=0.4)
def zeros_added():
    return between(lambda self, x: x + torch.zeros(x.shape[0], 14, 1, 1, dtype=x.dtype), 14, 14)


@graph(targets=AB, min_removed=0.4)
def new_zeros_added():
    return between(lambda self, x: x.new_zeros((x.size(0), 14, x.size(2), 10)).add(x), 14, 14)


@graph(targets=AB, min_removed=0.4)
def as_tensor_of_a_tensor():
    return between(lambda self, x: torch.as_tensor(x) + torch.asarray(x).tanh(), 14, 14)


@graph(targets=AB, min_removed=0.4)
def new_zeros_of_nothing():
    """What is padded to a width that is there already is not padded once there are fewer channels."""

    def step(self, x):
        batch, channels, height, width = x.shape
        return torch.cat([x, x.new_zeros(batch, 14 - channels, height, width)], 1)

    return between(step, 14, 14)


@graph(targets=AB, min_removed=0.4)
def full_multiplied():
    return between(lambda self, x: x * torch.full((14, 1, 1), 0.5).to(x), 14, 14)


@graph(targets=AB, min_removed=0.4)
def ones_like_subtracted():
    return between(lambda self, x: x - torch.ones_like(x) * 0.3 + torch.full_like(x[:, :, :1], 0.1), 14, 14)


@graph(targets=AB, min_removed=0.4)
def ramp_over_channels():
    """The constant differs from channel to channel: the right ones must be kept."""
    return between(lambda self, x: x * torch.linspace(0.5, 2, 14, dtype=x.dtype)[:, None, None], 14, 14)


@graph(targets=AB, min_removed=0.4)
def arange_over_own_channels():
    def step(self, x):
        ramp = torch.arange(x.shape[1], device=x.device, dtype=x.dtype) / 7 - 1
        return x + ramp.view(1, -1, 1, 1)

    return between(step, 14, 14)


@graph(targets=AB, min_removed=0.4)
def literal_tensor_over_channels():
    def step(self, x):
        return x * torch.tensor([0.5, -1.0, 2.0, 0.3, 1.7, -0.9, 1.1], dtype=x.dtype).view(7, 1, 1)

    return between(step, 7, 7)


@graph(targets=A, min_removed=0.4)
def sinusoidal_positions():
    """A table of sines, made on the fly for the width of the tokens."""

    def forward(self, x):
        x = self.a(x)
        place = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        rate = torch.exp(torch.arange(0, 14, 2, dtype=x.dtype) * -0.3)
        table = torch.cat([torch.sin(place * rate), torch.cos(place * rate)], -1)
        return self.head((x + table).relu())

    return net(forward, a=linear(10, 14), head=linear(14, 5)), tokens()


@graph(targets=A, min_removed=0.4)
def sinusoidal_positions_interleaved():
    def forward(self, x):
        x = self.a(x)
        place = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        rate = torch.exp(torch.arange(0, 14, 2, dtype=x.dtype) * -0.3)
        table = torch.zeros(x.shape[1], 14, dtype=x.dtype)
        table[:, 0::2] = torch.sin(place * rate)
        table[:, 1::2] = torch.cos(place * rate)
        return self.head((x + table).relu())

    return net(forward, a=linear(10, 14), head=linear(14, 5)), tokens()


@graph(targets=("scale.weight", "a.weight"), min_removed=0.4)
def eye_and_diagonal():
    """A diagonal matrix made from channel scales."""

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(x @ (torch.eye(14, dtype=x.dtype) * 0.5) + x @ torch.diag_embed(self.scale(x)).mean(0))

    return net(forward, a=linear(10, 14), scale=linear(14, 14), head=linear(14, 5)), features()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def batch_times_heads_in_view():
    """One literal mixes a symbolic size with a count that shrinks."""

    def forward(self, x):
        b, n, _ = x.shape
        x = self.a(x).view(b, n, 5, 4).permute(0, 2, 1, 3).reshape(b * 5, n, 4)
        x = x.softmax(1) * x
        x = x.view(b, 5, n, 4).permute(0, 2, 1, 3).reshape(b, n, 20)
        return self.head(self.b(x).relu())

    return net(forward, a=linear(10, 20), b=linear(20, 14), head=linear(14, 5)), tokens()


@graph(targets=AB, min_removed=0.4)
def batch_times_channels_in_view():
    """Every channel as an image of its own."""

    def forward(self, x):
        b, c, h, w = self.a(x).shape
        x = self.blur(self.a(x).view(b * c, 1, h, w)).view(b, c, h, w)
        return self.head(pool(self.b(x.relu())))

    layers = {"a": conv(3, 12), "blur": conv(1, 1), "b": conv(12, 20), "head": linear(20, 5)}
    return net(forward, **layers), image()


@graph(targets=AB, min_removed=0.4)
def channels_times_pixels_in_view():
    def forward(self, x):
        b, _, h, w = x.shape
        x = self.a(x).relu().reshape(b, 7 * h * w)
        return self.head(self.b(x.view(b, 7, h * w).mean(2)))

    return net(forward, a=conv(3, 7), b=linear(7, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def slices_at_computed_thirds():
    def step(self, x):
        third = x.shape[1] // 3
        return x[:, :third] + x[:, third : 2 * third] * x[:, 2 * third :]

    return between(step, 21, 7)


@graph(targets=AB, min_removed=0.4)
def slice_by_other_tensors_size():
    """Growing shortcut: only as many channels are taken as the other has."""

    def forward(self, x):
        x, y = self.a(x), self.b(x)
        return self.head(pool((x[:, : y.shape[1]] + y).relu()))

    return net(forward, a=conv(3, 14), b=conv(3, 9), head=linear(9, 5)), image()


@graph(targets=(*AB, "scale"), min_removed=0.4)
def expand_by_literal():
    def step(self, x):
        return x * self.scale.view(1, 14, 1, 1).expand(2, 14, 6, 10)

    return between(step, 14, 14, scale=parameter(14))


@graph(targets=AB, min_removed=0.4)
def divided_by_channel_count():
    """The literal is a scale, not a size: it must not follow the channels."""
    return between(lambda self, x: x / 14 + 12 * x.tanh(), 14, 14)


@graph(targets=("b.weight",), min_removed=0.2)
def one_hot_of_constant_classes():
    """A one-hot vector of the input, as wide as the channels it is added to: they stay."""

    def forward(self, x, label):
        x = self.a(x) + torch.nn.functional.one_hot(label, 14).to(x.dtype) * 3
        return self.head(self.b(x.relu()))

    model = net(forward, a=linear(10, 14), b=linear(14, 20), head=linear(20, 5))
    return model, (features(), torch.tensor([3, 11, 6]))
