"""What transformers add to attention: shared heads, rotations, biases, windows, whole blocks."""

import torch
from torch import nn
from torch.nn import functional as F

from .registry import buffer, graph, image, linear, net, parameter, tokens

PACKED = ("qkv.weight", "head.weight")
SPLIT = ("q.weight", "k.weight", "v.weight", "head.weight")
HINT = {"qkv": 4}
HINTS = {"q": 4, "k": 4, "v": 4}


def heads_of(x, size=6):
    """(batch, tokens, channels) -> (batch, heads, tokens, size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def rotated(x, cos, sin):
    """Rotary positions, halves paired: dimension i turns with dimension i + size / 2."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[: x.shape[-2]] + turned * sin[: x.shape[-2]]


def rotated_pairs(x, cos, sin):
    """Rotary positions, neighbours paired: even with odd."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def separate(forward, queries=24, keys=24, **parts):
    layers = {"q": linear(10, queries), "k": linear(10, keys), "v": linear(10, keys)}
    return net(forward, **layers, head=linear(queries, 5), **parts), tokens()


def packed(forward, **parts):
    return net(forward, qkv=linear(10, 72), head=linear(24, 5), **parts), tokens()


@graph("rope_halves", args=(rotated, 6), targets=SPLIT, heads=HINTS, min_removed=0.4)
@graph("rope_pairs", args=(rotated_pairs, 3), targets=SPLIT, heads=HINTS, min_removed=0.4)
def rope(rotate, size):
    def forward(self, x):
        q, k, v = heads_of(self.q(x)), heads_of(self.k(x)), heads_of(self.v(x))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        return self.head(joined(F.scaled_dot_product_attention(q, k, v)))

    return separate(forward, cos=buffer(9, size), sin=buffer(9, size))


STREAMS = ("qkv.weight", "qkv_too.weight", "head.weight", "head_too.weight")


@graph("rope_halves_joint", args=(rotated, 6), targets=STREAMS, heads=HINT | {"qkv_too": 4}, min_removed=0.4)
@graph("rope_pairs_joint", args=(rotated_pairs, 3), targets=STREAMS, heads=HINT | {"qkv_too": 4}, min_removed=0.4)
def rope_of_joint_streams(rotate, size):
    """Two streams of tokens with layers of their own attend to each other, as images and texts do."""

    def forward(self, x, y):
        streams = [layer(t).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4) for layer, t in ((self.qkv, x), (self.qkv_too, y))]
        q, k, v = (torch.cat(parts, 2) for parts in zip(*streams, strict=True))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        x, y = joined(F.scaled_dot_product_attention(q, k, v)).split([x.shape[1], y.shape[1]], 1)
        return self.head(x), self.head_too(y)

    layers = {"qkv": linear(10, 72), "qkv_too": linear(9, 72), "head": linear(24, 5), "head_too": linear(24, 5)}
    return net(forward, **layers, cos=buffer(20, size), sin=buffer(20, size)), (tokens(), tokens(9, 5))


@graph("query_key_layer_norm", args=(nn.LayerNorm,), targets=SPLIT, heads=HINTS, min_removed=0.4)
@graph("query_key_rms_norm", args=(nn.RMSNorm,), targets=SPLIT, heads=HINTS, min_removed=0.4)
def query_key_norm(norm):
    """One norm over the head dimension, shared by all heads: whole heads leave it alone."""

    def forward(self, x):
        q, k, v = self.q_norm(heads_of(self.q(x))), self.k_norm(heads_of(self.k(x))), heads_of(self.v(x))
        return self.head(joined(F.scaled_dot_product_attention(q, k, v)))

    return separate(forward, q_norm=norm(6), k_norm=norm(6))


@graph(stats=True, targets=("q_norm.weight", *SPLIT), min_removed=0.4)
def query_norm_over_all_heads():
    """The norm comes before the heads are taken apart, so its statistics see them all."""

    def forward(self, x):
        q, k, v = heads_of(self.q_norm(self.q(x))), heads_of(self.k(x)), heads_of(self.v(x))
        return self.head(joined(F.scaled_dot_product_attention(q, k, v)))

    return separate(forward, q_norm=nn.LayerNorm(24))


@graph(targets=(*PACKED, "table"), heads=HINT, min_removed=0.4)
def relative_position_table():
    """Swin: a row of the table for every offset, a column for every head."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.offset.view(-1)].view(7, 7, -1).permute(2, 0, 1).contiguous()
        weight = (q * 6**-0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return self.head(joined(weight.softmax(-1) @ v))

    offset = nn.Buffer(torch.arange(7)[:, None] - torch.arange(7)[None] + 6)
    return packed(forward, table=parameter(13, 4), offset=offset)


@graph(targets=(*PACKED, "table.weight"), heads=HINT, min_removed=0.4)
def relative_position_embedding_fused():
    """T5: the table is an nn.Embedding, and the bias is the fused kernel's mask."""

    def forward(self, x):
        q, k, v = (heads_of(y) for y in self.qkv(x).chunk(3, -1))
        bias = self.table(self.offset).permute(2, 0, 1)[None]
        return self.head(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))

    offset = nn.Buffer(torch.arange(7)[:, None] - torch.arange(7)[None] + 6)
    return packed(forward, table=nn.Embedding(13, 4), offset=offset)


