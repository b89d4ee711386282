"""The check of opaque modules: each one, once sliced, against itself masked, on the inputs that it has in the original.

The Python inside of an opaque module is not rewritten. Attributes that sizes came from are changed, but a size may be written
out, or come from somewhere nobody saw. Such a module then fails or computes something else: it must stay whole. The same holds
of a custom autograd function, which is tried on random inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.module_tree import fetch, named_tensors, own_copy, private_copy, set_mode
from fxprune.passes.ir.pytree import TensorRef, collect, map_tensors
from fxprune.passes.ir.quiet import own_random_state, random_state, set_random_state
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.verification.masked_model import MaskedOriginal, Removal, relative_error


@dataclass(frozen=True, slots=True)
class OpaqueSite:
    """One call of an opaque module: its path, the tensors that go in and come out, and its arguments if they are known.

    Or of a custom autograd function, with its arguments in which tensors are references.
    """

    path: str
    ins: list[TensorRef]
    outs: list[TensorRef]
    given: tuple[Any, Any] | None = None
    function: Any = None


def opaque_sites(solution: Solution, slicer: Slicer) -> list[OpaqueSite]:
    """The calls of opaque modules that read, hold or return anything that is cut; from captures not used up yet."""
    capture = solution.captures[0]
    found: list[OpaqueSite] = []
    for node, path in capture.unseen.items():
        if capture.only.get(node) is not True and node not in slicer.removed.nodes:
            refs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: capture.results[n])
            function = node.target if node.op == "call_function" else None
            given = capture.given.get(node) if function is None else refs
            outs = collect(capture.results[node], TensorRef)
            site = OpaqueSite(path, collect(refs, TensorRef), outs, given, function)
            if touched(solution, slicer, site):
                found.append(site)
    return found


def touched(solution: Solution, slicer: Slicer, site: OpaqueSite) -> bool:
    capture, labels, values = solution.captures[0], solution.values[0], solution.captures[0].op_trace.values
    own = [i for i, v in enumerate(values) if v.name is not None and inside(f"{capture.prefix}{v.name}", site.path)]
    return any(slicer(labels.get(i, ()), values[i].shape) for i in [*own, *(r.id for r in (*site.ins, *site.outs))])


def broken(
    model: nn.Module,
    pruned: nn.Module,
    solution: Solution,
    slicer: Slicer,
    sites: Sequence[OpaqueSite],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    heads: bool | str,
    tolerance: float,
) -> dict[str, str]:
    """Paths of the modules that do not compute, once cut, what they compute masked, with a reason that completes "it ..."."""
    if not sites:
        return {}
    prefix = solution.captures[0].prefix
    unknown = {s.path for s in sites if s.given is None}
    given = arguments(model, unknown, prefix, args, kwargs) if unknown else {}
    device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
    found: dict[str, str] = {}
    for site in sites:
        calls = given.get(site.path, [site.given])
        call = calls.pop(0) if calls else None
        if site.path not in found and call is not None:
            call = call if site.function is None else made_up(call, solution, device)
            wrong = compared(model, pruned, solution, slicer, site, *call, heads=heads, tolerance=tolerance)
            if wrong:
                what = "a module that is not captured and" if site.function is None else "a custom autograd function that"
                found[site.path] = f"belongs to {what} {wrong}"
    return found


def made_up(call: tuple[Any, Any], solution: Solution, device: torch.device) -> Any:
    """Arguments with random tensors in place of references: whole numbers are those of the capture, or zero."""
    generator, values = torch.Generator().manual_seed(0), solution.captures[0].op_trace.values

    def tensor(ref: TensorRef) -> Tensor:
        value = values[ref.id]
        if value.dtype.is_floating_point or value.dtype.is_complex:
            return torch.randn(value.shape, generator=generator, dtype=value.dtype).to(device)
        return (torch.zeros(value.shape, dtype=value.dtype) if value.data is None else value.data).to(device)

    return map_tensors(call, tensor, TensorRef)


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def kept_choice(numbers: Tensor, picked: np.ndarray, slicer: Slicer) -> Tensor:
    """Numbers of chosen entries with kept ones in place of those that are removed, which a pruned model does not choose."""
    stays = np.flatnonzero(slicer.table[picked])
    table = np.arange(len(picked))
    gone = np.setdiff1d(table, stays)
    table[gone] = stays[gone % len(stays)]
    return torch.from_numpy(table).to(numbers.device)[numbers.long()].to(numbers.dtype)


def renumbered(numbers: Tensor, picked: np.ndarray, slicer: Slicer) -> Tensor:
    """The same as numbers among the kept ones."""
    place = np.cumsum(slicer.table[picked]) - 1
    return torch.from_numpy(place).to(numbers.device)[numbers.long()].to(numbers.dtype)


def inside(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")


def arguments(
    model: nn.Module, paths: set[str], prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[tuple[Any, Any]]]:
    """What modules are called with in one run of the original, call by call."""
    root = set_mode(private_copy(model, own_copy), False)
    given: dict[str, list[tuple[Any, Any]]] = {path: [] for path in paths}
    for path in paths:
        module = root if f"{path}." == prefix else fetch(root, path.removeprefix(prefix))

        def keep(module: nn.Module, a: Any, k: Any, path: str = path) -> None:
            given[path].append(map_tensors((a, k), lambda t: t.detach().clone()))

        module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        root(*map_tensors(args, torch.clone), **map_tensors(kwargs, torch.clone))
    return given


def raises(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a copy of a module raises in training."""
    try:
        set_mode(private_copy(module, own_copy), True)(*map_tensors(args, torch.clone), **map_tensors(kwargs, torch.clone))
    except Exception:
        return True
    return False


