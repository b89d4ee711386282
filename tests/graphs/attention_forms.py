"""Attention that is not plain self-attention: cross, without heads, linear, masked, over channels."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .attention import HINT, HINTS, PACKED, SPLIT, packed, separate
from .registry import graph, image, linear, net, normal, parameter, tokens


@graph(targets=("q.weight", "kv.weight", "head.weight"), heads={"q": 4, "kv": 4}, min_removed=0.4)
def attention_cross():
    """Queries from one sequence, keys and values from a longer and wider one."""

    def forward(self, x, memory):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 6).transpose(1, 2)
        k, v = self.kv(memory).view(b, memory.shape[1], 2, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = net(forward, q=linear(10, 24), kv=linear(9, 48), head=linear(24, 5))
    return model, (tokens(), tokens(9, 11))


@graph(targets=SPLIT, min_removed=0.4, heads={"q": 1, "k": 1, "v": 1})
def attention_single_head():
    """Without heads, the dimensions themselves are the units; the scale stays the original's."""

    def forward(self, x):
        weight = (self.q(x) @ self.k(x).transpose(1, 2) * 24**-0.5).softmax(-1)
        return self.head(weight @ self.v(x))

    return separate(forward)


@graph(targets=SPLIT, min_removed=0.4, heads={"q": 1, "k": 1, "v": 1})
def attention_single_head_fused():
    """The default scale of the fused kernel comes from a size that shrinks."""

    def forward(self, x):
        q, k, v = self.q(x).tanh(), self.k(x), self.v(x)
        return self.head(F.scaled_dot_product_attention(q, k, v))

    return separate(forward)


@graph(targets=("q.weight", "k.weight", "v.weight"), min_removed=0.4)
def attention_single_head_scale_from_size():
    """Self-attention over pixels, with the scale computed from a channel count that shrinks."""

    def forward(self, x):
        b, _, h, w = x.shape
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        weight = torch.bmm(q.transpose(1, 2), k) / math.sqrt(q.size(1))
        x = torch.bmm(v, weight.softmax(-1).transpose(1, 2)).view(b, -1, h, w)
        return self.head(x)

    layers = {"q": nn.Conv2d(3, 14, 1), "k": nn.Conv2d(3, 14, 1), "v": nn.Conv2d(3, 20, 1)}
    return net(forward, **layers, head=nn.Conv2d(20, 5, 1)), image()


