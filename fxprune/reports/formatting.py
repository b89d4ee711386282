"""Tables and counts as they are printed."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType


WIDTH = 110


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, names: Sequence[str] = ()) -> Table:
    """Names at the left, numbers between, and a text at the right; `names` are titles between of what holds names, too."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    made.add_column(titles[0], overflow="fold")
    for title in titles[1:-1]:
        named = title in names
        made.add_column(title, justify="right", no_wrap=not named, overflow="fold" if named else "ellipsis")
    made.add_column(titles[-1], overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))  # a glob such as [ab] is no markup
    return made


class Printable:
    """What prints as rich tables, in a terminal and as text."""

    def tables(self) -> Iterator[RenderableType]:
        """What is shown of it, as rich renders it."""
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield from self.tables()

    def __str__(self) -> str:
        return as_text(self)


def as_text(renderable: RenderableType, width: int = WIDTH) -> str:
    """What rich shows of something, as plain text that is the same on every terminal."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).rstrip()


def plain_data(record: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready data: dicts and lists."""
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(record)))
    return data


def counted(number: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "family"), counted(1200, "family")
    ('1 family', '1,200 families')
    """
    if number != 1:
        noun = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun}"


def short(number: int) -> str:
    """A count in three digits.

    >>> short(950), short(23_520), short(25_557_032), short(4_089_184_256)
    ('950', '23.5 k', '25.6 M', '4.09 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return str(number)


def in_bytes(value: int) -> str:
    """A size in three digits.

    >>> in_bytes(96), in_bytes(27_800_000)
    ('96 B', '27.8 MB')
    """
    text = short(value)
    return text + ("B" if " " in text else " B")
