"""Sums over segments, as graph networks take them: constants and indices that meet heads."""

import torch
from torch import nn

from .registry import features, graph, index, linear, net, parameter

NODES = (0, 2, 1, 2, 2, 0)


def attended(forward, **parts):
    parts |= {"a": linear(10, 24), "head": linear(24, 5), "into": index(*NODES)}
    return net(forward, **parts), features(batch=6)


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def segments_added_by_index_add():
    def forward(self, x):
        x = self.a(x).view(-1, 4, 6)
        return self.head(x.new_zeros(3, 4, 6).index_add_(0, self.into, x).flatten(1))

    return attended(forward)


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def segments_added_by_an_expanded_index():
    def forward(self, x):
        x = self.a(x).view(-1, 4, 6)
        to = self.into.view(-1, 1, 1).expand_as(x)
        return self.head(torch.zeros(3, 4, 6, dtype=x.dtype).scatter_add(0, to, x).flatten(1))

    return attended(forward)


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def zeros_added_to_heads():
    def forward(self, x):
        x = self.a(x).view(-1, 4, 6) + torch.zeros(4, 6, dtype=x.dtype)
        return self.head(x.tanh().flatten(1))

    return attended(forward)


def graph_attention(self, x):
    x = self.a(x).view(-1, 4, 6)
    score = (x * self.query).sum(-1)
    to = self.into.view(-1, 1).expand_as(score)
    most = score.new_zeros(3, 4).scatter_reduce_(0, to, score, "amax", include_self=False)
    score = (score - most[self.into]).exp()
    score = score / score.new_zeros(3, 4).scatter_add_(0, to, score)[self.into]
    x = x * score.unsqueeze(-1)
    return x.new_zeros(3, 4, 6).scatter_add_(0, self.into.view(-1, 1, 1).expand_as(x), x).flatten(1)


@graph(stats=True, targets=("a.weight", "query", "head.weight"), min_removed=0.3)
def graph_attention_by_segments():
    return attended(lambda self, x: self.head(graph_attention(self, x)), query=parameter(1, 4, 6))


class Convolution(nn.Module):
    """Edges that data choose are left out: one opaque node. Constants have the sizes of what they meet, or of an attribute."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.lin, self.query, self.own, self.into = linear(10, 24), parameter(1, 24), own, index(*NODES)

    def forward(self, x):
        x = self.lin(x)
        edges = self.into[self.into.ne(1)] if bool(x.new_ones(1) > 0) else self.into
        weight = (x * self.query).sum(-1, keepdim=True).sigmoid()
        x = (x * weight)[self.into.ne(1)]
        out = x.new_zeros(3, *x.shape[1:]) if self.own else torch.zeros((3, x.size(-1)), dtype=x.dtype)
        return out.scatter_add_(0, edges.view(-1, 1).expand_as(x), x)


@graph(args=(True,), targets=("conv.lin.weight", "conv.query", "head.weight"), min_removed=0.4)
@graph("opaque_segments_by_size", args=(False,), targets=("conv.lin.weight", "conv.query", "head.weight"), min_removed=0.4)
def opaque_segments_by_shape(own):
    return net(lambda self, x: self.head(self.conv(x).relu()), conv=Convolution(own=own), head=linear(24, 5)), features(batch=6)


class ByNumPy(nn.Module):
    """What Python reads (a period, as in TimesNet) is kept whole, and the rest of the module is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(24, 16), linear(16, 24)

    def forward(self, x):
        order = x.detach().square().mean(1).argsort().numpy()
        x = self.second(self.first(x).relu())
        return x * (1 + int(order[0] < 100))


@graph(stats=True, targets=("a.weight", "block.first.weight", "block.second.weight", "head.weight"), min_removed=0.4)
def opaque_that_reads_by_numpy():
    return attended(lambda self, x: self.head(self.block(self.a(x).relu())), block=ByNumPy())
