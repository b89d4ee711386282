"""Steps that move channels: joined, cut, picked, repeated, reshaped."""

from __future__ import annotations

from .writer import (
    ANY,
    SPATIAL,
    Value,
    Writer,
    alike,
    beside,
    channel,
    coin,
    cuts,
    one_of,
    op,
    proper_divisor,
    some_channels,
)


@op(ANY, other=beside, weight=3, how=one_of("xy", "yx", "xyx", "xx", "hstack"))
def cat(w: Writer, x: Value, y: Value, *, how: str) -> str:
    names = {"x": str(x), "y": str(y)}
    parts = ", ".join(names[letter] for letter in (how if how != "hstack" else "xy"))
    return f"torch.hstack(({parts}))" if how == "hstack" and x.axis == 1 else f"torch.cat([{parts}], {x.axis})"


@op(ANY, other=alike, how=one_of("blocks", "interleaved", "sum", "max", "mean"))
def stack(w: Writer, x: Value, y: Value, *, how: str) -> str:
    if how in ("blocks", "interleaved"):
        at = x.axis + (how == "interleaved")
        return f"torch.stack([{x}, {y}], {at}).flatten({x.axis}, {x.axis + 1})"
    return f"torch.stack([{x}, {y}, {x} * 2]).{'amax' if how == 'max' else how}(0)"


@op(ANY, weight=2.5, sizes=cuts, order=one_of("reversed", "rotated", "same", "twice"), act=one_of("relu", "tanh", ""))
def split_and_join(w: Writer, x: Value, *, sizes: list[int], order: str, act: str) -> str:
    """Cut, one piece changed, joined in another order."""
    w.line(f"t = list({x}.split({sizes}, dim={x.axis}))")
    if act:
        w.line(f"t[0] = t[0].{act}()")
    joined = {"reversed": "t[::-1]", "rotated": "t[1:] + t[:1]", "same": "t", "twice": "t + t[:1]"}[order]
    return f"torch.cat({joined}, {x.axis})"


@op(ANY, weight=1.5, count=one_of(2, 3, 4), piece=one_of(0, 1, -1), how=one_of("chunk", "tensor_split", "unbind"))
def part(w: Writer, x: Value, *, count: int, piece: int, how: str) -> str:
    """One piece; the others may be taken by another step."""
    if how == "unbind":
        return f"{x}.unflatten({x.axis}, ({count}, -1)).unbind({x.axis})[{piece}]"
    return f"{x}.{how}({count}, dim={x.axis})[{piece}]"


@op(ANY, weight=1.5, count=one_of(2, 3), act=one_of("sigmoid", "relu", "tanh"), dynamic=coin)
def halves(w: Writer, x: Value, *, count: int, act: str, dynamic: bool) -> str:
    """Pieces multiplied with one another: what a gated unit does by hand."""
    if dynamic:
        w.line(f"m = {x}.shape[{x.axis}] // 2")
        return f"{x.at(':m')} * {x.at('m:2 * m')}.{act}()"
    w.line(f"t = {x}.unflatten({x.axis}, ({count}, {x.c // count})).unbind({x.axis})")
    return f"t[0] * t[1].{act}()" + (" + t[2]" if count == 3 else "")


@op(ANY, weight=1)
def glu(w: Writer, x: Value) -> str:
    return f"F.glu({x}, dim={x.axis})"


@op(ANY, weight=2, start=channel, stop=channel, step=one_of(1, 1, 2, 3), how=one_of("slice", "negative", "narrow"))
def slice_channels(w: Writer, x: Value, *, start: int, stop: int, step: int, how: str) -> str:
    low, high = min(start, stop), max(start, stop) + 1
    if how == "narrow":
        return f"{x}.narrow({x.axis}, {low}, {high - low})"
    return x.at(f"{low - x.c if how == 'negative' else low}:{high}:{step}")


@op(ANY, step=one_of(2, 3), how=one_of("+", "*"))
def strided_pieces(w: Writer, x: Value, *, step: int, how: str) -> str:
    """Every second channel with its neighbour."""
    n = x.c // step * step
    return f" {how} ".join(x.at(f"{i}:{n}:{step}") for i in range(step))


@op(ANY, weight=1.5, order=some_channels, how=one_of("list", "buffer", "index_select"))
def index(w: Writer, x: Value, *, order: list[int], how: str) -> str:
    if how == "list":
        return x.at(str(order))
    held = w.buffer(f"torch.tensor({order})")
    return x.at(held) if how == "buffer" else f"{x}.index_select({x.axis}, {held})"


@op(ANY, how=one_of("plain", "added", "space"))
def flip(w: Writer, x: Value, *, how: str) -> str:
    dims = (1, x.rank - 1) if how == "space" and x.rank > 2 else (x.axis,)
    return f"{x} + {x}.flip({dims})" if how == "added" else f"{x}.flip({dims})"


@op(ANY, by=channel, how=one_of("plain", "added"))
def roll(w: Writer, x: Value, *, by: int, how: str) -> str:
    return f"{x} - {x}.roll({by}, {x.axis})" if how == "added" else f"{x}.roll({by}, {x.axis})"


@op(ANY, weight=1.5, before=one_of(0, 0, 2, 5, -1), behind=one_of(0, 3, 4, -2), value=one_of(0.0, 0.5))
def pad(w: Writer, x: Value, *, before: int, behind: int, value: float) -> str:
    """Channels padded with a constant, or cropped."""
    return f"F.pad({x}, {(*[0, 0] * x.after, before, behind)}, value={value})"


