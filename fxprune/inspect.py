"""What pruning can remove from a model, what it cannot, and why: `python -m fxprune.inspect model.py`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fxprune.api import couple
from fxprune.passes.errors import PruneError
from fxprune.reports.coupling import Coupling
from fxprune.reports.coupling_graph import to_dot
from fxprune.reports.models import load

EXAMPLES = """
examples:
  python -m fxprune.inspect model.py            a file that defines `model` and `example_inputs`
  python -m fxprune.inspect torchvision:resnet50
  python -m fxprune.inspect timm:vit_tiny_patch16_224 --attention dims --freeze 'blocks.0*'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the families of a model, largest first; returns the exit status: 2 for what cannot be done."""
    arguments = parser().parse_args(argv)
    try:
        # what the model prints is not part of the answer
        with contextlib.redirect_stdout(sys.stderr):
            model, example_inputs = load(arguments.model)
            found = couple(
                model, example_inputs, freeze=arguments.freeze, release=arguments.release, attention=arguments.attention
            )
        if arguments.dot:
            write(Path(arguments.dot), to_dot(found.to_networkx(), found.model))
    except PruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found, as_json=arguments.json)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m fxprune.inspect",
        description="Show which layers of a model are pruned together, and what is kept whole and why.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", help="model.py, torchvision:NAME or timm:NAME")
    made.add_argument("--json", action="store_true", help="print JSON and nothing else")
    made.add_argument("--dot", metavar="FILE", help="write the coupling graph for Graphviz")
    made.add_argument("--attention", choices=("heads", "dims"), default="heads", help="what goes of attention")
    for name, what in (("--freeze", "modules that stay as they are"), ("--release", "outputs whose channels may go")):
        made.add_argument(name, metavar="GLOB", action="append", default=[], help=f"{what}; may be repeated")
    return made


def show(found: Coupling, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    elif sys.stdout.isatty():
        Console(highlight=False, markup=False, emoji=False).print(found)
    else:
        print(found)


def write(path: Path, text: str) -> None:
    """Write a file so that it is there complete or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        what = f"the graph cannot be written: {error.strerror}"
        raise PruneError(what, where=str(path), fix="--dot with a path that can be written to") from error


if __name__ == "__main__":
    sys.exit(main())
