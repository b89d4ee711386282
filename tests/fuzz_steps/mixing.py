"""Steps without weights: pointwise, gates, reductions, writing in place, changes of layout, and the heads."""

from __future__ import annotations

from .writer import (
    ANY,
    SPATIAL,
    Value,
    Writer,
    alike,
    channel,
    coin,
    one_of,
    op,
    same_batch,
)

UNARY = "relu gelu silu tanh sigmoid hardswish elu leaky_relu softsign".split()


@op(ANY, weight=4, how=one_of(*UNARY, "abs", "square", "line", "clamp", "fill", "drop"))
def pointwise(w: Writer, x: Value, *, how: str) -> str:
    if how in UNARY:
        return f"F.{how}({x})"
    others = {
        "line": f"{x} * 0.7 + 0.3",
        "clamp": f"{x}.clamp(-1, 2)",
        "fill": f"{x}.masked_fill({x} > 0.5, -0.4)",
        "drop": f"F.dropout({x}, 0.3, training=self.training)",
    }
    return others.get(how, f"{x}.{how}()")


@op(ANY, other=alike, weight=5, how=one_of("+", "+", "+", "*", "-", "maximum", "where", "lerp", "addcmul"))
def binary(w: Writer, x: Value, y: Value, *, how: str) -> str:
    named = {
        "maximum": f"torch.maximum({x}, {y})",
        "where": f"torch.where({x} > 0, {x}, {y})",
        "lerp": f"torch.lerp({x}, {y}, 0.3)",
        "addcmul": f"torch.addcmul({x}, {y}, {x}, value=0.5)",
    }
    return named.get(how, f"{x} {how} {y}")


@op(ANY, at=channel)
def gate_by_one_channel(w: Writer, x: Value, *, at: int) -> str:
    return f"{x} * {x.at(f'{at}:{at + 1}')}.sigmoid()"


@op(ANY, weight=1.5, how=one_of("mean", "amax", "sum", "std", "logsumexp"))
def gate_by_statistic(w: Writer, x: Value, *, how: str) -> str:
    """All channels gated by a statistic of them."""
    if how == "sum":
        w.sums(x)
    else:
        w.sees()
    return f"{x} * torch.tanh({x}.{how}({x.axis}, keepdim=True))"


@op(ANY, how=one_of("softmax", "cumsum", "centre"))
def along_channels(w: Writer, x: Value, *, how: str) -> str:
    w.sees()
    return f"{x} - {x}.mean({x.axis}, keepdim=True)" if how == "centre" else f"{x}.{how}({x.axis})"


@op("tokens " + SPATIAL, how=one_of("softmax", "mean", "flip", "cumsum"))
def along_space(w: Writer, x: Value, *, how: str) -> str:
    d = 1 if x.kind == "tokens" else -1
    return {
        "softmax": f"{x} * {x}.softmax({d})",
        "mean": f"{x} - {x}.mean({d}, keepdim=True)",
        "flip": f"{x} + {x}.flip({d})",
        "cumsum": f"{x}.cumsum({d})",
    }[how]


@op("map", weight=1.5, how=one_of("avg", "max", "up", "adaptive", "blur"))
def resample(w: Writer, x: Value, *, how: str) -> str:
    return {
        "avg": f"F.avg_pool2d({x}, 3, stride=2, padding=1)",
        "max": f"F.max_pool2d({x}, 2)",
        "up": f"F.interpolate({x}, scale_factor=2, mode='nearest')",
        "adaptive": f"F.adaptive_avg_pool2d({x}, (2, 2))",
        "blur": f"F.interpolate(F.avg_pool2d({x}, 2), size={x}.shape[2:], mode='bilinear')",
    }[how]


@op("map", other=same_batch, weight=1.5)
def gate_by_vector(w: Writer, x: Value, y: Value) -> str:
    """FiLM: a vector made from another value scales and shifts the channels."""
    mean = f"{y}.mean({tuple(d for d in range(1, y.rank) if d != y.axis)})" if y.rank > 2 else f"{y}"
    w.line(f"s, t = {w.layer(f'nn.Linear({y.c}, {2 * x.c})')}({mean}).chunk(2, 1)")
    return f"{x} * (1 + s[:, :, None, None]) + t[:, :, None, None]"


