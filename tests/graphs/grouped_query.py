"""More query heads than key heads: four key heads at most, and two or three queries on each."""

import torch
from torch.nn import functional as F

from .registry import buffer, graph
from .transformers import HINTS, SPLIT, heads_of, joined, rotated, rotated_pairs, separate


@graph("grouped_query_repeat_interleave", args=(False,), targets=SPLIT, heads=HINTS, min_removed=0.4)
@graph("grouped_query_rope", args=(True,), targets=SPLIT, heads=HINTS, min_removed=0.4)
def grouped_query(rope):
    """Eight query heads on four key heads."""

    def forward(self, x):
        q, k, v = heads_of(self.q(x)), heads_of(self.k(x)), heads_of(self.v(x))
        if rope:
            q, k = rotated(q, self.cos, self.sin), rotated(k, self.cos, self.sin)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return self.head(joined(F.scaled_dot_product_attention(q, k, v)))

    return separate(forward, queries=48, cos=buffer(9, 6), sin=buffer(9, 6))


@graph("grouped_query_expand", args=(False,), targets=SPLIT, heads=HINTS, min_removed=0.4)
@graph("grouped_query_expand_rope", args=(True,), targets=SPLIT, heads=HINTS, min_removed=0.4)
def grouped_query_expand(rope):
    """As Llama repeats them: expand over a new dimension, then reshape."""

    def repeated(x):
        b, heads, n, size = x.shape
        return x[:, :, None].expand(b, heads, 2, n, size).reshape(b, heads * 2, n, size)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 8, 6).transpose(1, 2)
        k, v = (layer(x).view(b, n, 4, 6).transpose(1, 2) for layer in (self.k, self.v))
        if rope:
            q, k = rotated_pairs(q, self.cos, self.sin), rotated_pairs(k, self.cos, self.sin)
        weight = (q @ repeated(k).transpose(2, 3) * 6**-0.5).softmax(-1)
        return self.head((weight @ repeated(v)).transpose(1, 2).reshape(b, n, 48))

    return separate(forward, queries=48, cos=buffer(9, 3), sin=buffer(9, 3))


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def grouped_query_five_dimensions():
    """Key heads and the queries on each are two dimensions; nothing is repeated."""

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 3, 6))
        k, v = self.k(x).unflatten(-1, (4, 6)), self.v(x).unflatten(-1, (4, 6))
        weight = torch.einsum("bngrd,bmgd->bgrnm", q, k).softmax(-1)
        return self.head(torch.einsum("bgrnm,bmgd->bngrd", weight, v).flatten(2))

    return separate(forward, queries=72)


@graph(targets=SPLIT, heads=HINTS, min_removed=0.4)
def grouped_query_fused():
    def forward(self, x):
        q, k, v = heads_of(self.q(x)), heads_of(self.k(x)), heads_of(self.v(x))
        return self.head(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))

    return separate(forward, queries=48)


@graph(targets=("q.weight", "head.weight"), heads={"q": 4}, min_removed=0.25)
def multi_query():
    """One key head for all queries: it stays, query heads go."""

    def forward(self, x):
        q, k, v = heads_of(self.q(x)), self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        return self.head(joined((q @ k.transpose(-2, -1)).softmax(-1) @ v))

    return separate(forward, keys=6)


@graph(stats=True, targets=("v.weight", "head.weight"), min_removed=0.1)
def grouped_query_differences():
    """Half of the heads is subtracted from the others, so that all go together; each half of the values has channels."""

    def forward(self, x):
        q, k, v = heads_of(self.q(x)), heads_of(self.k(x)), heads_of(self.v(x))
        halves = (half.repeat(1, 2, 1, 1) for half in v.chunk(2, dim=1))
        y = torch.cat([F.scaled_dot_product_attention(q, k, half, enable_gqa=True).transpose(1, 2) for half in halves], -1)
        first, second = y.chunk(2, dim=2)
        return self.head(F.rms_norm(first - 0.3 * second, (12,)).flatten(2))

    return separate(forward, keys=12)
