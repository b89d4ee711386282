"""The one exception type, which lives in the compiler as that raises it too, and the one warning."""

import os
from pathlib import Path
from types import TracebackType

import torch

from fxprune.passes import errors
from fxprune.passes.errors import PruneError

__all__ = ["PruneError", "PruneWarning"]

OWN = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, errors.__file__))
# what lies between a layer and an op: every call of a module, and all of torch that runs ops in other ways
PLUMBING = tuple(
    str(Path(torch.__file__).parent / name) for name in ("_", "fx", "utils", os.path.join("nn", "modules", "module."))
)


class PruneWarning(UserWarning):
    """Part of a request has no effect, and the rest was carried out."""


def without_own_lines(error: PruneError) -> PruneError:
    """The same error; its traceback, and those of the errors that it comes from, show no lines of fxprune's."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = others_lines(link.__traceback__)
        if isinstance(link.__context__, PruneError):
            link.__context__ = None  # an attempt that another one followed
        link = link.__cause__ or link.__context__
    return error.with_traceback(None)


def others_lines(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of fxprune's files, and of what torch does to run an op."""
    frames = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    kept = None
    for frame in reversed(frames):
        if not frame.tb_frame.f_code.co_filename.startswith((*OWN, *PLUMBING)):
            kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return kept
