"""Context managers for the state of a process: modes, random state, gradients, the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fxprune.passes.errors import DrawsNumbers
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


def random_state(devices: Sequence[int] = ()) -> list[Any]:
    """Of all that a model may draw from: Python's, NumPy's and torch's generators, on the processor and some GPUs."""
    numbers = [random.getstate(), np.random.get_state()]
    return [*numbers, torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def set_random_state(state: Sequence[Any], devices: Sequence[int] = ()) -> None:
    """As `random_state` gave it."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    for device, its in zip(devices, state[3:], strict=True):
        torch.cuda.set_rng_state(its, device)


def plain_random_state() -> list[Any]:
    """Of the generators that no program draws from: those of Python and NumPy, comparable."""
    return comparable(random.getstate(), np.random.get_state(legacy=True))


def comparable(pythons: Any, numpys: Any) -> list[Any]:
    return [pythons, *[v.tobytes() if isinstance(v, np.ndarray) else v for v in numpys]]


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Raises DrawsNumbers for what draws from these generators, and winds them back."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        drawn = plain_random_state() != comparable(*before)
        if drawn:  # to set NumPy's state takes as long as some layers
            random.setstate(before[0])
            np.random.set_state(before[1])
    if drawn:
        raise DrawsNumbers("numbers that Python's or NumPy's generator draws")


@contextlib.contextmanager
def extreme_draws(*, high: bool) -> Iterator[None]:
    """Have Python's and NumPy's generators draw the least or the greatest numbers that there are, the next 300 times.

    Their states stay changed. Both are Mersenne twisters (MT19937), whose state is the next 624 outputs but for a mixing of
    bits that can be undone.
    """
    word = 0x12DD9BB3 if high else 0x102244C9  # come out as 0xFFFFFFFF and 1: with 0 a rejection could go on for good
    random.setstate((3, (word,) * 624 + (0,), None))
    if np.random.get_state(legacy=False)["bit_generator"] == "MT19937":
        np.random.set_state(("MT19937", np.full(624, word, np.uint32), 0, 0, 0.0))
    yield


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Leave the state of Python's and NumPy's generators as it is."""
    numbers = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])


@contextlib.contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """Leave random state and gradient mode as they are."""
    with torch.random.fork_rng(devices=gpus_of(model)), torch.no_grad():
        yield


def gpus_of(model: nn.Module) -> list[int]:
    """The numbers of the GPUs that a model's parameters are on."""
    on_gpu = named_parameters(model).values() if torch.cuda.is_initialized() else ()
    return sorted({t.device.index or 0 for t in on_gpu if t.is_cuda})


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
