"""What a forward can change in place: containers, records, random generators; as they were, and put back."""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.ir.pytree import ATOMS, attributes_of, is_record

CONTAINERS = frozenset([dict, OrderedDict, set, list, tuple])
EMPTIED = CONTAINERS - {tuple}
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

Contents = Sequence[Callable[[], object]]  # functions that each put one object back


def changeable(value: Any) -> bool:
    """Whether something is no tensor and no module, and can be changed in place."""
    return type(value) not in ATOMS and (type(value) in CONTAINERS or is_generator(type(value)) or is_record(value))  # type: ignore[arg-type]  # as in `is_record`


@functools.lru_cache(maxsize=4096)
def is_generator(kind: Any) -> bool:
    return issubclass(kind, GENERATORS)


def contents(box: Any, seen: set[int] | None = None, *, tensors: bool = False) -> Contents:
    """What an object and the ones in it hold, for `refill`.

    Arguments: `seen`, objects that were looked into already; `tensors`, whether those are written back too, as in a record.
    """
    seen = set() if seen is None else seen
    if is_generator(type(box)):  # type: ignore[arg-type]
        return [rewound(box)]
    if isinstance(box, Tensor):
        return [written_back(box)] if tensors and not box.is_meta and not isinstance(box, nn.Parameter) else []
    if id(box) in seen:
        return []
    seen.add(id(box))
    if type(box) in CONTAINERS:
        inner = list(box.values() if isinstance(box, dict) else box) if box else []
        held: list[Callable[[], object]] = [] if type(box) is tuple else [filled_as_now(box)]
    else:
        with attributes_of(box) as attributes:
            if attributes is None:
                return []
            inner, held, tensors = list(attributes.values()), [attributes_as_now(box, attributes)], True
    empty: list[Any] = []  # as most dicts of hooks are
    for v in inner:
        kind = type(v)
        if kind in ATOMS:
            continue
        if kind in EMPTIED and not v and type(box) is dict:
            empty.append(v)
        elif (tensors and isinstance(v, Tensor)) or changeable(v):
            held += contents(v, seen, tensors=tensors)
    return [*held, functools.partial(emptied, empty)] if empty else held


def emptied(boxes: Sequence[Any]) -> None:
    for box in boxes:
        if box:
            box.clear()


def refill(held: Contents) -> None:
    """Have objects hold what they held."""
    for put_back in held:
        put_back()


def filled_as_now(box: Any) -> Callable[[], None]:
    before = copy.copy(box) if box else type(box)()

    def put_back() -> None:
        if isinstance(box, list):
            box[:] = before
        else:
            box.clear()
            box.update(before)

    return put_back


def attributes_as_now(box: Any, before: dict[str, Any]) -> Callable[[], None]:
    def put_back() -> None:
        for name in [n for n in getattr(box, "__dict__", ()) if n not in before]:
            object.__delattr__(box, name)
        for name, value in before.items():
            if attribute(box, name) is not value:
                object.__setattr__(box, name, value)

    return put_back


def attribute(box: Any, name: str) -> Any:
    """What an object holds, and not what its class answers, which may refuse to."""
    try:
        return object.__getattribute__(box, name)
    except AttributeError:
        return None


def written_back(tensor: Tensor) -> Callable[[], None]:
    """A tensor that is as it was is not written to: a result that was computed before may still go backward through it."""
    before = tensor.detach().clone()
    plain = (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_meta)
    )

    def put_back() -> None:
        with torch.no_grad():
            if not (plain and same_bits(tensor, before)):
                tensor.copy_(before)

    return put_back


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def rewound(generator: Any) -> Callable[[], object]:
    """Have a generator draw again what it would draw now."""
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    bits, drawn = generator.bit_generator, copy.deepcopy(generator.bit_generator.state)

    def put_back() -> None:
        bits.state = drawn

    return put_back
