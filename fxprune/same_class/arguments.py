"""Find by experiment the entries of an argument that a pruned module still has a use for.

A model may compute something for each of the original's heads and hand it to every layer, such as the slopes of ALiBi. It keeps
its own forward, and layers with fewer heads select theirs.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprune.passes.errors import GuardError, surface
from fxprune.passes.ir.module_tree import named_modules
from fxprune.passes.rewrite.pruned_module import said_of_forward
from fxprune.passes.verification.masked_model import relative_error


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


ROUNDING = 1e-6  # the same function of fewer numbers may be rounded otherwise
Place = tuple[str, int | None]  # the name of an argument, and a number where it is one of a tuple


def tensors_given(given: inspect.BoundArguments) -> dict[Place, Tensor]:
    """The tensors among arguments, and in tuples and lists among them."""
    found: dict[Place, Tensor] = {}
    for name, value in given.arguments.items():
        parts = dict(enumerate(value)) if type(value) in (tuple, list) else {None: value}
        found |= {(name, part): tensor for part, tensor in parts.items() if isinstance(tensor, Tensor)}
    return found


def put(given: inspect.BoundArguments, place: Place, tensor: Tensor) -> None:
    """Have another tensor in a place among arguments."""
    name, part = place
    value = given.arguments[name]
    given.arguments[name] = tensor if part is None else type(value)([*value[:part], tensor, *value[part + 1 :]])


class SelectingForward:
    """The forward of a module, given a part of some arguments.

    Attributes:
        module: the module.
        selections: by argument, or part of one (see `tensors_given`).
        own: what the module had as its forward, if not that of its class.
    """

    def __init__(self, module: nn.Module, selections: Mapping[Place, Selection]) -> None:
        self.module, self.selections, self.own = module, dict(selections), vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        for place, tensor in tensors_given(bound).items():
            if place in self.selections:
                put(bound, place, self.selections[place](tensor))
        forward = self.own or type(self.module).forward.__get__(self.module)
        return forward(*bound.args, **bound.kwargs)

    def __getattr__(self, name: str) -> Any:
        return said_of_forward(self, name)

    @property
    def __signature__(self) -> inspect.Signature:
        return signature(self.module)


def signature(module: nn.Module) -> inspect.Signature:
    return inspect.signature(type(module).forward.__get__(module))


def fit_arguments(
    original: nn.Module,
    module: nn.Module,
    counterpart: nn.Module,
    run: Callable[[nn.Module], Any],
    is_right: Callable[[], bool],
) -> bool:
    """Have modules inside `module` select from arguments such that it computes what it has to; else it is left as it was.

    A number of its own that became smaller may be what the argument is computed with: it is also tried as the original has it.

    Arguments:
        original: its like in the model that was pruned.
        module: with its own forward.
        counterpart: its like in the pruned model, whose modules are given what they need.
        run: calls either with what the counterpart was called with.
        is_right: whether `module` computes what it has to.
    """
    wanted: dict[str, list[dict[Place, Tensor]]] = {}
    with watching(counterpart, lambda path, given: wanted.setdefault(path, []).append(tensors_given(given))):
        run(counterpart)
    held = vars(module)
    larger = {
        name: n for name, n in vars(original).items() if type(n) is int and type(held.get(name)) is int and n > held[name]
    }
    for changed in ({}, larger) if larger else ({},):
        before = {name: held[name] for name in changed}
        held.update(changed)
        if select_arguments(module, wanted, run, is_right):
            return True
        held.update(before)
    return False


def select_arguments(
    module: nn.Module,
    wanted: Mapping[str, list[dict[Place, Tensor]]],
    run: Callable[[nn.Module], Any],
    is_right: Callable[[], bool],
) -> bool:
    """Have modules inside select what calls should give, by path, where `module` is right then; else it is left as it was."""
    differing: set[tuple[str, Place]] = set()
    while True:
        found, whole = selections_between(module, wanted, run, differing)
        both = {(path, place) for path, known in found.items() for place in known if (path, place) in whole}
        if not both:
            break
        differing |= both  # as a dropout is for everything: modules behind it select
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


def selections_between(
    module: nn.Module,
    wanted: Mapping[str, list[dict[Place, Tensor]]],
    run: Callable[[nn.Module], Any],
    without: Container[tuple[str, Place]],
) -> tuple[dict[str, dict[Place, Selection]], set[tuple[str, Place]]]:
    """By path of a module inside, what it has to select from its arguments, and those that some call gives as it should.

    Nothing where the calls do not fit.

    Arguments:
        wanted: the tensors that calls should give, by path.
        without: arguments that are not selected from.
    """
    left = {path: list(calls) for path, calls in wanted.items()}
    found: dict[str, dict[Place, Selection]] = {}
    whole: set[tuple[str, Place]] = set()

    def select(path: str, given: inspect.BoundArguments) -> None:
        there = left[path].pop(0)
        for place, tensor in tensors_given(given).items():
            if place not in there or (path, place) in without:
                continue
            if tensor.shape == there[place].shape:
                whole.add((path, place))
                continue
            known = found.setdefault(path, {})
            selection = known.get(place) or selection_between(tensor, there[place])
            if selection is not None:
                known[place] = selection
                put(given, place, selection(tensor))

    try:
        with watching(module, select):
            run(module)
    except Exception as error:  # what cannot be selected from
        surface(error)
        return {}, set()
    return {path: known for path, known in found.items() if known}, whole


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
        for path, inner in named_modules(module):
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
    most = math.gcd(all_of_it, left)
    for parts in (n for n in range(most, 0, -1) if most % n == 0):
        period, count = all_of_it // parts, left // parts
        selection = Selection(dim, period, tuple(nearest_rows(rows[:period], wanted[:count])))
        if relative_error(part, selection(tensor)) <= ROUNDING:
            return selection
    return None


def nearest_rows(rows: Tensor, wanted: Tensor) -> Iterator[int]:
    """For each row that is wanted the nearest; of several that are as near, the next one behind that of the row before."""
    last = -1
    if not (rows.is_floating_point() or rows.is_complex()):
        rows, wanted = rows.double(), wanted.double()
    for row in wanted:
        apart = (rows - row).abs().masked_fill(rows == row, 0).nan_to_num(torch.inf).flatten(1).amax(1)
        found = (apart == apart.min()).nonzero().flatten().tolist()
        last = next((i for i in found if i > last), found[0])
        yield last
