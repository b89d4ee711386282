"""Tensors joined along channels, and cut into pieces."""

import torch
from torch import nn

from .registry import conv, features, graph, image, linear, net, parameter, pool, tokens

AB = ("a.weight", "b.weight")
ABC = ("a.weight", "b.weight", "c.weight")


def two_branches(join, read, left=12, right=12, **parts):
    """Two convolutions of the input -> ``join`` -> conv c -> head."""

    def forward(self, x):
        return self.head(pool(self.c(join(self, self.a(x), self.b(x)))))

    layers = {"a": conv(3, left), "b": conv(3, right, 1), "c": conv(read, 20), "head": linear(20, 5)}
    return net(forward, **layers, **parts), image()


@graph(targets=ABC, min_removed=0.5)
def cat_two():
    return two_branches(lambda self, u, v: torch.cat([u, v], 1), 23, right=11)


@graph(targets=ABC, min_removed=0.5)
def cat_then_batch_norm():
    def join(self, u, v):
        return self.norm(torch.cat([u, v.relu()], 1)).relu()

    return two_branches(join, 23, right=11, norm=nn.BatchNorm2d(23))


@graph(targets=ABC, min_removed=0.5)
def cat_same_twice():
    return two_branches(lambda self, u, v: torch.cat([u, v, u], 1), 34, right=10)


@graph(targets=ABC, min_removed=0.5)
def cat_then_slice_across():
    return two_branches(lambda self, u, v: torch.cat([u, v], 1)[:, 7:19], 12)


@graph(targets=ABC, min_removed=0.5)
def stack_then_flatten():
    return two_branches(lambda self, u, v: torch.stack([u, v], 1).flatten(1, 2), 24)


@graph(targets=ABC, min_removed=0.5)
def stack_interleaved():
    return two_branches(lambda self, u, v: torch.stack([u, v], 2).flatten(1, 2).relu(), 24)


@graph(targets=ABC, min_removed=0.5)
def stack_then_sum():
    return two_branches(lambda self, u, v: torch.stack([u, v, u * v]).sum(0), 12)


@graph(targets=ABC, min_removed=0.5)
def stack_then_max():
    return two_branches(lambda self, u, v: torch.stack([u, v], dim=-1).max(-1).values, 12)


@graph(targets=(*ABC, "head.weight"), min_removed=0.4)
def streams_mixed_by_linear():
    """One weight for each of three streams, the same for every channel."""

    def forward(self, x):
        x = torch.stack([pool(self.a(x)), pool(self.b(x)), pool(self.c(x))], -1)
        return self.head(self.mix(x).relu().squeeze(-1))

    return net(forward, a=conv(3, 12), b=conv(3, 12), c=conv(3, 12), mix=linear(3, 1), head=linear(12, 5)), image()


@graph(targets=(*ABC, "head.weight"), min_removed=0.4)
def streams_mixed_by_pointwise_convolution():
    """The convolution's channels are the streams, and its space is what the streams hold (CoaT)."""

    def forward(self, x):
        x = torch.stack([pool(self.a(x)), pool(self.b(x)), pool(self.c(x))], 1)
        return self.head(self.mix(x).relu().squeeze(1))

    parts = {"a": conv(3, 12), "b": conv(3, 12), "c": conv(3, 12), "mix": nn.Conv1d(3, 1, 1)}
    return net(forward, **parts, head=linear(12, 5)), image()


@graph("groups_joined_alone", args=(1,), targets=AB, min_removed=0.4)
@graph("groups_joined_with_themselves", args=(2,), targets=AB, min_removed=0.4)
def groups_joined(times):
    """Three groups of four channels, joined ``times`` times along the groups."""

    def forward(self, x):
        x = self.a(x).relu().unflatten(1, (3, 4))
        x = torch.cat([x * (i + 1) for i in range(times)], 1)
        return self.head(pool(self.b(x.flatten(1, 2))))

    return net(forward, a=conv(3, 12), b=conv(12 * times, 20), head=linear(20, 5)), image()


