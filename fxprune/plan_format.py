"""The format of saved plans: what a stranger's file must look like before anything is made of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxprune.passes.coupling.families import names_family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.program import Waiver
from fxprune.passes.ir.slices import TensorSlice, nothing_of
from fxprune.passes.rewrite.basis import Basis

FORMATS = ("fxprune.plan/1", "fxprune.plan/2", "fxprune.plan/3")  # from 2 on it may keep nothing of a tensor; 3: see `Basis`
DICT = "what Plan.to_dict() returned"
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
MOST_DIMS = 64  # of a tensor
MOST_ELEMENTS = 1 << 40  # of all example inputs together
DEEPEST = 50  # nesting of example inputs
INT64 = 1 << 63


def share_indices(data: dict[str, Any]) -> dict[str, Any]:
    """A plan's plain data with each list of kept indices written once, in `kept`, and a number in its places."""
    places: dict[tuple[int, ...], int] = {}

    def numbered(plan: dict[str, Any]) -> dict[str, Any]:
        keep = {
            name: [{**part, "keep": places.setdefault(tuple(part["keep"]), len(places))} for part in found]
            for name, found in plan["keep"].items()
        }
        return {**plan, "keep": keep}

    steps = {"steps": [numbered(step) for step in data["steps"]]} if "steps" in data else {}
    return {**numbered(data), **steps, "kept": list(map(list, places))}


def restore_indices(data: Any, most: int) -> Any:
    """The plain data that `share_indices` was given; raises PruneError for more than so many indices in all."""
    kept = listed(mapping(data, "the plan").get("kept"), "kept")
    made: list[dict[str, Any]] = []
    for plan in (data, *steps_of(data)):
        keep: dict[str, list[Any]] = {}
        for name, found in mapping(plan.get("keep"), "keep").items():
            keep[name] = []
            for part in listed(found, f"what is kept of {name}"):
                number = mapping(part, f"what is kept of {name}").get("keep")
                if type(number) is not int or not 0 <= number < len(kept):
                    raise refused(f"what is kept of {name} is no place in its lists of indices")
                most -= len(listed(kept[number], "kept indices"))
                if most < 0:
                    raise refused("it keeps more indices than there are elements")
                keep[name].append({**part, "keep": kept[number]})
        made.append({**plan, "keep": keep})
    return {**made[0], "steps": made[1:]}


def steps_of(data: Any) -> Sequence[Mapping[str, Any]]:
    """The plain data of the plans that one was composed of, in order."""
    steps = listed(data.get("steps", []), "steps")
    if any("steps" in mapping(step, "a step") for step in steps):
        raise refused("a step of it has steps")
    return steps


def parse_plan(data: Any) -> dict[str, Any]:
    """The fields of a plan from plain data; raises PruneError for data that is none."""
    form = data.get("format") if isinstance(data, Mapping) else None
    if form not in FORMATS:
        raise refused(f"its format is {form!r}", fix=f"a file of format {' or '.join(FORMATS)}")
    for field in ("shapes", "keep", "attention", "freeze", "inputs"):
        if field not in data:
            raise refused(f"it has no {field!r}")
    shapes = {name: sizes(shape, f"the shape of {name}") for name, shape in mapping(data["shapes"], "shapes").items()}
    slices = {}
    known: dict[int, torch.Tensor] = {}  # lists of indices that were looked at already, by identity
    for name, found in mapping(data["keep"], "keep").items():
        if name not in shapes:
            raise refused(f"it cuts {name}, of which it has no shape")
        parts = listed(found, f"what is kept of {name}")
        if form != FORMATS[0] and len(parts) == 1 and isinstance(parts[0], Mapping) and parts[0].get("keep") == []:
            slices[name] = [nothing_of(shapes[name])]
            continue
        slices[name] = [parse_slice(part, name, shapes[name], known) for part in parts]
        dims = [d for part in slices[name] for d in part.dims]
        if len(set(dims)) != len(dims):
            raise refused(f"it cuts a dimension of {name} twice")
    if data["attention"] not in ("heads", "queries", "dims"):
        raise refused(f"attention is {data['attention']!r}, none of 'heads', 'queries' and 'dims'")
    freeze = texts(data["freeze"], "freeze")
    unknown = next((text for text in freeze if not names_family(text, shapes)), None)
    if unknown is not None:
        raise refused(f"it freezes {unknown}, of which it has no shape")
    derived = texts(data.get("derived", []), "derived")
    if not shapes.keys() >= set(derived):
        raise refused("it has no shape of a tensor that it calls derived")
    if data["inputs"] is not None and elements(data["inputs"]) > MOST_ELEMENTS:
        raise refused("its example inputs are larger than any model takes")
    return {
        "shapes": shapes,
        "slices": slices,
        "attention": data["attention"],
        "freeze": freeze,
        "inputs": data["inputs"],
        "release": texts(data.get("release", []), "release"),  # older plans have none
        "waiver": parse_waiver(data.get("waiver")),
        "derived": derived,
        "basis": Basis.from_dict(data.get("basis")) if form == FORMATS[2] else None,
        "frozen_modules": texts(data.get("frozen_modules", []), "frozen_modules"),
        "experts": data.get("experts") is True,
    }


