"""In-place operations, slice assignment, masks and element-wise choices."""

import torch
from torch import nn
from torch.nn import functional as F

from .indexing import between
from .registry import buffer, conv, features, graph, image, linear, net, parameter, pool, tokens

AB = ("a.weight", "b.weight")
ABC = ("a.weight", "b.weight", "c.weight")


def branches(step, read=14, left=14, right=14, **parts):
    """Two convolutions of the input -> ``step`` -> conv c -> head."""

    def forward(self, x):
        return self.head(pool(self.c(step(self, self.a(x), self.b(x))).relu()))

    layers = {"a": conv(3, left), "b": conv(3, right), "c": conv(read, 20), "head": linear(20, 5)}
    return net(forward, **layers, **parts), image()


@graph(targets=ABC, min_removed=0.4)
def inplace_chain():
    def step(self, x, y):
        x = self.act(x)
        x += y
        x.mul_(self.scale).add_(1).clamp_(max=3)
        return x

    return branches(step, act=nn.ReLU(inplace=True), scale=parameter(14, 1, 1))


@graph(targets=ABC, min_removed=0.4)
def inplace_out_of_sight():
    """The result of the call is thrown away; the tensor has changed all the same."""

    def step(self, x, y):
        x.add_(y)
        torch.relu_(x)
        return x

    return branches(step)


@graph(targets=ABC, min_removed=0.4)
def inplace_through_a_view():
    def step(self, x, y):
        view = x.view(x.shape[0], 7, 2, 6, 10)
        view[:, :, 1] *= 3
        view.add_(y.view_as(view))
        return x

    return branches(step)


@graph(targets=(*AB, "c.weight"), min_removed=0.4)
def assign_into_zeros():
    def step(self, x, y):
        joined = torch.zeros(x.shape[0], 23, 6, 10, dtype=x.dtype)
        joined[:, :9] = y
        joined[:, 9:] = x
        return joined

    return branches(step, read=23, right=9)


@graph(targets=ABC, min_removed=0.4)
def assign_into_new_empty():
    def step(self, x, y):
        joined = x.new_empty(x.shape[0], x.shape[1] + y.shape[1], *x.shape[2:])
        joined[:, : x.shape[1]] = x
        joined[:, x.shape[1] :].copy_(y)
        return joined

    return branches(step, read=23, right=9)


@graph(targets=ABC, min_removed=0.4)
def assign_last_channels():
    def step(self, x, y):
        x = x.relu()
        x[:, 5:] = y
        return x

    return branches(step, right=9)


@graph(targets=ABC, min_removed=0.4)
def add_to_first_channels():
    def step(self, x, y):
        x = x.relu()
        x[:, :5] += y
        return x

    return branches(step, right=5)


@graph(targets=ABC, min_removed=0.4)
def assign_every_other_channel():
    def step(self, x, y):
        x = x.clone()
        x[:, 1::2] = y * x[:, ::2]
        return x

    return branches(step, right=7)


@graph(targets=ABC, min_removed=0.4)
def assign_by_index_list():
    def step(self, x, y):
        x = x.clone()
        x[:, [9, 2, 4]] = y
        return x

    return branches(step, right=3)


@graph(targets=AB, min_removed=0.4)
def zero_some_channels():
    def step(self, x):
        x = x * 1
        x[:, 3:6] = 0
        x[:, -2:].fill_(0.5)
        return x

    return between(step, 14, 14)


@graph(targets=AB, min_removed=0.4)
def assign_shifted_in_space():
    """TSM: a quarter of the channels from the next frame, a quarter from the last, the rest as they were."""

    def forward(self, x):
        x = self.a(x)
        shifted = torch.zeros_like(x)
        shifted[:, :-1, :4] = x[:, 1:, :4]
        shifted[:, 1:, 4:8] = x[:, :-1, 4:8]
        shifted[:, :, 8:] = x[:, :, 8:]
        return self.head(self.b(shifted).relu())

    return net(forward, a=linear(10, 18), b=linear(18, 20), head=linear(20, 5)), tokens()


@graph(targets=AB, min_removed=0.4)
def masked_fill():
    return between(lambda self, x: x.masked_fill(x > 0.5, -1.0), 14, 14)


@graph(targets=AB, min_removed=0.4)
def masked_fill_for_each_channel():
    mask = nn.Buffer((torch.arange(14) % 3 == 1).view(14, 1, 1))
    return between(lambda self, x: x.masked_fill(self.mask, 0.3), 14, 14, mask=mask)


@graph(targets=(*ABC, "choice"), min_removed=0.4)
def where_for_each_channel():
    def step(self, x, y):
        return torch.where(self.choice > 0, x, y)

    return branches(step, choice=buffer(14, 1, 1))


@graph(targets=ABC, min_removed=0.4)
def where_for_each_pixel():
    return branches(lambda self, x, y: torch.where(x[:, :, :1] > y, x, 0.1))


@graph(targets=(*AB, "low", "high"), min_removed=0.4)
def clamp_by_tensors():
    def step(self, x):
        return torch.clamp(x, min=self.low.abs() * 0.3, max=self.high.abs() + 0.5)

    return between(step, 14, 14, low=parameter(14, 1, 1), high=buffer(1, 14, 1, 1))


@graph(targets=(*ABC, "share"), min_removed=0.4)
def lerp():
    return branches(lambda self, x, y: torch.lerp(x, y, self.share[:, None, None].sigmoid()), share=parameter(14))


@graph(targets=(*ABC, "scale"), min_removed=0.4)
def addcmul_and_addcdiv():
    def step(self, x, y):
        x = torch.addcmul(x, y, self.scale, value=0.7)
        return torch.addcdiv(x, y, 1 + self.scale.square())

    return branches(step, scale=parameter(1, 14, 1, 1))


