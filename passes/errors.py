"""The one exception type: what went wrong, where, and how to fix it."""

from __future__ import annotations

import linecache
import os
from pathlib import Path
from types import TracebackType

from torch import Tensor


class PruneError(Exception):
    """A request that cannot be carried out; nothing has been changed when it is raised.

    >>> print(PruneError("ratio must lie in [0, 1), not 1.5", fix="pass ratio=0.5"))
    ratio must lie in [0, 1), not 1.5
      fix: pass ratio=0.5

    Arguments:
        what: one clause that says what is wrong.
        where: the node, module or parameter it concerns, if there is one.
        fix: what the caller can do.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  at {where}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


def told(error: BaseException) -> str:
    """An error of someone else's in one line: its type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


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


class GuardError(RuntimeError):
    """An input for which the original takes another path than the one that was captured."""


class NotARectangle(Exception):
    """The rows of a joint factor would keep different numbers of entries; carries its labels."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__("rows keep different numbers of entries")
        self.labels = labels


class ReadsValue(Exception):
    """Python asked for the contents of a tensor: the innermost module must become one opaque node."""


class ReadsMissing(ReadsValue):
    """Contents that there are none of, as the run is without values."""


class NeedsValues(Exception):
    """The contents of a constant matter, but the run was without values."""


class WritesWhatItReads(Exception):
    """The program writes to constants made on the way, or to tensors that a forward assigns anew: it has to read copies."""


class MixesModes(Exception):
    """Something uses a tensor of a run in training that is no result, attribute or argument of its module."""


class DrawsNumbers(ReadsValue):
    """What was traced has drawn numbers that are no nodes."""


class ConvertsSize(BaseException):
    """Code of the model's has converted a size by `int` or `float`; no `except Exception` of its own is to catch it."""
