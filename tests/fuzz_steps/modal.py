"""Steps that do one thing in evaluation and another in training."""

from __future__ import annotations

from .writer import ANY, Value, Writer, one_of, op


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
