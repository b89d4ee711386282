"""Attention in its many spellings: four heads of six, 24 channels in all.

The query, key and value layers read the input, which stays, so that they shrink only if heads went.
"""

import math

import torch
from torch.nn import functional as F

from .registry import graph, linear, net, parameter, tokens

PACKED = ("qkv.weight", "qkv.bias", "head.weight")
SPLIT = ("q.weight", "k.weight", "v.weight", "v.bias", "head.weight")
HINT = {"qkv": 4}
HINTS = {"q": 4, "k": 4, "v": 4}


def packed(forward, **parts):
    return net(forward, qkv=linear(10, 72), head=linear(24, 5), **parts), tokens()


def separate(forward, **parts):
    layers = {"q": linear(10, 24), "k": linear(10, 24), "v": linear(10, 24), "head": linear(24, 5)}
    return net(forward, **layers, **parts), tokens()


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_packed():
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        x = ((q * 6**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(x.transpose(1, 2).reshape(b, n, 24))

    return packed(forward)


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_packed_head_major():
    """(heads, 3, head_dim) instead of (3, heads, head_dim)."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 4, 3, 6).permute(3, 0, 2, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(x.transpose(1, 2).flatten(2))

    return packed(forward)


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_packed_dims_first():
    """Swin v1 in lucidrains' order: every head_dim holds all heads."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 6, 4).permute(2, 0, 4, 1, 3).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(x.permute(0, 2, 3, 1).flatten(2))

    return packed(forward)


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_packed_chunk():
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (y.view(b, n, 4, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(x.transpose(1, 2).reshape(b, n, -1))

    return packed(forward)


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_packed_split_sizes():
    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (12, 6)).transpose(1, 2)
        q, k, v = qkv.split([4, 4, 4], dim=1)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    return packed(forward)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_split():
    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 6).permute(0, 2, 1, 3)
        k = self.k(x).view(b, n, 4, 6).permute(0, 2, 3, 1)
        v = self.v(x).view(b, n, 4, 6).permute(0, 2, 1, 3)
        x = torch.softmax(torch.matmul(q, k) / math.sqrt(6), dim=-1) @ v
        return self.head(x.permute(0, 2, 1, 3).contiguous().view(b, n, 24))

    return separate(forward)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_heads_inferred():
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, 6).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(x.transpose(1, 2).reshape(b, n, -1))

    return separate(forward)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_dims_inferred():
    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.head(x.transpose(1, 2).flatten(2))

    return separate(forward)


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_constant_batch():
    def forward(self, x):
        qkv = self.qkv(x).view(2, 7, 3, 4, 6)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(x.transpose(1, 2).reshape(2, 7, 24))

    return packed(forward)


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_index_packed():
    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, 4, 24 // 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        x = (q @ k.transpose(-2, -1) * (24 // 4) ** -0.5).softmax(dim=-1) @ v
        return self.head(x.transpose(1, 2).reshape(b, n, 24))

    return packed(forward)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_einsum():
    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, 6)) for layer in (self.q, self.k, self.v))
        weight = torch.einsum("bnhd,bmhd->bhnm", q, k).div(6**0.5).softmax(-1)
        return self.head(torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2))

    return separate(forward)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_turned_by_matrices():
    """A rotary embedding as one matrix for each position, which all heads are multiplied by."""

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (torch.einsum("bhnd,nde->bhne", t, self.turns) for t in (q, k))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward, turns=parameter(7, 6, 6))


@graph(targets=("wq", "wk", "wv", "wo"), min_removed=0.4)
def attention_einsum_with_parameters():
    """Keras and Flax: one three-dimensional weight each, no reshape anywhere."""

    def forward(self, x):
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (self.wq, self.wk, self.wv))
        weight = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        x = torch.einsum("bhnm,bmhd->bnhd", weight, v)
        return torch.einsum("bnhd,hdc->bnc", x, self.wo)

    parts = {"wq": parameter(10, 4, 6), "wk": parameter(10, 4, 6), "wv": parameter(10, 4, 6)}
    return net(forward, **parts, wo=parameter(4, 6, 5)), tokens()


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_heads_in_batch():
    """fairseq: batch and heads share a dimension, for bmm."""

    def forward(self, x):
        b, n, _ = x.shape

        def fold(y):
            return y.view(b, n, 4, 6).transpose(1, 2).reshape(b * 4, n, 6)

        q, k, v = fold(self.q(x)), fold(self.k(x)), fold(self.v(x))
        weight = torch.baddbmm(x.new_zeros(1, 1, 1), q, k.transpose(1, 2), alpha=6**-0.5).softmax(-1)
        x = torch.bmm(weight, v).view(b, 4, n, 6).transpose(1, 2).reshape(b, n, 24)
        return self.head(x)

    return separate(forward)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_sequence_first():
    """The layout of nn.MultiheadAttention: (tokens, batch * heads, head_dim)."""

    def forward(self, x):
        b, n, _ = x.shape
        x = x.transpose(0, 1)
        q, k, v = (layer(x).contiguous().view(n, b * 4, 6).transpose(0, 1) for layer in (self.q, self.k, self.v))
        x = torch.bmm((q @ k.transpose(1, 2)).softmax(2), v)
        return self.head(x.transpose(0, 1).contiguous().view(n, b, 24)).transpose(0, 1)

    return separate(forward)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_by_chunked_heads():
    """Heads split off as a list and joined again, one attention each."""

    def forward(self, x):
        pieces = zip(self.q(x).split(6, -1), self.k(x).split(6, -1), self.v(x).split(6, -1), strict=True)
        return self.head(torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in pieces], -1))

    return separate(forward)
