"""Find by experiment the entries of an argument that a pruned module still has a use for.

A model may compute something for each of the original's heads and hand it to every layer, such as the slopes of ALiBi. It keeps
its own forward, and layers with fewer heads select theirs.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprune.passes.errors import GuardError, surface


class Selection(NamedTuple):
    """Which entries of each `period` along a dimension are taken."""

    dim: int
    period: int
    entries: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.shape[self.dim] % self.period:
            raise GuardError(f"there are {tensor.shape[self.dim]} entries, and each {self.period} are selected from")
        index = torch.tensor(self.entries, device=tensor.device)
        parts = tensor.unflatten(self.dim, (-1, self.period))
        return parts.index_select(self.dim + 1, index).flatten(self.dim, self.dim + 1)


class SelectingForward:
    """The forward of a module, given a part of some arguments.

    Attributes:
        module: the module.
        selections: by name of the argument.
        own: what the module had as its forward, if not that of its class.
    """

    def __init__(self, module: nn.Module, selections: Mapping[str, Selection]) -> None:
        self.module, self.selections, self.own = module, dict(selections), vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        for name, select in self.selections.items():
            if isinstance(bound.arguments.get(name), Tensor):
                bound.arguments[name] = select(bound.arguments[name])
        forward = self.own or type(self.module).forward.__get__(self.module)
        return forward(*bound.args, **bound.kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return signature(self.module)


def signature(module: nn.Module) -> inspect.Signature:
    return inspect.signature(type(module).forward.__get__(module))


def fit_arguments(
    module: nn.Module, counterpart: nn.Module, run: Callable[[nn.Module], Any], is_right: Callable[[], bool]
) -> bool:
    """Have modules inside `module` select from arguments such that it computes what it has to; else it is left as it was.

    Arguments:
        module: with its own forward and the original's numbers.
        counterpart: its like in the pruned model, whose modules are given what they need.
        run: calls either with what the counterpart was called with.
        is_right: whether `module` computes what it has to.
    """
    wanted: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, dict[str, Selection]] = {}
    with watching(counterpart, lambda path, given: wanted.setdefault(path, []).append(dict(given.arguments))):
        run(counterpart)

    def select(path: str, given: inspect.BoundArguments) -> None:
        there = wanted[path].pop(0)
        for name, tensor in given.arguments.items():
            if isinstance(tensor, Tensor) and isinstance(there.get(name), Tensor) and tensor.shape != there[name].shape:
                known = found.setdefault(path, {})
                selection = known.get(name) or selection_between(tensor, there[name])
                if selection is not None:
                    known[name], given.arguments[name] = selection, selection(tensor)

    try:
        with watching(module, select):
            run(module)
    except Exception as error:  # what cannot be selected from
        surface(error)
        return False
    before = {path: vars(module.get_submodule(path)).get("forward") for path in found}
    for path, selections in found.items():
        inner = module.get_submodule(path)
        vars(inner)["forward"] = SelectingForward(inner, selections)
    if found and is_right():
        return True
    for path, forward in before.items():
        vars(module.get_submodule(path)).pop("forward")
        if forward is not None:
            vars(module.get_submodule(path))["forward"] = forward
    return False


@contextlib.contextmanager
def watching(module: nn.Module, see: Callable[[str, inspect.BoundArguments], None]) -> Iterator[None]:
    """Show the arguments of every call of a module inside, by path; what is changed of them is what it is called with."""

    def before(path: str) -> Callable[..., Any]:
        def hook(inner: nn.Module, args: Any, kwargs: Any) -> Any:
            given = signature(inner).bind(*args, **kwargs)
            see(path, given)
            return given.args, given.kwargs

        return hook

    with contextlib.ExitStack() as stack:
        for path, inner in module.named_modules():
            if path:
                stack.callback(inner.register_forward_pre_hook(before(path), with_kwargs=True).remove)
        yield


def selection_between(tensor: Tensor, part: Tensor) -> Selection | None:
    """The selection along one dimension that makes a part of a tensor; None where there is none."""
    apart = [d for d, (a, b) in enumerate(zip(tensor.shape, part.shape, strict=False)) if a != b]
    if tensor.dim() != part.dim() or len(apart) != 1:
        return None
    dim, (all_of_it, left) = apart[0], (tensor.shape[apart[0]], part.shape[apart[0]])
    rows, wanted = tensor.movedim(dim, 0), part.movedim(dim, 0)
    for parts in range(math.gcd(all_of_it, left), 0, -1):
        period, count = all_of_it // parts, left // parts
        firsts = [next((i for i in range(period) if torch.equal(rows[i], row)), None) for row in wanted[:count]]
        entries = tuple(i for i in firsts if i is not None)
        selection = Selection(dim, period, entries)
        if len(entries) == count and torch.equal(selection(tensor), part):
            return selection
    return None
