"""Capture: run a model once, with proxies that carry values, into an FX graph and a trace of its dispatcher calls.

The graph is what the user gets back, with symbolic sizes and modules as nodes. The trace is what the dispatcher ran for each
node, and what coupling reads. Decisions that Python took on the way (`if x.shape[0] > 1`) are kept as guards.

There are four ways, each tried where the one before it fails: (1) every op is a node; (2) the innermost module whose Python
reads the contents of a tensor, or does what proxies cannot follow, is one opaque node, which still runs under the recorder,
so that it is coupled like everything else; (3) where that would be the whole model, the innermost function is one node, and
what it is given and returns stays whole; (4) the whole model is one opaque node.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxprune.passes.capture.conversions import Conversions, seen_conversions
from fxprune.passes.capture.leftovers import remove_leftovers
from fxprune.passes.capture.opaque import RootWrapper
from fxprune.passes.capture.patches import not_a_models
from fxprune.passes.capture.patching import Patches
from fxprune.passes.capture.rollback import ParameterWrites, facts_written
from fxprune.passes.capture.tracer import ValueTracer, reason_of
from fxprune.passes.errors import ConvertsSize, DrawsNumbers, MixesModes, PruneError, WritesWhatItReads, surface
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.quiet import undrawn


def capture_program(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    retry: bool = True,
    whole: str = "",
    find_home: Callable[[], torch.device | None] = lambda: None,
) -> CapturedProgram:
    """Capture one run of `root` on the example arguments; `root` must be a private copy (see `private_copy`).

    `retry=False` lets errors out instead of turning the module where they arose opaque; `whole` captures the model as one
    opaque module from the start, and says why; `find_home` finds the device that tensors are said to be on which are on `meta`
    for the run.
    """
    program = captured(root, args, kwargs, retry, whole, find_home)
    remove_leftovers()
    return program


def captured(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    retry: bool,
    whole: str,
    find_home: Callable[[], torch.device | None],
) -> CapturedProgram:
    tracer = ValueTracer(root, args, kwargs, retry=retry)
    tracer.evaluator.find_home = find_home
    if whole:
        return trace(as_one_module(tracer, whole)).program("whole.")
    try:
        while True:
            try:
                return trace(tracer).program("")
            except WritesWhatItReads:
                tracer = once_more(tracer)
            except MixesModes:
                tracer.modes.separate = True
                tracer = once_more(tracer)
            except DrawsNumbers:
                if tracer.watches_draws:  # it is the model's own forward
                    raise
                tracer = once_more(tracer, watches_draws=True)
            except ConvertsSize as error:
                tracer = once_more(tracer, conversions=tracer.conversions.after(error))
            except Exception as error:
                if tracer.conversions.files:  # what it did not run into with plain numbers
                    tracer = once_more(tracer, conversions=Conversions(expected=False))
                    continue
                function = None if isinstance(error, PruneError) or not retry else function_of(error)
                if function is None or function in tracer.evaluator.functions:
                    raise
                tracer = once_more(tracer, function)
    except Exception as error:
        if not retry or hasattr(error, "fxprune_plain") or isinstance(error, PruneError):
            tracer.discard()
            raise
        surface(error)
        reason, where = reason_of(error), getattr(error, "fxprune_where", type(root).__name__)
    written, tracer = tracer.written, as_one_module(tracer, reason)
    try:
        made = trace(tracer).program("whole.")
        made.reads_state = bool(written)
        return made
    except Exception as error:
        error.fxprune_where = where  # type: ignore[attr-defined]
        raise


def trace(tracer: ValueTracer) -> ValueTracer:
    """Run the tracer, with the recorder in place all the while; it writes only while a node is evaluated."""
    tracer.recorder.active, parameters = False, ParameterWrites(tracer.root, watched=tracer.takes_memory)
    tracer.recorder.before_write, tracer.watch_parameters = parameters.before_write, parameters.watch
    with tracer.bar, Patches(tracer), seen_conversions(tracer), parameters, torch.no_grad(), tracer.recorder, undrawn():
        tracer.run()
    if parameters.written_unseen:
        raise PruneError(
            "the forward writes to the memory of a parameter, and not by an operator of torch",
            where=type(getattr(tracer.root, "whole", tracer.root)).__name__,
            fix="write by torch, such as parameter.data.mul_(2), or before pruning; the model is as it was",
        )
    tracer.check_writes()
    if tracer.modes.mixed(tracer):
        raise MixesModes
    return tracer


def function_of(error: BaseException) -> types.FunctionType | None:
    """The innermost function of a file of the model's that an error came through; a method is none."""
    found, trace = None, error.__traceback__
    while trace is not None:
        names = trace.tb_frame.f_globals
        function = names.get(trace.tb_frame.f_code.co_name)
        if type(function) is types.FunctionType and function.__globals__ is names and not not_a_models(names):
            found = function
        trace = trace.tb_next
    return found


def once_more(
    failed: ValueTracer, function: Any = None, conversions: Conversions | None = None, *, watches_draws: bool = False
) -> ValueTracer:
    """A tracer of the same module tree: for it `function` is one node, or its program copies what it writes to, or it looks for
    modules that draw numbers.

    `conversions` is what it knows of these, if not what the other one does.
    """
    failed.stored.restore_all(failed.index)
    for kept in failed.kept:
        delattr(failed.root, failed.names[id(kept)])
    tracer = ValueTracer(failed.root, failed.example_args, failed.example_kwargs, retry=failed.retry)
    tracer.evaluator.find_home, tracer.evaluator.opaque = failed.evaluator.find_home, dict(failed.evaluator.opaque)
    tracer.evaluator.functions = failed.evaluator.functions | ({function} if function is not None else set())
    tracer.conversions = conversions or failed.conversions
    tracer.writes_constants = failed.writes_constants or failed.wrote_constants
    tracer.read_as_copies = failed.read_as_copies | failed.assigned_alone
    tracer.modes.separate = failed.modes.separate
    tracer.written = failed.written | facts_written(failed)
    tracer.takes_memory, tracer.watches_draws = failed.takes_memory, failed.watches_draws or watches_draws
    failed.discard()
    return tracer


def as_one_module(failed: ValueTracer, reason: str) -> ValueTracer:
    """A tracer for which the whole model is one opaque node."""
    failed.stored.restore_all(failed.index)
    root = failed.root
    wrapper = RootWrapper(root)
    wrapper.train(root.training)
    tracer = ValueTracer(wrapper, failed.example_args, failed.example_kwargs)
    tracer.forward, tracer.is_one_module = root.forward, True
    tracer.names = tracer.recorder.names = dict(failed.names)
    tracer.evaluator.opaque["whole"], tracer.takes_memory = reason, failed.takes_memory
    failed.discard()
    return tracer
