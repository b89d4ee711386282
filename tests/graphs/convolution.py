"""Convolutions: grouped, depthwise, transposed, in other dimensions, and with computed weights."""

import torch
from torch import nn
from torch.nn import functional as F

from .registry import conv, graph, image, linear, net, normal, parameter, pool

A = ("a.weight",)
AB = ("a.weight", "b.weight")
ABC = ("a.weight", "b.weight", "c.weight")


def chain(a, b, c=None, width=20):
    """a -> relu -> b -> relu (-> c) -> head over ``width`` channels."""

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu())
        return self.head(pool(x))

    return net(forward, a=a, b=b, c=c or nn.Identity(), head=linear(width, 5)), image()


@graph(targets=(*AB, "norm.weight", "norm.running_var"), min_removed=0.5)
def conv_norm_conv():
    def forward(self, x):
        return self.head(pool(self.b(self.norm(self.a(x)).relu())))

    return net(forward, a=conv(3, 12), norm=nn.BatchNorm2d(12), b=conv(12, 20), head=linear(20, 5)), image()


@graph(targets=(*AB, "head.weight"), min_removed=0.5)
def conv_is_the_head():
    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())

    return net(forward, a=conv(3, 12), b=conv(12, 20, 1, bias=False), head=conv(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def conv_strided_dilated():
    return chain(conv(3, 12, stride=2), conv(12, 20, padding="same", dilation=2))


@graph(targets=AB, min_removed=0.4)
def conv_padding_modes():
    return chain(conv(3, 12, padding_mode="reflect"), conv(12, 20, padding_mode="circular"))


@graph(targets=(*ABC, "b.bias"), min_removed=0.4)
def group_conv():
    return chain(conv(3, 16), conv(16, 24, groups=4), conv(24, 20))


@graph(targets=ABC, min_removed=0.4)
def group_conv_twice():
    """Eight-channel groups into six-channel groups: the inner boundaries disagree."""
    return chain(conv(3, 24), conv(24, 24, groups=4), conv(24, 20, groups=2))


@graph(targets=ABC, min_removed=0.3)
def group_conv_residual():
    def forward(self, x):
        x = self.a(x)
        x = x + self.c(self.b(x).relu())
        return self.head(pool(x.relu()))

    layers = {"a": conv(3, 20), "b": conv(20, 40, groups=5), "c": conv(40, 20, 1)}
    return net(forward, **layers, head=linear(20, 5)), image()


@graph(targets=ABC, min_removed=0.4)
def depthwise():
    return chain(conv(3, 12), conv(12, 12, groups=12), conv(12, 20, 1))


@graph(targets=ABC, min_removed=0.4)
def depthwise_multiplier():
    return chain(conv(3, 7), conv(7, 21, groups=7), conv(21, 20, 1))


@graph(targets=("a.weight", "b.weight", "c.weight", "d.weight"), min_removed=0.3)
def inverted_residual():
    def forward(self, x):
        x = self.a(x)
        y = self.d(F.hardswish(self.norm(self.c(F.relu6(self.b(x))))))
        return self.head(pool(x + y))

    layers = {"a": conv(3, 10), "b": conv(10, 30, 1), "c": conv(30, 30, groups=30), "d": conv(30, 10, 1)}
    return net(forward, **layers, norm=nn.BatchNorm2d(30), head=linear(10, 5)), image()


@graph(targets=AB, min_removed=0.4)
def transposed():
    return chain(conv(3, 12), nn.ConvTranspose2d(12, 20, 3, stride=2, output_padding=1))


@graph(targets=ABC, min_removed=0.4)
def transposed_grouped():
    return chain(conv(3, 16), nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4), conv(24, 20))


@graph(targets=ABC, min_removed=0.4)
def transposed_depthwise():
    return chain(conv(3, 12), nn.ConvTranspose2d(12, 12, 2, stride=2, groups=12), conv(12, 20))


@graph(targets=ABC, min_removed=0.4)
def transposed_depthwise_multiplier():
    return chain(conv(3, 7), nn.ConvTranspose2d(7, 21, 2, groups=7, bias=False), conv(21, 20))


@graph("conv_1d", args=(nn.Conv1d, (9,)), targets=AB, min_removed=0.4)
@graph("conv_3d", args=(nn.Conv3d, (3, 4, 5)), targets=AB, min_removed=0.4)
@graph("transposed_1d", args=(nn.ConvTranspose1d, (9,)), targets=AB, min_removed=0.4)
@graph("transposed_3d", args=(nn.ConvTranspose3d, (3, 4, 5)), targets=AB, min_removed=0.4)
def other_dimensions(kind, size):
    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).flatten(2).sum(2))

    return net(forward, a=kind(3, 12, 2), b=kind(12, 20, 2), head=linear(20, 5)), normal(2, 3, *size)


