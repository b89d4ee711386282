"""What every public function does around its work, and which models it takes.

Modes that the caller is in are left, compiled code runs as plain Python, wrappers are taken off, and faults become PruneErrors.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxprune.arguments import checked_call
from fxprune.arguments import shown as said
from fxprune.passes.errors import GuardError, PruneError, told
from fxprune.passes.ir.module_tree import PLAIN_TENSORS, check_module, named_modules, named_parameters, named_tensors, walk
from fxprune.passes.ir.progress import Progress
from fxprune.passes.ir.quiet import own_random_state, without_modes

# what Python and torch raise for what nobody foresaw; running out of memory is not among it
FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, pickle.PickleError)


@contextlib.contextmanager
def entry_point(model: Any) -> Iterator[nn.Module]:
    """The surroundings of a public function, which get the module to prune: the model, or what a wrapper holds.

    Raises: PruneError for what cannot be pruned, and in place of any error that says nothing of what to do. Where
    `FXPRUNE_STRICT=1` is set, as it is in tests, such errors are let out as they are.
    """
    with without_modes(), uncompiled(), own_random_state():
        try:
            yield unwrapped(model)
        except GuardError as error:
            raise PruneError(f"{error}", fix="inputs that the pruned model takes, or one that was pruned with these") from error
        except FAULTS as error:
            if isinstance(error, torch.OutOfMemoryError) or os.environ.get("FXPRUNE_STRICT") == "1":
                raise
            raise PruneError(
                f"fxprune failed with {told(error)}",
                fix="report it with the model and what FXPRUNE_TRACEBACK=1 shows; freeze= the module it names, if it names one",
            ) from error


COMPILING = {"torch._dynamo", "torch.nn.attention.flex_attention"}


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run what `torch.compile` returned as the Python that it was given; a compiled graph cannot be followed."""
    if not sys.modules.keys() & COMPILING:  # nothing was compiled in this process, nor will be
        yield
        return
    dynamo = importlib.import_module("torch._dynamo")
    with torch.compiler.set_stance("force_eager"), dynamo.config.patch(error_on_nested_fx_trace=False):
        yield


# classes that call one module and have nothing to prune of their own: where they are defined, and where they keep it
WRAPPERS = (
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
)
OBSERVERS = (("torch.ao.quantization", "FakeQuantizeBase"), ("torch.ao.quantization", "ObserverBase"))


def is_a(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class of a Python module, which is not imported for it."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def inside_wrappers(model: Any) -> Any:
    """What a wrapper calls, or what is given, if it is none."""
    for module, name, attribute in WRAPPERS:
        if is_a(model, module, name):
            return inside_wrappers(getattr(model, attribute))
    return model


def without_wrappers(model: Any) -> Any:
    """The same, without masks that it may be computed with."""
    model = inside_wrappers(model)
    masked = vars(model).get("forward") if isinstance(model, nn.Module) else None
    return masked.plain() if is_a(masked, "fxprune.iterative.masked_forward", "MaskedForward") else model  # type: ignore[union-attr]


def unwrapped(model: Any) -> nn.Module:
    """The module to prune: the model itself, or what a wrapper calls.

    Raises: PruneError for what is no module, or cannot be pruned as it is.
    """
    if is_a(model, "torch.export", "ExportedProgram"):
        raise PruneError("model is an ExportedProgram, not a torch.nn.Module", fix="pass exported.module()")
    check_module(model)
    if (inner := without_wrappers(model)) is not model:
        return unwrapped(inner)
    if isinstance(model, torch.jit.ScriptModule):
        raise PruneError(
            f"model is a {type(model).__name__}: what it computes is no longer Python",
            fix="pass the module that was scripted or traced, and trace the pruned one (torch.jit.trace)",
        )
    check_tensors(model)
    return model


def check_values(*models: nn.Module) -> None:
    """Raise PruneError where tensors are on the meta device, whose values are asked for."""
    for model in models:
        for name, tensor in named_tensors(model):
            if tensor.is_meta:
                what = f"{name} is on the meta device: it has no values"
                raise PruneError(what, where=type(model).__name__, fix="a model with weights")


def check_tensors(model: nn.Module) -> None:
    """Raise PruneError where tensors have no shape yet, or are parts of larger ones."""
    sharded = "prune the plain model, before fully_shard(), parallelize_module() or quantize_()"
    for module, path in walk(model).items() if "torch.distributed.fsdp" in sys.modules else ():
        if is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            raise PruneError("the model's parameters are flattened and sharded", where=path or "FSDP", fix=sharded)
    for name, tensor in named_tensors(model):
        if type(tensor) in PLAIN_TENSORS:
            continue
        path = name.rpartition(".")[0]
        if is_lazy(tensor):
            raise PruneError(
                f"{name} is not initialized: its layer is lazy",
                where=f"{path} ({type(model.get_submodule(path)).__name__})",
                fix="run the model once: model(*example_inputs)",
            )
        if is_a(tensor, "torch._subclasses.fake_tensor", "FakeTensor"):
            raise PruneError(
                f"{name} is a FakeTensor: it has no values",
                where=type(model).__name__,
                fix="make the model outside of FakeTensorMode, or on the meta device with criterion='random', verify=False",
            )
        packed: bool = is_traceable_wrapper_subclass(tensor)
        if packed:
            spread = is_a(tensor, "torch.distributed.tensor", "DTensor")
            raise PruneError(
                f"{name} is a {type(tensor).__name__} that is sharded or packed, not a plain tensor",
                where=type(model).__name__,
                fix=f"prune(), couple(), Plan.apply() and Pruner take it as it is; else {sharded}" if spread else sharded,
            )


def why_unprunable(model: nn.Module) -> PruneError | None:
    """What is wrong with a kind of model of which nothing can be pruned; None where nothing is known."""
    for path, module in named_modules(model):
        if any(is_a(module, *kind) for kind in OBSERVERS):
            return PruneError(
                "nothing in the model can be pruned: it is prepared for quantization, and observers follow its weights",
                where=f"{path} ({type(module).__name__})",
                fix="prune the float model, then prepare it for quantization",
            )
        packed = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
        if packed and not named_parameters(model):
            return PruneError(
                "nothing in the model can be pruned: it is quantized, and its weights are packed",
                where=f"{path} ({type(module).__name__})",
                fix="prune the float model, then quantize it",
            )
    return None


@checked_call()
def progress(shown: bool | None = None) -> None:
    """Show bars on stderr for what takes longer than two seconds, or do not.

    Without a call, the environment variable `FXPRUNE_PROGRESS` (0 or 1) decides; where it is not set, bars are shown if stderr
    is a terminal.

    >>> progress(False)
    >>> progress()  # as at the start

    Arguments:
        shown: True or False; None for what holds without a call.

    Raises: PruneError for anything else.
    """
    if not (shown is None or isinstance(shown, bool)):
        raise PruneError(f"progress takes True, False or None, not {said(shown)}", fix="fxprune.progress(False)")
    Progress.shown = shown
