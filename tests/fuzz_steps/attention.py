"""Attention blocks: packed or separate projections, fused or by hand, with fewer key heads, over channels."""

from __future__ import annotations

from .writer import SPATIAL, Value, Writer, coin, one_of, op, proper_divisor, rarely, sequence

PACKED = {
    "packed": ("reshape(b, n, 3, {h}, {d})", "permute(2, 0, 3, 1, 4)"),
    "heads_first": ("view(b, n, {h}, 3, {d})", "permute(3, 0, 2, 1, 4)"),
    "dims_first": ("view(b, n, 3, {d}, {h})", "permute(2, 0, 4, 1, 3)"),
}


def projections(w: Writer, x: Value, y: Value, heads: int, size: int, form: str, shared: int) -> None:
    """Lines that leave queries, keys and values as (batch, heads, tokens, size)."""
    w.line(f"b, n = {x}.shape[:2]")
    if form in PACKED:
        view, order = (part.format(h=heads, d=size) for part in PACKED[form])
        qkv = w.layer(f"nn.Linear({x.c}, {3 * heads * size})")
        w.line(f"q, k, v = {qkv}({x}).{view}.{order}")
        return
    if form == "chunk":
        qkv = w.layer(f"nn.Linear({x.c}, {3 * heads * size}, bias=False)")
        w.line(f"q, k, v = (t.view(b, n, {heads}, -1).transpose(1, 2) for t in {qkv}({x}).chunk(3, dim=-1))")
        return
    few = heads // shared
    w.line(f"q = {w.layer(f'nn.Linear({x.c}, {heads * size})')}({x}).view(b, n, {heads}, {size}).transpose(1, 2)")
    for name in "kv":
        layer = w.layer(f"nn.Linear({y.c}, {few * size})")
        w.line(f"{name} = {layer}({y}).view(b, {y}.shape[1], {few}, {size}).transpose(1, 2)")
    if shared > 1:
        w.line(f"k, v = k.repeat_interleave({shared}, dim=1), v.repeat_interleave({shared}, dim=1)")


@op(
    "tokens",
    other=sequence,
    weight=4,
    heads=one_of(2, 3, 4, 4, 6),
    size=one_of(2, 3, 4, 6),
    form=one_of("separate", "separate", "separate", "packed", "heads_first", "dims_first", "chunk"),
    how=one_of("sdpa", "matmul", "einsum", "bmm"),
    shared=one_of(1, 1, 2, 3),
    norm=rarely,
    causal=rarely,
    project=coin,
)
def attention(
    w: Writer,
    x: Value,
    y: Value,
    *,
    heads: int,
    size: int,
    form: str,
    how: str,
    shared: int,
    norm: bool,
    causal: bool,
    project: bool,
) -> str:
    """Self-attention, or from one sequence to another."""
    projections(w, x, y, heads, size, form, shared if heads % shared == 0 else 1)
    if norm:
        w.sees()
        w.line(f"q, k = {w.layer(f'nn.LayerNorm({size})')}(q), {w.layer(f'nn.RMSNorm({size})')}(k)")
    if how == "sdpa":
        w.line(f"a = F.scaled_dot_product_attention(q, k, v, is_causal={causal})")
    elif how == "matmul":
        w.line(f"a = (q @ k.transpose(-2, -1) * {size}**-0.5).softmax(-1) @ v")
    elif how == "einsum":
        w.line("a = torch.einsum('bhnd,bhmd->bhnm', q, k).div(q.shape[-1] ** 0.5).softmax(-1)")
        w.line("a = torch.einsum('bhnm,bhmd->bhnd', a, v)")
    else:
        w.line(f"q, k, v = (t.reshape(b * {heads}, -1, {size}) for t in (q, k, v))")
        w.line(f"a = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(b, {heads}, n, {size})")
    w.line(f"a = a.transpose(1, 2).reshape(b, n, {heads * size})")
    return f"{x} + {w.layer(f'nn.Linear({heads * size}, {x.c})')}(a)" if project else "a"


@op("tokens", heads=one_of(2, 3, 4), size=one_of(2, 3, 5))
def channel_attention(w: Writer, x: Value, *, heads: int, size: int) -> str:
    """XCiT: within a head, channels attend to channels."""
    w.sees()
    qkv = w.layer(f"nn.Linear({x.c}, {3 * heads * size})")
    w.line(f"q, k, v = {qkv}({x}).unflatten(-1, (3, {heads}, {size})).permute(2, 0, 3, 4, 1).unbind(0)")
    w.line(f"a = (q @ k.transpose(-2, -1) * {w.parameter(f'{heads}, 1, 1')}).softmax(-1) @ v")
    return "a.permute(0, 3, 1, 2).flatten(2)"


@op("tokens", other=sequence, weight=1.5, out=one_of(4, 6, 9))
def attention_without_heads(w: Writer, x: Value, y: Value, *, out: int) -> str:
    """One value is the query and, through a layer, another the key; the scores weigh a third."""
    w.sees()
    k, v = w.layer(f"nn.Linear({y.c}, {x.c})"), w.layer(f"nn.Linear({y.c}, {out})")
    return f"({x} @ {k}({y}).mT / math.sqrt({x.c})).softmax(-1) @ {v}({y})"


@op(SPATIAL, weight=0.8, out=one_of(4, 6, 9), groups=proper_divisor)
def attention_over_positions(w: Writer, x: Value, *, out: int, groups: int) -> str:
    """Groups of channels are heads, positions are tokens; queries and keys are the value itself."""
    w.sees()
    w.line(f"q = {x}.flatten(2).unflatten(1, ({groups}, {x.c // groups}))")
    w.line("a = (q.mT @ q * 0.2).softmax(-1)")
    return f"(q @ a).reshape({x}.shape)"


@op("tokens", weight=1.5, heads=one_of(1, 2, 3), size=one_of(3, 4))
def pooled_by_query(w: Writer, x: Value, *, heads: int, size: int) -> tuple[str, str]:
    """Learned queries, one a head, pool the tokens."""
    k, v = (f"{w.layer(f'nn.Linear({x.c}, {heads * size})')}({x}).unflatten(-1, ({heads}, {size}))" for _ in range(2))
    w.line(f"a = torch.einsum('hd,bnhd->bhn', {w.parameter(f'{heads}, {size}')}, {k}).softmax(-1)")
    return "vector", f"torch.einsum('bhn,bnhd->bhd', a, {v}).flatten(1)"


@op("tokens", weight=0.8, heads=one_of(2, 4), size=one_of(2, 3), how=one_of("elu", "relu"))
def linear_attention(w: Writer, x: Value, *, heads: int, size: int, how: str) -> str:
    """Keys meet values first."""
    w.sees()
    qkv = w.layer(f"nn.Linear({x.c}, {3 * heads * size})")
    w.line(f"q, k, v = {qkv}({x}).unflatten(-1, (3, {heads}, {size})).permute(2, 0, 3, 1, 4)")
    w.line("q, k = F.elu(q) + 1, F.elu(k) + 1" if how == "elu" else "q, k = q.relu() + 0.1, k.relu() + 0.1")
    w.line("a = q @ (k.mT @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-3)")
    return "a.transpose(1, 2).flatten(2)"
