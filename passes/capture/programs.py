"""The captured programs of a model: evaluation, and training where that is another program."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.capture.capture import capture_program
from fxprune.passes.capture.frames import inner_ops
from fxprune.passes.capture.leftovers import remove_leftovers
from fxprune.passes.capture.modules import before_forward
from fxprune.passes.capture.patches import LOCK
from fxprune.passes.capture.rollback import ParameterWrites
from fxprune.passes.errors import GuardError, PruneError, surface, told
from fxprune.passes.ir.module_tree import named_tensors, private_copy, set_mode, walk
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.quiet import own_random_state

OWN = "the model's own forward raises"
NO_GRADIENTS = "the model's forward needs gradients, which are off while it is captured:"
ENABLE = "with torch.enable_grad(): in the forward, around what takes gradients"
NOT_FOLLOWED = "the model's program cannot be followed:"
REPORT = "report it with the model; what it does to tensors there is beyond the compiler"
Home = Callable[[], torch.device | None]


def programs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: Callable[[Tensor], Tensor] | None,
) -> list[CapturedProgram]:
    """The captured program for evaluation, and for training where that is another one.

    Shapes are all that coupling needs, so the run is first tried without values.
    """
    scripted = next((path for m, path in walk(model).items() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise PruneError(
            "a module is compiled to TorchScript, whose program cannot be rewritten",
            where=scripted or type(model).__name__,
            fix="pass the model with the module that it was scripted or traced from",
        )
    try:
        return modes_captured(model, args, kwargs, stand_in)
    except PruneError:
        if stand_in is None:  # else the next run removes them; as long as there is the error, its frames hold proxies, too
            remove_leftovers()
        raise


def modes_captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: Callable[[Tensor], Tensor] | None,
) -> list[CapturedProgram]:
    possible = functools.partial(runs, model, args, kwargs) if stand_in is None else lambda gradients: False
    args, kwargs = given = given_to_forward(model, args, kwargs)
    home: Home = lambda: None  # noqa: E731
    if stand_in is not None:
        swap = lambda t: stand_in(t) if t.is_floating_point() else t  # noqa: E731
        home = functools.partial(only_device, model, args, kwargs)
        args, kwargs = map_tensors((args, kwargs), swap)
    copied = set_mode(private_copy(model, stand_in), False)
    found = [captured(copied, args, kwargs, final=stand_in is None, home=home, possible=possible)]
    if not found[0].reads_training:
        return found
    other = None
    whole = ", ".join(found[0].opaque.values()) if found[0].prefix else ""  # its own forward runs, so it does in training
    try:
        if stand_in is not None and not found[0].trains_on_values:
            with contextlib.suppress(PruneError):  # training may read values all the same
                other = captured(trained(private_copy(model, stand_in)), args, kwargs, final=True, home=home, whole=whole)
        if other is None:
            other = captured(trained(private_copy(model)), *given, final=True, whole=whole)
    except PruneError as error:  # a model may need targets to train: then it is captured for evaluation
        stay_in_evaluation(found[0], error.what)
        return found
    if other.reads_state and not found[0].prefix:  # in training the model's own forward must run, so it does in evaluation
        why, copied = ", ".join(other.opaque.values()), set_mode(private_copy(model), False)
        with contextlib.suppress(PruneError):
            found = [captured(copied, *given, final=True, whole=why)]
    found[0].note = found[0].note or other.note
    if other.prefix != found[0].prefix:
        stay_in_evaluation(found[0], ", ".join(other.opaque.values()))
    elif code(other) != code(found[0]):
        found.append(other)
    return found


def given_to_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as the hooks of a model, which stay hooks, hand them to its forward."""
    if not model._forward_pre_hooks:
        return args, kwargs
    try:
        with torch.no_grad(), own_random_state():
            return before_forward(set_mode(private_copy(model), False), *map_tensors((args, kwargs), torch.clone))
    except Exception as error:
        surface(error)
        raise PruneError(
            f"a hook of the model raises {told(error)}", where=type(model).__name__, fix=other_inputs(args, kwargs)
        ) from error


def stay_in_evaluation(capture: CapturedProgram, why: str) -> None:
    """Have training be as evaluation; opaque modules that would do what nobody has seen are kept in that mode."""
    capture.note, capture.is_untrained = f"training mode is as evaluation: {why}", True
    paths = [f"{path}." for path in capture.asking]
    capture.evaluating = frozenset(path for path in capture.modules if any(f"{path}.".startswith(p) for p in paths))


def trained(root: nn.Module) -> Any:
    """A private copy, told to train."""
    try:
        return set_mode(root, True)
    except Exception as error:
        surface(error)
        raise PruneError(f"train() raises {told(error)}", where=type(root).__name__) from error


def only_device(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that all tensors of a model and its inputs are on; None where there is none."""
    devices = {t.device for t in (*dict(named_tensors(model)).values(), *collect((args, kwargs), Tensor))}
    return devices.pop() if len(devices) == 1 else None


def captured(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    final: bool,
    home: Home = lambda: None,
    possible: Callable[[bool], bool] = lambda gradients: False,
    whole: str = "",
) -> CapturedProgram:
    """The program of a private copy; `possible` says, where that raises, whether the model runs without gradients, or with."""
    try:
        return capture_program(root, args, kwargs, retry=final, whole=whole, find_home=home)
    except PruneError:
        raise
    except Exception as error:
        surface(error)
        what, fix = OWN, other_inputs(args, kwargs)
        if possible(False):
            what, fix = NOT_FOLLOWED, REPORT
        elif possible(True):
            what, fix = NO_GRADIENTS, ENABLE
        raise PruneError(
            f"{error}" if isinstance(error, GuardError) else f"{what} {told(error)}",
            where=getattr(error, "fxprune_where", type(root).__name__),
            fix=fix,
        ) from error


def other_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What to give in place of inputs on which a model does not run."""
    fix = "example_inputs on which model(*example_inputs) runs"
    given = (*args, *kwargs.values())
    if given and not collect(given, Tensor):
        return f"tensors, such as torch.randn(1, 3, 224, 224): {', '.join(type(v).__name__ for v in given)} holds none"
    if len(args) == 1 and isinstance(args[0], list):
        return f"{fix}; the list of {len(args[0])} is given as one argument"
    return fix


def runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: bool) -> bool:
    """Whether a model runs on these inputs in evaluation mode."""
    try:
        with LOCK, ParameterWrites(model, watched=True), torch.set_grad_enabled(gradients), own_random_state():
            set_mode(private_copy(model), False)(*map_tensors(args, torch.clone), **map_tensors(kwargs, torch.clone))
    except Exception:
        return False
    return True


def code(capture: CapturedProgram) -> list[Any]:
    """What a captured program does, for comparison."""
    lines: list[Any] = [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in capture.graph.nodes]
    asking = [node for node, path in capture.unseen.items() if path in capture.asking]
    return lines + [inner_ops(node, capture.results, capture.op_trace, capture.index[node]) for node in asking]
