"""Arguments that several commands share, and their values."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.cli.models import Wanted, load
from fxprune.cli.objects import data_of, find_object, function_of
from fxprune.passes.errors import PruneError
from fxprune.reports.files import is_special

LARGEST_SIZE = 1 << 24  # of one dimension of the example inputs


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--input-size", metavar="CxHxW", type=sizes, help="shape of one sample: 3x224x224, or 224 for images")
    group.add_argument("--batch-size", metavar="N", type=positive, help="of the example inputs (1 by default)")
    group.add_argument("--num-classes", metavar="N", type=positive, help="of a classifier that is built")
    group.add_argument("--weights", metavar="FILE", help="a state dict, .safetensors or .pt")
    group.add_argument("--device", default="cpu", help="such as cuda (cpu by default)")


def add_coupling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what may go")
    group.add_argument("--attention", choices=("heads", "queries", "dims"), default="heads", help="what goes of attention")
    group.add_argument("--experts", choices=("also", "only"), help="whole experts go beside all else, or alone")
    for name, what in (
        ("--freeze", "modules that stay as they are"),
        ("--freeze-outputs", "layers whose outputs stay"),
        ("--release", "outputs whose channels may go"),
    ):
        group.add_argument(name, metavar="GLOB", action="append", default=[], help=f"{what}; may be repeated")


def loaded(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model and example inputs that a command line asks for."""
    wanted = Wanted(arguments.input_size, arguments.batch_size, arguments.num_classes, arguments.weights, arguments.device)
    if wanted.batch_size is not None and wanted.input_size is None and arguments.model.partition(":")[0] not in BUILT:
        raise PruneError("--batch-size is for example inputs that are made up", fix="--input-size 3x224x224 with it")
    return load(arguments.model, wanted)


BUILT = ("torchvision", "timm", "hf")


def coupling(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_coupling_arguments` added, as keyword arguments of `prune` and `couple`."""
    names = ("attention", "freeze", "freeze_outputs", "release")
    experts = {None: False, "also": True}.get(arguments.experts, arguments.experts)
    return {name: getattr(arguments, name) for name in names} | {"experts": experts}


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how much goes")
    group.add_argument(
        "--ratio", metavar="R", action="append", help="share to remove, or LAYER=R; may be repeated (0.5 by default)"
    )
    for name, example in (("params", "5M"), ("macs", "2G"), ("memory", "10MB"), ("latency", "20ms")):
        group.add_argument(f"--{name}", metavar="N", type=amount, help=f"what may stay, such as 0.5 or {example}")
    group.add_argument("--round-to", metavar="N", type=positive, default=1, help="multiple of channels that stay")
    group.add_argument("--floor", metavar="R", type=float, help="least share of a family that stays")
    group = parser.add_argument_group("which go")
    group.add_argument("--ranking", help="local, global or isomorphic")
    group.add_argument("--data", metavar="FILE[:NAME]", help="batches, for criteria that look at data (NAME: data)")
    group.add_argument("--loss", metavar="FILE[:NAME]", help="a function of output and target (NAME: loss)")


def selection(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_selection_arguments` added, as keyword arguments of `prune`; data is not read yet."""
    found = {n: getattr(arguments, n) for n in ("params", "macs", "memory", "latency", "round_to", "floor", "ranking")}
    found["ratio"] = ratio_of(arguments.ratio)
    return found


def data_and_loss(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--data` and `--loss` name."""
    return {"data": data_of(arguments.data), "loss": function_of(arguments.loss, "loss", "loss")}


def criterion_of(text: str | None) -> Any:
    """A criterion by name, or an object of a user's; None where `prune` is to choose."""
    if text is None:
        return None
    return find_object(text, "criterion", "criterion")[0] if ":" in text or text.endswith(".py") else text


def ratio_of(given: list[str] | None) -> Any:
    """`--ratio 0.5`, or `--ratio layer1=0.3 --ratio layer2=0.5`."""
    if not given:
        return None
    named: dict[str, float] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            share = float(value)
        except ValueError:
            raise PruneError(f"--ratio {text}: {value!r} is no number", fix="--ratio 0.5 or --ratio layer1=0.5") from None
        if not equals and len(given) == 1:
            return share
        if not equals or name in named:
            raise PruneError(f"--ratio {text} is given beside another one", fix="one share, or LAYER=R for each layer")
        named[name] = share
    return named


def removal_of(given: list[str]) -> dict[str, list[int]] | None:
    """`--remove layer1.0.conv1=2,6,9`, with ranges such as 4-7."""
    found: dict[str, list[int]] = {}
    for text in given:
        name, equals, listed = text.rpartition("=")
        if not equals or not re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", listed):
            raise PruneError(f"--remove {text} is not LAYER=INDICES", fix="--remove layer1.0.conv1=2,6,9 or conv1=0-7,12")
        for part in listed.split(","):
            start, _, end = part.partition("-")
            found.setdefault(name, []).extend(range(int(start), min(int(end or start), int(start) + LARGEST_SIZE) + 1))
    return found or None


def check_target(path: Path, what: str, *, folder: bool = False) -> None:
    """Raise PruneError where a file (or a folder, if that is meant) could not be written, before the work is done."""
    above = path.absolute().parent
    if not above.is_dir():
        raise PruneError(f"{what} cannot be written: there is no folder {above}", fix=f"mkdir -p {above}")
    if not os.access(above, os.W_OK):
        raise PruneError(f"{what} cannot be written: {above} is read-only", fix="another folder")
    if is_special(path):
        raise PruneError(f"{what} cannot be written: {path} is a device or a pipe", fix="the name of a file")
    if path.is_dir() and not folder:
        raise PruneError(f"{what} cannot be written: {path} is a folder", fix="the name of a file")
    if folder and path.is_file():
        fix = "the name of a folder" if path.suffix else "a name that ends in .safetensors"
        raise PruneError(f"{what} cannot be written: {path} is a file", fix=fix)


def sizes(text: str) -> tuple[int, ...]:
    parts = re.split(r"[x,]", text)
    if not all(re.fullmatch(r"\d{1,9}", p) and 0 < int(p) <= LARGEST_SIZE for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; 3x224x224 is one")
    return tuple(int(p) for p in parts)


def positive(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def amount(text: str) -> float | str:
    """A share or an absolute number, or a text with a unit, which `prune` checks."""
    try:
        return float(text)
    except ValueError:
        return text


Answer = Callable[[], None]
