"""Products of activations: excitation, spatial gates, gated linear units, mixtures."""

import torch
from torch import nn
from torch.nn import functional as F

from .indexing import between
from .registry import conv, features, graph, image, linear, net, normal, parameter, pool, tokens

A = ("a.weight",)
AB = ("a.weight", "b.weight")


@graph(targets=(*AB, "down.weight", "up.weight"), min_removed=0.4)
def squeeze_excite():
    def step(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    return between(step, 14, 14, down=conv(14, 5, 1), up=conv(5, 14, 1))


@graph(targets=(*AB, "down.weight", "up.weight"), min_removed=0.4)
def squeeze_excite_linear():
    def step(self, x):
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        y = F.hardsigmoid(self.up(self.down(y).relu())).view(b, c, 1, 1)
        return x * y.expand_as(x)

    return between(step, 14, 14, down=linear(14, 5, bias=False), up=linear(5, 14, bias=False))


@graph(targets=(*AB, "excite.weight"), min_removed=0.4)
def effective_squeeze_excite():
    def step(self, x):
        return x * F.hardsigmoid(self.excite(x.mean((2, 3), keepdim=True)))

    return between(step, 14, 14, excite=conv(14, 14, 1))


@graph(targets=("first.weight", "a.weight", "b.weight"), min_removed=0.4)
def efficient_channel_attention():
    """ECA convolves along the channels: a spatial axis there, on which neighbours must stay neighbours."""

    def forward(self, x):
        x = self.first(x)
        y = self.mix(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return self.head(pool(self.b(self.a(x * y[:, :, None, None]).relu())))

    parts = {"first": conv(3, 12), "mix": nn.Conv1d(1, 1, 3, padding=1), "a": conv(12, 14), "b": conv(14, 20)}
    return net(forward, **parts, head=linear(20, 5)), image()


@graph(targets=("a.weight", "b.weight"), min_removed=0.4)
def window_over_tokens_and_channels():
    """One kernel slides along both: what it finds of a channel stays that channel's."""

    def forward(self, x):
        x = self.a(x)
        x = x + F.conv2d(x.unsqueeze(1), self.kernel, self.bias, padding=(1, 2)).squeeze(1).tanh()
        return self.head(self.b(x).relu().mean(1))

    parts = {"a": linear(10, 14), "b": linear(14, 20), "head": linear(20, 5)}
    return net(forward, **parts, kernel=parameter(1, 1, 3, 5), bias=parameter(1)), tokens()


@graph(stats=True, targets=AB, min_removed=0.4)
def spatial_gate_max_and_mean():
    """CBAM: a map of the largest and the mean channel gates every channel."""

    def step(self, x):
        y = torch.cat([x.max(1, keepdim=True).values, torch.mean(x, 1, keepdim=True)], 1)
        return x * self.gate(y).sigmoid()

    return between(step, 14, 14, gate=conv(2, 1, 5))


@graph(targets=(*AB, "gate.weight"), min_removed=0.4)
def spatial_gate_by_conv():
    def step(self, x):
        return x * self.gate(x).sigmoid() + x

    return between(step, 14, 14, gate=conv(14, 1, 1))


@graph(targets=(*AB, "across.weight", "down.weight"), min_removed=0.4)
def outer_product_gate():
    """A gate over channels times a gate over space, broadcast against each other."""

    def step(self, x):
        return x + (self.across(x).sigmoid() * self.down(pool(x))[:, :, None, None]).tanh()

    return between(step, 14, 14, across=conv(14, 1, 1), down=linear(14, 14))


@graph(targets=(*AB, "key.weight", "one.weight", "two.weight"), min_removed=0.4)
def global_context():
    """GCNet: a softmax over space weighs the pixels, and the context is added everywhere."""

    def step(self, x):
        b, c, h, w = x.shape
        weight = self.key(x).view(b, 1, h * w).softmax(-1).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), weight).view(b, c, 1, 1)
        return x + self.two(self.one(context).relu())

    return between(step, 14, 14, key=conv(14, 1, 1), one=conv(14, 5, 1), two=conv(5, 14, 1))


