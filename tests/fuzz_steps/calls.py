"""Steps that differ in how something is called or handed on: by keyword, scripted, memoized, inside of a dataclass; and copies
and pairs of channels that a product or a reduction takes together."""

from __future__ import annotations

from .writer import ANY, Value, Writer, one_of, op


@op(ANY, weight=1.5, how=one_of("module", "function", "method"))
def by_keyword(w: Writer, x: Value, *, how: str) -> str:
    if how == "function":
        return f"F.gelu(input={x})"
    if how == "method":
        return f"{x}.transpose(dim0={x.axis}, dim1=0).transpose(dim0=0, dim1={x.axis})"
    n = x.rank - 2
    layer = f"nn.Linear({x.c}, {x.c + 1})" if x.after == 0 else f"nn.Conv{n}d({x.c}, {x.c + 1}, 1)"
    return f"{w.layer(layer)}(input={x})"


@op(ANY, weight=1.5, how=one_of("memo", "count", "script"))
def called(w: Writer, x: Value, *, how: str) -> str:
    """A function of TorchScript's, or one that remembers what it computed for a size."""
    if how == "script":
        return f"scripted_swish({x})"
    if how == "memo":
        return f"{x} * remembered_slope({x}.shape[{x.axis}])"
    return f"{x} + remembered_ramp({x}.shape[0]).view(-1{', 1' * (x.rank - 1)})"


@op(ANY, weight=1, how=one_of("dataclass", "tuple", "record", "read"))
def handed_on(w: Writer, x: Value, *, how: str) -> str:
    """Two values that a module returns in a container of its own."""
    w.line(f"t = {w.layer(f'Returns({how!r})')}({x})")
    return "t[0] + t[1]" if how == "tuple" else "t.first + t.second"


@op(ANY, weight=1, how=one_of("read", "after", "training"))
def remembered(w: Writer, x: Value, *, how: str) -> str:
    """A buffer that the forward of its module assigns anew."""
    shape = [x.c if d == x.axis else 1 for d in range(x.rank)]
    return f"{w.layer(f'Remembers({shape}, {how!r})')}({x})"


@op(ANY, weight=2, times=one_of(2, 3), how=one_of("interleave", "expand", "tile", "stack"))
def product_of_copies(w: Writer, x: Value, *, times: int, how: str) -> str:
    """Every channel several times, and a product over all of them: copies go together or not at all.

    Each is scaled first, so that it is zero in the product where its parameters are.
    """
    a = x.axis
    scale = w.parameter(", ".join(str(x.c) if d == a else "1" for d in range(x.rank)))
    w.line(f"t = {x} * {scale}")
    copies = {
        "interleave": f"t.repeat_interleave({times}, dim={a})",
        "expand": f"t.unsqueeze({a + 1}).expand({', '.join('-1' if d != a + 1 else str(times) for d in range(x.rank + 1))})"
        f".flatten({a}, {a + 1})",
        "tile": f"torch.cat([t] * {times}, {a})",
        "stack": f"torch.stack([t] * {times}, {a + 1}).flatten({a}, {a + 1})",
    }[how]
    w.line(f"t = {copies}.movedim({a}, -1)")
    w.line("g = torch.tanh(t.flatten(1, -2) @ t.flatten(1, -2).mT) if t.dim() > 2 else torch.tanh(t @ t.mT)")
    w.line("t = (g @ t.flatten(1, -2)).view(t.shape) if t.dim() > 2 else g @ t")
    return f"t.movedim(-1, {a})"


@op(ANY, weight=1.5, how=one_of("maxout", "magnitude", "norm"))
def pairs(w: Writer, x: Value, *, how: str) -> str:
    """Neighbouring channels in pairs, of each pair one value."""
    if how == "maxout":
        w.sees()
    else:
        w.sums(x)  # where the one pair there is cannot go, one of it does
    w.line(f"t = {x}.unflatten({x.axis}, ({x.c // 2}, 2))")
    return {
        "maxout": f"t.amax({x.axis + 1})",
        "magnitude": f"(t.square().sum({x.axis + 1}) + 1e-3).sqrt()",
        "norm": f"t.norm(dim={x.axis + 1})",
    }[how]
