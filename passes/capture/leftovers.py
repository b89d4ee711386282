"""What a capture leaves behind: values of its that outlive it, in caches of functions and in containers, are removed."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fxprune.passes.capture.patches import CACHED
from fxprune.passes.capture.proxy import PROXIES, unwrap
from fxprune.passes.ir.pytree import fields_of, iterate

DEPTH = 8  # containers in containers
NESTED = (tuple, list, set, frozenset)
pending: list[weakref.ref[Any]] = []  # proxies of captures that have ended, and not been looked for yet


def remove_leftovers() -> None:
    """Remove proxies of past captures from whatever still holds them.

    A function that remembers results (`functools.lru_cache`) forgets all of them. Entries that are looked up by a proxy go; in
    place of other proxies stand their values, as a run on the example would have left them. A tensor without contents is no
    such value: its entry goes too, but a variable or an attribute of a class becomes None.
    """
    if not alive():
        pending.clear()
        return
    gc.collect(0)  # what was created since the collector was put off, and holds itself
    found = alive()
    pending.clear()
    seen: set[int] = set()
    for _ in range(DEPTH):
        seen |= {id(found), *map(id, found)}
        holders = [h for h in gc.get_referrers(*found) if id(h) not in seen] if found else []
        seen.add(id(holders))
        found = [h for h in holders if not release(h, found)]


def alive() -> list[Any]:
    return [proxy for proxy in (ref() for ref in pending) if proxy is not None]


def release(holder: Any, held: list[Any]) -> bool:
    """Have a holder let go of some values; False where what holds the holder has to let go of it."""
    inside = {id(v) for v in held}
    if type(holder) is CACHED:
        holder.cache_clear()
    elif isinstance(holder, dict) and (owner := class_of(holder)) is not None:
        for key in [k for k, v in list(holder.items()) if id(v) in inside]:
            setattr(owner, key, unwrap(holder[key]) if replaceable(holder[key]) else None)
    elif isinstance(holder, dict):
        for key, value in list(holder.items()):
            if id(key) in inside or (id(value) in inside and not replaceable(value) and not is_namespace(holder)):
                del holder[key]
            elif id(value) in inside:
                holder[key] = unwrap(value) if replaceable(value) else None
    elif isinstance(holder, set):
        holder.difference_update([v for v in holder if id(v) in inside])
    elif type(holder) is list:
        kept = [v for v in holder if id(v) not in inside or replaceable(v)]
        holder[:] = [unwrap(v) if id(v) in inside else v for v in kept]
    elif isinstance(holder, NESTED):
        return False
    elif hasattr(holder, "__dict__") and not isinstance(holder, type | ModuleType):
        return release(vars(holder), held)
    return True


def replaceable(value: Any) -> bool:
    """Whether the value of a proxy, or those of proxies in a tuple, can stand in its place."""
    fixed = type(value) in PROXIES or isinstance(value, tuple)
    return fixed and not any(isinstance(v, Tensor) and v.is_meta for v in iterate(unwrap(value)))


def class_of(holder: dict[Any, Any]) -> type | None:
    """The class whose attributes a dict holds: it has to be told of changes."""
    if "__module__" not in holder:
        return None
    return next((c for c in gc.get_referrers(holder) if isinstance(c, type) and vars(c).keys() == holder.keys()), None)


def is_namespace(holder: dict[Any, Any]) -> bool:
    """Whether a dict holds the variables of a module rather than entries of a table."""
    return "__name__" in holder and "__builtins__" in holder


def restore_functions(replaced: list[tuple[Callable[..., Any], Callable[..., Any]]]) -> None:
    """Put functions back where a module that was imported meanwhile has taken what stood in their place.

    Arguments: `replaced`, pairs of a function and what stood in its place; it is empty afterwards.
    """
    held: list[Any] = []
    functions: list[Any] = []
    while replaced:
        function, wrapper = replaced.pop()
        if sys.getrefcount(wrapper) > 2:  # that of this frame and that of the argument
            held.append(wrapper)
            functions.append(function)
    substitute(held, functions)


def substitute(old: list[Any], new: list[Any], depth: int = DEPTH) -> None:
    """Put objects in the places of others, in all containers that hold those; a tuple that does is itself replaced.

    The containers are asked for all at once, since that goes through everything there is.
    """
    by_id = dict(zip(map(id, old), new, strict=True))

    def instead(value: Any) -> Any:
        return by_id.get(id(value), value)

    fixed: list[Any] = []
    copies: list[Any] = []
    for holder in gc.get_referrers(*old) if old else ():
        kind: Any = type(holder)
        if holder is old:
            continue
        if kind is dict and any(id(k) in by_id for k in holder):
            items = [(instead(k), instead(v)) for k, v in holder.items()]
            holder.clear()
            holder.update(items)
        elif kind is dict:
            holder.update([(k, instead(v)) for k, v in holder.items() if id(v) in by_id])
        elif kind is list:
            holder[:] = map(instead, holder)
        elif kind is set:
            items = list(map(instead, holder))
            holder.clear()
            holder.update(items)
        elif kind in (tuple, frozenset) and depth:
            fixed.append(holder)
            copies.append(kind(map(instead, holder)))
        elif fields_of(kind) is not None and hasattr(holder, "__dict__"):  # an object whose attributes have no dict yet
            vars(holder).update([(k, instead(v)) for k, v in vars(holder).items() if id(v) in by_id])
    if fixed:
        substitute(fixed, copies, depth - 1)


def uncached(patches: Any, value: Any, put: Callable[[Any], None]) -> None:
    """Have a function compute what it would look up in its `functools.lru_cache`: a proxy is good for one capture."""
    function = getattr(value, "__func__", value)  # of a static method
    if type(function) is CACHED:
        plain = without_proxies(patches, function)
        put(plain if function is value else type(value)(plain))
        patches.undo.append(functools.partial(put, value))
        return
    for cell in getattr(function, "__closure__", None) or ():  # a decorator of the model's own around it
        try:
            inner = cell.cell_contents
        except ValueError:  # it is still empty
            continue
        if type(inner) is CACHED:
            cell.cell_contents = without_proxies(patches, inner)
            patches.undo.append(functools.partial(setattr, cell, "cell_contents", inner))


def without_proxies(patches: Any, function: Any) -> Callable[..., Any]:
    """A function that looks up and remembers nothing that is computed from proxies, or by a module, while it is traced."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        traced = patches.tracing() and any(type(v) in PROXIES or isinstance(v, nn.Module) for v in iterate((args, kwargs)))
        return (function.__wrapped__ if traced else function)(*args, **kwargs)

    patches.replaced.append((function, wrapper))
    return wrapper