@graph(targets=(*AB, "mid.weight", "rows.weight", "columns.weight"), min_removed=0.4)
def coordinate_attention():
    def step(self, x):
        _, _, h, w = x.shape
        y = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        rows, columns = self.mid(y).relu().split([h, w], 2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()

    return between(step, 14, 14, mid=conv(14, 5, 1), rows=conv(5, 14, 1), columns=conv(5, 14, 1))


@graph(targets=(*AB, "large.weight", "squeeze.weight", "excite.weight"), min_removed=0.4)
def selective_kernel():
    """SKNet: a softmax over two branches, for every channel."""

    def step(self, x):
        branches = torch.stack([x, self.large(x)], 1)
        y = self.squeeze(branches.sum(1).mean((2, 3), keepdim=True)).relu()
        weight = self.excite(y).view(x.shape[0], 2, 14, 1, 1).softmax(1)
        return (branches * weight).sum(1)

    return between(step, 14, 14, large=conv(14, 14, 5), squeeze=conv(14, 5, 1), excite=conv(5, 28, 1))


@graph(targets=("a.weight", "film.weight", "head.weight"), min_removed=0.4)
def feature_wise_modulation():
    """FiLM: scale and shift come from another input."""

    def forward(self, x, condition):
        scale, shift = self.film(condition).chunk(2, dim=-1)
        x = self.a(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return self.head(pool(x.relu()))

    model = net(forward, a=conv(3, 14), film=linear(9, 28), head=linear(14, 5))
    return model, (image(), features(9, 2))


@graph(targets=("a.weight", "a.bias", "head.weight"), min_removed=0.4)
def glu_chunk():
    def forward(self, x):
        x, gate = self.a(x).chunk(2, dim=-1)
        return self.head(x * gate.sigmoid()).mean(1)

    return net(forward, a=linear(10, 28), head=linear(14, 5)), tokens()


@graph(targets=AB, min_removed=0.4)
def glu_functional_over_channels():
    return between(lambda self, x: F.glu(x, dim=1), 28, 14)


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def geglu_module():
    def forward(self, x):
        gate, x = self.a(x).split(15, -1)
        return self.head(self.act(gate) * x)

    return net(forward, a=linear(10, 30), act=nn.GELU("tanh"), head=linear(15, 5)), tokens()


@graph(targets=("gate.weight", "up.weight", "head.weight"), min_removed=0.4)
def swiglu():
    def forward(self, x):
        return self.head(F.silu(self.gate(x)) * self.up(x))

    up, gate = linear(10, 22, bias=False), linear(10, 22, bias=False)
    return net(forward, up=up, gate=gate, head=linear(22, 5, bias=False)), tokens()


@graph(targets=("a.weight", "b.weight"), min_removed=0.3)
def spatial_gating_unit():
    """gMLP: half of the channels, mixed along tokens, gate the other half."""

    def forward(self, x):
        u, v = self.a(x).chunk(2, dim=-1)
        v = self.mix(v.transpose(-1, -2)).transpose(-1, -2)
        return self.head(self.b(u * v).relu().mean(1))

    return net(forward, a=linear(10, 28), mix=linear(7, 7), b=linear(14, 20), head=linear(20, 5)), tokens()


@graph(stats=True, targets=("a.weight",))
def maxout():
    """Whole outputs may go, or some of the four that each is the largest of."""

    def forward(self, x):
        return self.head(self.a(x).view(*x.shape[:2], 12, 4).amax(-1))

    return net(forward, a=linear(10, 48), head=linear(12, 5)), tokens()


@graph(targets=("a.weight", "b.weight", "head.weight"), min_removed=0.4)
def maxout_of_two_convs():
    def forward(self, x):
        return self.head(pool(torch.maximum(self.a(x), self.b(x))))

    return net(forward, a=conv(3, 14), b=conv(3, 14, 1), head=linear(14, 5)), image()


@graph(targets=("a.weight", "carry.weight"), min_removed=0.3)
def highway():
    def forward(self, x):
        x = self.a(x)
        carry = self.carry(x).sigmoid()
        return self.head(carry * self.b(x).relu() + (1 - carry) * x)

    parts = {"a": linear(10, 14), "b": linear(14, 14), "carry": linear(14, 14)}
    return net(forward, **parts, head=linear(14, 5)), features()


@graph(targets=("experts.0.0.weight", "experts.1.2.weight", "stem.weight"), min_removed=0.4)
def mixture_of_stacked_experts():
    def forward(self, x):
        x = self.stem(x).relu()
        choice = self.route(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head((choice.unsqueeze(-1) * outputs).sum(1))

    experts = nn.ModuleList(nn.Sequential(linear(14, 11), nn.ReLU(), linear(11, 9)) for _ in range(3))
    return net(forward, stem=linear(10, 14), route=linear(14, 3), experts=experts, head=linear(9, 5)), features()


@graph(stats=True, targets=("stem.weight", "one", "two"), min_removed=0.4)
def mixture_of_batched_experts():
    """Whole experts may go as well, and the softmax over them is a statistic."""

    def forward(self, x):
        x = self.stem(x).relu()
        choice = self.route(x).softmax(-1)
        hidden = torch.einsum("bd,edh->beh", x, self.one).relu()
        return self.head(torch.einsum("beh,ehd,be->bd", hidden, self.two, choice))

    parts = {"one": parameter(3, 14, 11), "two": parameter(3, 11, 9), "route": linear(14, 3)}
    return net(forward, stem=linear(10, 14), **parts, head=linear(9, 5)), features()


@graph(targets=("a.weight", "head.weight"), min_removed=0.4)
def bilinear_pooling():
    """Every pair of channels is a feature: one channel takes a row and a column with it."""

    def forward(self, x):
        x = self.a(x).relu().flatten(2)
        return self.head(torch.bmm(x, x.transpose(1, 2)).flatten(1) / x.shape[2])

    return net(forward, a=conv(3, 10), head=linear(100, 5)), image()


@graph(targets=("a.weight", "head.weight"), min_removed=0.3)
def gram_over_tokens():
    """Tokens against tokens: the channels are summed away."""

    def forward(self, x):
        x = self.a(x).relu()
        return self.head((x @ x.transpose(1, 2)).softmax(-1) @ x).mean(1)

    return net(forward, a=linear(10, 14), head=linear(14, 5)), tokens()


@graph(targets=("a.weight", "b.weight"), min_removed=0.3)
def similarity_of_two_towers():
    """CLIP: the embedding size may shrink, because only inner products are seen."""

    def forward(self, x, y):
        return self.a(x).relu() @ self.b(y).relu().t() * self.scale.exp()

    model = net(forward, a=linear(10, 14), b=linear(9, 14), scale=parameter(1))
    return model, (features(10), normal(4, 9))


@graph(targets=("a.weight", "pieces.weight", "head.weight"), min_removed=0.4)
def activation_of_learned_pieces():
    """DyReLU: each channel has two slopes, made of the input, and all channels share how far these may go."""

    def forward(self, x):
        slopes = self.pieces(x).view(-1, 14, 2) * self.scale
        return self.head((self.a(x).unsqueeze(-1) * slopes).amax(-1))

    parts = {"pieces": linear(10, 28), "scale": parameter(2)}
    return net(forward, a=linear(10, 14), **parts, head=linear(14, 5)), features()


@graph(targets=("a.weight", "b.weight", "c.weight", "head.weight"), min_removed=0.3)
def gated_sum_of_experts():
    """MMoE: results of all experts are stacked, multiplied by a gate for each of them, and added up."""

    def forward(self, x):
        made = torch.stack([layer(x) for layer in (self.a, self.b, self.c)])
        gates = (x @ self.gate).softmax(1).t().unsqueeze(2).expand(-1, -1, 24)
        return self.head((made * gates).sum(0))

    layers = {name: linear(10, 24) for name in "abc"}
    return net(forward, **layers, gate=parameter(10, 3), head=linear(24, 5)), features()
