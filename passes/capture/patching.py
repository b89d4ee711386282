"""What hides the program from a tracer, switched off while it runs."""

from __future__ import annotations

import functools
import math
import sys
import threading
import types
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.passes.capture.conversions import (
    STAND_INS,
    STANDS_FOR_TORCH,
    compares_dtypes,
    constructed,
    legacy,
    see_mode_questions,
    see_numpy,
    see_questions,
)
from fxprune.passes.capture.leftovers import restore_functions, uncached
from fxprune.passes.capture.modules import keep_backward_hooks, see_modules, see_moves, see_own_calls
from fxprune.passes.capture.patches import (
    CALLABLE,
    CHECKS,
    FACTORIES,
    LOCK,
    NOT_MODELS,
    Vectorised,
    named_apply,
    not_a_models,
    say_that_fx_traces,
    see_autocast,
    see_grad_modes,
    see_messages,
    see_random_state,
    show_to_script,
)
from fxprune.passes.capture.proxy import PROXIES, unwrap
from fxprune.passes.capture.tracer import ValueTracer
from fxprune.passes.ir.pytree import iterate

ATTENTION = F.scaled_dot_product_attention  # which wants a plain flag before it looks for proxies
NOT_LOOKED_INTO = NOT_MODELS | {"numpy"}  # which computes on arrays; what it makes of sizes, `see_numpy` says
FOLLOWED = frozenset([*CALLABLE, types.ModuleType])
CONTEXT_FUNCTIONS = ("finfo", "iinfo", "is_autocast_enabled", "get_autocast_dtype")


