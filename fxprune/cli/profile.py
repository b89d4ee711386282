"""`fxprune profile`: latency, multiply-accumulates and peak memory, by module, of the original and of the pruned model."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator

import fxprune.reports.profile
from fxprune.checkpoints.checkpoint import load
from fxprune.cli.arguments import Answer, add_model_arguments, loaded
from fxprune.cli.output import show, show_json

HELP = "Measure one forward: latency, multiply-accumulates, peak memory, by module."
EPILOG = """
examples:
  fxprune profile torchvision:resnet50
  fxprune profile model.py small.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pruned", metavar="PRUNED", nargs="?", help="what `fxprune prune -o` wrote, to be set beside it")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    model, example_inputs = loaded(arguments)
    pruned = None if arguments.pruned is None else load(arguments.pruned, model)
    with without_logs():
        found = fxprune.reports.profile.profile(model, example_inputs, pruned)
    return lambda: show_json(found.to_dict()) if arguments.json else show(found)


@contextlib.contextmanager
def without_logs() -> Iterator[None]:
    """Discard what torch's profiler, which is C++, writes to standard error."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
