"""`fxprune inspect`: what is pruned together, what stays whole, and why."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from rich.console import Group as Together
from rich.text import Text
from torch import nn

from fxprune.api import couple, prune
from fxprune.arguments import did_you_mean
from fxprune.cli.arguments import Answer, add_coupling_arguments, add_model_arguments, check_target, coupling, loaded
from fxprune.cli.output import show, show_json
from fxprune.errors import PruneWarning
from fxprune.passes.errors import PruneError
from fxprune.reports.count import count
from fxprune.reports.coupling import CoupledFamily, Coupling
from fxprune.reports.coupling_graph import to_dot
from fxprune.reports.files import replacing
from fxprune.reports.formatting import short
from fxprune.reports.report import Report
from fxprune.reports.reporter import report

HELP = "Show which layers are pruned together, and what is kept whole and why."
EPILOG = """
examples:
  fxprune inspect model.py
  fxprune inspect torchvision:resnet50 --why layer1.0.conv1
  fxprune inspect model.py --html model.html
  fxprune inspect timm:vit_tiny_patch16_224 --freeze 'blocks.0*'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--family", metavar="NAME", help="one family, with all that it spans")
    what.add_argument("--why", metavar="NAME", help="what goes with the channels of a layer, link by link, or why none can")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--dot", metavar="FILE", help="write the coupling graph for Graphviz")
    parser.add_argument("--html", metavar="FILE", help="write a page that a browser shows, with what each ratio would leave")
    add_model_arguments(parser)
    add_coupling_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    if arguments.dot is not None:
        check_target(Path(arguments.dot), "the graph")
    if arguments.html is not None:
        check_target(Path(arguments.html), "the page")
    model, example_inputs = loaded(arguments)
    found = couple(model, example_inputs, **coupling(arguments))
    if arguments.html is not None:
        whole_report(model, example_inputs, coupling(arguments)).to_html(Path(arguments.html))
    if arguments.dot is not None:
        write(Path(arguments.dot), to_dot(found.to_networkx(), found.model))
    if arguments.why is not None:
        group = found.group(arguments.why)
        if arguments.json:
            return lambda: show_json(group.to_dict())
        return lambda: show(group)
    if arguments.family is not None:
        family = family_called(found, arguments.family)
        return lambda: show_json(family.to_dict()) if arguments.json else show(described(family))
    parameters, macs = totals(model, example_inputs)
    if arguments.json:
        return lambda: show_json({**found.to_dict(), "parameters": parameters, "macs": macs})
    size = f"{short(parameters)} parameters, {short(macs)} multiply-accumulates a forward"
    return lambda: show(Together(found, "", Text(size)))


def whole_report(model: nn.Module, example_inputs: Any, asked: dict[str, Any]) -> Report:
    """The report of a model that nothing was removed from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruneWarning)
        whole = prune(model, None, example_inputs, params=1.0, verify=False, **asked)
    return report(model, whole, example_inputs)


def totals(model: nn.Module, example_inputs: Any) -> tuple[int, int]:
    """The parameters of a model and the multiply-accumulates of one forward of the example inputs."""
    found = count(model, example_inputs)
    return found.parameters, found.macs or 0


def family_called(found: Coupling, name: str) -> CoupledFamily:
    """The family of a name, or the one that spans a tensor's or layer's first dimension."""
    for family in found.families:
        if family.name == name:
            return family
    near = [
        f for f in found.families if any(f"{n}:{d}" == name or (n in (name, f"{name}.weight") and d == 0) for n, d in f.members)
    ]
    if len(near) == 1:
        return near[0]
    names = [f.name for f in near or found.families]
    fix = f"one of {', '.join(names)}" if near else did_you_mean(name, names).rstrip() or "a name that fxprune inspect shows"
    raise PruneError(f"{name!r} names {'several families' if near else 'no family'} of the model", fix=fix)


def described(family: CoupledFamily) -> Text:
    """A family, its members a line each."""
    lines = [str(family), "", *(f"  {tensor}:{dim}" for tensor, dim in family.members)]
    return Text("\n".join(lines))


def write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
