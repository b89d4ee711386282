"""The configuration of a pruned model of the original's class.

Where the class is built from a configuration (`type(model)(model.config)`, as those of transformers and diffusers are), that
of the pruned model is found by experiment: each number is changed in turn, the class is built without contents, and the
dimensions that follow it are those it stands for. What comes out is built and compared, so that a wrong guess cannot pass.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.original_state import at_most
from fxprune.passes.ir.module_tree import named_modules, named_parameters

Shapes = dict[str, tuple[int, ...]]
Path = tuple[str, ...]
Knob = tuple[Path, ...]  # numbers of a configuration that change together
Attributes = dict[tuple[str, str], Any]
Place = tuple[str, str]  # a tensor and one of its dimensions, or a module and one of its attributes
MOST_TRIED = 64  # configurations, where several fit
FILLS = {getattr(Tensor, name) for name in ("uniform_", "normal_", "zero_", "fill_", "trunc_normal_") if hasattr(Tensor, name)}


class Experiment:
    """A model that its class builds from a configuration, and what was seen of that.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @functools.cached_property
    def growths(self) -> list[tuple[Knob, nn.Module]]:
        return list(growths(self.model))


def configure(
    experiment: Experiment, made: nn.Module, known: Attributes, error_of: Callable[[Any], float], tolerance: float
) -> bool | None:
    """Give `made` the configuration and the attributes that its class would be built with, where one describes it.

    A configuration describes it if a model that is built from it, with the weights loaded, computes the same.

    Arguments:
        experiment: the original.
        made: its shrunk copy.
        known: attributes, by module path and name, that were seen to be sizes, with their values in the pruned model.
        error_of: the relative error of a model on the example inputs.
        tolerance: the largest error that counts as equal.

    Returns: whether one does; None where the class has none.
    """
    model = experiment.model
    if not hasattr(model, "config") or build(model, model.config) is None:
        return None
    target = shapes(made)
    for config in candidates(experiment, target, known):
        fresh = build(made, config)
        if fresh is None or shapes(fresh) != target:
            continue
        modules = dict(named_modules(fresh))
        if any(getattr(modules.get(path), name, value) != value for (path, name), value in known.items()):
            continue
        before = adopt(made, fresh, config)
        if error_of(made) <= tolerance and error_of(rebuilt(made, config)) <= tolerance:
            return True
        restore(before)
    return False


def rebuilt(made: nn.Module, config: Any) -> Any:
    """A model of the class as its library would load it: built from a configuration, with the weights of `made` themselves."""
    first = next(iter(named_parameters(made).values()))
    with torch.random.fork_rng(devices=[]), at_most(len(shapes(made)), on_meta=True):
        fresh = type(made)(copy.deepcopy(config))
    # a class may have a `load_state_dict` of its own, which takes no `assign`
    nn.Module.load_state_dict(fresh, nn.Module.state_dict(made), strict=False, assign=True)
    fresh.to(first.device)
    for path, module in named_modules(fresh):  # rotary tables stay in single precision, unless the whole model was converted
        for name, buffer in module._buffers.items():
            theirs = made.get_submodule(path)._buffers.get(name)
            if buffer is not None and theirs is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(theirs.dtype)
    return fresh


def shapes(model: nn.Module) -> Shapes:
    return {name: tuple(t.shape) for name, t in [*named_parameters(model).items(), *model.named_buffers()]}


def build(model: nn.Module, config: Any) -> nn.Module | None:
    """A model of the class without contents; None where the class or the configuration does not allow it."""
    try:
        if hasattr(config, "to_dict") and hasattr(type(config), "from_dict"):
            type(config).from_dict(config.to_dict())  # as it is read from a file, which some check
        with torch.device("meta"), Unfilled():
            made: Any = type(model)(copy.deepcopy(config))
        return made if isinstance(made, type(model)) else None  # a GraphModule makes a class of its own for each
    except Exception:
        return None