@graph(targets=ABC, min_removed=0.5)
def cat_along_width():
    return two_branches(lambda self, u, v: torch.cat([u, v], 3), 12)


@graph(targets=ABC, min_removed=0.5)
def cat_along_batch_then_shared():
    def join(self, u, v):
        u, v = self.shared(torch.cat([u, v], 0)).chunk(2, 0)
        return u * v.sigmoid()

    return two_branches(join, 9, shared=conv(12, 9))


@graph(targets=("a.weight", "c.weight"), min_removed=0.4)
def cat_with_input():
    def forward(self, x):
        return self.head(pool(self.c(torch.cat([x, self.a(x), x], 1)).relu()))

    return net(forward, a=conv(3, 12), c=conv(18, 20), head=linear(20, 5)), image()


@graph(targets=ABC, min_removed=0.4)
def cat_then_added():
    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1) + self.c(x)
        return self.head(pool(x.relu()))

    return net(forward, a=conv(3, 12), b=conv(3, 9), c=conv(3, 21), head=linear(21, 5)), image()


@graph(targets=ABC, min_removed=0.4)
def cats_misaligned_then_added():
    """Cut at 12 on one side and at 7 on the other: three families meet."""

    def forward(self, x):
        left = torch.cat([self.a(x), self.b(x)], 1)
        right = torch.cat([self.c(x), self.d(x)], 1)
        return self.head(pool((left + right).relu()))

    parts = {"a": conv(3, 12), "b": conv(3, 9), "c": conv(3, 7), "d": conv(3, 14)}
    return net(forward, **parts, head=linear(21, 5)), image()


@graph(targets=AB, min_removed=0.4)
def cat_of_flattened_maps():
    def forward(self, x):
        return self.head(torch.cat([self.a(x).flatten(1), self.b(x).flatten(1)], 1).relu())

    return net(forward, a=conv(3, 12), b=conv(3, 7, stride=2), head=linear(720 + 105, 5)), image()


@graph(targets=AB, min_removed=0.4)
def hstack_of_features():
    def forward(self, x):
        return self.head(torch.hstack((self.a(x), self.b(x), self.a(x).relu())))

    return net(forward, a=linear(10, 14), b=linear(10, 9), head=linear(37, 5)), features()


@graph(targets=("a.weight", "token"), min_removed=0.4)
def cat_learned_token():
    def forward(self, x):
        x = self.a(x)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(x.sum(1).relu())

    return net(forward, a=linear(10, 14), token=parameter(1, 1, 14), head=linear(14, 5)), tokens()


@graph(targets=AB, min_removed=0.4)
def chunk():
    def forward(self, x):
        u, v = self.a(x).relu().chunk(2, 1)
        return self.head(pool(self.b(u))), self.head_two(pool(v))

    parts = {"a": conv(3, 24), "b": conv(12, 20), "head": linear(20, 5), "head_two": linear(12, 3)}
    return net(forward, **parts), image()


@graph(targets=("a.weight", "b.weight", "c.weight", "d.weight"), min_removed=0.4)
def chunk_uneven():
    """Thirteen channels in three chunks: 5, 5 and 3."""

    def forward(self, x):
        u, v, w = torch.chunk(self.a(x).relu(), 3, dim=1)
        return self.head(pool(torch.cat([self.b(u), self.c(v), self.d(w)], 1)))

    parts = {"a": conv(3, 13), "b": conv(5, 9), "c": conv(5, 7), "d": conv(3, 11)}
    return net(forward, **parts, head=linear(27, 5)), image()