@graph(targets=("a.weight", "low", "head.weight"), min_removed=0.4)
def maximum_with_parameter():
    def forward(self, x):
        return self.head(torch.maximum(self.a(x), self.low) - torch.fmin(self.a(x), self.low))

    return net(forward, a=linear(10, 14), low=parameter(14), head=linear(14, 5)), features()


def hidden():
    return torch.tensor([[0, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)


@graph(targets=("a.weight", "head.weight"), min_removed=0.3)
def fill_masked_tokens_with_parameter():
    """Masked autoencoders: hidden tokens are replaced by one learned one."""

    def forward(self, x, hidden):
        x = self.a(x)
        x = torch.where(hidden.unsqueeze(-1), self.token.to(x.dtype), x)
        return self.head(x.relu())

    model = net(forward, a=linear(10, 14), token=parameter(1, 1, 14), head=linear(14, 5))
    return model, {"x": tokens(), "hidden": hidden()}


@graph(targets=("a.weight", "token", "head.weight"), min_removed=0.3)
def write_parameter_where_an_input_says():
    """The same by assignment, as for augmentation of spectra; the mask has fewer dimensions than what it chooses from."""

    def forward(self, x, hidden):
        x = self.a(x)
        x[hidden] = self.token.to(x.dtype)
        return self.head(x.relu())

    model = net(forward, a=linear(10, 14), token=parameter(14), head=linear(14, 5))
    return model, {"x": tokens(), "hidden": hidden()}


@graph(targets=AB, min_removed=0.3)
def write_rows_where_an_input_says():
    def forward(self, x, hidden):
        y = self.b(x)[hidden].tanh()
        x = self.a(x)
        x[hidden] = y
        return self.head(x.relu())

    model = net(forward, a=linear(10, 14), b=linear(10, 14), head=linear(14, 5))
    return model, {"x": tokens(), "hidden": hidden()}


@graph(targets=AB, min_removed=0.3)
def write_where_another_is_large():
    """A mask over channels too, computed from other channels: they go together."""

    def forward(self, x):
        y = self.b(x)
        x = self.a(x)
        x[y > 0.5] = -1.0
        return self.head(x.relu()) + self.read(y)

    return net(forward, a=linear(10, 14), b=linear(10, 14), head=linear(14, 5), read=linear(14, 5)), tokens()


@graph(targets=("b.weight",), min_removed=0.15)
def write_values_in_the_order_of_a_mask():
    """As many values as the mask has places, channels and all: what goes where depends on all of it."""

    def forward(self, x):
        y = self.b(x)
        x = self.a(x)
        x[x > 0.5] = x[x > 0.5].flip(0)
        return self.head(x.relu()) + self.read(y)

    return net(forward, a=linear(10, 14), b=linear(10, 14), head=linear(14, 5), read=linear(14, 5)), tokens()


@graph(targets=AB, min_removed=0.3)
def copy_into_token_zero():
    def forward(self, x):
        x = self.a(x)
        x[:, 0] = self.b(x[:, 1:].mean(1))
        return self.head(x.relu())

    return net(forward, a=linear(10, 14), b=linear(14, 14), head=linear(14, 5)), tokens()


@graph(targets=("b.weight", "head.weight"), min_removed=0.2)
def strided_view_written_later():
    """A view of every second channel is written into: as a copy of what is left it would leave its source as it was."""

    def forward(self, x):
        x = self.a(x)
        x[:, 1:10:2].mul_(0.5)
        every = x[:, ::3]
        every.add_(1)
        return self.head(pool(self.b(x).relu()))

    return net(forward, a=conv(3, 12), b=conv(12, 20), head=linear(20, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def roll_by_nothing_then_source_written():
    """A roll is a copy, also where every channel stays at its place."""

    def forward(self, x):
        x = self.a(x)
        y = x.roll(0, 1)
        x.tanh_()
        return self.head(pool(self.b(y) * self.b(x)))

    return net(forward, a=conv(3, 12), b=conv(12, 20), head=linear(20, 5)), image()


@graph(stats=True, targets=("a.weight", "b.weight"), min_removed=0.4)
def zeros_filled_then_normalised():
    """Of one image, whose batch dimension other sizes fold into channels."""

    def forward(self, x):
        x = self.a(x)
        y = torch.zeros(x.shape[0], 24, x.shape[2], x.shape[3], dtype=x.dtype)
        y[:, :12] = x
        y[:, 12:] = F.pad(x, (0, 0, 0, 0, 2, 0), value=0.5)[:, :12].softmax(1)
        return self.head(pool(self.b(self.norm(y)).relu()))

    layers = {"a": conv(3, 12), "norm": nn.InstanceNorm2d(24, affine=True), "b": conv(24, 20), "head": linear(20, 5)}
    return net(forward, **layers), image()[:1]


@graph(targets=("a.weight", "b.weight"), min_removed=0.3)
def repeated_then_a_few_written():
    """What is written to is made of few channels and few copies, which do not all go together."""

    def forward(self, x):
        x = self.a(x).unsqueeze(2).expand(-1, -1, 3).flatten(1)
        x[:, 1:4] += x[:, 1:4].sigmoid()
        return self.head(self.b(x).relu())

    return net(forward, a=linear(10, 7), b=linear(21, 20), head=linear(20, 5)), features()


@graph(targets=("b.weight", "head.weight"), min_removed=0.2)
def strided_view_of_what_is_written_later():
    """A view of every second channel shows what is put into its source after it was taken."""

    def forward(self, x):
        x = self.a(x)
        every = x[:, ::2]
        x.clamp_(max=0.3)
        return self.head(pool(self.b(every).relu()))

    return net(forward, a=conv(3, 12), b=conv(6, 20), head=linear(20, 5)), image()
