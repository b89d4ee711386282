"""What torch hides from a tracer, switched off for as long as it runs."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.passes.capture.patches import CACHED, CALLABLE, CHECKS, FACTORIES, TRANSFORMS, named_apply
from fxprune.passes.capture.proxy import ValueProxy, unwrap
from fxprune.passes.capture.training_flag import read_training
from fxprune.passes.errors import ReadsValue
from fxprune.passes.ir.pytree import iterate

if TYPE_CHECKING:
    from fxprune.passes.capture.tracer import ValueTracer


def handing_on(cells: int) -> types.CodeType:
    """The code of a `__getattr__` that asks the tracer; it takes the place of code that closes over so many variables."""
    code = (lambda module, name: module._traced_getattr(name)).__code__
    return code.replace(co_freevars=tuple(f"unused_{i}" for i in range(cells)))


@contextlib.contextmanager
def patched(tracer: ValueTracer) -> Iterator[None]:
    """Switch off what hides the program while tracing, and make factories and `apply` see proxies."""
    undo: list[Callable[[], None]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        old = vars(owner).get(name)
        setattr(owner, name, value)
        undo.append((lambda: setattr(owner, name, old)) if old is not None else (lambda: delattr(owner, name)))

    def factory(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if tracer.running is None and any(type(v) is ValueProxy for v in iterate((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return wrapper

    apply = next(vars(k)["apply"] for k in torch.autograd.Function.__mro__ if "apply" in vars(k))

    def traced_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if tracer.running is None and any(type(v) is ValueProxy for v in iterate((args, kwargs))):
            return tracer.create_proxy("call_function", named_apply(cls), args, kwargs)
        return apply.__get__(None, cls)(*args, **kwargs)

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*unwrap(args), **unwrap(kwargs))

    def checker(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if tracer.running is None:
                args, kwargs = unwrap(args), unwrap(kwargs)
                if any(isinstance(v, torch.Tensor) and v.is_meta for v in args):
                    return None  # there is nothing to check in a run without values
            return function(*args, **kwargs)

        return wrapper

    def opening(function: Callable[..., Any]) -> Callable[..., Any]:
        """What takes anything that says it is a tensor for one: `torch.vmap` and its like wrap the memory of a proxy."""

        def wrapper(*args: Any) -> Any:
            if any(type(v) is ValueProxy for v in args):
                raise ReadsValue(f"{function.__name__}()")
            return function(*args)

        return wrapper

    def batch_norm(*args: Any, **kwargs: Any) -> Any:
        """Without the room for what a GPU's training kernel notes, which the dispatcher would show as one more call."""
        if len(args) == 9 and type(args[0]) is torch.Tensor and args[0].is_meta:
            return torch.native_batch_norm(*args[:8])[0]
        return plain_batch_norm(*args, **kwargs)

    maths = {id(f): f for name, f in vars(math).items() if callable(f) and not name.startswith("_")}
    seen: set[object] = set()
    owners: set[type] = set()

    def look_at(module: nn.Module) -> None:
        """Functions of `math` see proxies, also where a module's file has imported them by name."""
        kind = module if "forward" in vars(module) else type(module)
        if kind in seen:
            return
        seen.add(kind)
        names = getattr(module.forward, "__globals__", {})
        for name, value in list(names.items()) if id(names) not in seen else ():
            if id(value) in maths and value is maths[id(value)]:
                names[name] = factory(value)
                undo.append(functools.partial(names.__setitem__, name, value))
            elif type(value) in CALLABLE:
                forgetful(value, functools.partial(names.__setitem__, name))
        seen.add(id(names))
        for owner in type(module).__mro__:
            if owner in owners or owner.__module__.startswith("torch."):
                continue
            owners.add(owner)
            for name, value in list(vars(owner).items()):
                if type(value) in CALLABLE:
                    forgetful(value, functools.partial(setattr, owner, name))

    def forgetful(value: Any, put: Callable[[Any], None]) -> None:
        """Have a function that remembers results (`functools.lru_cache`) forget them: a proxy is good for one trace only."""
        function = getattr(value, "__func__", value)  # of a static method
        if type(function) is CACHED:
            put(function.__wrapped__ if function is value else type(value)(function.__wrapped__))
            undo.append(functools.partial(put, value))
            return
        for cell in getattr(function, "__closure__", None) or ():  # a decorator of one's own around it
            try:
                inner = cell.cell_contents
            except ValueError:  # it is still empty
                continue
            if type(inner) is CACHED:
                cell.cell_contents = inner.__wrapped__
                undo.append(functools.partial(setattr, cell, "cell_contents", inner))

    def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        look_at(module)
        return tracer.call_module(module, functools.partial(plain_call, module), args, kwargs)

    def module_getattr(module: nn.Module, name: str) -> Any:
        number = tracer.plain.answer(module, name)
        if number is not None:
            return number
        value = plain_getattr(module, name)
        return tracer.getattr(name, value, {}) if tracer.running is None and isinstance(value, torch.Tensor) else value

    fast = torch.backends.mha.get_fastpath_enabled()
    functional: Any = F
    verify_batch_size = functional._verify_batch_size
    plain_batch_norm = torch.batch_norm
    plain_call = nn.Module._call_impl
    getter: Any = nn.Module.__getattr__
    plain_getattr = types.FunctionType(getter.__code__, getter.__globals__, getter.__name__, None, getter.__closure__)
    set_tracing = getattr(torch.fx._symbolic_trace, "_set_is_fx_tracing", None)  # what is_fx_tracing() answers by
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for name in FACTORIES:
            patch(torch, name, factory(getattr(torch, name)))
        for name in CHECKS:
            patch(torch, name, checker(getattr(torch, name)))
        for function in maths.values():
            patch(math, function.__name__, factory(function))
        for owner, name in TRANSFORMS:
            patch(owner, name, opening(getattr(owner, name)))
        patch(torch, "batch_norm", batch_norm)
        for name in ("finfo", "iinfo", "is_autocast_enabled", "get_autocast_dtype"):
            patch(torch, name, told(getattr(torch, name)))
        patch(torch.autocast, "__init__", told(torch.autocast.__init__))
        patch(torch.autograd.Function, "apply", classmethod(traced_apply))
        # one example may be too few for batch statistics; the shapes are all that matters here
        functional._verify_batch_size = lambda size: None
        mode = property(lambda m: read_training(tracer, m), lambda m, v: vars(m).__setitem__("training", v))
        patch(nn.Module, "training", mode)
        # Special methods stay: putting another in their place would have Python look through every subclass there is.
        patch(nn.Module, "_call_impl", module_call)  # what `__call__` comes to
        patch(nn.Module, "_traced_getattr", module_getattr)
        undo.append(functools.partial(setattr, getter, "__code__", getter.__code__))
        getter.__code__ = handing_on(len(getter.__closure__ or ()))
        look_at(tracer.root)
        if set_tracing is not None:
            set_tracing(True)
        yield
    finally:
        if set_tracing is not None:
            set_tracing(False)
        for restore in reversed(undo):
            restore()
        functional._verify_batch_size = verify_batch_size
        torch.backends.mha.set_fastpath_enabled(fast)
