"""Context managers for the state of a process: modes, random state, gradients, the garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fxprune.passes.ir.module_tree import named_parameters


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector: the compiler creates many small objects without cycles, and a full collection over a
    session's modules takes longer than compiling a model."""
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


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Leave the modes that the caller is in: inference, autocast, `torch.device(...)` and others; a default device stays."""
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with contextlib.ExitStack() as stack:
            if default in modes:
                torch._C._push_on_torch_function_stack(default)
                stack.callback(torch._C._pop_torch_function_stack)
            stack.enter_context(_disable_current_modes())
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda") if torch._C._is_any_autocast_enabled() else ():
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
