"""Embedding tables, alone and tied to the output."""

import torch
from torch import nn
from torch.nn import functional as F

from .registry import graph, linear, net, parameter, words

AB = ("a.weight", "b.weight")


@graph(targets=("table.weight", *AB), min_removed=0.3)
def embedding():
    def forward(self, x):
        return self.head(self.b(self.a(self.table(x)).relu()).mean(1))

    layers = {"table": nn.Embedding(11, 14), "a": linear(14, 20), "b": linear(20, 9), "head": linear(9, 5)}
    return net(forward, **layers), words()


@graph(targets=("table.weight", "a.weight"), min_removed=0.4)
def embedding_tied_to_output():
    """The weight that embeds words also scores them: one tensor, one set of kept dimensions."""

    def forward(self, x):
        x = self.table(x)
        x = x + self.b(self.a(x).relu())
        return F.linear(x, self.table.weight)

    return net(forward, table=nn.Embedding(11, 14), a=linear(14, 22), b=linear(22, 14)), words()


@graph(targets=("table.weight", "a.weight"), min_removed=0.4)
def embedding_tied_as_module():
    def forward(self, x):
        return self.head(self.a(self.table(x)).relu())

    model = net(forward, table=nn.Embedding(11, 14), a=linear(14, 14), head=linear(14, 11, bias=False))
    model.head.weight = model.table.weight
    return model, words()


@graph(targets=("table.weight", "a.weight"), min_removed=0.3)
def embedding_bag():
    def forward(self, x):
        return self.head(self.a(self.table(x)).relu())

    table = nn.EmbeddingBag(11, 14, mode="sum")
    return net(forward, table=table, a=linear(14, 20), head=linear(20, 5)), words()


@graph(targets=("table", "place.weight"), min_removed=0.3)
def embedding_functional_with_positions():
    def forward(self, x):
        place = torch.arange(x.shape[1], device=x.device)
        return self.head((F.embedding(x, self.table) * 14**0.5 + self.place(place)).relu())

    return net(forward, table=parameter(11, 14), place=nn.Embedding(9, 14), head=linear(14, 5)), words()
