"""What pruning can remove from a model, what it cannot, and why: `python -m fxprune.inspect` is `fxprune inspect`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fxprune.cli.main import main as command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Print the families of a model, largest first; returns the exit status: 2 for what cannot be done."""
    return command_line(["inspect", *(sys.argv[1:] if argv is None else argv)])