@graph(targets=("q.weight", "k.weight", "v.weight"), heads=HINTS, min_removed=0.4)
def attention_value_wider_than_key():
    def forward(self, x):
        q, k = (
            self.q(x).unflatten(-1, (4, 3)).transpose(1, 2),
            self.k(x).unflatten(-1, (4, 3)).transpose(1, 2),
        )
        v = self.v(x).unflatten(-1, (4, 7)).transpose(1, 2)
        return self.head(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    layers = {"q": linear(10, 12), "k": linear(10, 12), "v": linear(10, 28), "head": linear(28, 5)}
    return net(forward, **layers), tokens()


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_causal_mask():
    def forward(self, x):
        n = x.shape[1]
        q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.mT * self.scale
        scores = scores.masked_fill(self.mask[:n, :n] == 0, float("-inf"))
        return self.head((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return separate(forward, scale=6**-0.5, mask=nn.Buffer(torch.ones(9, 9).tril()))


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_causal_fused_with_key_mask():
    def forward(self, x, keep):
        q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :], scale=0.3)
        return self.head(x.transpose(1, 2).flatten(2))

    keep = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    model, x = separate(forward)
    return model, {"x": x, "keep": keep}


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_linear_heads():
    """Linear attention: keys meet values first; a removed head has no value, so zeroing is enough."""

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        norm = 1 / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
        return self.head((q @ (k.mT @ v) * norm).transpose(1, 2).flatten(2))

    return separate(forward)


@graph(stats=True, targets=SPLIT, min_removed=0.4)
def attention_linear_single_head():
    """The feature map sends a zeroed query to one, which a removed one is not."""

    def forward(self, x):
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        norm = torch.einsum("bnd,bd->bn", q, k.sum(1)).reciprocal()
        return self.head(torch.einsum("bnd,bde,bn->bne", q, torch.einsum("bnd,bne->bde", k, v), norm))

    return separate(forward)


@graph(targets=PACKED, heads=HINT, min_removed=0.4)
def attention_over_channels():
    """XCiT: within a head, channels attend to channels."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        x = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        return self.head(x.permute(0, 3, 1, 2).reshape(b, n, 24))

    return packed(forward, temperature=parameter(4, 1, 1))


@graph(stats=True, targets=SPLIT, heads=HINTS, min_removed=0.4)
def attention_with_memory_tokens():
    """Learned keys and values beside the computed ones; they may go too, and the softmax sees them."""

    def forward(self, x):
        b = x.shape[0]
        q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k = torch.cat([self.memory[0].expand(b, -1, -1, -1), k], 2)
        v = torch.cat([self.memory[1].expand(b, -1, -1, -1), v], 2)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return separate(forward, memory=parameter(2, 4, 3, 6))


@graph(targets=("query", "k.weight", "v.weight"), min_removed=0.4)
def attention_pooling_by_learned_query():
    """Four learned queries, one a head, pool the tokens."""

    def forward(self, x):
        k, v = self.k(x).unflatten(-1, (4, 6)), self.v(x).unflatten(-1, (4, 6))
        weight = torch.einsum("hd,bnhd->bhn", self.query, k).softmax(-1)
        return self.head(torch.einsum("bhn,bnhd->bhd", weight, v).flatten(1))

    parts = {"query": parameter(4, 6), "k": linear(10, 24), "v": linear(10, 24)}
    return net(forward, **parts, head=linear(24, 5)), normal(3, 7, 10)


@graph(stats=True, targets=("mix.weight", "qkv.weight", "head.weight"), min_removed=0.4)
def attention_over_mixed_tokens_dims_first():
    """Tokens made by a layer may go; heads come after dimensions, for which the fused kernels have a path of their own."""

    def forward(self, x):
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 3, 4).permute(2, 0, 4, 1, 3)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.flatten(1))

    return net(forward, mix=linear(7, 8), qkv=linear(10, 36), head=linear(96, 5)), tokens()


@graph("causal_attention_over_mixed_tokens", args=(True,), targets=("q.weight", "kv.weight", "head.weight"), min_removed=0.4)
@graph("causal_mask_over_mixed_tokens", args=(False,), targets=("q.weight", "kv.weight", "head.weight"), min_removed=0.4)
def causal_over_mixed_tokens(fused):
    """Tokens that a layer made could go, but which keys each of them sees is counted by its place."""

    def forward(self, x):
        y = self.mix(x.transpose(1, 2)).transpose(1, 2)
        q = self.q(y).unflatten(-1, (4, 6)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 4, 6)).permute(2, 0, 3, 1, 4)
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
            y = (q @ k.mT * 0.4).masked_fill(~seen, -1e9).softmax(-1) @ v
        return self.head(y.transpose(1, 2).flatten(2))

    return net(forward, mix=linear(7, 5), q=linear(10, 24), kv=linear(10, 48), head=linear(24, 5)), tokens()


@graph(targets=("qkv.weight", "proj.weight"), min_removed=0.3, heads={"qkv": 4})
def pooling_attention_beside_a_class_token():
    """Multiscale attention: patches go through a convolution and a norm that all heads share; the class token does not."""

    def pool(self, x, conv, norm):
        first, rest = torch.tensor_split(x, (1,), dim=2)
        batch, heads, tokens, width = rest.shape
        rest = conv(rest.reshape(batch * heads, 2, tokens // 2, width).permute(0, 3, 1, 2))
        rest = rest.reshape(batch, heads, width, -1).transpose(2, 3)
        return norm(torch.cat((first, rest), dim=2))

    def forward(self, x):
        batch, tokens, _width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, 6).transpose(1, 3).unbind(dim=2)
        q, k, v = (pool(self, t, *layers) for t, *layers in zip((q, k, v), self.convs, self.norms, strict=True))
        out = (q @ k.transpose(2, 3) * 6**-0.5).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, -1, 24))

    layers = {
        "convs": nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, groups=6) for _ in range(3)),
        "norms": nn.ModuleList(nn.LayerNorm(6) for _ in range(3)),
    }
    return net(forward, qkv=linear(24, 72), proj=linear(24, 24), **layers), torch.randn(2, 9, 24, dtype=torch.float64)
