"""The configuration of a pruned model of the original's class.

Where the class is built from a configuration (`type(model)(model.config)`, as those of transformers and diffusers are), that
of the pruned model is found by experiment: each number is changed in turn, the class is built without contents, and the
dimensions that follow it are those it stands for. What comes out is built and compared, so that a wrong guess cannot pass.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fxprune.original_state import at_most

Shapes = dict[str, tuple[int, ...]]
Path = tuple[str, ...]
Attributes = dict[tuple[str, str], Any]
Place = tuple[str, str]  # a tensor and one of its dimensions, or a module and one of its attributes
MOST_TRIED = 64  # configurations, where several fit


def configure(
    model: nn.Module, made: nn.Module, known: Attributes, error_of: Callable[[Any], float], tolerance: float
) -> bool | None:
    """Give `made` the configuration and the attributes that its class would be built with, where one describes it.

    A configuration describes it if a model that is built from it, with the weights loaded, computes the same.

    Arguments:
        model: the original.
        made: its shrunk copy.
        known: attributes, by module path and name, that were seen to be sizes, with their values in the pruned model.
        error_of: the relative error of a model on the example inputs.
        tolerance: the largest error that counts as equal.

    Returns: whether one does; None where the class has none.
    """
    if not hasattr(model, "config") or build(model, model.config) is None:
        return None
    target = shapes(made)
    for config in candidates(model, target, known):
        fresh = build(made, config)
        if fresh is None or shapes(fresh) != target:
            continue
        modules = dict(fresh.named_modules())
        if any(getattr(modules.get(path), name, value) != value for (path, name), value in known.items()):
            continue
        before = adopt(made, fresh, config)
        if error_of(made) <= tolerance and error_of(rebuilt(made, config)) <= tolerance:
            return True
        restore(before)
    return False


def rebuilt(made: nn.Module, config: Any) -> Any:
    """A model of the class as its library would load it: built from a configuration, with the weights of `made` themselves."""
    first = next(made.parameters())
    with torch.random.fork_rng(devices=[]), at_most(len(shapes(made)), on_meta=True):
        fresh = type(made)(copy.deepcopy(config))
    fresh.load_state_dict(made.state_dict(), strict=False, assign=True)
    fresh.to(first.device)
    for path, module in fresh.named_modules():  # rotary tables stay in single precision, unless the whole model was converted
        for name, buffer in module._buffers.items():
            theirs = made.get_submodule(path)._buffers.get(name)
            if buffer is not None and theirs is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(theirs.dtype)
    return fresh


def shapes(model: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}


def build(model: nn.Module, config: Any) -> nn.Module | None:
    """A model of the class without contents; None where the class or the configuration does not allow it."""
    try:
        if hasattr(config, "validate"):
            config.validate()  # as it is when it is written to disk
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


def candidates(model: nn.Module, target: Shapes, known: Attributes) -> Iterator[Any]:
    """Configurations that may build the pruned shapes and attributes, at most `MOST_TRIED`.

    Each number is doubled in turn: the dimensions and attributes that change are those that follow it. Where one of these
    follows no other number, it says what the number is now; where two of them say different things, no configuration
    describes the model. Of other numbers every scale is tried that occurs.
    """
    plain = build(model, model.config)
    assert plain is not None
    before, after = places(plain, known), {**dimensions(target), **known}
    values = dict(numbers(model.config))
    follow: dict[Path, set[Place]] = {}
    for path, value in values.items():
        grown = build(model, changed(model.config, {path: 2 * value}))
        there = places(grown, known) if grown is not None else {}
        if there.keys() != before.keys():  # a number of layers, or one that must not be this
            continue
        follow[path] = {place for place, size in there.items() if size != before[place]}
        if not follow[path] and not differing(plain, grown):
            del follow[path]
    scale = {place: Fraction(after[place], size) for place, size in before.items() if size and place in after}
    followers = Counter(place for found in follow.values() for place in found)
    options: list[list[tuple[Path, int]]] = []
    for path, found in follow.items():
        certain = {scale[place] for place in found if followers[place] == 1}
        if len(certain) > 1:
            return
        tried = certain or {Fraction(1), *scale.values()}
        fitting = sorted({values[path] * s for s in tried if (values[path] * s).denominator == 1})
        if not fitting:
            return
        options.append([(path, int(size)) for size in fitting])
    for chosen in itertools.islice(itertools.product(*options), MOST_TRIED):
        yield changed(model.config, dict(chosen))


def dimensions(shapes: Shapes) -> dict[Place, int]:
    return {(name, str(d)): size for name, shape in shapes.items() for d, size in enumerate(shape)}


def places(model: nn.Module, known: Attributes) -> dict[Place, int]:
    """The sizes of all dimensions of a model's tensors, and those attributes of it that are known to be sizes."""
    modules = dict(model.named_modules())
    attributes = {(path, name): getattr(modules.get(path), name, None) for path, name in known}
    return dimensions(shapes(model)) | {place: value for place, value in attributes.items() if type(value) is int}


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