# -- in place ----------------------------------------------------------------------------------------------------------


@op(ANY, weight=2, how=one_of("relu_", "mul_", "add_", "tanh_", "clamp_"))
def in_place(w: Writer, x: Value, *, how: str) -> str:
    given = {"mul_": "0.5", "add_": "0.3", "clamp_": "max=1"}
    return f"{x if x.owned else f'{x}.clone()'}.{how}({given.get(how, '')})"


@op(ANY, other=alike, how=one_of("add_", "mul_", "copy_"))
def in_place_with(w: Writer, x: Value, y: Value, *, how: str) -> str:
    return f"{x if x.owned else f'{x}.clone()'}.{how}({y})"


@op(ANY, weight=2, start=channel, stop=channel, how=one_of("scale", "fill", "zero", "add", "swap"), step=one_of(1, 1, 2))
def write_slice(w: Writer, x: Value, *, start: int, stop: int, how: str, step: int) -> str:
    low, high = min(start, stop), max(start, stop) + 1
    w.line(f"t = {x if x.owned else f'{x}.clone()'}")
    part = Value("t", x.kind, x.tensor, True).at(f"{low}:{high}:{step}")
    lines = {
        "scale": f"{part} *= 2",
        "fill": f"{part} = 0.5",
        "zero": f"{part} = 0",
        "add": f"{part} += {part}.sigmoid()",
        "swap": f"{part} = {x}.flip({x.axis}){part[1:]}",
    }
    w.line(lines[how])
    return "t"


@op(ANY, other=alike, weight=2, how=one_of("own", "other", "learned", "rows"), at=channel)
def write_where(w: Writer, x: Value, y: Value, *, how: str, at: int) -> str:
    """A mask computed from values says where: of every element, or of images or tokens by one of their channels."""
    place = f"{y}[..., {at}]" if x.kind == "tokens" else f"{y}[(slice(None), {at}, *(0,) * {x.rank - 2})]"
    w.line(f"t = {x}.clone()")
    if how == "own":
        w.line(f"t[{x} > 0.5] = -0.4")
    elif how == "other":
        w.line(f"t[{y} > 0.2] = 0.3")
    elif how == "rows":
        w.line(f"m = {place} > 0")
        w.line(f"t[m] = {y}[m].tanh()")
    else:
        w.line(f"t[{place} > 0] = {w.parameter(', '.join(map(str, (x.c, *(1,) * x.after))))}")
    return "t"


@op(ANY, other=lambda x, y: x.kind == y.kind and x.space == y.space, weight=1.5, like=coin)
def assemble(w: Writer, x: Value, y: Value, *, like: bool) -> str:
    """Two values written into zeros, one behind the other."""
    a, n = x.axis, x.c + y.c
    sizes = ", ".join(str(n) if d == a else f"{x}.shape[{d}]" for d in range(x.rank))
    w.line(f"t = {x}.new_zeros({sizes})" if like else f"t = torch.zeros({sizes}, dtype={x}.dtype)")
    target = Value("t", x.kind, x.tensor, True)
    w.line(f"{target.at(f':{x.c}')} = {x}")
    w.line(f"{target.at(f'{x.c}:')} = {y}")
    return "t"


# -- layouts -----------------------------------------------------------------------------------------------------------


@op(SPATIAL, weight=2, how=one_of("flatten", "view", "permute"))
def to_tokens(w: Writer, x: Value, *, how: str) -> tuple[str, str]:
    return "tokens", {
        "flatten": f"{x}.flatten(2).transpose(1, 2)",
        "view": f"{x}.reshape({x}.shape[0], {x.c}, -1).permute(0, 2, 1)",
        "permute": f"{x}.movedim(1, -1).flatten(1, -2)",
    }[how]