@graph(targets=ABC, min_removed=0.4)
def split_uneven():
    def forward(self, x):
        u, v = self.a(x).relu().split([5, 9], 1)
        return self.head(pool(self.b(u) + self.c(v)))

    return net(forward, a=conv(3, 14), b=conv(5, 20), c=conv(9, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def split_added():
    def forward(self, x):
        u, v, w = torch.split(self.a(x).relu(), 7, dim=1)
        return self.head(pool(self.b(u + v * w)))

    return net(forward, a=conv(3, 21), b=conv(7, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def split_by_step_with_rest():
    def forward(self, x):
        u, v, w = self.a(x).relu().split(6, dim=1)
        return self.head(pool(self.b(torch.cat([w, u * v], 1))))

    return net(forward, a=conv(3, 14), b=conv(8, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def tensor_split_at_indices():
    def forward(self, x):
        u, v, w = torch.tensor_split(self.a(x).relu(), (4, 9), dim=1)
        return self.head(pool(self.b(torch.cat([w, v, u], 1))))

    return net(forward, a=conv(3, 14), b=conv(14, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def split_at_half_of_size():
    def forward(self, x):
        x = self.a(x)
        half = x.size(1) // 2
        return self.head(pool(self.b(x[:, :half] * x[:, half:].sigmoid())))

    return net(forward, a=conv(3, 24), b=conv(12, 20), head=linear(20, 5)), image()


@graph(targets=ABC, min_removed=0.4)
def partial_convolution():
    """FasterNet: some channels are convolved, the rest pass by, and they are joined again."""

    def forward(self, x):
        u, v = torch.split(self.a(x), [4, 10], dim=1)
        x = torch.cat([self.b(u), v], 1)
        return self.head(pool(self.c(x).relu()))

    return net(forward, a=conv(3, 14), b=conv(4, 4), c=conv(14, 20, 1), head=linear(20, 5)), image()


@graph(targets=("a.weight", "b.weight", "c.weight", "d.weight"), min_removed=0.4)
def cross_stage_partial():
    """CSP: half of the channels through a residual, then joined with the other half."""

    def forward(self, x):
        u, v = self.a(x).chunk(2, dim=1)
        v = v + self.c(self.b(v).relu())
        return self.head(pool(self.d(torch.cat([u, v], 1)).relu()))

    parts = {"a": conv(3, 24), "b": conv(12, 9), "c": conv(9, 12), "d": conv(24, 20)}
    return net(forward, **parts, head=linear(20, 5)), image()


@graph(targets=("a.weight", "scales.0.weight", "scales.1.weight", "scales.2.weight"), min_removed=0.4)
def hierarchical_split():
    """Res2Net: every piece is added to the result of the one before."""

    def forward(self, x):
        pieces = torch.split(self.a(x).relu(), 6, 1)
        done = [pieces[0]]
        for layer, piece in zip(self.scales, pieces[1:], strict=True):
            done.append(layer(piece + done[-1]).relu())
        return self.head(pool(torch.cat(done, 1)))

    scales = nn.ModuleList(conv(6, 6) for _ in range(3))
    return net(forward, a=conv(3, 24), scales=scales, head=linear(24, 5)), image()


@graph(targets=("a.weight", "slopes.weight", "b.weight"), min_removed=0.4)
def cat_of_one_map_with_labelled_positions():
    """A map made of a vector's channels, joined to itself: each part has its own place for every channel."""

    def forward(self, x):
        x = self.a(x).view(-1, 6, 2, 2)
        return self.head(pool(self.b(self.slopes(torch.cat([x, x, x], 1)))))

    parts = {"a": linear(10, 24), "slopes": nn.PReLU(18), "b": conv(18, 20, 1), "head": linear(20, 5)}
    return net(forward, **parts), features()


@graph(stats=True, targets=("a.weight", "token", "b.weight"), min_removed=0.3)
def cat_of_tokens_then_slice_of_channels():
    """A slice of what each token keeps begins at one place for all of them."""

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], 1)[..., 3:11]
        return self.head(self.b(x * self.scale).relu().mean(1))

    parts = {"a": linear(10, 14), "token": parameter(1, 2, 14), "scale": parameter(8), "b": linear(8, 20)}
    return net(forward, **parts, head=linear(20, 5)), tokens()