@graph(targets=("a.weight", "kernel", "shift"), min_removed=0.5)
def functional_conv():
    def forward(self, x):
        x = F.conv2d(self.a(x).relu(), self.kernel, self.shift, stride=2, padding=1)
        return self.head(pool(x))

    parts = {"a": conv(3, 12), "kernel": parameter(20, 12, 3, 3), "shift": parameter(20)}
    return net(forward, **parts, head=linear(20, 5)), image()


@graph(targets=("a.weight", "kernel"), min_removed=0.45)
def functional_depthwise_by_own_size():
    def forward(self, x):
        x = self.a(x)
        x = F.conv2d(x, self.kernel, padding=1, groups=x.shape[1])
        return self.head(pool(x.relu()))

    return net(forward, a=conv(3, 14), kernel=parameter(14, 1, 3, 3), head=linear(14, 5)), image()


@graph(targets=(*AB, "gate"), min_removed=0.5)
def conv_weight_times_gate():
    def forward(self, x):
        weight = self.b.weight * self.gate.view(-1, 1, 1, 1)
        x = F.conv2d(self.a(x).relu(), weight, self.b.bias, padding=1)
        return self.head(pool(x))

    return net(forward, a=conv(3, 12), b=conv(12, 20), gate=parameter(20), head=linear(20, 5)), image()


@graph(targets=("a.weight", "experts"), min_removed=0.5)
def conv_weight_mixed_from_experts():
    """DynamicConv: a kernel for each image, run as one grouped convolution with the batch as groups."""

    def forward(self, x):
        x = self.a(x).relu()
        b, c, h, w = x.shape
        choice = self.route(pool(x)).sigmoid()
        weight = (choice @ self.experts.flatten(1)).view(b * 20, c, 3, 3)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.head(pool(x.view(b, 20, h, w).relu()))

    parts = {"a": conv(3, 12), "route": linear(12, 4), "experts": parameter(4, 20, 12, 3, 3)}
    return net(forward, **parts, head=linear(20, 5)), image()


