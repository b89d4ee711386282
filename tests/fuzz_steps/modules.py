"""Steps that are modules of their own: that do another thing in training, and that look at values."""

from __future__ import annotations

from .writer import ANY, Value, Writer, one_of, op, proper_divisor, width


@op(ANY, weight=2, how=one_of("layers", "skipped", "act", "scale", "order"))
def by_mode(w: Writer, x: Value, *, how: str) -> str:
    n = x.rank - 2
    layer = f"nn.Linear({x.c}, {x.c})" if x.kind in ("vector", "tokens") else f"nn.Conv{n}d({x.c}, {x.c}, 1)"
    if how == "order":
        orders = f"torch.arange({x.c}).flip(0), torch.arange({x.c})"
        return x.at(f"{w.layer(f'Chosen({orders})')}()")
    if how == "scale":
        scales = f"torch.linspace(1, 2, {x.c}).view({x.lift(x.c)}), torch.linspace(3, -1, {x.c}).view({x.lift(x.c)})"
        return f"{x} * {w.layer(f'Chosen({scales})')}()"
    pair = {"layers": f"{layer}, {layer}", "skipped": f"{layer}, nn.Identity()", "act": "nn.ReLU(), nn.Tanh()"}[how]
    return f"{w.layer(f'Either({pair})')}({x})"


@op(ANY, weight=1.5, how=one_of("hidden", "act", "norm", "groups"), hidden=width, groups=proper_divisor)
def reads(w: Writer, x: Value, *, how: str, hidden: int, groups: int) -> str:
    n = x.rank - 2
    flat = x.kind in ("vector", "tokens")
    if how == "groups":
        return f"{w.layer(f'Regroups({x.c}, {groups}, {x.axis})')}({x})"
    up, down = f"nn.Linear({x.c}, {hidden})", f"nn.Linear({hidden}, {x.c})"
    if not flat:
        up, down = f"nn.Conv{n}d({x.c}, {hidden}, 3, padding=1)", f"nn.Conv{n}d({hidden}, {x.c}, 1)"
    norm = "nn.Identity()" if flat else f"nn.BatchNorm{n}d({x.c})"
    inner = {"hidden": f"nn.Sequential({up}, nn.ReLU(), {down})", "act": "nn.GELU()", "norm": norm}[how]
    return f"{w.layer(f'Reads({inner})')}({x})"
