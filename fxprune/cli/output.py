"""What the command line prints: tables as wide as the terminal, 80 columns where there is none."""

from __future__ import annotations

import codecs
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fxprune.reports.formatting import as_text

if TYPE_CHECKING:
    from rich.console import RenderableType


# what tables are drawn with, for terminals and files that cannot hold it; as wide
PLAIN = {"─": "-", "━": "-", "→": ">", "…": "~", "×": "x", "±": "~", "█": "#", "µ": "u"}


@contextlib.contextmanager
def spelled_for(stream: Any) -> Iterator[None]:
    """Let a stream whose encoding does not have a character take one that looks alike, or a question mark."""
    before = getattr(stream, "errors", None)
    if before != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    codecs.register_error("fxprune", plain)
    stream.reconfigure(errors="fxprune")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for the characters that could not be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def show(found: RenderableType) -> None:
    if sys.stdout.isatty():
        Console(highlight=False, markup=False, emoji=False).print(found)
    else:
        print(as_text(found, width=shutil.get_terminal_size((80, 24)).columns))


def show_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def one_line(text: str) -> str:
    """A text without line breaks.

    >>> one_line("there\\n  is none")
    'there is none'
    """
    return " ".join(text.split())
