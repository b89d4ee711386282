"""The command `fxprune`: its arguments, and what becomes of errors: one line, and exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from fxprune import __version__
from fxprune.arguments import did_you_mean
from fxprune.cli import benchmark, inspect, profile, prune, report, sweep
from fxprune.cli.output import one_line, spelled_for
from fxprune.errors import PruneWarning
from fxprune.passes.errors import PruneError

COMMANDS = {
    "inspect": inspect,
    "prune": prune,
    "report": report,
    "profile": profile,
    "benchmark": benchmark,
    "sweep": sweep,
}
BAD_USE, FAILED, STOPPED = 2, 1, 130

EPILOG = """
A MODEL is one of

  model.py                  a file that defines `model` and `example_inputs`
  file.py:name              a module in a file, or a function that returns one
  package.module:name       likewise, of what can be imported
  torchvision:resnet50      a model of a library, with random weights
  timm:vit_tiny_patch16_224
  hf:path/to/folder         a configuration of transformers, with its weights if
                            they are there; hf:config.json with random ones

A function may return (model, example_inputs), and takes no arguments but
num_classes. `fxprune COMMAND --help` says more.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USE, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")


def parser() -> Parser:
    made = Parser(
        prog="fxprune",
        description="Structured pruning for PyTorch: what can go, and a smaller model without it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"fxprune {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        raw = argparse.RawDescriptionHelpFormatter
        mine = commands.add_parser(
            name, help=command.HELP, description=command.HELP, epilog=command.EPILOG, formatter_class=raw, allow_abbrev=False
        )
        mine.add_argument("model", metavar="MODEL", help="what `fxprune --help` lists")
        mine.set_defaults(parser=mine)
        command.add_arguments(mine)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what cannot be done, and 1 where the reader of a pipe has gone."""
    try:
        arguments, unknown = parser().parse_known_args(argv)
        if unknown:
            refuse(arguments.parser, unknown)
    except SystemExit as stop:
        return int(stop.code or 0)
    command: Any = COMMANDS[arguments.command]
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - closed by the caller: `fxprune ... >&-`
    try:
        with random_seed(), warnings_as_lines(arguments.command):
            # what the model prints is not part of the answer
            with contextlib.redirect_stdout(sys.stderr):
                answer = command.run(arguments)
            with spelled_for(sys.stdout):
                answer()
                sys.stdout.flush()
    except PruneError as error:
        parts = [error.what, f"at {error.where}" if error.where else "", f"fix: {error.fix}" if error.fix else ""]
        print(f"fxprune {arguments.command}: error: {one_line('; '.join(p for p in parts if p))}", file=sys.stderr)
        return BAD_USE
    except SystemExit as stop:
        said = f"the model's code ends the process with SystemExit({stop.code!r})"
        print(f"fxprune {arguments.command}: error: {one_line(said)}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        print(f"fxprune {arguments.command}: stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # `fxprune inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer
        print(f"fxprune {arguments.command}: error: the answer cannot be written: {error.strerror}", file=sys.stderr)
        return BAD_USE
    return 0


def refuse(command: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Exit with the error for arguments that a command does not take, and the option that is near the first of them."""
    option = unknown[0].partition("=")[0]
    near = did_you_mean(option, re.findall(r"--[a-z-]+", command.format_usage())) if option.startswith("-") else ""
    command.error(f"unrecognized arguments: {' '.join(unknown)}{'; ' if near else ''}{near.rstrip()}")


@contextlib.contextmanager
def random_seed() -> Iterator[None]:
    """The same random weights and inputs in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def warnings_as_lines(command: str) -> Iterator[None]:
    """Warnings of fxprune in one line each; those of others are left out, unless Python is asked to show them (`-W`)."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PruneWarning)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, PruneWarning):
                print(f"fxprune {command}: warning: {one_line(str(message))}", file=sys.stderr)
            else:
                shown(message, category, *rest, **more)

        warnings.showwarning = show
        yield