@graph(targets=("a.weight", "b.weight", "c.weight"), min_removed=0.4)
def kernels_summed():
    """RepVGG-like: one convolution with the sum of two kernels of different size."""

    def forward(self, x):
        weight = self.b.weight + F.pad(self.c.weight, (1, 1, 1, 1))
        x = F.conv2d(self.a(x).relu(), weight, self.b.bias + self.c.bias, padding=1)
        return self.head(pool(x))

    layers = {"a": conv(3, 12), "b": conv(12, 20), "c": conv(12, 20, 1)}
    return net(forward, **layers, head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def kernel_flipped():
    def forward(self, x):
        weight = self.b.weight.transpose(0, 1).flip(2, 3)
        return self.head(pool(F.conv2d(self.a(x).relu(), weight, padding=1)))

    return net(forward, a=conv(3, 12), b=conv(20, 12, bias=False), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def pointwise_conv_as_linear():
    def forward(self, x):
        x = F.linear(self.a(x).relu().permute(0, 2, 3, 1), self.b.weight[:, :, 0, 0], self.b.bias)
        return self.head(x.mean((1, 2)))

    return net(forward, a=conv(3, 12), b=conv(12, 20, 1), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.2)
def separable_over_depth_axis():
    """Channels become the depth of a 3d convolution: they are a spatial axis there, and must stay."""

    def forward(self, x):
        x = self.mix(self.fixed(x).unsqueeze(1)).squeeze(1)
        return self.head(pool(self.b(self.a(x).relu())))

    parts = {"fixed": conv(3, 7), "mix": nn.Conv3d(1, 1, 3, padding=1), "a": conv(7, 12), "b": conv(12, 20)}
    return net(forward, **parts, head=linear(20, 5)), image()


@graph(targets=A, min_removed=0.4)
def cross_correlation():
    """Siamese tracker: one image's features are the depthwise kernel for the other's."""

    def forward(self, template, search):
        kernel, x = self.a(template).relu(), self.a(search).relu()
        b, c, h, w = x.shape
        kernel = kernel.reshape(b * c, 1, *kernel.shape[2:])
        x = F.conv2d(x.reshape(1, b * c, h, w), kernel, groups=b * c)
        return self.head(x.view(b, c, x.shape[2], x.shape[3]))

    model = net(forward, a=conv(3, 12), head=conv(12, 5, 1))
    return model, (image(3, 3, 4), image(3, 6, 10, seed=3))


@graph(targets=AB, min_removed=0.4)
def blur_by_expanded_buffer():
    """Anti-aliasing: one fixed kernel, expanded to as many channels as there are."""

    def forward(self, x):
        x = self.a(x).relu()
        x = F.conv2d(x, self.blur.expand(x.shape[1], 1, 3, 3), stride=2, padding=1, groups=x.shape[1])
        return self.head(pool(self.b(x)))

    blur = nn.Buffer(torch.empty(1, 1, 3, 3))
    return net(forward, a=conv(3, 12), blur=blur, b=conv(12, 20), head=linear(20, 5)), image()


@graph(stats=True, targets=AB, min_removed=0.4)
def grouped_conv_of_which_a_few_channels_are_read():
    """Whatever nobody reads may go first, and yet each group keeps as many channels as the others."""

    def forward(self, x):
        return self.head(pool(self.norm(self.b(self.a(x)))[:, :2].relu()))

    layers = {"a": conv(3, 10), "b": conv(10, 12, 1, groups=2, bias=False), "norm": nn.GroupNorm(1, 12)}
    return net(forward, **layers, head=linear(2, 5)), image()


@graph("grouped_conv_outputs_tied_by_group", args=(conv(12, 18, 1, groups=6),), targets=("b.weight", "c.weight"))
@graph("group_norm_groups_tied", args=(nn.GroupNorm(6, 18),), stats=True, targets=("a.weight", "b.weight", "c.weight"))
def each_group_one_unit(middle):
    """All outputs of a group are added up elsewhere, so that they go together: the group goes whole, or they stay."""

    def forward(self, x):
        x = self.b(self.a(x).relu())
        y = x[:, 0:18:3] + x[:, 1:18:3] * x[:, 2:18:3]
        return self.head(pool(self.c(x).relu())), self.other(pool(y))

    a = conv(3, 12 if isinstance(middle, nn.Conv2d) else 18)
    layers = {"a": a, "b": middle, "c": conv(18, 20), "head": linear(20, 5), "other": linear(6, 5)}
    return net(forward, **layers), image()


@graph(targets=("a.weight", "b.weight", "head.weight"), min_removed=0.3)
def groups_of_several_outputs_over_the_image():
    """Each channel of the image has a group of its own, of which some outputs go."""

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.head(pool(x))

    return net(forward, a=conv(3, 18, groups=3), b=conv(18, 18, groups=18), head=linear(18, 5)), image()
