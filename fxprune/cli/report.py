"""`fxprune report`: what pruning took from a model, by the file that was saved."""

from __future__ import annotations

import argparse
from pathlib import Path

from fxprune.checkpoints.checkpoint import load
from fxprune.cli.arguments import Answer, add_model_arguments, loaded
from fxprune.cli.output import show
from fxprune.reports.reporter import report

HELP = "Show what pruning took from a model, what it left, and why."
EPILOG = """
example:
  fxprune report model.py small.safetensors
  fxprune report model.py small.safetensors --html report.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pruned", metavar="PRUNED", help="what `fxprune prune -o` or fxprune.save wrote")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page that a browser shows")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    model, example_inputs = loaded(arguments)
    pruned = load(arguments.pruned, model)
    found = report(model, pruned, example_inputs)
    if arguments.html is not None:
        found.to_html(Path(arguments.html))
    return lambda: show(found)
