"""Channels and tokens picked, dropped, repeated and reordered by an index."""

import torch
from torch import nn

from .registry import conv, features, graph, image, index, linear, net, parameter, pool, tokens

A = ("a.weight",)
AB = ("a.weight", "b.weight")


def between(step, channels, read, **parts):
    """conv -> ``step`` -> conv -> head; ``step`` turns ``channels`` channels into ``read``."""

    def forward(self, x):
        x = step(self, self.a(x).relu())
        return self.head(pool(self.b(x)))

    return net(forward, a=conv(3, channels), b=conv(read, 20), head=linear(20, 5), **parts), image()


@graph(targets=AB, min_removed=0.4)
def index_by_list():
    return between(lambda self, x: x[:, [3, 1, 7, 0, 10, 5]], 12, 6)


@graph(targets=AB, min_removed=0.4)
def index_for_its_shape_alone():
    """What nobody reads the contents of holds no channel."""
    return between(lambda self, x: x * x[:, 5].shape[-1], 12, 12)


@graph(targets=AB, min_removed=0.4)
def select_for_its_shape_alone():
    return between(lambda self, x: x * x.select(1, 3).shape[-1], 12, 12)


@graph(targets=AB, min_removed=0.4)
def index_by_buffer():
    order = index(5, 2, 9, 0, 11, 7, 1, 3, 10, 8, 4, 6)
    return between(lambda self, x: x[:, self.order], 12, 12, order=order)


@graph(targets=AB, min_removed=0.4)
def index_with_repeats():
    return between(lambda self, x: x[:, [0, 0, 3, 5, 5, 5, 7, 9, 11, 2, 2, 4]], 12, 12)


@graph(targets=AB, min_removed=0.4)
def index_by_bool_buffer():
    keep = nn.Buffer(torch.arange(14) % 3 != 1)
    return between(lambda self, x: x[:, self.keep], 14, 9, keep=keep)


@graph(targets=AB, min_removed=0.4)
def index_select():
    order = index(9, 9, 1, 0, 4, 13, 12, 2)
    return between(lambda self, x: x.index_select(1, self.order), 14, 8, order=order)


@graph(targets=AB, min_removed=0.4)
def flip():
    return between(lambda self, x: x.flip(1), 12, 12)


@graph(targets=AB, min_removed=0.4)
def flip_everything():
    return between(lambda self, x: x.flip(3, 1, 2), 14, 14)


@graph(targets=AB, min_removed=0.4)
def flip_added():
    return between(lambda self, x: x + x.flip(1), 12, 12)


@graph(targets=AB, min_removed=0.4)
def roll():
    return between(lambda self, x: x.roll(5, 1), 12, 12)


@graph(targets=AB, min_removed=0.4)
def roll_added():
    return between(lambda self, x: x + x.roll(6, 1), 12, 12)


@graph(targets=AB, min_removed=0.4)
def roll_channels_and_space():
    return between(lambda self, x: torch.roll(x, shifts=(-3, 1, 4), dims=(1, 2, 3)), 14, 14)


@graph(targets=AB, min_removed=0.4)
def slices_strided_added():
    return between(lambda self, x: x[:, ::2] + x[:, 1::2], 20, 10)


@graph(targets=AB, min_removed=0.4)
def slice_strided():
    return between(lambda self, x: x[:, 1::3], 20, 7)


@graph(targets=AB, min_removed=0.4)
def slices_overlap():
    return between(lambda self, x: torch.cat([x[:, :9], x[:, 4:]], 1), 14, 19)


@graph(targets=AB, min_removed=0.4)
def slices_overlap_multiplied():
    return between(lambda self, x: x[:, :8] * x[:, 4:], 12, 8)


@graph(targets=AB, min_removed=0.4)
def slice_negative():
    return between(lambda self, x: x[:, -9:-2], 14, 7)


@graph(targets=AB, min_removed=0.4)
def slice_all_but_last():
    return between(lambda self, x: x[:, :-4], 14, 10)


@graph(targets=AB, min_removed=0.4)
def slices_swap_halves():
    return between(lambda self, x: torch.cat((x[:, 5:], x[:, :5]), dim=1), 14, 14)


@graph(targets=AB, min_removed=0.4)
def narrow():
    return between(lambda self, x: x.narrow(1, 3, 8), 14, 8)


@graph(targets=AB, min_removed=0.4)
def slice_through_ellipsis():
    def step(self, x):
        return x.permute(0, 2, 3, 1)[..., 2:11].permute(0, 3, 1, 2)

    return between(step, 14, 9)


