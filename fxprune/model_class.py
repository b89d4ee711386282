"""A pruned model of the original's own class: its Python stays, its tensors, attributes and configuration shrink.

The model is captured as one opaque module (see `capture/opaque.py`): its tensors are cut by the plan, and integer attributes
that turn up as sizes are corrected. Where the class is built from a configuration (`type(model)(model.config)`, as those of
transformers and diffusers are), the configuration of the pruned model is found by experiment: each number is changed in
turn, the class is built without contents, and the dimensions that follow it are those it stands for. Whatever comes out is
compared with the pruned program, so that a wrong guess cannot pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.inputs import ExampleInputs
from fxprune.passes.capture.capture import capture_program
from fxprune.passes.capture.opaque import OPERATORS
from fxprune.passes.coupling.couple import couple_channels
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import private_copy, set_mode
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.quiet import unobserved
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.passes.rewrite.rewrite import rewrite_program
from fxprune.passes.verification.masked_model import relative_error
from fxprune.plan import kept_labels, plan_between
from fxprune.verification import tolerance_of

Shapes = dict[str, tuple[int, ...]]
Path = tuple[str, ...]
Attributes = dict[tuple[str, str], Any]
MOST_UNCERTAIN = 8  # numbers of a configuration that may stand for the same dimensions


def restore_class(model: nn.Module, pruned: PrunedModule, inputs: ExampleInputs) -> Any:
    """A pruned model in the original's own class; raises PruneError where it does not compute the same."""
    plan = plan_between(model, pruned)
    with unobserved(model):
        whole = capture_program(set_mode(private_copy(model), False), inputs.args, inputs.kwargs, whole=True)
        solution = couple_channels([whole], plan.coupling_options)
        made, known = shrink_class(model, solution, kept_labels(plan, solution))
        mode = pruned.training
        wanted = collect(inputs.call(pruned.eval()), Tensor)
        pruned.train(mode)
        modes = {m: m.training for m in made.modules()}
        made.eval()
        tolerance = tolerance_of(made)
        configure(model, made, known, wanted, inputs.call, tolerance)
        error = difference(made, wanted, inputs.call)
        for m, training in modes.items():
            m.training = training
    if error > tolerance:
        raise PruneError(
            f"the pruned model cannot stay a {type(model).__name__}: its own forward holds sizes that no attribute has",
            where=type(model).__name__,
            fix="take the GraphModule that prune returns without same_class",
        )
    made.__dict__["meta"] = dict(pruned.meta)
    return made


def shrink_class(model: nn.Module, solution: Solution, kept: Tensor) -> tuple[nn.Module, Attributes]:
    """The copy of a model captured whole, with cut tensors, and the attributes that its forward uses as sizes."""
    made: nn.Module = rewrite_program(model, solution, kept).get_submodule("whole")
    for (_, was), (_, now) in zip(model.named_modules(), made.named_modules(), strict=True):
        now.training = was.training
    trees = [use.tree for found in solution.captures[0].sizes.values() for use in found]
    uses = [tree for tree in trees if tree[0] not in OPERATORS]
    paths = [module.removeprefix("whole").removeprefix(".") for module, _ in uses]
    return made, {(path, name): getattr(made.get_submodule(path), name) for path, (_, name) in zip(paths, uses, strict=True)}


def configure(model: nn.Module, made: nn.Module, known: Attributes, wanted: list[Tensor], run: Any, tolerance: float) -> None:
    """Give `made` the configuration and the attributes that its class would be built with, if there is one.

    Arguments:
        model: the original.
        made: its shrunk copy.
        known: attributes, by module path and name, that were seen to be sizes, with their values in the pruned model.
        wanted: what the pruned program returns on the example inputs.
        run: calls a model on the example inputs.
        tolerance: the largest relative error that counts as equal.

    Raises: PruneError where the class has a configuration and none describes the pruned model.
    """
    if not hasattr(model, "config") or build(model, model.config) is None:
        return
    target, best, chosen = shapes(made), float("inf"), None
    for config in candidates(model, target):
        fresh = build(made, config)
        if fresh is None or shapes(fresh) != target:
            continue
        modules = dict(fresh.named_modules())
        if any(getattr(modules.get(path), name, value) != value for (path, name), value in known.items()):
            continue
        before = adopt(made, fresh, config)
        error = difference(made, wanted, run)
        if error < best:
            best, chosen = error, (fresh, config)
        restore(before)
    if chosen is None or best > tolerance:
        raise PruneError(
            "no configuration of the class describes the pruned model",
            where=type(model).__name__,
            fix="one ratio for all layers, or the GraphModule that prune returns without same_class",
        )
    adopt(made, *chosen)


