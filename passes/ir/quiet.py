"""Context managers that leave the process as it was: random state, gradient mode, the garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import nn

from fxprune.passes.ir.module_tree import named_parameters


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Put the garbage collector off: what is made here is many small objects without cycles, and a full collection over a
    session's modules takes longer than a model does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """Leave random state and gradient mode as they are."""
    devices = sorted({t.device.index or 0 for t in named_parameters(model).values() if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield
