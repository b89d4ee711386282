"""Progress of what takes long: the one place that makes bars, and the switch for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SWITCH = "FXPRUNE_PROGRESS"  # in the environment: 0 or 1
DELAY = 2.0  # seconds before which nothing is shown


class Progress:
    """What `fxprune.progress` set; None leaves it to the environment, and that to whether stderr is a terminal."""

    shown: bool | None = None


def is_shown() -> bool:
    if Progress.shown is not None:
        return Progress.shown
    said = os.environ.get(SWITCH, "")
    return said not in ("0", "false") if said else sys.stderr.isatty()


class Bar(tqdm):
    monitor_interval = 0  # tqdm's own starts a thread that lives as long as the process


def progress_bar(items: Iterable[Any] | None = None, what: str = "", unit: str = "step", total: int | None = None) -> Any:
    """A bar over items, or one whose `update()` counts; it is gone when it is done.

    Arguments:
        items: what is gone through; None for a bar that is told.
        what: a word or two before it.
        unit: what one item is.
        total: how many there are, where the items do not say.
    """
    return Bar(items, desc=what, unit=unit, total=total, disable=not is_shown(), leave=False, delay=DELAY, dynamic_ncols=True)
