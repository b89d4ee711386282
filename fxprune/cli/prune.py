"""`fxprune prune`: a whole job, from a model to a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Group as Together
from rich.text import Text
from torch import nn

import fxprune.api
from fxprune.checkpoints.checkpoint import SUFFIX, save
from fxprune.cli.arguments import (
    Answer,
    add_coupling_arguments,
    add_model_arguments,
    add_selection_arguments,
    check_target,
    coupling,
    criterion_of,
    data_and_loss,
    loaded,
    removal_of,
    selection,
)
from fxprune.cli.output import show
from fxprune.passes.errors import PruneError
from fxprune.reports.reporter import report

HELP = "Prune a model, compare the result with the original, and write it to a file."
EPILOG = """
examples:
  fxprune prune model.py --ratio 0.5 -o small.safetensors
  fxprune prune torchvision:resnet50 --weights r50.pt --macs 2G -o s.safetensors
  fxprune prune model.py --criterion taylor --data train.py:batches --dry-run
  fxprune prune model.py --remove layer1.0.conv1=2,6,9 -o small.safetensors

fxprune.load("small.safetensors", model) reads the file in Python.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="a .safetensors file, or a folder for models of transformers")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    parser.add_argument("--same-class", action="store_true", help="a model of its own class in place of a GraphModule")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the original")
    add_model_arguments(parser)
    add_selection_arguments(parser)
    parser.add_argument("--criterion", help="a name, or FILE:NAME of your own (magnitude without data)")
    parser.add_argument(
        "--remove", metavar="LAYER=I,J", action="append", default=[], help="exactly these channels, in place of a ratio"
    )
    add_coupling_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    target = None if arguments.output is None else Path(arguments.output)
    if target is None and not arguments.dry_run:
        raise PruneError("nothing says where to write the result", fix="-o small.safetensors, or --dry-run")
    asked = selection(arguments) | coupling(arguments) | {"remove": removal_of(arguments.remove)}
    asked |= {"criterion": criterion_of(arguments.criterion), "same_class": arguments.same_class}
    if target is not None:
        check_output(target)
    model, example_inputs = loaded(arguments)
    if target is not None and target.suffix != SUFFIX:
        check_configured(model, target)
    asked |= data_and_loss(arguments)
    pruned = fxprune.api.prune(model, example_inputs=example_inputs, verify=False if arguments.no_verify else "auto", **asked)
    found = report(model, pruned, example_inputs)
    if target is None or arguments.dry_run:
        return lambda: show(Together(found, "", Text("nothing was written")))
    save(pruned, target)
    return lambda: show(Together(found, "", Text(f"written to {target}")))


def check_output(target: Path) -> None:
    if target.suffix not in ("", SUFFIX):
        raise PruneError(f"-o {target} ends in {target.suffix}", fix=f"-o {target.with_suffix(SUFFIX)}")
    check_target(target, "the result", folder=target.suffix == "")


def check_configured(model: nn.Module, target: Path) -> None:
    """Raise PruneError where a model cannot be saved to a folder."""
    if not hasattr(getattr(model, "config", None), "to_dict"):
        what = f"a {type(model).__name__} has no configuration to be saved to a folder with"
        raise PruneError(what, fix=f"-o {target if target.name else 'small'}{SUFFIX}")
