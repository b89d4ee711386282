"""Line plots as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, TOP, LINE = 560, 360, 64, 40, 18


def draw_curves(title: str, whole: float, ratios: Sequence[float], curves: Mapping[str, Sequence[float]]) -> str:
    """Curves as an SVG document: the ratio to the right, the value upwards, a name for each at the side.

    Arguments:
        title: above the plot.
        whole: the value of every curve at ratio 0.
        ratios: ascending, without 0.
        curves: the values at these ratios, by name.
    """
    values = [v for values in curves.values() for v in (whole, *values) if math.isfinite(v)] or [0.0]
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    right = max(ratios)

    def spot(r: float, v: float) -> str:
        return f"{LEFT + WIDTH * r / right:.1f},{TOP + HEIGHT * (high - v) / (high - low):.1f}"

    lines = []
    for v in (low + (high - low) * k / 4 for k in range(5)):
        y = TOP + HEIGHT * (high - v) / (high - low)
        lines.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(text(LEFT - 8, y + 4, f"{v:.3g}", anchor="end"))
    for r in (0.0, *ratios):
        lines.append(text(LEFT + WIDTH * r / right, TOP + HEIGHT + 20, f"{r:g}", anchor="middle"))
    for i, (label, its) in enumerate(curves.items()):
        colour = f"hsl({360 * i // max(len(curves), 1)},65%,42%)"
        known = zip((0.0, *ratios), (whole, *its), strict=True)
        points = " ".join(spot(r, v) for r, v in known if math.isfinite(v))
        name = html.escape(label)
        line = f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{points}">'
        lines.append(f"{line}<title>{name}</title></polyline>")
        lines.append(text(LEFT + WIDTH + 16, TOP + LINE * i + 8, name, fill=colour))
    lines.append(text(LEFT, 22, html.escape(title)))
    lines.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 42, "share of the family's units removed", anchor="middle"))
    size = (LEFT + WIDTH + 300, max(TOP + HEIGHT + 56, TOP + LINE * len(curves) + 16))
    form = f'width="{size[0]}" height="{size[1]}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {form}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""])


def text(x: float, y: float, content: str, *, anchor: str = "start", fill: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{content}</text>'
