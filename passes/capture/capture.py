"""Trace: run the model once, with proxies that carry values, into a graph and a tape.

The graph is what the user gets back, with symbolic sizes and modules as nodes. The tape is what the dispatcher ran for each
node, which is what coupling reads. Decisions that Python took on the way (`if x.shape[0] > 1`) are kept as guards.

Ladder: (1) symbolic; (2) where Python reads a tensor's contents, or a forward does what proxies cannot follow, the innermost
module becomes one opaque node: it still runs under the recorder, so it is coupled like everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxprune.passes.capture.opaque import RootWrapper
from fxprune.passes.capture.patching import patched
from fxprune.passes.capture.tracer import ValueTracer
from fxprune.passes.capture.train_eval import membership
from fxprune.passes.errors import PruneError, ReadsValue, WritesConstants, surface
from fxprune.passes.ir.program import CapturedProgram, named_outputs


def capture_program(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    retry: bool = True,
    whole: bool = False,
    find_home: Callable[[], torch.device | None] = lambda: None,
) -> CapturedProgram:
    """Capture one run of `root` on the example arguments; `root` must be a private copy (see `private_copy`).

    `retry=False` lets errors out instead of turning the module where they arose opaque; `whole` makes one opaque module of
    all of it from the start; `find_home` finds the device that tensors are said to be on which are on `meta` for the run.
    """
    tracer = ValueTracer(root, args, kwargs)
    tracer.retry, tracer.find_home = retry, find_home
    prefix = ""
    try:
        if whole:
            raise RuntimeError("stays of its class")
        try:
            graph = recorded(tracer)
        except WritesConstants:
            tracer = starting_over(tracer, args, kwargs)
            graph = recorded(tracer)
    except Exception as error:
        if not retry or hasattr(error, "fxprune_plain") or isinstance(error, PruneError):
            raise
        if not whole:
            surface(error)
        prefix = "whole."
        tracer = whole_tracer(tracer, root, args, kwargs, error)
        try:
            graph = recorded(tracer)
        except Exception as plain:
            plain.fxprune_where = getattr(error, "fxprune_where", type(root).__name__)  # type: ignore[attr-defined]
            raise
    tracer.stored.take_back(tracer.index, 0)
    output = next(n for n in graph.nodes if n.op == "output")
    outputs = list(named_outputs(output.args[0], tracer.results))
    only = membership(graph, tracer.branches or [], tracer.index)
    made = CapturedProgram(
        tracer.root,
        graph,
        tracer.recorder.op_trace,
        tracer.results,
        tracer.guards,
        tracer.opaque,
        tracer.calls,
        tracer.sizes,
        tracer.inputs,
        outputs,
        tracer.reads_training or tracer.readings[0].asked or only is None,
        only or {},
        tracer.untracked,
        tracer.index,
        prefix,
        tracer.modules,
        tracer.apart(),
        tracer.given,
        tracer.trains_on_values,
    )
    vars(tracer).clear()  # its proxies know it: what the capture does not hold is to go now, not when the collector comes
    return made


def starting_over(failed: ValueTracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ValueTracer:
    """A tracer of the same module tree whose program copies constants before it writes to them."""
    failed.stored.take_back(failed.index, 0)
    for kept in failed.kept:
        delattr(failed.root, failed.names[id(kept)])
    tracer = ValueTracer(failed.root, args, kwargs)
    tracer.retry, tracer.find_home, tracer.opaque = failed.retry, failed.find_home, dict(failed.opaque)
    tracer.writes_constants = True
    return tracer


def whole_tracer(
    failed: ValueTracer, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> ValueTracer:
    """A tracer for which the whole model is one opaque node."""
    failed.stored.take_back(failed.index, 0)
    wrapper = RootWrapper(root)
    wrapper.train(root.training)
    tracer = ValueTracer(wrapper, args, kwargs)
    tracer.root = wrapper
    tracer.forward = root.forward
    tracer.names = tracer.recorder.names = dict(failed.names)
    tracer.opaque["whole"] = f"reads {error}" if isinstance(error, ReadsValue) else f"{type(error).__name__}: {error}"
    return tracer


def recorded(tracer: ValueTracer) -> fx.Graph:
    """Trace with the recorder in place all the while; it writes only while a node is evaluated."""
    tracer.recorder.active = False
    with patched(tracer), torch.no_grad(), tracer.recorder:
        graph = tracer.trace(tracer.root)
    tracer.check_constants()
    return graph
