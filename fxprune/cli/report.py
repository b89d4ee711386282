"""`fxprune report`: what pruning took from a model, by the file that was saved."""

from __future__ import annotations

import argparse

import fxprune.reports.report
from fxprune.checkpoints.checkpoint import load
from fxprune.cli.arguments import Answer, add_model_arguments, loaded
from fxprune.cli.output import show

HELP = "Show what pruning took from a model, what it left, and why."
EPILOG = """
example:
  fxprune report model.py small.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pruned", metavar="PRUNED", help="what `fxprune prune -o` or fxprune.save wrote")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    model, example_inputs = loaded(arguments)
    pruned = load(arguments.pruned, model)
    found = fxprune.reports.report.report(model, pruned, example_inputs)
    return lambda: show(found)