@graph(targets=(*PACKED, "scale", "hidden.weight", "spread.weight"), heads=HINT, min_removed=0.4)
def cosine_attention_with_computed_bias():
    """Swin v2: a temperature a head, and a small network that makes the bias from coordinates."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weight = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        weight = weight * torch.clamp(self.scale, max=1.5).exp()
        table = self.spread(self.hidden(self.where).relu())
        bias = table[self.offset.view(-1)].view(7, 7, -1).permute(2, 0, 1)
        weight = (weight + 16 * bias.sigmoid().unsqueeze(0)).softmax(-1)
        return self.head((weight @ v).transpose(1, 2).reshape(b, n, -1))

    offset = nn.Buffer(torch.arange(7)[:, None] - torch.arange(7)[None] + 6)
    network = {"hidden": linear(2, 14), "spread": linear(14, 4, bias=False), "where": buffer(13, 2)}
    return packed(forward, scale=parameter(4, 1, 1), offset=offset, **network)


def windows_of(x, size):
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, c)


def map_of(x, size, h, w):
    x = x.view(-1, h // size, w // size, size, size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, x.shape[-1])


@graph("window_partition", args=(0,), targets=("embed.weight", *PACKED), heads=HINT, min_removed=0.4)
@graph("window_shift_with_mask", args=(1,), targets=("embed.weight", *PACKED), heads=HINT, min_removed=0.4)
def window_attention(shift):
    """Swin: attention in 2x2 windows, which in every other block are cyclically shifted."""

    def forward(self, x):
        x = self.embed(x.permute(0, 2, 3, 1))
        _, h, w, _ = x.shape
        shortcut = x
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        x = windows_of(x, 2)
        windows, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(windows, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        weight = (q * 6**-0.5) @ k.transpose(-2, -1)
        if shift:
            count = self.mask.shape[0]
            weight = weight.view(windows // count, count, 4, n, n) + self.mask[None, :, None]
            weight = weight.view(-1, 4, n, n)
        x = self.out((weight.softmax(-1) @ v).transpose(1, 2).reshape(windows, n, 24))
        x = map_of(x, 2, h, w)
        if shift:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        return self.head((shortcut + x).mean((1, 2)))

    mask = nn.Buffer(torch.zeros(15, 4, 4).masked_fill(torch.arange(240).view(15, 4, 4) % 7 == 1, -100.0))
    layers = {"embed": linear(3, 14), "qkv": linear(14, 72), "out": linear(24, 14), "head": linear(14, 5)}
    return net(forward, **layers, mask=mask), image()


@graph(targets=(*PACKED, "before.weight", "after.weight"), heads=HINT, min_removed=0.4)
def talking_heads():
    """CaiT: heads are mixed before and after the softmax, so those are three families of heads."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        weight = q @ k.transpose(-2, -1)
        weight = self.before(weight.permute(0, 2, 3, 1)).softmax(2)
        weight = self.after(weight).permute(0, 3, 1, 2)
        return self.head((weight @ v).transpose(1, 2).reshape(b, n, 24))

    return packed(forward, before=linear(4, 5), after=linear(5, 4))


@graph(targets=("embed.weight", "token", "place", *PACKED), heads=HINT, min_removed=0.4)
def class_token_and_position():
    def forward(self, x):
        b = x.shape[0]
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(b, -1, -1), x], 1) + self.place
        q, k, v = self.qkv(x).reshape(b, 16, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(joined(F.scaled_dot_product_attention(q, k, v)))
        return self.head(x[:, 0])

    parts = {"token": parameter(1, 1, 14), "place": parameter(1, 16, 14), "embed": nn.Conv2d(3, 14, 2, 2)}
    layers = {"qkv": linear(14, 72), "out": linear(24, 14), "head": linear(14, 5)}
    return net(forward, **parts, **layers), image()


class Block(nn.Module):
    """Pre-norm attention and MLP with LayerScale, the way timm writes it."""

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = linear(dim, heads * size * 3), linear(heads * size, dim)
        self.fc1, self.fc2 = linear(dim, 22), linear(22, dim)
        self.gamma1, self.gamma2 = parameter(dim), parameter(dim)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.gamma1 * self.proj(y.reshape(b, n, self.num_heads * self.head_dim))
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


@graph(
    stats=True,
    targets=("embed.weight", "0.qkv.bias", "0.gamma1", "1.fc1.bias", "1.qkv.bias", "norm.weight"),
    heads={"0.qkv": 4, "1.qkv": 4},
    min_removed=0.5,
)
def vision_transformer():
    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = getattr(self, "1")(getattr(self, "0")(x))
        return self.head(self.norm(x).mean(1))

    blocks = {"0": Block(14, 4, 6), "1": Block(14, 4, 6)}
    parts = {"embed": nn.Conv2d(3, 14, 2, 2), "norm": nn.LayerNorm(14), "head": linear(14, 5)}
    return net(forward, **parts, **blocks), image()
