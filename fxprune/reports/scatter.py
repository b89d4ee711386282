"""Values over costs as SVG: the points of a sweep, the front through the best of them, and the original."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 46


@dataclass(frozen=True)
class Scatter:
    """What is drawn.

    Attributes:
        title: what the costs are.
        spots: for each point its cost as a share of the original's, its value, a line of text, and its number.
        front: the numbers of those on the front, by ascending cost.
        original: the value of the original, at the share 1.
    """

    title: str
    spots: Sequence[tuple[float, float, str, int]]
    front: Sequence[int]
    original: float | None


def draw(scatter: Scatter) -> str:
    """An `svg` element; colours are those of the page around it."""
    values = [v for _, v, _, _ in scatter.spots] + ([] if scatter.original is None else [scatter.original])
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    low, high = low - room, high + room
    most = max(1.0, *(share for share, _, _, _ in scatter.spots))

    def place(share: float, value: float) -> tuple[str, str]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * share / most
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return f"{x:.1f}", f"{y:.1f}"

    found = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Value over the {html.escape(scatter.title)}">']
    for value in ticks(low, high):
        x, y = place(0, value)
        found.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        found.append(f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for k in range(5):
        x, _ = place(most * k / 4, low)
        found.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{100 * most * k / 4:.0f} %</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    found.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(scatter.title)}</text>')
    at = {number: place(share, value) for share, value, _, number in scatter.spots}
    line = " ".join(",".join(at[number]) for number in scatter.front)
    found.append(f'<polyline class="line s0" points="{line}"/>')
    for share, value, text, number in scatter.spots:
        x, y = place(share, value)
        kind, size = ("s0", 5) if number in scatter.front else ("other", 4)
        found.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="{size}"><title>{html.escape(text)}</title></circle>')
    if scatter.original is not None:
        x, y = place(1, scatter.original)
        found.append(f'<circle class="whole" cx="{x}" cy="{y}" r="5"><title>unpruned: {scatter.original:.4g}</title></circle>')
    return "\n".join([*found, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four to eight of them.

    >>> ticks(0.62, 0.91)
    [0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    """
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, math.floor(high / step + 1e-9) + 1)]