class Unfilled(TorchFunctionMode):
    """Nothing is drawn for tensors without memory, which takes longer than the rest of a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def numbers(config: Any, path: Path = (), least: int = 2) -> Iterator[tuple[Path, int]]:
    """Every whole number from `least` on in a configuration, in its lists and in the configurations inside it."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value >= least:
            yield (*path, name), value
        elif type(value) in (list, tuple) and all(type(n) is int for n in value):
            yield from (((*path, name, str(i)), n) for i, n in enumerate(value) if n >= least)
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from numbers(value, (*path, name), least)


def changed(config: Any, values: dict[Path, int]) -> Any:
    config = copy.deepcopy(config)
    for path, value in values.items():
        owner = config
        *holders, name = path
        for holder in holders:
            holding, owner = owner, getattr(owner, holder)
        if isinstance(owner, list | tuple):
            setattr(holding, holders[-1], type(owner)(value if str(i) == name else n for i, n in enumerate(owner)))
        else:
            setattr(owner, name, value)
    return config


def growths(model: nn.Module) -> Iterator[tuple[Knob, nn.Module]]:
    """For each number of a configuration the class built with twice that, where it has the same tensors then.

    Numbers of one value that cannot be doubled alone (two widths without a layer between them) are doubled together.
    """
    values, base = dict(numbers(model.config)), shapes(model).keys()

    def grown(knob: Knob) -> nn.Module | None:
        made = build(model, changed(model.config, {path: 2 * values[path] for path in knob}))
        return made if made is not None and shapes(made).keys() == base else None

    alone = {path: grown((path,)) for path in values}
    yield from (((path,), made) for path, made in alone.items() if made is not None)
    stuck = [path for path, made in alone.items() if made is None]
    for a, b in itertools.combinations(stuck, 2):
        if values[a] == values[b] and (made := grown((a, b))) is not None:
            yield (a, b), made


def followers(model: nn.Module) -> dict[str, set[tuple[str, int]]]:
    """For each number of a model's configuration the dimensions of tensors that follow it; empty where none builds it.

    Numbers that may only change in step, such as a width and the number of heads that must divide it, stand together.
    """
    config = getattr(model, "config", None)
    plain = None if config is None else build(model, config)
    if plain is None:
        return {}
    found = {knob: places for knob, made in growths(model) if (places := differing_dimensions(plain, made))}
    joined = dict.fromkeys(found, frozenset[Knob]())
    for a, b in in_step(model, list(found)):
        both = joined[a] | joined[b] | {a, b}
        joined |= dict.fromkeys(both, both)
    sets = dict.fromkeys(some or frozenset({knob}) for knob, some in joined.items())
    named = [sorted(some, key=list(found).index) for some in sets]
    return {
        " and ".join(".".join(path) for knob in some for path in knob): set().union(*(found[knob] for knob in some))
        for some in named
    }


def conflict(model: nn.Module, made: nn.Module) -> str:
    """Why no configuration describes a shrunk copy."""
    before, after = dimensions(shapes(model)), dimensions(shapes(made))
    for name, places in followers(model).items():
        sizes = {Fraction(after[n, str(d)], before[n, str(d)]): f"{n}:{d}" for n, d in sorted(places) if (n, str(d)) in after}
        if len(sizes) > 1:
            said = " and ".join(f"{float(share):.3g} of itself at {place}" for share, place in list(sizes.items())[:2])
            return f"no configuration describes the pruned model: {name} would have to be {said}"
    return "no configuration describes the pruned model: one that has its shapes computes something else"