def compared(
    model: nn.Module,
    pruned: Any,
    solution: Solution,
    slicer: Slicer,
    site: OpaqueSite,
    args: Any,
    kwargs: Any,
    *,
    heads: bool | str,
    tolerance: float,
) -> str:
    """What is wrong with a cut module on these arguments: nothing, or a clause."""
    capture, labels, path = solution.captures[0], solution.values[0], site.path
    whole = f"{path}." == capture.prefix
    if site.function is not None:
        module: nn.Module = Applied(site.function)
    else:
        module = model if whole else fetch(model, path.removeprefix(capture.prefix))
    names = {id(t): name for name, t in named_tensors(model)}
    own = {name: solution.leaves.get(names.get(id(t), ""), ()) for name, t in named_tensors(module)}
    tensors = collect((args, kwargs), Tensor)
    if len(site.ins) != len(tensors):
        return ""  # some of them are the model's own, which the program does not hand over
    picks = [solution.picks[0].get(r.id) for r in site.ins]
    chosen = {id(t): kept_choice(t, p, slicer) for t, p in zip(tensors, picks, strict=True) if p is not None}
    args, kwargs = map_tensors((args, kwargs), lambda t: chosen.get(id(t), t))
    tensors = collect((args, kwargs), Tensor)
    cut = {
        id(t): slicer.take(labels.get(r.id, ()), t) if p is None else renumbered(t, p, slicer)
        for t, r, p in zip(tensors, site.ins, picks, strict=True)
    }
    few_args, few_kwargs = map_tensors((args, kwargs), lambda t: cut[id(t)].clone())
    with torch.no_grad(), torch.random.fork_rng(devices=[]), own_random_state():
        torch.manual_seed(0)
        drawn = random_state()
        known = [labels.get(r.id, ()) for r in site.ins]
        try:
            wanted = MaskedOriginal(module, Removal(own, slicer.kept, heads))(args, kwargs, known)
        except Exception as error:  # it reads what another call stored on it
            return f"cannot be tried alone ({type(error).__name__})"
        set_random_state(drawn)
        try:
            tried = site.function
            if tried is None:
                cut = pruned.own_model if whole else fetch(pruned, path)
                tried = set_mode(private_copy(cut, own_copy), False)
            got = tried(*few_args, **few_kwargs)
            asks = path in capture.asking and path not in capture.evaluating
            if asks and raises(tried, few_args, few_kwargs) and not raises(module, args, kwargs):
                return "fails in training once it is cut"
        except Exception as error:
            return f"fails once it is cut ({type(error).__name__})"
    expected, found = collect(wanted, Tensor), collect(got, Tensor)
    if not len(site.outs) == len(expected) == len(found):
        return "returns something else once it is cut"
    least = [
        slicer.take(labels.get(r.id, ()), t) if (p := solution.picks[0].get(r.id)) is None else renumbered(t, p, slicer)
        for t, r in zip(expected, site.outs, strict=True)
    ]
    errors = [relative_error(a, b) for a, b in zip(least, found, strict=True)]
    return "" if max(errors, default=0.0) <= tolerance else "computes something else once it is cut"
