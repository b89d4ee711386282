"""A second program for a module whose callers call it otherwise than while the model was captured.

A model may look whether it is captured: those of transformers make a mask then that they leave out when they run. The program
of a module is for what it was given in the capture. Where a forward of the class calls it with other plain arguments, such as
None in place of a mask, that call of the original is captured on its own, and cut as the plan says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprune.passes.capture.programs import programs
from fxprune.passes.coupling.couple import couple_channels
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.errors import surface
from fxprune.passes.ir.module_tree import every_tensor
from fxprune.passes.ir.pytree import ATOMS, collect, map_tensors
from fxprune.passes.ir.slice_algebra import same_slices
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.passes.rewrite.rewrite import rewrite_program, tensor_cuts
from fxprune.plan import PlanData
from fxprune.same_class.arguments import signature


class Call(NamedTuple):
    """What a module was called with, by name of the argument, and what it returned."""

    given: dict[str, Any]
    out: Any


class Projected(nn.Module):
    """A module between maps of what it is given and returns, along dimensions that shrink, so that these are coupled.

    Arguments:
        call: of the module; its tensors are examples.
        inputs: pairs of the number of a tensor among those given, and a dimension.
        outputs: the same of what it returns.
    """

    def __init__(self, module: nn.Module, call: Call, inputs: list[tuple[int, int]], outputs: list[tuple[int, int]]) -> None:
        super().__init__()
        self.module, self.call, self.places = module, (call.given,), (inputs, outputs)
        examples = collect(call.given, Tensor), collect(call.out, Tensor)
        self.maps = nn.ModuleList(
            nn.ParameterList(torch.eye(tensors[i].shape[dim]).to(tensors[i]) for i, dim in places)
            for tensors, places in zip(examples, self.places, strict=True)
        )

    def forward(self, *tensors: Tensor) -> Any:
        taken = iter(self.mapped(0, tensors))
        out = self.module(**map_tensors(self.call[0], lambda _: next(taken)))
        return self.mapped(1, collect(out, Tensor))

    def mapped(self, which: int, tensors: Iterable[Tensor]) -> list[Tensor]:
        found = list(tensors)
        matrices: Any = self.maps[which]
        for (i, dim), matrix in zip(self.places[which], matrices, strict=True):
            found[i] = (found[i].movedim(dim, -1) @ matrix).movedim(-1, dim)
        return found


@contextlib.contextmanager
def noting_calls(model: nn.Module, paths: Iterable[str]) -> Any:
    """The calls of modules while the model runs, by path."""
    found: dict[str, list[Call]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            with contextlib.suppress(TypeError):  # a decorator takes what the signature does not say
                found.setdefault(path, []).append(call_of(module, args, kwargs, out))

        return hook

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True).remove)
        yield found


def call_of(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Call:
    bound = signature(module).bind(*args, **kwargs)
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        more = bound.signature.parameters[name].kind is bound.signature.parameters[name].VAR_KEYWORD
        given |= value if more else {name: value}
    return Call(map_tensors(given, lambda t: t.detach().clone()), map_tensors(out, lambda t: t.detach().clone()))


def plain(given: dict[str, Any]) -> Any:
    """Arguments without what their tensors are; those that are None are as if they were not given."""
    return {name: map_tensors(value, lambda _: ...) for name, value in given.items() if value is not None}


def program_for(module: nn.Module, path: str, call: Call, there: Call, plan: PlanData) -> PrunedModule | None:
    """The pruned module inside the result captured a program for such a call; None where there is none, or none is needed.

    Arguments:
        module: of the original, at `path`.
        call: how the original calls it.
        there: the same call in the pruned model, by the program that it has.
        plan: what was removed.
    """
    before, after = (collect(c.given, Tensor) for c in (call, there))
    if plain(call.given) == plain(there.given) or not all(map(is_known, call.given.values())):
        return None
    names = [name for name, value in call.given.items() for _ in collect(value, Tensor)]
    ends = {name: iter(collect(value, Tensor)) for name, value in there.given.items()}
    after = [next(ends.get(name, iter(())), before[i]) for i, name in enumerate(names)]
    taken, returned = shrinking(before, after), shrinking(collect(call.out, Tensor), collect(there.out, Tensor))
    if taken is None or returned is None:
        return None
    held = {f"module.{name}": f"{path}.{name}" for name, _ in every_tensor(module)}
    slices = {here: plan.slices[name] for here, name in held.items() if plan.slices.get(name)}
    shapes = {here: plan.shapes[name] for here, name in held.items() if name in plan.shapes}
    try:
        solution = couple_channels(
            programs(Projected(module, call, taken, returned), tuple(before), {}, None),
            CouplingOptions(plan.coupling_options.heads),
        )
        removed = solution.removed_by(slices, shapes)
        if (removed & (solution.frozen >= 0)).any():
            return None
        kept = torch.from_numpy(~removed[solution.unit_of.numpy()])
        cuts = tensor_cuts(solution, kept)
        if not all(same_slices(slices.get(name, []), cuts.get(name, []), shape) for name, shape in shapes.items()):
            return None
        return rewrite_program(Projected(module, call, taken, returned), solution, kept, made=cuts)
    except Exception as error:  # a module that cannot be captured alone
        surface(error)
        return None


def shrinking(before: list[Tensor], after: list[Tensor]) -> list[tuple[int, int]] | None:
    """The numbers and dimensions of tensors that are smaller afterwards; None where they are not the same tensors."""
    if len(before) != len(after) or any(a.dim() != b.dim() for a, b in zip(before, after, strict=True)):
        return None
    return [
        (i, d)
        for i, (a, b) in enumerate(zip(before, after, strict=True))
        for d in range(a.dim())
        if a.shape[d] != b.shape[d] and a.is_floating_point()
    ]


def is_known(value: Any) -> bool:
    """Whether a value is of tensors and plain data alone: a cache would be written to."""
    if isinstance(value, tuple | list):
        return all(map(is_known, value))
    return isinstance(value, Tensor) or type(value) in ATOMS