def parse_slice(data: Any, name: str, shape: tuple[int, ...], known: dict[int, torch.Tensor]) -> TensorSlice:
    """What is kept along some dimensions of a tensor of a given shape; `known` are lists of indices made tensors before."""
    data = mapping(data, f"what is kept of {name}")
    missing = next((field for field in ("dims", "keep", "sizes") if field not in data), None)
    if missing is not None:
        raise refused(f"what is kept of {name} has no {missing!r}")
    dims, left = sizes(data["dims"], f"dims of {name}"), sizes(data["sizes"], f"sizes of {name}")
    if not dims or len(set(dims)) != len(dims) or max(dims) >= len(shape):
        raise refused(f"a tensor of shape {shape} has no dimensions {dims}")
    indices = data["keep"]
    if id(indices) not in known:
        if not isinstance(indices, list | tuple) or not all(type(i) is int for i in indices):
            raise refused(f"the kept indices of {name} are not a list of integers")
        if any(a >= b for a, b in itertools.pairwise(indices)):
            raise refused(f"the kept indices of {name} are not in ascending order")
    if not indices or len(left) != len(dims) or len(indices) != math.prod(left):
        raise refused(f"{len(indices)} kept indices do not fill {left}")
    if not 0 <= indices[0] <= indices[-1] < math.prod(shape[d] for d in dims):
        raise refused(f"kept indices of a tensor of shape {shape} reach from {indices[0]} to {indices[-1]}")
    if id(indices) not in known:
        known[id(indices)] = torch.tensor(indices, dtype=torch.int64)
    return TensorSlice(dims, known[id(indices)], left)


def parse_waiver(data: Any) -> Waiver | None:
    if data is None:
        return None
    data = mapping(data, "waiver")
    name, size = data.get("input"), data.get("size")
    if not isinstance(name, str) or type(size) is not int or size < 0:
        raise refused("waiver must hold an input by name and a size")
    return Waiver(name, size, texts(data.get("guards", []), "the guards of waiver"))


def peak_bytes(dtype: torch.dtype) -> int:
    return (4 if dtype.is_floating_point else 8) + dtype.itemsize


def byte_size(data: Any) -> int:
    """The bytes that it takes to make up described example inputs; 0 where they are not described."""
    return 0 if data is None else elements(data, peak_bytes)


def elements(data: Any, weight: Callable[[torch.dtype], int] = lambda dtype: 1, depth: int = 0) -> int:
    """How many elements all tensors of described example inputs have; raises PruneError for what describes none.

    Arguments: `weight` says how much an element of a dtype counts.
    """
    if depth > DEEPEST:
        raise refused("its example inputs are nested too deeply")
    if not isinstance(data, Mapping) or len(data) != 1:
        raise refused("its example inputs are not described")
    kind, content = next(iter(data.items()))
    if kind == "tensor":
        return described_tensor(mapping(content, "an example input"), weight)
    if kind in ("tuple", "list"):
        return sum(elements(part, weight, depth + 1) for part in listed(content, "example inputs"))
    if kind in ("dict", "fields"):
        pairs = listed(content, "example inputs")
        if not all(isinstance(p, list | tuple) and len(p) == 2 and is_value(p[0]) for p in pairs):
            raise refused("example inputs by keyword must be pairs of a name and a description")
        return sum(elements(part, weight, depth + 1) for _, part in pairs)
    if (kind == "value" and is_value(content)) or (kind == "opaque" and isinstance(content, str)):
        return 0
    raise refused(f"it has no example inputs of kind {str(kind)[:40]!r}")


def described_tensor(data: Mapping[str, Any], weight: Callable[[torch.dtype], int]) -> int:
    shape, dtype, span = sizes(data.get("shape"), "the shape of an example input"), data.get("dtype"), data.get("range")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refused(f"an example input has the dtype {str(dtype)[:40]!r}")
    if span is not None:
        pair = isinstance(span, list | tuple) and len(span) == 2 and all(type(i) is int for i in span)
        if not pair or not -INT64 <= span[0] <= span[1] < INT64 - 1:
            raise refused("the range of an example input must be two integers, the smaller one first")
    elif not DTYPES[dtype].is_floating_point and not DTYPES[dtype].is_complex and 0 not in shape:
        raise refused("an example input of integers has no range")
    return math.prod(shape) * weight(DTYPES[dtype])


def is_value(data: Any) -> bool:
    return data is None or isinstance(data, bool | int | float | str)


def mapping(data: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise refused(f"{what} must be a mapping by name, not {type(data).__name__}")
    return data


def listed(data: Any, what: str) -> Sequence[Any]:
    if not isinstance(data, list | tuple):
        raise refused(f"{what} must be a list, not {type(data).__name__}")
    return data


def texts(data: Any, what: str) -> tuple[str, ...]:
    if not isinstance(data, list | tuple) or not all(isinstance(text, str) for text in data):
        raise refused(f"{what} must be a list of texts")
    return tuple(data)


def sizes(data: Any, what: str) -> tuple[int, ...]:
    """A shape, or other numbers from 0 for dimensions of a tensor."""
    numbers = isinstance(data, list | tuple) and len(data) <= MOST_DIMS
    if not numbers or not all(type(n) is int and 0 <= n < INT64 for n in data):
        raise refused(f"{what} must be a list of at most {MOST_DIMS} integers from 0")
    return tuple(data)


def refused(why: str, fix: str = DICT) -> PruneError:
    return PruneError(f"this is no plan: {why}", fix=fix)