@op(ANY, weight=1.5, times=one_of(2, 3), how=one_of("repeat", "interleave", "expand", "expand_inside"))
def repeated(w: Writer, x: Value, *, times: int, how: str) -> str:
    a = x.axis
    if how == "interleave":
        return f"{x}.repeat_interleave({times}, dim={a})"
    if how == "repeat":
        return f"{x}.repeat({', '.join(str(times if d == a else 1) for d in range(x.rank))})"
    at = a if how == "expand" else a + 1
    sizes = ", ".join(str(times) if d == at else "-1" for d in range(x.rank + 1))
    return f"{x}.unsqueeze({at}).expand({sizes}).flatten({a}, {a + 1})"


@op(ANY, weight=1.5, groups=proper_divisor, how=one_of("view", "module", "dynamic"))
def shuffle(w: Writer, x: Value, *, groups: int, how: str) -> str:
    a = x.axis
    if how == "module" and x.rank > 3:
        return f"F.channel_shuffle({x}, {groups})"
    sizes = f"({groups}, {x}.shape[{a}] // {groups})" if how == "dynamic" else f"({groups}, {x.c // groups})"
    return f"{x}.unflatten({a}, {sizes}).transpose({a}, {a + 1}).flatten({a}, {a + 1})"


@op(
    ANY,
    weight=5,
    groups=proper_divisor,
    how=one_of(
        "scale_groups",
        "scale_each",
        "bias",
        "flip_groups",
        "flip_each",
        "roll_each",
        "softmax_each",
        "softmax_groups",
        "sum_groups",
        "sum_each",
        "mean_groups",
        "mean_each",
        "max_each",
        "select_group",
        "select_each",
        "drop_group",
        "drop_each",
        "swap",
        "normalize_each",
        "index_each",
    ),
)
def grouped(w: Writer, x: Value, *, groups: int, how: str) -> str:
    """Channels as (groups, each), something done along one of the two, flat again."""
    a, k = x.axis, x.c // groups
    w.line(f"g = {x}.unflatten({a}, ({groups}, {k}))")
    rest = ", :" * x.after
    lead = ":, :" if x.kind == "tokens" else ":"
    if how in (
        "softmax_each",
        "softmax_groups",
        "mean_groups",
        "mean_each",
        "max_each",
        "normalize_each",
    ):
        w.sees()
    if how in ("sum_each", "sum_groups"):
        w.sums(x)
    short = {
        "sum_groups": f"g.sum({a})",
        "mean_groups": f"g.mean({a})",
        "select_group": f"g.select({a}, {groups - 1})",
        "sum_each": f"g.sum({a + 1})",
        "mean_each": f"g.mean({a + 1})",
        "max_each": f"g.max({a + 1}).values",
        "select_each": f"g.select({a + 1}, 0)",
    }
    if how in short:
        return short[how]
    if how == "scale_groups":
        w.line(f"g = g * {w.parameter(x.lift(groups, 1))}")
    elif how == "scale_each":
        w.line(f"g = g * {w.parameter(x.lift(k))}")
    elif how == "bias":
        w.line(f"g = g + {w.parameter(x.lift(groups, k))}")
    else:
        w.line(
            "g = "
            + {
                "flip_groups": f"g.flip({a})",
                "flip_each": f"g.flip({a + 1})",
                "roll_each": f"g.roll(1, {a + 1})",
                "softmax_each": f"g.softmax({a + 1})",
                "softmax_groups": f"g.softmax({a})",
                "drop_group": f"g[{lead}, 1:]",
                "drop_each": f"g[{lead}, :, 1:{rest}]" if rest else f"g[{lead}, :, 1:]",
                "swap": f"g.transpose({a}, {a + 1}).relu()",
                "normalize_each": f"F.normalize(g, dim={a + 1})",
                "index_each": f"g.index_select({a + 1}, {w.buffer(f'torch.tensor({[(3 * i + 1) % k for i in range(k)]})')})"
                if how == "index_each"
                else "",
            }[how]
        )
    return f"g.flatten({a}, {a + 1})"


@op("map", weight=1.2, how=one_of("module", "view"))
def pixel_shuffle(w: Writer, x: Value, *, how: str) -> str:
    w.sees()  # channels become places, rows of which may go
    if how == "module":
        return f"F.pixel_shuffle({x}, 2)"
    _, c, height, width = x.shape
    w.line(f"t = {x}.view(-1, 2, 2, {c // 4}, {height}, {width}).permute(0, 3, 4, 1, 5, 2)")
    return f"t.reshape(-1, {c // 4}, {2 * height}, {2 * width})"


@op("map", weight=1.2, how=one_of("module", "view", "slices", "unfold"))
def pixel_unshuffle(w: Writer, x: Value, *, how: str) -> str:
    if how == "slices":
        return f"torch.cat([{x}[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)"
    if how == "unfold":
        return f"F.unfold({x}, 2, stride=2).unflatten(2, ({x.shape[2] // 2}, {x.shape[3] // 2}))"
    if how == "module":
        return f"F.pixel_unshuffle({x}, 2)"
    w.line(f"b, c, h, w = {x}.shape")
    w.line(f"t = {x}.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)")
    return "t.reshape(b, c * 4, h // 2, w // 2)"


@op(SPATIAL, weight=1, count=one_of(2, 4))
def shift_pieces(w: Writer, x: Value, *, count: int) -> str:
    """Pieces of the channels move in space, each in its own direction."""
    w.line(f"t = {x}.chunk({count}, 1)")
    return "torch.cat([p.roll(i - 1, -1) for i, p in enumerate(t)], 1)"
