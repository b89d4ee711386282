"""Where the time of `fxprune.prune` goes, step by step, as shares of the whole.

    phases.py                          a few models of different make
    phases.py --models resnet50 --rounds 20
    phases.py --against PATH           the whole time of `prune`, against another checkout of this repository

Prints a table: for each step of the compiler the share of the CPU time of the fastest of several rounds, verification off.
With `--against` both checkouts are timed in turns, and rows and table are stored in `phases.jsonl` and `PHASES.md`.
"""

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import compare
from models import build, full_name
from sweep import machine, markdown_table
from torch import fx

import fxprune
from fxprune.passes.capture import programs
from fxprune.passes.coupling import couple
from fxprune.passes.rewrite import rewrite
from fxprune.passes.rewrite.rewriter import Rewriter
from fxprune.selection import allocation, select

MODELS = ("mobilenet_v2", "resnet18", "resnet50", "resnext50_32x4d", "efficientnet_b7", "inception_v3", "vit_b_16", "swin_t")
COMPARED = ("mobilenet_v2", "resnet50", "resnext50_32x4d", "inception_v3", "vit_b_16", "swin_t")
STEPS: list[tuple[str, Any, str]] = [
    ("copy of the modules", programs, "private_copy"),
    ("capture", programs, "capture_program"),
    ("rules", couple, "propagate"),
    ("ties", couple, "solve"),
    ("families", select, "find_free_families"),
    ("scores", select, "score_units"),
    ("choice", allocation, "form_groups"),
    ("choice", allocation, "list_candidates"),
    ("choice", allocation, "find_nonempty_sets"),
    ("choice", allocation, "restore_rectangles"),
    ("rewriting", Rewriter, "run"),
    ("slicing tensors", rewrite, "slice_tensor"),
    ("code of the result", fx.GraphModule, "recompile"),
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", type=Path, help="another checkout, to be timed in turns with this one")
    arguments = parser.parse_args(argv)
    if arguments.against is not None:
        compare.compare(arguments.models or COMPARED, arguments.against, arguments.rounds)
        print(compare.TABLE.read_text(), end="")
        return
    arguments.models = arguments.models or MODELS
    rows = [{"model": name, **shares(full_name(name), arguments.rounds)} for name in arguments.models]
    names = list(dict.fromkeys(name for name, _, _ in STEPS))
    columns: list[tuple[str, str, Callable[[dict[str, Any]], object]]] = [
        ("model", "l", lambda row: row["model"]),
        ("ms", "r", lambda row: f"{1e3 * row['seconds']:.0f}"),
        *((name, "r", lambda row, name=name: f"{row[name]:.0%}") for name in [*names, "the rest"]),
    ]
    print(f"{machine()}\n\n{markdown_table(columns, rows)}", end="")


def shares(model: str, rounds: int) -> dict[str, float]:
    """The share of each step in the fastest round, and its seconds; time in a step inside of another counts for the inner."""
    network, images = build(model)
    best: dict[str, float] = {"seconds": float("inf")}
    for _ in range(rounds):
        clock = Clock()
        with clock.watching():
            start = time.process_time()
            fxprune.prune(network, example_inputs=images[:1], verify=False)
            seconds = time.process_time() - start
        if seconds < best["seconds"]:
            found = {name: clock.spent[name] / seconds for name, _, _ in STEPS}
            best = {"seconds": seconds, **found, "the rest": 1 - sum(found.values())}
    return best


class Clock:
    """Adds up what the steps take."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.inner = [0.0]  # for each step that is going on, what the steps inside of it took

    def watching(self) -> ExitStack:
        stack = ExitStack()
        for name, owner, attribute in STEPS:
            stack.enter_context(patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))))
        return stack

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.process_time() - start
                self.spent[name] += seconds - self.inner.pop()
                self.inner[-1] += seconds

        return run


if __name__ == "__main__":
    sys.exit(main())