def difference(made: nn.Module, wanted: list[Tensor], run: Any) -> float:
    try:
        with torch.no_grad():
            found = collect(run(made), Tensor)
        return max((relative_error(a, b) for a, b in zip(wanted, found, strict=True)), default=float("inf"))
    except Exception:  # numbers that fit the shapes and not the program
        return float("inf")


def shapes(model: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def build(model: nn.Module, config: Any) -> nn.Module | None:
    """A model of the class without contents; None where the class or the configuration does not allow it."""
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(config))
    except Exception:
        return None


def numbers(config: Any, path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Every whole number above 1 in a configuration and in those inside it."""
    for name, value in vars(config).items():
        if type(value) is int and value > 1 and not name.startswith("_"):
            yield (*path, name), value
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from numbers(value, (*path, name))


def changed(config: Any, values: dict[Path, int]) -> Any:
    config = copy.deepcopy(config)
    for path, value in values.items():
        owner = config
        for name in path[:-1]:
            owner = getattr(owner, name)
        setattr(owner, path[-1], value)
    return config


def candidates(model: nn.Module, target: Shapes) -> Iterator[Any]:
    """Configurations that may build the pruned shapes.

    A number may be scaled as the dimensions that follow it are; one that only attributes follow (a number of heads), by any
    scale that occurs. Where one is the only number that a dimension follows there is no choice.
    """
    base, plain = shapes(model), build(model, model.config)
    assert plain is not None
    scales = {Fraction(target[n][d], size) for n in base for d, size in enumerate(base[n]) if size}
    values = dict(numbers(model.config))
    follow: dict[Path, set[tuple[str, int]]] = {}
    for path, value in values.items():
        grown = build(model, changed(model.config, {path: 2 * value}))
        there = shapes(grown) if grown is not None else {}
        if there.keys() != base.keys():  # a number of layers, or one that must not be this
            continue
        places = {(n, d) for n in base for d, size in enumerate(base[n]) if there[n][d] != size}
        if places or differing(plain, grown):
            follow[path] = places
    options: dict[Path, list[int]] = {}
    for path, places in follow.items():
        alone = places and not any(other != path and places & others for other, others in follow.items())
        ratios = {Fraction(target[n][d], base[n][d]) for n, d in places} if alone else scales
        fitting = {values[path] * r for r in ratios if (values[path] * r).denominator == 1}
        options[path] = sorted(map(int, fitting)) if alone else sorted({values[path], *map(int, fitting)})
    open_ = [path for path, choices in options.items() if len(choices) > 1][:MOST_UNCERTAIN]
    fixed = {path: choices[0] for path, choices in options.items() if len(choices) == 1}
    for chosen in itertools.product(*(options[path] for path in open_)):
        yield changed(model.config, fixed | dict(zip(open_, chosen, strict=True)))


def differing(a: nn.Module, b: nn.Module | None) -> list[tuple[str, str]]:
    """Module paths and names of numbers that are attributes of both and differ."""
    theirs = dict(b.named_modules()) if b is not None else {}
    return [
        (path, name)
        for path, module in a.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float, tuple) and path in theirs and vars(theirs[path]).get(name, value) != value
    ]


def adopt(made: nn.Module, fresh: nn.Module, config: Any) -> list[tuple[Any, str, Any]]:
    """Set the attributes that a freshly built model has otherwise; returns what they were."""
    before: list[tuple[Any, str, Any]] = []
    for path, name in differing(made, fresh):
        module = made.get_submodule(path)
        before.append((module, name, getattr(module, name)))
        object.__setattr__(module, name, getattr(fresh.get_submodule(path), name))
    configs = {id(m.config): m.config for m in made.modules() if hasattr(m, "config")}
    replaced = {id(old): match(old, made.config, config) for old in configs.values()}
    for module in made.modules():
        if hasattr(module, "config"):
            before.append((module, "config", module.config))
            object.__setattr__(module, "config", replaced[id(module.config)])
    return before


def match(old: Any, root: Any, new: Any) -> Any:
    """The part of a new configuration that stands where `old` stands in the present one."""
    if old is root or type(old) is type(root):
        return new
    for name, value in vars(root).items():
        if type(value) is type(old):
            return getattr(new, name)
    return old


def restore(before: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in before:
        object.__setattr__(owner, name, value)
