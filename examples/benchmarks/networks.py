"""The networks of `accuracy.py` and `fronts.py`, small enough to be trained on a processor."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def build(name: str) -> nn.Module:
    return {"resnet20": ResNet20, "vit": ViT, "mobilenet": MobileNet}[name]()


class Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = nn.Sequential()
        if stride > 1 or before != width:
            self.skip = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.skip(x))


class ResNet20(nn.Module):
    """Three stages of three blocks, as for CIFAR (He et al., arXiv:1512.03385), on 28 x 28 pixels halved by the stem."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width] * 3 + [2 * width] * 3 + [4 * width] * 3
        befores = [width, *widths[:-1]]
        self.blocks = nn.Sequential(*(Block(a, b, 1 + (b > a)) for a, b in zip(befores, widths)))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Written so that narrower heads need no change: Torch-Pruning does not rewrite a forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer (arXiv:2010.11929) on 7 x 7 patches of 4 x 4 pixels, with the mean of the tokens at the end."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, hidden: int = 192, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.layers = nn.Sequential(*(Layer(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


class Inverted(nn.Module):
    def __init__(self, before: int, width: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        inside = expansion * before
        self.adds = stride == 1 and before == width
        self.expand, self.norm1 = nn.Conv2d(before, inside, 1, bias=False), nn.BatchNorm2d(inside)
        self.depthwise, self.norm2 = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False), nn.BatchNorm2d(inside)
        self.project, self.norm3 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.norm2(self.depthwise(F.relu6(self.norm1(self.expand(x))))))
        out = self.norm3(self.project(out))
        return x + out if self.adds else out


class MobileNet(nn.Module):
    """Inverted residuals with linear bottlenecks (MobileNetV2, arXiv:1801.04381) on 28 x 28 pixels halved by the stem."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 24, 32, 32, 48), last: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU6())
        strides = [1, *(1 + (b > a and b < widths[-1]) for a, b in pairwise(widths))]
        self.blocks = nn.Sequential(*(Inverted(a, b, s) for a, b, s in zip((widths[0], *widths), widths, strides)))
        self.last = nn.Sequential(nn.Conv2d(widths[-1], last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6())
        self.head = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(images))).mean((2, 3)))
