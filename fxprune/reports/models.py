"""Models by name, for the command line: a file's own, or one of a library's with random weights."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxprune.passes.errors import PruneError

IMAGE_SIZE = 224
IMAGE_SIZES = {"inception_v3": 299, "quantized_inception_v3": 299}
FRAMES = 16
# Their builders warn unless told how to draw the first weights; random ones of any kind do here.
TOLD_HOW_TO_START = frozenset({"googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"})


def load(source: str) -> tuple[nn.Module, Any]:
    """The model that a command line names, in evaluation mode, and example inputs for it.

    Arguments:
        source: `model.py` (a file that defines `model` and `example_inputs`), `torchvision:NAME` or
            `timm:NAME`.

    Raises: PruneError where there is no such model.
    """
    library, colon, name = source.partition(":")
    if colon and library in ZOOS:
        return ZOOS[library](name)
    path = Path(source)
    if not path.is_file():
        fix = "a Python file that defines `model` and `example_inputs`, torchvision:resnet50 or timm:resnet50"
        raise PruneError(f"there is no file {source}", fix=fix)
    found = run_file(path)
    for needed in ("model", "example_inputs"):
        if not hasattr(found, needed):
            what = f"the file defines no `{needed}`"
            raise PruneError(what, where=source, fix=f"define `{needed}` at its top level")
    if not isinstance(found.model, nn.Module):
        kind = type(found.model).__name__
        raise PruneError(f"`model` is of type {kind}, not a torch.nn.Module", where=source, fix="model = Net()")
    return found.model, found.example_inputs


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a script's neighbours would see it: what lies beside it can be imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PruneError("the file is no Python source", where=str(path), fix="a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    with importable(path.resolve().parent), registered(module):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            what = f"the file raises {type(error).__name__}: {error}"
            raise PruneError(what, where=line_of(error, path), fix=f"make `python {path}` run") from error
    return module


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def registered(module: ModuleType) -> Iterator[None]:
    """Dataclasses and pickle look a class's module up by name while it is being made."""
    taken = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        del sys.modules[module.__name__]
        if taken is not None:
            sys.modules[module.__name__] = taken


def line_of(error: BaseException, path: Path) -> str:
    """The last line of the file that was running when it raised."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}"
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return f"{path}:{line}" if line else str(path)


def from_torchvision(name: str) -> tuple[nn.Module, Any]:
    torchvision = library_called("torchvision")
    models = torchvision.models
    if name not in models.list_models():
        raise unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # else it is downloaded
    if name in TOLD_HOW_TO_START:
        options["init_weights"] = False
    size = IMAGE_SIZES.get(name, IMAGE_SIZE)
    frames = (FRAMES,) if builder.__module__.startswith("torchvision.models.video") else ()
    return builder(**options).eval(), torch.randn(1, 3, *frames, size, size)


def from_timm(name: str) -> tuple[nn.Module, Any]:
    timm = library_called("timm")
    if not timm.is_model(name):
        raise unknown("timm", name, timm.list_models())
    model = timm.create_model(name, pretrained=False).eval()
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


ZOOS = {"torchvision": from_torchvision, "timm": from_timm}


def library_called(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PruneError(f"{name} is not installed", fix=f"pip install {name}") from error


def unknown(library: str, name: str, known: Sequence[str]) -> PruneError:
    close = difflib.get_close_matches(name, known, n=3)
    fix = " or ".join(f"{library}:{c}" for c in close) or f"one of the names of {library}'s list_models()"
    return PruneError(f"{library} has no model called {name!r}", fix=fix)
