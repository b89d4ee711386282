"""Statistics over channels, and over everything else.

Where the statistic of a zeroed channel is not the statistic without it, zeroing is no reference (``stats``).
"""

import torch
from torch import nn
from torch.nn import functional as F

from .indexing import between
from .registry import conv, features, graph, image, linear, net, pool, tokens

AB = ("a.weight", "b.weight")


def scaled(statistic):
    """Every channel is scaled by a statistic over all of them."""
    return between(lambda self, x: x * (1 + statistic(x).tanh()), 14, 14)


@graph("mean_over_channels", args=(lambda x: x.mean(1, keepdim=True),), stats=True, targets=AB)
@graph("sum_over_channels", args=(lambda x: x.sum(1, keepdim=True),), targets=AB)
@graph("sum_over_channels_and_space", args=(lambda x: x.sum((1, 3), keepdim=True),), targets=AB)
@graph("mean_over_everything", args=(lambda x: x.mean(),), stats=True, targets=AB)
@graph("amax_over_channels", args=(lambda x: x.amax(1, keepdim=True),), stats=True, targets=AB)
@graph("amin_over_channels", args=(lambda x: (x - 1).amin(1, keepdim=True),), stats=True, targets=AB)
@graph("max_values_over_channels", args=(lambda x: torch.max(x - 2, 1, True)[0],), stats=True, targets=AB)
@graph("median_over_channels", args=(lambda x: x.median(1, keepdim=True).values,), stats=True, targets=AB)
@graph("range_over_channels", args=(lambda x: torch.sub(*(x - 2).aminmax(dim=1, keepdim=True)),), stats=True, targets=AB)
@graph("var_over_channels", args=(lambda x: x.var(1, keepdim=True),), stats=True, targets=AB)
@graph(
    "std_over_channels",
    args=(lambda x: torch.std(x, dim=1, keepdim=True, correction=0),),
    stats=True,
    targets=AB,
)
@graph("norm_over_channels", args=(lambda x: x.norm(dim=1, keepdim=True),), targets=AB)
@graph("norm_1_over_channels", args=(lambda x: torch.linalg.vector_norm(x, 1, 1, True),), targets=AB)
@graph("logsumexp_over_channels", args=(lambda x: x.logsumexp(1, keepdim=True),), stats=True, targets=AB)
@graph(
    "mean_by_size_over_channels",
    args=(lambda x: x.sum(1, keepdim=True) / x.shape[1],),
    targets=AB,
)
def statistic_over_channels(statistic):
    return scaled(statistic)


@graph(stats=True, targets=AB)
def variance_and_mean_over_channels():
    def step(self, x):
        var, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) / (var + 0.1).sqrt()

    return between(step, 14, 14)


@graph(stats=True, targets=AB)
def softmax_over_channels():
    return between(lambda self, x: x.softmax(1), 14, 14)


@graph(stats=True, targets=("a.weight", "head.weight"))
def softmax_over_features():
    def forward(self, x):
        return self.head(F.softmax(self.a(x), dim=-1) * 9)

    return net(forward, a=linear(10, 14), head=linear(14, 5)), tokens()


@graph(stats=True, targets=AB)
def log_softmax_over_channels():
    return between(lambda self, x: F.log_softmax(x, dim=1), 14, 14)


@graph(stats=True, targets=("a.weight", "head.weight"))
def softmax_in_groups_of_features():
    """Discrete latents: four categories of six classes."""

    def forward(self, x):
        return self.head(self.a(x).view(-1, 4, 6).softmax(-1).flatten(1))

    return net(forward, a=linear(10, 24), head=linear(24, 5)), features()


@graph(targets=AB)
def cumsum_over_channels():
    return between(lambda self, x: x.cumsum(1), 14, 14)


@graph(targets=("a.weight", "head.weight"))
def cumsum_over_tokens():
    def forward(self, x):
        return self.head(self.a(x).relu().cumsum(1))

    return net(forward, a=linear(10, 14), head=linear(14, 5)), tokens()


