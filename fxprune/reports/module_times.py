"""Seconds of every module in one forward, before and after pruning, measured in turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxprune.inputs import ExampleInputs, device_of
from fxprune.passes.ir.module_tree import walk
from fxprune.passes.ir.progress import progress_bar
from fxprune.selection.latency import Latency, measure_seconds, summarise

TURNS = 7  # forwards of each model whose modules are timed


def measure_models(model: nn.Module, pruned: nn.Module, inputs: ExampleInputs) -> Latency:
    """Seconds of one forward of both, in turns. Both are in evaluation mode."""
    device = device_of(model)
    with torch.no_grad():
        original, now = measure_seconds([lambda: inputs.call(model), lambda: inputs.call(pruned)], device)
    return summarise(original, now, device)


def measure_modules(model: nn.Module, pruned: nn.Module, inputs: ExampleInputs) -> dict[str, tuple[float, float]]:
    """For every module that is called in both, by path, the seconds of its calls in one forward: the least of some.

    What is inside it is included, and so is what timing that takes.
    """
    turns: list[list[dict[str, float]]] = [[], []]
    with torch.no_grad():
        for _ in progress_bar(range(TURNS), "timing modules", "turn"):
            for found, module in zip(turns, (model, pruned), strict=True):
                with timed(module) as seconds:
                    inputs.call(module)
                found.append(seconds)
    both = turns[0][0].keys() & turns[1][0].keys()
    least = lambda found, path: min(seconds.get(path, 0.0) for seconds in found)  # noqa: E731
    return {path: (least(turns[0], path), least(turns[1], path)) for path in turns[0][0] if path in both}


@contextlib.contextmanager
def timed(root: nn.Module) -> Iterator[dict[str, float]]:
    """Within the block the seconds of all calls of each module are added up, by path."""
    seconds: dict[str, float] = {}
    started: dict[str, list[float]] = {}
    device = device_of(root)
    handles: list[Any] = []

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def starts(path: str) -> Any:
        return lambda *_: started.setdefault(path, []).append(now())

    def ends(path: str) -> Any:
        def end(*_: Any) -> None:
            seconds[path] = seconds.get(path, 0.0) + now() - started[path].pop()

        return end

    try:
        for module, path in walk(root).items():
            handles.append(module.register_forward_pre_hook(starts(path)))
            handles.append(module.register_forward_hook(ends(path)))
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
