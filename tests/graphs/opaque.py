"""Programs that read values, and functions whose inside nothing can watch."""

import torch
from torch import nn

from .registry import conv, graph, image, linear, net, parameter, pool, tokens

AB = ("a.weight", "b.weight")


class Attention(nn.Module):
    """Attention that reads a value and keeps its sizes in attributes: one opaque node."""

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, size, heads * size
        self.scale = size**-0.5
        self.qkv, self.proj = linear(dim, 3 * heads * size), linear(heads * size, dim)

    def forward(self, x):
        b, n, _ = x.shape
        if x.abs().max() > 1e6:
            raise ValueError("the input has exploded")
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        x = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.inner)
        return self.proj(x)


@graph(
    targets=("a.weight", "attention.qkv.bias", "attention.proj.bias"),
    heads={"attention.qkv": 4},
    min_removed=0.4,
)
def opaque_attention_with_static_heads():
    def forward(self, x):
        x = self.a(x)
        return self.head(x + self.attention(x))

    return net(forward, a=linear(10, 14), attention=Attention(14, 4, 6), head=linear(14, 5)), tokens()


class Branching(nn.Module):
    """Which convolution runs depends on the values of the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = conv(channels, 9), conv(9, channels)

    def forward(self, x):
        if x.sum() > -1e9:
            x = self.two(self.one(x).relu())
        return x.tanh()


@graph(targets=("a.weight", "branch.one.weight", "branch.two.weight"), min_removed=0.4)
def branch_on_values_inside():
    def forward(self, x):
        return self.head(pool(self.branch(self.a(x))))

    return net(forward, a=conv(3, 14), branch=Branching(14), head=linear(14, 5)), image()


@graph(targets=("a.weight", "branch.one.weight"), min_removed=0.4)
def branch_on_values_inside_twice():
    """The same opaque module is called on two tensors."""

    def forward(self, x):
        x = self.a(x)
        return self.head(pool(self.branch(x) + self.branch(x.relu())))

    return net(forward, a=conv(3, 14), branch=Branching(14), head=linear(14, 5)), image()


@graph(targets=AB, min_removed=0.4)
def branch_on_values_in_the_root():
    def forward(self, x):
        x = self.a(x).relu()
        if x.mean() < 1e6:
            x = x * 2
        return self.head(pool(self.b(x)))

    return net(forward, a=conv(3, 12), b=conv(12, 20), head=linear(20, 5)), image()


@graph(targets=AB, min_removed=0.4)
def value_read_with_item():
    def forward(self, x):
        x = self.a(x).relu()
        x = x / (1 + int(x.shape[0] > 1) + float(self.temperature.item() ** 2))
        return self.head(pool(self.b(x)))

    parts = {"a": conv(3, 12), "b": conv(12, 20), "head": linear(20, 5)}
    return net(forward, **parts, temperature=parameter(1)), image()


@graph(targets=AB, min_removed=0.4)
def constants_made_after_a_value_was_read():
    """An opaque program makes tensors of its own, out of numbers that are no contents of tensors."""

    def forward(self, x):
        x = self.a(x).relu()
        count = torch.zeros((), dtype=x.dtype)
        if x.mean() < 1e6:
            count = count + torch.tensor([2.0, 3.0], dtype=x.dtype).sum()
        return self.head(pool(self.b(x * count))), count

    return net(forward, a=conv(3, 12), b=conv(12, 20), head=linear(20, 5)), image()


class Recentred(nn.Module):
    """Takes statistics out of torch and back in: which channel a number came from is lost."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = parameter(channels)

    def forward(self, x):
        total = torch.tensor(x.square().mean((0, 2, 3)).tolist(), dtype=x.dtype).sum()
        return x / total + self.bias.view(1, -1, 1, 1)


