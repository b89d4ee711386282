"""Draw the pictures of docs/concepts.md from what fxprune finds: `python docs/images/draw.py` writes them beside this file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fxprune
from fxprune.reports.group import Group

STYLE = """\
.plate { fill: #fff } text { fill: #37474f } .dim { fill: #607d8b; font-size: 13px } .name { font-weight: 600 }
.kept { fill: #3949ab } .other { fill: #00897b } .gone { fill: #fff; stroke: #d84315; stroke-width: 1.5; stroke-dasharray: 3 2 }
.tie { stroke: #607d8b; stroke-width: 2; fill: none }"""
CELL, GAP = 18, 4  # of a square that stands for one channel


class Block(nn.Module):
    """The block of the page: two convolutions write a sum, and a third one reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


class Heads(nn.Module):
    """Attention of two heads of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(1, -1, 2, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 6))


def main() -> dict[str, str]:
    """The pictures by the names of their files."""
    return {"family.svg": family(), "heads.svg": heads()}


def family() -> str:
    """The layers that one family runs through, which of their channels go, what ties them, and what is left of each."""
    model, x = Block().eval(), torch.randn(1, 3, 8, 8)
    group = fxprune.couple(model, x).group("a", [1, 4])
    small = group.apply()
    rows = [link for link in group.links if link.tensor.endswith("weight")]
    at = {(link.tensor, link.dim): 74 + 52 * i for i, link in enumerate(rows)}
    drawn = [text(20, 30, "before: two channels go from every layer of the family", "name"), text(560, 30, "after", "name")]
    for link in rows:
        y, layer = at[link.tensor, link.dim], link.tensor.partition(".")[0]
        side = ("outputs", "inputs")[link.dim]
        drawn += [text(20, y + 14, f"{side} of {layer}", "name"), *cells(150, y, gone_of(group, link.tensor, link.dim))]
        if link.source is not None:
            above, reach = at[link.source], 290 + (y - at[link.source]) // 2
            drawn.append(f'<path class="tie" d="M288 {above + 9}C{reach} {above + 9} {reach} {y + 9} 288 {y + 9}"/>')
            drawn.append(text(342, y + 14, f"tied to {link.source[0].partition('.')[0]} by {link.op}", "dim"))
        convolution = small.get_submodule(layer)
        drawn.append(text(560, y + 14, f"{layer}: Conv2d({convolution.in_channels}, {convolution.out_channels})"))
    lost = "A sum ties the outputs of a and b; c reads the sum. One family of six units: two go, four stay."
    return picture(
        760, 74 + 52 * len(rows) + 20, "A family before and after pruning", [*drawn, text(20, 74 + 52 * len(rows), lost)]
    )


def heads() -> str:
    """What may go of two heads: one of them, or a dimension of each, and never a dimension of one alone."""
    model, x = Heads().eval(), torch.randn(1, 5, 6)
    whole = fxprune.couple(model, x).group("q", [4])
    narrow = fxprune.couple(model, x, attention="dims")
    each, alone = narrow.group("q", [1, 5]), narrow.group("q", [1])
    assert each.rows is None and alone.rows is not None
    drawn = [
        text(20, 30, "outputs of q", "name"),
        *cells(20, 46, (), heads=2),
        text(20, 96, "view(1, -1, 2, 3) makes two heads", "dim"),
    ]
    for x_at, title, group, below in (
        (290, "one head", whole, 'attention="heads"'),
        (450, "a dimension of each", each, 'attention="dims"'),
        (640, "never", alone, "rows of 2 and 3 are no tensor"),
    ):
        gone = gone_of(group, "q.weight", 0)
        rows = [
            cells(x_at, 46 + (CELL + GAP) * head, [i - 3 * head for i in gone if i // 3 == head], 3, head) for head in range(2)
        ]
        drawn += [text(x_at, 30, title, "name"), *rows[0], *rows[1], text(x_at, 110, below, "dim")]
    said = "What the program does with the channels decides what may go, not the class of the layer."
    return picture(860, 160, "What may be removed of attention heads", [*drawn, text(20, 144, said)])


def gone_of(group: Group, tensor: str, dim: int) -> Sequence[int]:
    """The indices of a dimension that go with a group."""
    return group.remove[f"{tensor}:{dim}"]


def cells(x: int, y: int, gone: Sequence[int], count: int = 6, head: int = 0, heads: int = 1) -> list[str]:
    """A square for each channel, empty where it goes, in the colour of its head."""

    def kind(i: int) -> str:
        return "gone" if i in gone else ("kept", "other")[head or i * heads // count]

    square = f'y="{y}" width="{CELL}" height="{CELL}"'
    return [f'<rect class="{kind(i)}" x="{x + (CELL + GAP) * i}" {square}/>' for i in range(count)]


def text(x: int, y: int, words: str, kind: str = "") -> str:
    shown = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}"{f" class={kind!r}".replace(chr(39), chr(34)) if kind else ""}>{shown}</text>'


def picture(width: int, height: int, title: str, drawn: Sequence[str]) -> str:
    def lines() -> Iterator[str]:
        size = f'viewBox="0 0 {width} {height}" role="img" font-family="system-ui, sans-serif" font-size="14"'
        yield f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
        yield f"<title>{title}</title>"
        yield f"<style>\n{STYLE}\n</style>"
        yield f'<rect class="plate" width="{width}" height="{height}" rx="8"/>'
        yield from drawn
        yield "</svg>\n"

    return "\n".join(lines())


if __name__ == "__main__":
    for name, drawn in main().items():
        Path(__file__).with_name(name).write_text(drawn)
