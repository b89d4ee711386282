"""`fxprune sweep`: many budgets and methods on one model, each evaluated, kept in a folder and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxprune.cli.arguments import (
    Answer,
    add_coupling_arguments,
    add_model_arguments,
    amount,
    check_target,
    coupling,
    criterion_of,
    data_and_loss,
    loaded,
    positive,
)
from fxprune.cli.objects import call, function_of
from fxprune.cli.output import show, show_json
from fxprune.criteria.catalog import resolve
from fxprune.passes.errors import PruneError
from fxprune.selection.argument_checks import check_word
from fxprune.selection.budgets import KINDS
from fxprune.selection.options import RANKINGS
from fxprune.sweeps.sweep import sweep

HELP = "Prune a model in many ways, and evaluate each: what is it worth, at which cost?"
EPILOG = """
examples:
  fxprune sweep train.py:net --macs 0.5 0.25 --evaluate train.py:accuracy
  fxprune sweep train.py:net --macs 0.5 0.25 --criterion flap wanda \\
      --ranking local global --data train.py:batches \\
      --evaluate train.py:accuracy -o sweep --html sweep.html

The function of --evaluate takes a model in evaluation mode and returns a
number; higher is better. With -o a sweep that was stopped goes on where it was.
"""
EXAMPLES = {"ratio": "0.3 0.5", "params": "0.5 5M", "macs": "0.5 2G", "memory": "0.5 10MB", "latency": "0.5 20ms"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate", metavar="FILE[:NAME]", help="a function of a model that returns a number (NAME: evaluate)"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="keep each point and its plan here, to go on from")
    parser.add_argument("--html", metavar="FILE", help="write table and plot as one page that a browser shows")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--no-repair", action="store_true", help="do not repair on --data what was pruned")
    parser.add_argument("--no-measure", action="store_true", help="do not time what was pruned")
    parser.add_argument("--no-verify", action="store_true", help="do not compare results with the original")
    parser.add_argument("--same-class", action="store_true", help="hand models of the original's class to --evaluate")
    add_model_arguments(parser)
    group = parser.add_argument_group("how much goes (one value or several)")
    for kind, example in EXAMPLES.items():
        what = "share to remove" if kind == "ratio" else "what may stay"
        group.add_argument(f"--{kind}", metavar="N", nargs="+", type=amount, help=f"{what}, such as {example}")
    group.add_argument("--round-to", metavar="N", type=positive, default=1, help="multiple of channels that stay")
    group.add_argument("--floor", metavar="R", type=float, help="least share of a family that stays")
    group = parser.add_argument_group("which go (one value or several)")
    group.add_argument("--criterion", metavar="A", nargs="+", help="names, or FILE:NAME of your own")
    group.add_argument("--ranking", metavar="A", nargs="+", help="local, global or isomorphic")
    group.add_argument("--depth", nargs="+", choices=("no", "yes", "only", "blocks"), help="whether residual branches go, too")
    group.add_argument("--data", metavar="FILE[:NAME]", help="batches, for criteria and for repair (NAME: data)")
    group.add_argument("--loss", metavar="FILE[:NAME]", help="a function of output and target (NAME: loss)")
    add_coupling_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    asked = requested(arguments)
    if arguments.evaluate is None:
        raise PruneError("nothing says what a result is worth", fix="--evaluate train.py:accuracy, a function of a model")
    page = None if arguments.html is None else Path(arguments.html)
    if page is not None:
        check_target(page, "the page")
    if arguments.output is not None:
        check_target(Path(arguments.output), "the sweep", folder=True)
    evaluate = function_of(arguments.evaluate, "evaluate", "function")
    model, example_inputs = loaded(arguments)
    asked |= data_and_loss(arguments)
    if arguments.no_repair:
        asked["repair"] = False
    score = lambda module: call(evaluate, arguments.evaluate, module)  # noqa: E731
    found = sweep(model, example_inputs, score, folder=arguments.output, **asked)
    if not found.done:
        raise PruneError(f"no point came out: {found.points[0].failed}", fix="the same with `fxprune prune`, which says more")
    if page is not None:
        found.to_html(page)
    return lambda: show_json(found.to_dict()) if arguments.json else show(found)


def requested(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is asked for of `sweep`, before a model is loaded; raises PruneError for what means nothing."""
    budgets = {kind: given for kind in EXAMPLES if (given := getattr(arguments, kind)) is not None}
    if not budgets:
        raise PruneError("nothing says how much goes", fix="--macs 0.5 0.25, or another budget")
    for kind in budgets.keys() & KINDS.keys():
        for given in budgets[kind]:
            KINDS[kind].check(given)
    criteria = None if arguments.criterion is None else [criterion_of(text) for text in arguments.criterion]
    for criterion in criteria or ():
        resolve(criterion)
    for ranking in arguments.ranking or ():
        check_word("ranking", ranking, RANKINGS)
    depth = None if arguments.depth is None else [{"no": False, "yes": True}.get(text, text) for text in arguments.depth]
    return {
        "budgets": budgets,
        "criteria": criteria,
        "rankings": arguments.ranking,
        **({} if depth is None else {"depth": depth}),
        **coupling(arguments),
        "round_to": arguments.round_to,
        "floor": arguments.floor,
        "verify": False if arguments.no_verify else "auto",
        "measure": not arguments.no_measure,
        "same_class": arguments.same_class,
    }