@graph(targets=("b.weight",), min_removed=0.2)
def contents_taken_out_and_back_in():
    def forward(self, x):
        return self.head(pool(self.b(self.norm(self.a(x).sigmoid())).relu()))

    return net(forward, a=conv(3, 12), norm=Recentred(12), b=conv(12, 20), head=linear(20, 5)), image()


class Swish(torch.autograd.Function):
    """Memory-efficient SiLU, as EfficientNets carry it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class Project(torch.autograd.Function):
    """A linear layer with its own backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class NumpyCube(torch.autograd.Function):
    """Element by element, but through numpy, where nothing can be watched."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3 + 0.5).to(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2


class NumpyFlip(torch.autograd.Function):
    """The channels in reverse order, through numpy: only gradients can tell."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy()[:, ::-1].copy()).to(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(1)


class NumpyProject(torch.autograd.Function):
    """A linear layer through numpy: every output reads every input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T).to(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


@graph("function_elementwise", args=(Swish,), targets=AB, min_removed=0.4)
@graph("function_elementwise_numpy", args=(NumpyCube,), targets=AB, min_removed=0.4)
# which place a hidden function moves a channel to at another width is unknown: what enters it stays whole
@graph("function_flip_numpy", args=(NumpyFlip,), targets=("b.weight",), min_removed=0.2)
def custom_function(function):
    def forward(self, x):
        return self.head(pool(self.b(function.apply(self.a(x)))))

    return net(forward, a=conv(3, 12), b=conv(12, 20), head=linear(20, 5)), image()


@graph("function_matmul", args=(Project,), targets=("a.weight", "weight"), min_removed=0.4)
@graph("function_matmul_numpy", args=(NumpyProject,), targets=("b.weight",), min_removed=0.2)
def custom_function_with_weight(function):
    def forward(self, x):
        x = function.apply(self.a(x).relu(), self.weight)
        return self.head(self.b(x.relu()).relu())

    parts = {"a": linear(10, 14), "weight": parameter(9, 14), "b": linear(9, 22), "head": linear(22, 5)}
    return net(forward, **parts), tokens()


class Computing(nn.Module):
    """Sizes are computed from attributes where they are needed, and one of them is the size of nothing."""

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.width = heads, heads * size
        self.scale = size**-0.5
        self.qkv, self.proj = linear(dim, 3 * heads * size), linear(heads * size, dim)

    def forward(self, x):
        b, n, _ = x.shape
        if x.abs().max() > 1e6:
            raise ValueError("the input has exploded")
        qkv = self.qkv(x).reshape(b, n, 3 * self.heads, self.width // self.heads).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.heads, self.heads], 1)
        x = ((q * self.scale @ k.mT).softmax(-1) @ v).transpose(1, 2)
        return self.proj(x.reshape(b, n, 1 * self.width))


@graph(targets=("a.weight", "attention.qkv.bias", "attention.proj.bias"), min_removed=0.4)
def opaque_attention_with_computed_sizes():
    def forward(self, x):
        x = self.a(x)
        return self.head(x + self.attention(x))

    return net(forward, a=linear(10, 14), attention=Computing(14, 4, 6), head=linear(14, 5)), tokens()


class WrittenOut(nn.Module):
    """The number of channels is written in the forward, which reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = linear(14, 24), linear(24, 14)

    def forward(self, x):
        if x.abs().max() > 1e6:
            raise ValueError("the input has exploded")
        x = self.inner(x).view(x.shape[0], x.shape[1], 4, 6)
        return self.outer(x.softmax(-1).reshape(x.shape[0], x.shape[1], 24))


@graph(stats=True, targets=("b.weight", "head.weight"), min_removed=0.15)
def opaque_with_sizes_written_out():
    """It would not run with fewer channels: it stays whole, and what does not pass through it is pruned."""

    def forward(self, x):
        x = self.a(x)
        return self.head(self.b(x + self.block(x)).relu())

    return net(forward, a=linear(10, 14), block=WrittenOut(), b=linear(14, 40), head=linear(40, 5)), tokens()
