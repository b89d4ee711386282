"""From a model to its coupling: what is captured, how often, and without a trace left behind."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import PruneError
from fxprune.passes.capture import Capture
from fxprune.passes.couple import Solution, solve
from fxprune.passes.faults import surface
from fxprune.passes.tape import NeedsValues, collect, map_tensors
from fxprune.passes.terms import Terms
from fxprune.passes.trace import trace
from fxprune.passes.tree import named_parameters, named_tensors, on_meta, private_copy, set_mode

Home = Callable[[], torch.device | None]


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    terms: Terms,
    closed: Mapping[str, str] | None = None,
) -> Solution:
    """Trace and couple: in evaluation mode, and in training mode too where the program asks which one it is in."""
    with unobserved(model), uncollected():
        try:
            found = programs(model, args, kwargs, on_meta)
        except Exception as error:  # the program reads values, or runs code that knows nothing of meta tensors
            surface(error)
            found = None
        if found is not None:
            terms.check([name for capture in found for name, _ in capture.outputs])
            try:
                return solve(found, terms, closed)
            except NeedsValues:  # the contents of a constant
                pass
            except Exception as error:
                surface(error, ours=True)
        found = programs(model, args, kwargs, None)
        terms.check([name for capture in found for name, _ in capture.outputs])
        try:
            return solve(found, terms, closed)
        except PruneError:
            raise
        except Exception as error:
            surface(error, ours=True)
            raise PruneError(
                f"the model's program cannot be followed: {type(error).__name__}: {error}",
                where=type(model).__name__,
                fix="report it with the model; what it does to tensors there is beyond the compiler",
            ) from error


def programs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: Callable[[Tensor], Tensor] | None,
) -> list[Capture]:
    """The captured program for evaluation, and for training where that is another one.

    Shapes are all that coupling needs, so the run is first tried without values.
    """
    given = args, kwargs
    home: Home = lambda: None  # noqa: E731
    if stand_in is not None:
        swap = lambda t: stand_in(t) if t.is_floating_point() else t  # noqa: E731
        home = functools.partial(only_device, model, args, kwargs)
        args, kwargs = map_tensors((args, kwargs), swap)
    found = [captured(set_mode(private_copy(model, stand_in), False), args, kwargs, final=stand_in is None, home=home)]
    if not found[0].reads_training:
        return found
    other = None
    try:
        if stand_in is not None and not found[0].trains_on_values:
            with contextlib.suppress(PruneError):  # training may read values all the same
                other = captured(trained(private_copy(model, stand_in)), args, kwargs, final=True, home=home)
        if other is None:
            other = captured(trained(private_copy(model)), *given, final=True)
    except PruneError as error:  # a model may need targets to train: then it is captured for evaluation
        found[0].note = f"training mode is as evaluation: {error.what}"
        return found
    if other.prefix != found[0].prefix:
        found[0].note = f"training mode is as evaluation: {', '.join(other.opaque.values())}"
    elif code(other) != code(found[0]):
        found.append(other)
    return found


def trained(root: nn.Module) -> Any:
    """A private copy, told to train."""
    try:
        return set_mode(root, True)
    except Exception as error:
        surface(error)
        raise PruneError(f"train() raises {type(error).__name__}: {error}", where=type(root).__name__) from error


def only_device(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that all tensors of a model and its inputs are on; None where there is none."""
    devices = {t.device for t in (*dict(named_tensors(model)).values(), *collect((args, kwargs), Tensor))}
    return devices.pop() if len(devices) == 1 else None


def captured(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, final: bool, home: Home = lambda: None
) -> Capture:
    try:
        return trace(root, args, kwargs, retry=final, find_home=home)
    except PruneError:
        raise
    except Exception as error:
        surface(error)
        raise PruneError(
            f"the model's own forward raises {type(error).__name__}: {error}",
            where=getattr(error, "fxprune_where", type(root).__name__),
            fix="example_inputs on which model(*example_inputs) runs",
        ) from error


def code(capture: Capture) -> list[Any]:
    """What a captured program does, for comparison."""
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in capture.graph.nodes]


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


def described(solution: Solution) -> str:
    """How the model was captured, in a phrase."""
    opaque, note = solution.captures[0].opaque, solution.captures[0].note
    how = "opaque: " + ", ".join(f"{path or 'the root'} ({why})" for path, why in opaque.items()) if opaque else "symbolic"
    return f"{how}; {note}" if note else how
