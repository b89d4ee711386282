"""What a command line names in Python: an object of a file, or of a module that can be imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fxprune.arguments import did_you_mean
from fxprune.passes.errors import PruneError

STOPS = (Exception, SystemExit)  # what code that a user names may raise


def find_object(spec: str, default: str, what: str) -> tuple[Any, ModuleType]:
    """The object that `file.py[:name]` or `package.module:name` names, and the module it is in.

    Arguments:
        default: the name in a file, where none is given.
        what: is looked for, as a message names it.

    Raises: PruneError where there is none.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or place.endswith(("/", "\\")) or spec.endswith(".py"):
        place, name = spec, ""
    if place.endswith(".py") or Path(place).is_file():
        module = run_file(Path(place))
    elif colon and all(part.isidentifier() for part in place.split(".")):
        module = import_module(place)
    else:
        raise PruneError(f"{spec!r} names no {what}", fix=f"file.py:{default} or package.module:{default}")
    name = name or default
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [n for n in dir(found) if not n.startswith("_")])
            kind = "file" if place.endswith(".py") else "module"
            raise PruneError(f"the {kind} defines no `{name}`", where=place, fix=f"{near}define `{name}` at its top level")
        found = getattr(found, part)
    return found, module


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a script's neighbours would see it: what lies beside it can be imported."""
    if not path.is_file():
        raise PruneError(f"there is no file {path}", fix="a Python file that can be read")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise PruneError("the file is no Python source", where=str(path), fix="a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    with importable(path.resolve().parent), registered(module):
        try:
            spec.loader.exec_module(module)
        except STOPS as error:
            what = f"the file raises {type(error).__name__}: {error}"
            inside = isinstance(error, ImportError) and "attempted relative import" in str(error)
            fix = f"the module: {'.'.join(path.with_suffix('').parts[-2:])}:model, where that can be imported"
            raise PruneError(what, where=line_of(error, path), fix=fix if inside else f"make `python {path}` run") from error
    return module


def import_module(name: str) -> ModuleType:
    """A module that can be imported from here, as `python -m` would."""
    with importable(Path.cwd()):
        try:
            return importlib.import_module(name)
        except STOPS as error:
            raise PruneError(f"{name} cannot be imported: {error}", fix=f"make `python -c 'import {name}'` run") from error


def call(function: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """What a function that a user named returns; raises PruneError where it fails."""
    if not callable(function):
        raise PruneError(f"{name} is of type {type(function).__name__}, not a function", fix="the name of a function")
    try:
        return function(*args, **kwargs)
    except PruneError:
        raise
    except STOPS as error:
        raise PruneError(f"{name} raises {type(error).__name__}: {error}", fix="call it in Python to see where") from error


def function_of(spec: str | None, default: str, what: str) -> Callable[..., Any] | None:
    """The function that a user names; None where none is named."""
    if spec is None:
        return None
    found, _ = find_object(spec, default, what)
    if not callable(found):
        raise PruneError(f"{spec} is of type {type(found).__name__}, not a function", fix="the name of a function")
    wanted: Callable[..., Any] = found
    return wanted


def data_of(spec: str | None) -> Any:
    """The batches that a user names, or that the function which is named returns; None where none are named."""
    if spec is None:
        return None
    found, _ = find_object(spec, "data", "data")
    found = call(found, spec) if callable(found) else found
    if not hasattr(found, "__iter__") or isinstance(found, str):
        raise PruneError(f"{spec} is of type {type(found).__name__}, not batches of data", fix="a list of (inputs, target)")
    return found


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
