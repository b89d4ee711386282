"""`fxprune benchmark`: methods of pruning on one model side by side."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Group as Together

from fxprune.cli.arguments import (
    Answer,
    add_coupling_arguments,
    add_model_arguments,
    add_selection_arguments,
    coupling,
    data_and_loss,
    loaded,
    selection,
)
from fxprune.cli.objects import call, function_of
from fxprune.cli.output import show, show_json
from fxprune.criteria.calibration import read
from fxprune.criteria.catalog import resolve
from fxprune.passes.errors import PruneError
from fxprune.reports.comparison import compare_methods, named_methods
from fxprune.selection.argument_checks import check_word
from fxprune.selection.options import RANKINGS

HELP = "Prune models by several methods: size, memory, latency, score side by side."
EPILOG = """
examples:
  fxprune benchmark torchvision:resnet18 --methods magnitude,random
  fxprune benchmark timm:resnet18 timm:mobilenetv3_small_100 --macs 0.5
  fxprune benchmark train.py:net --methods magnitude,taylor/global \\
      --data train.py:batches --score train.py:accuracy --macs 0.5

A method is a criterion, perhaps with a ranking: taylor/isomorphic. The function
of --score takes a model in evaluation mode and returns a number.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("others", metavar="MODEL", nargs="*", help="more models, each compared by itself")
    parser.add_argument(
        "--methods",
        metavar="A,B",
        default="magnitude,magnitude/global,random",
        help="criteria, such as magnitude,taylor/global",
    )
    parser.add_argument("--score", metavar="FILE[:NAME]", help="a function of a model that returns a number (NAME: score)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare results with the original")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    add_model_arguments(parser)
    add_selection_arguments(parser)
    add_coupling_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    names = [name for name in arguments.methods.split(",") if name]
    if not names or len(set(names)) < len(names):
        raise PruneError("--methods names " + ("one method twice" if names else "none"), fix="--methods magnitude,taylor")
    asked = selection(arguments) | coupling(arguments)
    methods = named_methods(names, **asked)
    for method in methods.values():
        resolve(method["criterion"])
        check_word("ranking", method["ranking"] or "local", RANKINGS)
    score = function_of(arguments.score, "score", "function")
    models = [arguments.model, *arguments.others]
    if len(set(models)) < len(models):
        raise PruneError("a model is named twice", fix="each MODEL once")
    made = [loaded(argparse.Namespace(**{**vars(arguments), "model": name})) for name in models]
    given: dict[str, Any] = data_and_loss(arguments)
    if given["data"] is not None:
        given["data"] = list(read(given["data"]))  # each method reads it again
    for method in methods.values():
        method.update(given, verify=False if arguments.no_verify else "auto")
    evaluate = None if score is None else lambda model: call(score, arguments.score, model)
    found = [compare_methods(model, example_inputs, methods, evaluate) for model, example_inputs in made]
    if arguments.json:
        return lambda: show_json(found[0].to_dict() if len(found) == 1 else [one.to_dict() for one in found])
    return lambda: show(Together(*[part for one in found for part in (one, "")][:-1]))
