"""Errors of the compiler's own: users get the next rung of the ladder, tests get the error.

A run without values may fail because the program reads values, and a module that proxies cannot follow becomes opaque. To do
so upon any error at all is good for users and hides mistakes made here. `FXPRUNE_STRICT=1` lets those out.
"""

from __future__ import annotations

import linecache
import os
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).parent
# what runs the model's own ops and answers its questions: an error there is the model's
PROXIES = frozenset(["proxy.py"])
RUNNERS = frozenset(
    "run result __torch_dispatch__ __torch_function__ torch_function read_attribute concretise known_tensor".split()
)


class EngineFault(BaseException):
    """An error in the compiler, let out; no `except Exception` of the ladder takes it for the model's."""


def surface(error: BaseException, *, ours: bool = False) -> None:
    """Raise EngineFault if tests ask for it and the error arose here, of itself; `ours` says that it did."""
    if os.environ.get("FXPRUNE_STRICT") == "1" and (ours or is_ours(error)):
        raise EngineFault(f"{type(error).__name__}: {error}") from error


def is_ours(error: BaseException) -> bool:
    """Whether the innermost line is one of the compiler's, and neither a `raise` nor a call of the model's."""
    trace: TracebackType | None = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    path = Path(code.co_filename)
    mine = path.resolve().is_relative_to(HERE.resolve())
    raised = linecache.getline(code.co_filename, trace.tb_lineno).strip().startswith("raise ")
    return mine and not raised and path.name not in PROXIES and code.co_name not in RUNNERS