def in_step(model: nn.Module, knobs: Sequence[Knob]) -> Iterator[tuple[Knob, Knob]]:
    """Pairs of numbers that no configuration has smaller by one, each for itself, and that may be scaled together."""
    values = dict(numbers(model.config))

    def fits(*lower: tuple[Knob, int]) -> bool:
        chosen = {path: values[path] - less for knob, less in lower for path in knob}
        return build(model, changed(model.config, chosen)) is not None

    bound = [knob for knob in knobs if not fits((knob, 1))]
    for a, b in itertools.combinations(bound, 2):
        one, other = values[a[0]], values[b[0]]
        steps = math.gcd(one, other)
        if steps > 1 and fits((a, one // steps), (b, other // steps)):
            yield a, b


def differing_dimensions(a: nn.Module, b: nn.Module) -> set[tuple[str, int]]:
    """The dimensions of tensors, by name and position, that two models of one class have otherwise."""
    there = dimensions(shapes(b))
    return {(name, int(d)) for (name, d), size in dimensions(shapes(a)).items() if there.get((name, d)) != size}


def candidates(experiment: Experiment, target: Shapes, known: Attributes) -> Iterator[Any]:
    """Configurations that may build the pruned shapes and attributes, at most `MOST_TRIED`.

    Each number is doubled in turn: the dimensions and attributes that change are those that follow it. Where one of these
    follows no other number, it says what the number is now; where two of them say different things, no configuration
    describes the model. Other numbers stay, and if that does not do every scale is tried that occurs.
    """
    model = experiment.model
    plain = build(model, model.config)
    assert plain is not None
    before, after = places(plain, known), {**dimensions(target), **known}
    values = dict(numbers(model.config))
    follow: dict[Knob, set[Place]] = {}
    for knob, grown in experiment.growths:
        there = places(grown, known)
        moved = {place for place, size in there.items() if size != before.get(place)}
        if there.keys() == before.keys() and (moved or differing(plain, grown)):
            follow[knob] = moved
    scale = {place: Fraction(after[place], size) for place, size in before.items() if size and place in after}
    followers = Counter(place for found in follow.values() for place in found)
    options: list[list[dict[Path, int]]] = []
    for knob, found in follow.items():
        certain = {scale[place] for place in found if followers[place] == 1}
        if len(certain) > 1:
            return
        tried = certain or {Fraction(1), *scale.values()}
        value = values[knob[0]]
        fitting = sorted({value * s for s in tried if (value * s).denominator == 1}, key=lambda size: (size != value, size))
        if not fitting:
            return
        options.append([dict.fromkeys(knob, int(size)) for size in fitting])
    for chosen in itertools.islice(itertools.product(*options), MOST_TRIED):
        yield changed(model.config, {path: size for some in chosen for path, size in some.items()})


def dimensions(shapes: Shapes) -> dict[Place, int]:
    return {(name, str(d)): size for name, shape in shapes.items() for d, size in enumerate(shape)}


def places(model: nn.Module, known: Attributes) -> dict[Place, int]:
    """The sizes of all dimensions of a model's tensors, and those attributes of it that are known to be sizes."""
    modules = dict(named_modules(model))
    attributes = {(path, name): getattr(modules.get(path), name, None) for path, name in known}
    return dimensions(shapes(model)) | {place: value for place, value in attributes.items() if type(value) is int}


def differing(a: nn.Module, b: nn.Module | None) -> list[tuple[str, str]]:
    """Module paths and names of numbers that are attributes of both and differ."""
    theirs = dict(named_modules(b)) if b is not None else {}
    return [
        (path, name)
        for path, module in named_modules(a)
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
    fresh_modules, replaced = dict(named_modules(fresh)), {id(made.config): config}
    for path, module in named_modules(made):
        if hasattr(module, "config"):
            before.append((module, "config", module.config))
            theirs = getattr(fresh_modules[path], "config", None)
            ours = replaced.setdefault(id(module.config), with_numbers(module.config, theirs))
            object.__setattr__(module, "config", ours)
    return before


def with_numbers(config: Any, other: Any) -> Any:
    """A copy of a configuration with the numbers of another one."""
    theirs = dict(numbers(other, least=1)) if other is not None else {}
    return changed(config, {path: theirs[path] for path, _ in numbers(config) if path in theirs})


def restore(before: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in before:
        object.__setattr__(owner, name, value)