class Patches:
    """Replaces functions for as long as a tracer runs, in its thread alone: others get what they would have got.

    Arguments:
        tracer: which is to see what the functions are called with.
    """

    def __init__(self, tracer: ValueTracer) -> None:
        self.tracer, self.thread = tracer, threading.get_ident()
        self.undo: list[Callable[[], None]] = []
        self.replaced: list[tuple[Callable[..., Any], Callable[..., Any]]] = []
        self.active = True
        self.imported = len(sys.modules)
        self.maths = {id(f): f for name, f in vars(math).items() if callable(f) and not name.startswith("_")}
        self.nodes = self.maths | {id(f): f for f in (*tracer.evaluator.functions, ATTENTION)}
        self.seen, self.owners = set[object](), set[type]()
        self.stand_ins, self.shadows = dict(STAND_INS), dict[str, Any]()

    def __enter__(self) -> None:
        LOCK.acquire()
        try:
            for patch in PATCHES:
                patch(self)
            for module in self.tracer.paths:
                self.look_at(module)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for restore in reversed(self.undo):
                restore()
            self.undo.clear()
        finally:
            self.active = False
            LOCK.release()
        del self.tracer
        if len(sys.modules) != self.imported:
            restore_functions(self.replaced)
        for held in (self.replaced, self.stand_ins, self.shadows):  # functions that refer to this
            held.clear()

    # -- how a function is replaced ---------------------------------------------------------------------------------

    def patch(self, owner: Any, name: str, value: Any) -> None:
        old = vars(owner).get(name)
        setattr(owner, name, value)
        self.undo.append(functools.partial(setattr, owner, name, old) if old is not None else lambda: delattr(owner, name))

    def tracing(self) -> bool:
        """Whether code of the model's is being traced, in this thread, rather than evaluated."""
        return self.active and threading.get_ident() == self.thread and self.tracer.recorder.tracing

    def seeing_proxies(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that becomes a node where it is given a proxy."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.tracing() and any(type(v) in PROXIES for v in iterate((args, kwargs))):
                return self.tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        self.replaced.append((function, wrapper))
        return wrapper

    def given_values(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is given the values of proxies."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*unwrap(args), **unwrap(kwargs)) if self.tracing() else function(*args, **kwargs)

        self.replaced.append((function, wrapper))
        return wrapper

    # -- functions of torch -----------------------------------------------------------------------------------------

    def factories(self) -> None:
        """Factories take sizes, which torch would convert to plain integers."""
        for name in FACTORIES:
            self.patch(torch, name, self.seeing_proxies(getattr(torch, name)))

    def constructors(self) -> None:
        """`torch.Tensor(3, n)` and `torch.LongTensor([n])` take sizes, which they would read as something else."""

        def construct(kind: Any, args: Any, kwargs: Any) -> Any:
            if self.tracing() and any(type(v) in PROXIES for v in iterate(args)):
                return self.tracer.create_proxy(*legacy(kind, args, kwargs))
            return constructed(kind, args, kwargs)

        vars(STANDS_FOR_TORCH)["construct"] = construct
        self.undo.append(functools.partial(vars(STANDS_FOR_TORCH).__setitem__, "construct", constructed))

    def arithmetic(self) -> None:
        """Functions of `math` take sizes, which they would convert to plain floats"""
        for function in self.maths.values():
            self.patch(math, function.__name__, self.seeing_proxies(function))

    def checks(self) -> None:
        """`torch._check` and `torch.distributions` read conditions; in a run without values there is none to read."""

        def checker(function: Callable[..., Any], held: Any = None) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if self.tracing():
                    args, kwargs = unwrap(args), unwrap(kwargs)
                    if any(isinstance(v, torch.Tensor) and v.is_meta for v in args):
                        return held
                return function(*args, **kwargs)

            return wrapper

        for name in ("_is_all_true", *CHECKS):
            self.patch(torch, name, checker(getattr(torch, name), True if name == "_is_all_true" else None))

    def contexts(self) -> None:
        """What depends on a dtype or device alone is no step of the program."""
        for name in CONTEXT_FUNCTIONS:
            self.patch(torch, name, self.given_values(getattr(torch, name)))

    def custom_functions(self) -> None:
        """A custom autograd function is one node, which keeps its backward.

        Its `apply` may have been stored anywhere; it looks `forward` up in the class, which asks the metaclass first.
        """

        def forward(cls: Any) -> Any:
            plain = next(vars(k)["forward"] for k in cls.__mro__ if "forward" in vars(k)).__get__(None, cls)
            if not self.tracing():
                return plain
            given_context = not torch.autograd.function._is_setup_context_defined(cls.setup_context)

            def instead(*args: Any, **kwargs: Any) -> Any:
                if any(type(v) in PROXIES for v in iterate((args, kwargs))):
                    args = args[1:] if given_context else args
                    return self.tracer.create_proxy("call_function", named_apply(cls), args, kwargs)
                return plain(*args, **kwargs)

            return instead

        def assign(cls: Any, value: Any) -> None:
            del meta.forward
            try:
                cls.forward = value
            finally:
                meta.forward = found

        meta: Any = torch.autograd.function.FunctionMeta
        found = property(forward, assign)
        self.patch(meta, "forward", found)

    def vectorised_functions(self) -> None:
        """A function that `torch.vmap` vectorises is one node: the tensors that it is handed are no proxies."""
        plain = torch._functorch.apis.vmap_impl

        def vmap_impl(function: Callable[..., Any], *given: Any, **kwargs: Any) -> Any:
            if not self.tracing() or not any(type(v) in PROXIES for v in iterate((given, kwargs))):
                return plain(function, *given, **kwargs)
            begin = len(self.tracer.recorder.op_trace.ops)
            target = Vectorised(function, *given[:4])
            made = self.tracer.create_proxy("call_function", target, given[4:], kwargs)
            self.tracer.recorder.refuse_own(begin)  # which the program would not cut
            return made

        self.patch(torch._functorch.apis, "vmap_impl", vmap_impl)

    def batch_statistics(self) -> None:
        """One example may be too few for batch statistics; and what a GPU's kernel saves would be one more call."""
        plain, verify = torch.batch_norm, vars(F)["_verify_batch_size"]

        def batch_norm(*args: Any, **kwargs: Any) -> Any:
            mine = threading.get_ident() == self.thread
            if mine and len(args) == 9 and type(args[0]) is torch.Tensor and args[0].is_meta:
                return torch.native_batch_norm(*args[:8])[0]
            return plain(*args, **kwargs)

        self.patch(torch, "batch_norm", batch_norm)
        self.patch(F, "_verify_batch_size", lambda size: None if threading.get_ident() == self.thread else verify(size))

    def attention(self) -> None:
        """A function that is traced through has to run on after its check for overridden arguments, which led to the tracer."""
        check = vars(F)["has_torch_function"]

        def has_torch_function(args: Any) -> bool:
            if not self.tracing():
                return bool(check(args))
            inlining, self.tracer.inlining = self.tracer.inlining, False
            return not inlining and bool(check(args))

        self.patch(F, "has_torch_function", has_torch_function)
        self.patch(F, ATTENTION.__name__, self.seeing_proxies(ATTENTION))

    # -- modules ----------------------------------------------------------------------------------------------------

    def look_at(self, module: nn.Module) -> None:
        """Functions of `math`, and those that are one node, see proxies wherever a file has them; caches hold none."""
        kind = module if "forward" in vars(module) else type(module)
        if kind in self.seen:
            return
        self.seen.add(kind)
        self.look_into(getattr(module.forward, "__globals__", {}))
        for owner in type(module).__mro__:
            if owner in self.owners or owner.__module__.startswith("torch."):
                continue
            self.owners.add(owner)
            for name, value in list(vars(owner).items()):
                if type(value) in CALLABLE:
                    uncached(self, value, functools.partial(setattr, owner, name))
                    self.look_into(getattr(value, "__globals__", {}))

    def look_into(self, names: dict[str, Any]) -> None:
        """The variables of a file, of the files whose functions it has, and of modules that it or one of these imports."""
        pending, known = [(names, 0)], self.nodes.keys() | self.stand_ins.keys()
        while pending:
            names, steps = pending.pop()
            if id(names) in self.seen or not_a_models(names, NOT_LOOKED_INTO):
                continue
            self.seen.add(id(names))
            self.shadow(names)
            for name, value in [item for item in names.items() if type(item[1]) in FOLLOWED or id(item[1]) in known]:
                kind = type(value)
                if id(value) in self.nodes and value is self.nodes[id(value)]:
                    names[name] = self.seeing_proxies(value)
                    self.undo.append(functools.partial(names.__setitem__, name, value))
                elif (stand_in := self.stand_ins.get(id(value))) is not None:
                    names[name] = stand_in
                    self.undo.append(functools.partial(names.__setitem__, name, value))
                elif kind in CALLABLE:
                    if kind is not types.FunctionType or value.__closure__:
                        uncached(self, value, functools.partial(names.__setitem__, name))
                    pending.append((getattr(getattr(value, "__wrapped__", value), "__globals__", names), steps + 1))
                elif kind is types.ModuleType and steps < 2:
                    pending.append((vars(value), 2))

    def shadow(self, names: dict[str, Any]) -> None:
        """Put what stands in place of functions of Python's own into a file that has none of these names."""
        if not self.tracer.conversions.compare_dtypes and isinstance(path := names.get("__file__"), str):
            self.tracer.conversions.compare_dtypes = compares_dtypes(path)
        for name in self.shadows.keys() - names.keys():
            names[name] = self.shadows[name]
            self.undo.append(functools.partial(names.pop, name, None))


PATCHES: list[Callable[[Patches], None]] = [
    Patches.factories,
    Patches.constructors,
    Patches.arithmetic,
    Patches.checks,
    Patches.contexts,
    Patches.custom_functions,
    Patches.vectorised_functions,
    Patches.batch_statistics,
    Patches.attention,
    see_modules,
    see_moves,
    say_that_fx_traces,
    see_own_calls,
    keep_backward_hooks,
    see_grad_modes,
    see_autocast,
    see_questions,
    see_mode_questions,
    see_numpy,
    see_messages,
    see_random_state,
    show_to_script,
]
