"""Sizes and devices that Python computes: of merged dimensions, of positions, and what holds for every input."""

import torch
from torch.nn import functional as F

from .registry import conv, graph, image, index, linear, net, normal, parameter, pool, tokens

AB = ("a.weight", "b.weight")


@graph(targets=("qkv.weight",), min_removed=0.3, heads={"qkv": 4})
def batch_counted_from_merged_heads():
    """The batch is recovered by a division of a dimension that holds both it and the heads."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).reshape(3, b * 4, n, 6).unbind(0)
        out = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 6**0.5).softmax(-1), v)
        batch = out.shape[0] // 4
        return self.head(out.view(batch, 4, n, 6).transpose(1, 2).reshape(batch, n, -1)).sum(1)

    return net(forward, qkv=linear(10, 72), head=linear(24, 5)), tokens()


@graph(targets=AB, min_removed=0.4)
def positions_counted_from_the_input():
    """Rows of a table are picked by positions that are as many as the input is long."""

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0).repeat(x.shape[0], 1)
        return self.head(self.b((self.a(x) + self.table[places]).relu()).relu().mean(1))

    layers = {"a": linear(10, 24), "b": linear(24, 12), "head": linear(12, 5)}
    return net(forward, **layers, table=parameter(20, 24)), tokens()


@graph(targets=AB, min_removed=0.4)
def one_hot_positions_times_a_table():
    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        hot = F.one_hot(places, num_classes=20).to(x.dtype)
        return self.head(self.b((self.a(x) + hot @ self.table).relu()).relu().mean(1))

    layers = {"a": linear(10, 24), "b": linear(24, 12), "head": linear(12, 5)}
    return net(forward, **layers, table=parameter(20, 24)), tokens()


@graph(targets=AB, min_removed=0.4)
def branch_on_the_device():
    """A run without values must not be mistaken for the model's own device."""

    def forward(self, x):
        x = self.a(x)
        x = x.relu() if x.device.type != "meta" and not x.is_meta else x.tanh() * 2
        return self.head(pool(self.b(x).relu()))

    return net(forward, a=conv(3, 14), b=conv(14, 20), head=linear(20, 5)), normal(2, 3, 6, 10)


@graph(targets=AB, min_removed=0.3)
def mask_over_two_dimensions_written():
    def forward(self, x):
        x = self.a(x)
        x[self.picked.bool()] = 0.5
        return self.head(self.b(x).relu().mean(1))

    picked = index(*([1, 0, 0, 1, 0, 1, 0] * 2)).view(2, 7)
    return net(forward, a=linear(10, 24), b=linear(24, 12), head=linear(12, 5), picked=torch.nn.Buffer(picked)), tokens()


@graph(targets=AB, min_removed=0.4)
def keywords_with_a_gap():
    """An argument given by name after one that was left out."""

    def forward(self, x, scale=1.0, bias=None):
        x = self.a(x) * scale
        return self.head(self.b((x if bias is None else x + bias).relu()).relu().mean(1))

    model = net(forward, a=linear(10, 24), b=linear(24, 12), head=linear(12, 5))
    return model, {"x": tokens(), "bias": normal(1, seed=4)}


@graph(targets=AB, min_removed=0.4)
def copy_that_shrinks_to_a_view():
    """Two copies of two channels; with one channel left the reshape would be a view, and written to."""

    def forward(self, x):
        x = self.a(x)
        twice = x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2)
        x.clamp_(max=0.1)
        return self.head(pool(self.b(twice).relu()))

    return net(forward, a=conv(3, 2), b=conv(4, 20), head=linear(20, 5)), normal(2, 3, 6, 10)


@graph(stats=True, targets=("a.weight", "head.weight"), min_removed=0.3)
def asserted_of_channels():
    """What a forward asserts of its channels is true of the original, and may not be of what is left."""

    def forward(self, x):
        x = self.a(x)
        b, c, h, w = x.shape
        torch._assert(c % 3 == 0, "three groups")
        x = x.reshape(b, 3, c // 3, h, w)
        spread = x.var((2, 3, 4), unbiased=False, keepdim=True).add(1e-5).sqrt()
        x = x.reshape(b, c, h, w) / spread.expand(-1, 3, c // 3, h, w).reshape(b, c, h, w) * self.scale.view(1, -1, 1, 1)
        return self.head(pool(x))

    return net(forward, a=conv(3, 24), scale=parameter(24), head=linear(24, 5)), image()
