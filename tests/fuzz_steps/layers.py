"""Steps with weights: convolutions, linear layers, products with parameters, norms, recurrent layers, attention."""

from __future__ import annotations

from .writer import (
    ANY,
    SPATIAL,
    Value,
    Writer,
    beside,
    coin,
    divisor,
    one_of,
    op,
    proper_divisor,
    rarely,
    sequence,
    width,
)


@op(SPATIAL, weight=5, out=width, kernel=one_of(1, 3, 3), groups=divisor, stride=one_of(1, 1, 1, 2), bias=coin)
def conv(w: Writer, x: Value, *, out: int, kernel: int, groups: int, stride: int, bias: bool) -> str:
    out = max(1, out // groups) * groups
    options = f"stride={stride}, padding={kernel // 2}, groups={groups}, bias={bias}"
    return f"{w.layer(f'nn.Conv{x.rank - 2}d({x.c}, {out}, {kernel}, {options})', x)}({x})"


@op(SPATIAL, weight=1.5, times=one_of(1, 1, 2), kernel=one_of(1, 3))
def depthwise(w: Writer, x: Value, *, times: int, kernel: int) -> str:
    layer = f"nn.Conv{x.rank - 2}d({x.c}, {x.c * times}, {kernel}, padding={kernel // 2}, groups={x.c})"
    return f"{w.layer(layer, x)}({x})"


@op(SPATIAL, weight=1.5, out=width, groups=divisor, stride=one_of(1, 2), bias=coin)
def conv_transposed(w: Writer, x: Value, *, out: int, groups: int, stride: int, bias: bool) -> str:
    out = max(1, out // groups) * groups
    options = f"stride={stride}, groups={groups}, bias={bias}"
    return f"{w.layer(f'nn.ConvTranspose{x.rank - 2}d({x.c}, {out}, {stride}, {options})', x)}({x})"


@op("vector tokens", weight=6, out=width, bias=coin)
def linear(w: Writer, x: Value, *, out: int, bias: bool) -> str:
    return f"{w.layer(f'nn.Linear({x.c}, {out}, bias={bias})', x)}({x})"


@op(ANY, weight=2, pick=one_of(0.0, 0.3, 0.6, 0.9))
def again(w: Writer, x: Value, *, pick: float) -> str:
    """A layer that was called before, called on another value."""
    fitting = [layer for layer, kind, c in w.layers.values() if (kind, c) == (x.kind, x.c)]
    return f"{fitting[int(pick * len(fitting))]}({x})"


@op("vector tokens", weight=3, pick=one_of(0.0, 0.5), how=one_of("transposed", "tied"))
def tied(w: Writer, x: Value, *, pick: float, how: str) -> str:
    """An earlier linear layer's weight, backwards or in a second layer."""
    linears = [a for a, _, _ in w.layers.values() if a.startswith("self.linear")]
    at = 1 if how == "tied" else 0
    fitting = [a for a in linears if w.module.get_parameter(f"{a.removeprefix('self.')}.weight").shape[at] == x.c]
    layer = fitting[int(pick * len(fitting))]
    if how == "transposed":
        return f"F.linear({x}, {layer}.weight.t())"
    out = w.module.get_parameter(f"{layer.removeprefix('self.')}.weight").shape[0]
    made = w.layer(f"nn.Linear({x.c}, {out})")
    w.make(f"{made.removeprefix('self.')}.weight", f"{layer}.weight")
    return f"{made}({x})"


@op("tokens vector", weight=1.5, heads=one_of(1, 2, 3), size=one_of(2, 4, 5), how=one_of("einsum", "matmul", "parts"))
def parameter_product(w: Writer, x: Value, *, heads: int, size: int, how: str) -> str:
    lead = "bn" if x.kind == "tokens" else "b"
    if how == "matmul":
        return f"{x} @ {w.parameter(f'{x.c}, {heads * size}')}"
    if how == "einsum":
        return f"torch.einsum('{lead}c,chd->{lead}hd', {x}, {w.parameter(f'{x.c}, {heads}, {size}')}).flatten(-2)"
    weight = w.parameter(f"{heads}, {x.c}, {size}")
    return f"torch.cat([{x} @ {weight}[i] for i in range({heads})], -1)"


@op(ANY, weight=1.5, groups=proper_divisor, out=one_of(2, 3, 4))
def block_diagonal(w: Writer, x: Value, *, groups: int, out: int) -> str:
    """Every group of channels times a matrix of its own."""
    k, rest = x.c // groups, "xyz"[: x.after]
    lead = "bn" if x.kind == "tokens" else "b"
    weight = w.parameter(f"{groups}, {k}, {out}")
    w.line(f"g = {x}.unflatten({x.axis}, ({groups}, {k}))")
    return f"torch.einsum('{lead}gk{rest},gko->{lead}go{rest}', g, {weight}).flatten({x.axis}, {x.axis + 1})"


@op(ANY, weight=2.5, affine=one_of(True, True, False))
def batch_norm(w: Writer, x: Value, *, affine: bool) -> str:
    if x.kind == "tokens":
        return f"{w.layer(f'nn.BatchNorm1d({x.c}, affine={affine})')}({x}.transpose(1, 2)).transpose(1, 2)"
    rank = {"vector": 1, "line": 1, "map": 2, "volume": 3}[x.kind]
    return f"{w.layer(f'nn.BatchNorm{rank}d({x.c}, affine={affine})', x)}({x})"


@op(SPATIAL, weight=1.5, groups=divisor)
def group_norm(w: Writer, x: Value, *, groups: int) -> str:
    if groups < x.c:
        w.sees()
    return f"{w.layer(f'nn.GroupNorm({groups}, {x.c})', x)}({x})"


@op(SPATIAL, affine=coin)
def instance_norm(w: Writer, x: Value, *, affine: bool) -> str:
    return f"{w.layer(f'nn.InstanceNorm{x.rank - 2}d({x.c}, affine={affine})', x)}({x})"


@op(ANY, weight=2.5, how=one_of("layer", "layer", "rms", "by_hand", "normalize"))
def channel_norm(w: Writer, x: Value, *, how: str) -> str:
    w.sees()
    if how == "by_hand":
        scale = w.parameter(x.lift(x.c))
        return f"{x} * ({x}.square().mean({x.axis}, keepdim=True) + 1e-5).rsqrt() * {scale}"
    if how == "normalize":
        return f"F.normalize({x}, dim={x.axis})"
    norm = w.layer(f"nn.{'LayerNorm' if how == 'layer' else 'RMSNorm'}({x.c})")
    return f"{norm}({x})" if x.after == 0 else f"{norm}({x}.movedim(1, -1)).movedim(-1, 1)"


@op(ANY, kind=one_of("scale", "shift", "both", "one"))
def affine(w: Writer, x: Value, *, kind: str) -> str:
    """LayerScale and its like."""
    if kind == "one":
        return f"{x} * {w.parameter('1')}"
    parts = [w.parameter(x.lift(x.c)) for _ in range(2)]
    return {"scale": f"{x} * {parts[0]}", "shift": f"{x} + {parts[1]}"}.get(kind, f"{parts[1]} + {x} * {parts[0]}")


@op("vector line map volume", weight=0.7)
def prelu(w: Writer, x: Value) -> str:
    return f"{w.layer(f'nn.PReLU({x.c})')}({x})"


@op(
    "tokens",
    weight=1.5,
    cell=one_of("LSTM", "GRU", "RNN"),
    hidden=one_of(4, 5, 6, 8),
    both=rarely,
    layers=one_of(1, 1, 2),
    last=one_of("", "", "state", "step"),
)
def recurrent(w: Writer, x: Value, *, cell: str, hidden: int, both: bool, layers: int, last: str) -> tuple[str, str]:
    options = f"num_layers={layers}, bidirectional={both}, batch_first=True"
    layer = w.layer(f"nn.{cell}({x.c}, {hidden}, {options})")
    if last == "state":
        w.line(f"_, h = {layer}({x})")
        return "vector", f"{'h[0]' if cell == 'LSTM' else 'h'}[-1]"
    return ("vector", f"{layer}({x})[0][:, -1]") if last else ("tokens", f"{layer}({x})[0]")


@op(SPATIAL + " tokens vector", weight=2.5, hidden=width, act=one_of("relu", "gelu", "silu"), norm=coin, times=one_of(1, 2))
def residual(w: Writer, x: Value, *, hidden: int, act: str, norm: bool, times: int) -> str:
    """A bottleneck or a feed-forward block around which the value passes, once or twice with the same layers."""
    n = x.rank - 2
    flat = x.kind in ("vector", "tokens")
    up = w.layer(f"nn.Linear({x.c}, {hidden})" if flat else f"nn.Conv{n}d({x.c}, {hidden}, 3, padding=1)")
    down = w.layer(f"nn.Linear({hidden}, {x.c})" if flat else f"nn.Conv{n}d({hidden}, {x.c}, 1, bias=False)")
    middle = f"{w.layer(f'nn.BatchNorm{n}d({hidden})')}({up}(r))" if norm and not flat else f"{up}(r)"
    w.line(f"r = {x}")
    for _ in range(times):
        w.line(f"r = r + {down}(F.{act}({middle}))")
    return "r"


@op("tokens vector", hidden=width, act=one_of("silu", "sigmoid", "gelu"), packed=coin)
def gated_linear(w: Writer, x: Value, *, hidden: int, act: str, packed: bool) -> str:
    """SwiGLU: two linear layers, or one that is cut in two."""
    if packed:
        w.line(f"u, v = {w.layer(f'nn.Linear({x.c}, {2 * hidden})')}({x}).chunk(2, -1)")
    else:
        up, gate = w.layer(f"nn.Linear({x.c}, {hidden})"), w.layer(f"nn.Linear({x.c}, {hidden}, bias=False)")
        w.line(f"u, v = {up}({x}), {gate}({x})")
    return f"F.{act}(u) * v" if act != "sigmoid" else "u.sigmoid() * v"


@op(SPATIAL, weight=1.5, hidden=one_of(2, 3, 5, 8), how=one_of("linear", "conv"))
def squeeze_excite(w: Writer, x: Value, *, hidden: int, how: str) -> str:
    dims, n = tuple(range(2, x.rank)), x.rank - 2
    if how == "conv":
        w.line(f"s = {x}.mean({dims}, keepdim=True)")
        down, up = f"nn.Conv{n}d({x.c}, {hidden}, 1)", f"nn.Conv{n}d({hidden}, {x.c}, 1)"
        return f"{x} * {w.layer(up)}({w.layer(down)}(s).relu()).sigmoid()"
    w.line(f"s = {x}.mean({dims})")
    up, down = w.layer(f"nn.Linear({hidden}, {x.c})"), w.layer(f"nn.Linear({x.c}, {hidden})")
    return f"{x} * {up}({down}(s).relu()).sigmoid()[(...,) + (None,) * {n}]"


@op(ANY, other=beside, weight=3, how=one_of("+", "*", "-"))
def merge(w: Writer, x: Value, y: Value, *, how: str) -> str:
    """A projection of one value joins another: a branch, however its channels count."""
    n = x.rank - 2
    flat = x.kind in ("vector", "tokens")
    layer = w.layer(f"nn.Linear({y.c}, {x.c})" if flat else f"nn.Conv{n}d({y.c}, {x.c}, 1)", y)
    return f"{x} {how} {layer}({y})"


@op("tokens", weight=1.5, out=one_of(3, 5, 6), keep=coin)
def mix_tokens(w: Writer, x: Value, *, out: int, keep: bool) -> str:
    """A linear layer along the tokens, as in MLP-Mixer."""
    w.sees()  # tokens may go
    n = x.shape[1]
    mixed = f"{w.layer(f'nn.Linear({n}, {n if keep else out})')}({x}.transpose(1, 2)).transpose(1, 2)"
    return f"{x} + {mixed}" if keep else mixed


@op("tokens", other=sequence, weight=1.5, heads=proper_divisor, cross=coin)
def multihead(w: Writer, x: Value, y: Value, *, heads: int, cross: bool) -> str:
    """torch's own layer."""
    other = y if cross else x
    layer = w.layer(f"nn.MultiheadAttention({x.c}, {heads}, kdim={other.c}, vdim={other.c}, batch_first=True)")
    return f"{layer}({x}, {other}, {other}, need_weights=False)[0]"