@graph(targets=("a.weight", "head.weight"))
def softmax_over_tokens():
    def forward(self, x):
        x = self.a(x)
        return self.head((x.softmax(1) * x).sum(1))

    return net(forward, a=linear(10, 14), head=linear(14, 5)), tokens()


@graph(targets=("a.weight", "head.weight"))
def statistics_pooling():
    """Speaker models: mean and deviation over time, joined."""

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(torch.cat([x.mean(2), x.std(2), x.amax(2)], 1))

    return net(forward, a=nn.Conv1d(7, 14, 3), head=linear(42, 5)), tokens(10)


@graph(targets=AB)
def generalised_mean_pooling():
    def forward(self, x):
        x = F.avg_pool2d(self.a(x).clamp(min=1e-2).pow(3.0), (6, 10)).pow(1 / 3)
        return self.head(self.b(x.flatten(1)).relu())

    return net(forward, a=conv(3, 14), b=linear(14, 20), head=linear(20, 5)), image()


@graph(targets=("b.weight",))
def sort_over_channels_stays():
    """The place a channel is sorted to depends on its value: the channels stay, the rest need not."""

    def forward(self, x):
        x = self.fixed(x).sort(1).values
        return self.head(pool(self.c(self.b(x).relu()).relu()))

    return net(forward, fixed=conv(3, 7), b=conv(7, 14), c=conv(14, 20), head=linear(20, 5)), image()


@graph(stats=True, targets=("a.weight", "b.weight", "head.weight"))
def normalised_over_channels_by_sum():
    def forward(self, x):
        x = self.a(x).sigmoid()
        x = x / x.sum(-1, keepdim=True)
        return self.head(x + self.b(x))

    return net(forward, a=linear(10, 14), b=linear(14, 14), head=linear(14, 5)), tokens()


@graph(stats=True, targets=("b.weight", "head.weight"), min_removed=0.2)
def std_of_two_channels():
    """A single one would have no spread."""

    def forward(self, x):
        x = self.a(x)
        return self.head(pool(self.b(x * x.std(1, keepdim=True)).relu()))

    return net(forward, a=conv(3, 2), b=conv(2, 20), head=linear(20, 5)), image()


@graph(stats=True, targets=("a.weight", "b.weight"), min_removed=0.3)
def means_of_groups_that_share_units():
    """Rows of which one takes back what another one lost."""

    def forward(self, x):
        x = self.a(x)
        x = x + x.flip(1)
        return self.head(self.b(x.unflatten(1, (3, 4)).mean(2)).relu() + self.c(x).relu())

    return net(forward, a=linear(10, 12), b=linear(3, 20), c=linear(12, 20), head=linear(20, 5)), features()


@graph("loss_mse", args=(F.mse_loss,), stats=True, targets=AB)
@graph("loss_smooth_l1_summed", args=(lambda x, y: F.smooth_l1_loss(x, y, reduction="sum", beta=0.5),), targets=AB)
@graph("loss_huber_of_detached", args=(lambda x, y: F.huber_loss(x, y.detach()),), stats=True, targets=AB)
@graph(
    "loss_cross_entropy_of_truths",
    args=(lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()),),
    stats=True,
    targets=AB,
)
@graph(
    "loss_cross_entropy_of_truths_by_entry",
    args=(lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), pos_weight=1 + y.abs(), reduction="none").sum(1),),
    stats=True,
    targets=AB,
)
def loss_beside_the_result(loss):
    """As a network that quantizes its code returns how far the code is from the vectors that stand for it."""

    def forward(self, x):
        x = self.a(x).relu()
        code = x.tanh() * self.scale
        return self.b(code).mean((2, 3)), loss(x, code)

    return net(forward, a=conv(3, 12), b=conv(12, 4), scale=nn.Parameter(torch.ones(12, 1, 1))), image()