@graph(targets=AB, min_removed=0.4)
def one_channel_gates_all():
    return between(lambda self, x: x * x[:, 3:4].sigmoid(), 12, 12)


@graph(targets=AB, min_removed=0.4)
def one_channel_selected():
    return between(lambda self, x: x + x.select(1, 3).unsqueeze(1), 12, 12)


@graph(targets=A, min_removed=0.3)
def slice_half_stays_the_output():
    """The first channels reach the output as they are: only the others may go."""

    def forward(self, x):
        x = self.a(x)
        return x[:, :2], self.head(pool(x[:, 2:].relu()))

    return net(forward, a=conv(3, 22), head=linear(20, 5)), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.3)
def unbind_triplet():
    def forward(self, x):
        q, k, v = self.a(x).view(x.shape[0], 3, 8).unbind(1)
        return self.head(q * k + v)

    return net(forward, a=linear(10, 24), head=linear(8, 5)), features()


@graph(targets=("a.weight", "head.weight"), min_removed=0.3)
def unbind_last_dimension():
    def forward(self, x):
        real, imaginary = self.a(x).view(x.shape[0], 9, 2).unbind(-1)
        return self.head(real.tanh() * imaginary)

    return net(forward, a=linear(10, 18), head=linear(9, 5)), features()


@graph(targets=AB, min_removed=0.3)
def select_token():
    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).select(1, 2))

    return net(forward, a=linear(10, 14), b=linear(14, 20), head=linear(20, 5)), tokens()


@graph(targets=AB, min_removed=0.3)
def gather_tokens():
    def forward(self, x):
        x = self.a(x)
        picked = self.order.view(1, 4, 1).expand(x.shape[0], -1, x.shape[-1])
        return self.head(self.b(torch.gather(x, 1, picked)).relu().mean(1))

    parts = {"a": linear(10, 14), "b": linear(14, 20), "order": index(4, 0, 6, 1)}
    return net(forward, **parts, head=linear(20, 5)), tokens()


@graph(targets=AB, min_removed=0.3)
def take_along_tokens():
    def forward(self, x):
        x = self.a(x)
        x = torch.take_along_dim(x, self.order.view(1, 3, 1), dim=1)
        return self.head(self.b(x).relu().mean(1))

    parts = {"a": linear(10, 14), "b": linear(14, 20), "order": index(5, 5, 2)}
    return net(forward, **parts, head=linear(20, 5)), tokens()


@graph(targets=AB, min_removed=0.3)
def take_along_channels_then_product():
    """The same channels everywhere: chosen as by `index_select`, and verified through a product over them."""

    def forward(self, x):
        picked = torch.tensor([9, 3, 0, 5, 6, 3]).view(1, 1, -1)
        x = torch.take_along_dim(self.a(x), picked, 2)
        return self.head(self.b(torch.tanh(x @ x.mT) @ x).relu().mean(1))

    return net(forward, a=linear(10, 12), b=linear(6, 20), head=linear(20, 5)), tokens()


@graph(targets=AB, min_removed=0.3)
def gather_channels_by_an_expanded_index():
    """An index expanded to the sizes of what it picks from leaves the batch free."""

    def step(self, x):
        reversed_order = torch.arange(11, -1, -1).view(1, -1, 1, 1).expand(x.shape)
        return x + x.gather(1, reversed_order)

    return between(step, 12, 12)


@graph(targets=AB, min_removed=0.3)
def gather_channels_by_a_buffer():
    return between(
        lambda self, x: x.gather(1, self.order.view(1, -1, 1, 1).expand(*x.shape)), 12, 12, order=index(*range(11, -1, -1))
    )


@graph(targets=AB, min_removed=0.3)
def scatter_add_tokens():
    def forward(self, x):
        x = self.a(x)
        where = self.segment.view(1, 7, 1).expand_as(x)
        x = x.new_zeros(x.shape[0], 3, x.shape[2]).scatter_add(1, where, x)
        return self.head(self.b(x).relu().mean(1))

    parts = {"a": linear(10, 14), "b": linear(14, 20), "segment": index(0, 2, 1, 1, 0, 2, 2)}
    return net(forward, **parts, head=linear(20, 5)), tokens()


@graph(targets=(*AB, "place"), min_removed=0.3)
def position_table_by_index():
    def forward(self, x):
        x = self.a(x) + self.place[self.order[: x.shape[1]]]
        return self.head(self.b(x.relu()).mean(1))

    parts = {"a": linear(10, 14), "place": parameter(9, 14), "order": index(3, 1, 4, 0, 5, 8, 2, 6, 7)}
    return net(forward, **parts, b=linear(14, 20), head=linear(20, 5)), tokens()