@op("tokens", weight=1.5, how=one_of("line", "map", "view"))
def to_space(w: Writer, x: Value, *, how: str) -> tuple[str, str]:
    n = x.shape[1]
    rows = 2 if n % 2 == 0 else 1
    if how == "line":
        return "line", f"{x}.transpose(1, 2)"
    if how == "map":
        return "map", f"{x}.transpose(1, 2).unflatten(2, ({rows}, {n // rows}))"
    return "map", f"{x}.permute(0, 2, 1).contiguous().view({x}.shape[0], {x.c}, {rows}, {n // rows})"


@op(SPATIAL + " tokens", weight=2, how=one_of("mean", "amax", "flatten", "first", "logsumexp", "pool"))
def to_vector(w: Writer, x: Value, *, how: str) -> tuple[str, str]:
    space = (1,) if x.kind == "tokens" else tuple(range(2, x.rank))
    if how == "flatten":
        return "vector", f"{x}.flatten(1)"
    if how == "first":
        return "vector", f"{x}[:, 0]" if x.kind == "tokens" else f"{x}[(..., *(0,) * {len(space)})]"
    if how == "pool" and x.kind == "map":
        return "vector", f"F.adaptive_avg_pool2d({x}, 1).flatten(1)"
    return "vector", f"{x}.{how if how != 'pool' else 'sum'}({space})"


@op("vector", weight=4, tokens=one_of(2, 3, 4), how=one_of("unflatten", "expand", "last"))
def to_sequence(w: Writer, x: Value, *, tokens: int, how: str) -> tuple[str, str]:
    w.sees()  # tokens made of channels may go, and whatever runs over tokens sees them
    if how == "expand":
        return "tokens", f"{x}.unsqueeze(1).expand(-1, {tokens}, -1) + {w.parameter(f'{tokens}, {x.c}')}"
    if how == "last":
        return "tokens", f"{x}.view({x}.shape[0], {x.c // tokens}, {tokens}).transpose(1, 2)"
    return "tokens", f"{x}.unflatten(1, ({tokens}, {x.c // tokens}))"


@op("vector", weight=4, how=one_of("expand", "unflatten"))
def to_map(w: Writer, x: Value, *, how: str) -> tuple[str, str]:
    w.sees()
    if how == "expand":
        return "map", f"{x}[:, :, None, None].expand(-1, -1, 2, 3) * {w.parameter('2, 3')}"
    return "map", f"{x}.view(-1, {x.c // 4}, 2, 2)"


@op("tokens", how=one_of("class", "positions", "register"))
def extra_tokens(w: Writer, x: Value, *, how: str) -> str:
    n = x.shape[1]
    if how == "positions":
        return f"{x} + {w.parameter(f'1, {n + 2}, {x.c}')}[:, :{x}.shape[1]]"
    w.sees()  # learned tokens may go
    count = 1 if how == "class" else 2
    return f"torch.cat([{w.parameter(f'1, {count}, {x.c}')}.expand({x}.shape[0], -1, -1), {x}], 1)"


@op("vector", weight=2, other=lambda x, y: y.kind == "vector" and x.c * y.c <= 200 and same_batch(x, y))
def outer(w: Writer, x: Value, y: Value) -> str:
    return f"({x}.unsqueeze(2) * {y}.unsqueeze(1)).flatten(1)"


@op(ANY, weight=0, how=one_of("plain", "plain", "pooled", "flat"), out=one_of(3, 5))
def head(w: Writer, x: Value, *, how: str, out: int) -> tuple[str, str]:
    """What makes an output of a value, so that its own channels may go."""
    space = (1,) if x.kind == "tokens" else tuple(range(2, x.rank))
    if how == "flat" and x.rank > 2:
        n = x.tensor[0].numel()
        return "vector", f"{w.layer(f'nn.Linear({n}, {out})')}({x}.flatten(1))"
    if how == "pooled" and x.rank > 2:
        return "vector", f"{w.layer(f'nn.Linear({x.c}, {out})')}({x}.mean({space}))"
    if x.after:
        return x.kind, f"{w.layer(f'nn.Conv{x.rank - 2}d({x.c}, {out}, 1)')}({x})"
    return x.kind, f"{w.layer(f'nn.Linear({x.c}, {out})')}({x})"
