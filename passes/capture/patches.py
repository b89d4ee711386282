"""Names of functions that hide the program from a tracer, and kernels that show it to the dispatcher."""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import functools
import inspect
import logging
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._higher_order_ops import utils as higher_order
from torch.overrides import BaseTorchFunctionMode

from fxprune.passes.capture.opaque import MAKING
from fxprune.passes.capture.proxy import unwrap
from fxprune.passes.errors import ReadsValue
from fxprune.passes.ir.program import (
    IS_GRAD_ENABLED,
    SET_GRAD_ENABLED,
    enter_autocast,
    exit_autocast,
    read_draws,
    seed_draws,
    write_draws,
)
from fxprune.passes.ir.pytree import record

VISIBLE = contextvars.ContextVar("visible", default=False)  # which a thread may take over from another one
LOCK = threading.RLock()  # what is replaced belongs to the process: one thread at a time
CACHED = type(functools.lru_cache(len))
NOT_MODELS = frozenset(["torch", "fxprune", *sys.stdlib_module_names])  # packages that hold no code of a model's
CALLABLE = (CACHED, types.FunctionType, staticmethod, classmethod)
CHECKS = [name for name in vars(torch) if name.startswith("_check") and callable(getattr(torch, name))]
# overloads with a leading Scalar take anything that says it is a Tensor for one, and read its memory
SCALARS = "where pow float_power remainder isin xlogy bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift"
FACTORIES = (*MAKING, *SCALARS.split(), "result_type")


BUILTINS: dict[int, str] = torch.jit._builtins._get_builtin_table()  # which torch makes of what is there when it is asked first


def not_a_models(names: dict[str, Any], packages: frozenset[str] = NOT_MODELS) -> bool:
    """Whether the variables of a file are those of a package that holds no code of a model's."""
    return str(names.get("__name__", "")).partition(".")[0] in packages


def see_grad_modes(patches: Any) -> None:
    """Regions with and without gradients (`no_grad`, `enable_grad`, `set_grad_enabled`) are nodes that read and set the mode.

    To leave out what gradients need, and to forbid them, are one for the gradients of what is outside: an `inference_mode`
    is a region without them.
    """
    kind = torch.inference_mode
    enter, leave = kind.__enter__, kind.__exit__

    def is_grad_enabled() -> Any:
        return patches.tracer.read_grad_mode() if patches.tracing() else IS_GRAD_ENABLED()

    def set_grad_enabled(mode: Any) -> None:
        if patches.tracing():
            patches.tracer.set_grad_mode(mode)
        else:
            SET_GRAD_ENABLED(mode)

    def entered(region: Any) -> None:
        if patches.tracing():
            region._inference_mode_context = is_grad_enabled()
            set_grad_enabled(not region.mode)
        else:
            enter(region)

    def left(region: Any, *error: Any) -> None:
        if patches.tracing():
            set_grad_enabled(vars(region).pop("_inference_mode_context"))
        else:
            leave(region, *error)

    patches.replaced += [(IS_GRAD_ENABLED, is_grad_enabled), (SET_GRAD_ENABLED, set_grad_enabled)]
    patches.patch(torch, "is_grad_enabled", is_grad_enabled)
    patches.patch(torch._C, "_set_grad_enabled", set_grad_enabled)
    patches.patch(kind, "__enter__", entered)
    patches.patch(kind, "__exit__", left)


def say_that_fx_traces(patches: Any) -> None:
    """Models ask whether they are traced; the answer is by thread."""
    set_tracing = getattr(torch.fx._symbolic_trace, "_set_is_fx_tracing", None)
    if set_tracing is not None:
        set_tracing(True)
        patches.undo.append(functools.partial(set_tracing, False))


def see_autocast(patches: Any) -> None:
    """Regions of autocast are nodes, as regions with and without gradients are."""
    kind = torch.autocast
    init, enter, leave = kind.__init__, kind.__enter__, kind.__exit__
    given = inspect.signature(init)

    def made(region: Any, *args: Any, **kwargs: Any) -> None:
        if patches.tracing():
            bound = given.bind(region, *args, **kwargs)
            bound.apply_defaults()
            region.fxprune_given = bound.args[1:]
            args, kwargs = unwrap(args), unwrap(kwargs)
        init(region, *args, **kwargs)

    def entered(region: Any) -> Any:
        if patches.tracing():
            asked = vars(region).get("fxprune_given") or (
                region.device,
                region.fast_dtype,
                region._enabled,
                region._cache_enabled,
            )
            region.fxprune_line = patches.tracer.note_region(enter_autocast, *asked)
            patches.tracer.casts |= region._enabled
        return enter(region)

    def left(region: Any, *error: Any) -> Any:
        if patches.tracing():
            patches.tracer.note_region(exit_autocast, vars(region).pop("fxprune_line"))
        return leave(region, *error)

    patches.patch(kind, "__init__", made)
    patches.patch(kind, "__enter__", entered)
    patches.patch(kind, "__exit__", left)


def see_random_state(patches: Any) -> None:
    """Seeds of torch's generators, and their states, are nodes, as what is drawn afterwards is."""
    kept: dict[int, tuple[Any, fx.Node]] = {}  # states, by identity

    def seeded(function: Any) -> Any:
        def wrapper(seed: Any) -> Any:
            if patches.tracing():
                patches.tracer.note_region(seed_draws, seed)
            return function(unwrap(seed))

        return wrapper

    def read(function: Any) -> Any:
        def wrapper(*device: Any, **named: Any) -> Any:
            state = function(*device, **named)
            if patches.tracing():
                where = () if function is plain["get_rng_state", torch] else (*device, *named.values()) or ("cuda",)
                kept[id(state)] = state, patches.tracer.note_region(read_draws, *where)
            return state

        return wrapper

    def written(function: Any) -> Any:
        def wrapper(new_state: Any, *device: Any, **named: Any) -> None:
            if patches.tracing():
                if id(new_state) not in kept:
                    raise ReadsValue("a state of random numbers from elsewhere")
                where = () if function is plain["set_rng_state", torch] else (*device, *named.values()) or ("cuda",)
                patches.tracer.note_region(write_draws, kept[id(new_state)][1], *where)
            function(new_state, *device, **named)

        return wrapper

    ways = {"manual_seed": seeded, "get_rng_state": read, "set_rng_state": written}
    plain = {(name, owner): getattr(owner, name) for name in ways for owner in (torch, torch.cuda)}
    for (name, owner), function in plain.items():
        if (name, owner) != ("manual_seed", torch.cuda):
            wrapper = patches.stand_ins[id(function)] = ways[name](function)
            patches.replaced.append((function, wrapper))
            for place in (owner, torch.random if owner is torch else owner):
                patches.patch(place, name, wrapper)


def see_messages(patches: Any) -> None:
    """A size that is written into a message decides nothing: the guards that its text has led to go again."""

    def taking(function: Any, level: int | None = None, *, paused: bool = True) -> Any:
        """A function that takes messages; as argument number `level`, which of its callers it is said to have.

        It is no step of the program, unless it has a stand-in of its own that is to see proxies: then nothing is `paused`.
        """

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if level is not None and len(args) > level:
                args = (*args[:level], args[level] + 1, *args[level + 1 :])
            elif level is not None:
                kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            if not patches.tracing():
                return function(*args, **kwargs)
            said = " ".join([a for a in (*args, *kwargs.values()) if type(a) is str])
            tracer = patches.tracer
            tracer.guards = [g for g in tracer.guards if g.how != "text" or str(g.value) not in said]
            with tracer.paused() if paused else contextlib.nullcontext():
                return function(*args, **kwargs)

        patches.stand_ins[id(function)] = wrapper
        patches.replaced.append((function, wrapper))
        return wrapper

    for name in ("_assert", *CHECKS):
        patches.patch(torch, name, taking(getattr(torch, name), paused=name not in CHECKS))
    patches.patch(builtins, "print", taking(print))
    patches.patch(warnings, "warn", taking(warnings.warn, 2))
    for name in ("debug", "info", "warning", "error"):
        patches.patch(logging.Logger, name, taking(getattr(logging.Logger, name), sys.maxsize))


def show_to_script(patches: Any) -> None:
    """`torch.jit.script` knows functions of torch by identity: what stands for one is that function to it."""
    for function, wrapper in patches.replaced:
        name = BUILTINS.get(id(function))
        if name is not None:
            BUILTINS[id(wrapper)] = name
            patches.undo.append(functools.partial(BUILTINS.pop, id(wrapper), None))


@contextlib.contextmanager
def plain_rnn(module: nn.Module) -> Iterator[None]:
    """Recurrent kernels of vendors hide their arithmetic from the dispatcher: use the decomposed ones."""
    if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield
        return
    with LOCK:
        # torch.backends.mkldnn.flags() sets other flags too, and warns of them
        mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        try:
            torch._C._set_mkldnn_enabled(False)
            torch._C._set_cudnn_enabled(False)
            yield
        finally:
            torch._C._set_mkldnn_enabled(mkldnn)
            torch._C._set_cudnn_enabled(cudnn)


class NamedFunction:
    """A function made of a class, under a name that generated code can refer to; it is pickled as that class."""

    def __init__(self, make: Callable[[type], NamedFunction], cls: type, name: str, run: Callable[..., Any]) -> None:
        self.make, self.cls, self.run, self.is_custom = make, cls, run, False
        self.__name__ = self.__qualname__ = name
        self.__module__ = outside_torch(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.make, (self.cls,)


class Vectorised:
    """What `torch.vmap` makes of a function, under a name that generated code can refer to; it is pickled with the function."""

    def __init__(self, function: Callable[..., Any], *how: Any) -> None:
        self.given = function, *how
        self.__name__ = self.__qualname__ = f"vmap_{getattr(function, '__name__', 'function').strip('<>')}"
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch._functorch.apis.vmap_impl(*self.given, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Vectorised, self.given


def named_apply(cls: type) -> NamedFunction:
    """A custom autograd function's `apply`."""
    made = NamedFunction(named_apply, cls, f"{cls.__name__}_apply", cls.apply)  # type: ignore[attr-defined]
    made.is_custom = True
    return made


def creating(cls: type) -> NamedFunction:
    """A function that creates an object of a class from the values of its attributes."""

    return NamedFunction(creating, cls, f"new_{cls.__name__}", lambda **attributes: record(cls, attributes))


def itself(cls: type) -> NamedFunction:
    """A function that returns a class, which an object may have as an attribute."""
    return NamedFunction(itself, cls, f"class_{cls.__name__}", lambda: cls)


def outside_torch(cls: type) -> str:
    """The module of a class; this one if it is torch's, where FX would look up whatever is said to be there."""
    return __name__ if cls.__module__.partition(".")[0] == "torch" else cls.__module__


@contextlib.contextmanager
def functions_as_they_are() -> Iterator[None]:
    """Have `torch.cond` and its like call the functions they are given, in this thread, instead of compiling them before.

    A compiler would compile the code of the mode that looks on, too.
    """
    plain, mine = getattr(higher_order, "_hop_compile_and_call", None), threading.get_ident()

    def call(function: Callable[..., Any], args: Any, kwargs: Any = None) -> Any:
        if plain is None or threading.get_ident() == mine:
            return function(*args, **(kwargs or {}))
        return plain(function, args, kwargs)

    if plain is not None:  # other versions of torch compile elsewhere
        higher_order._hop_compile_and_call = call
    try:
        yield
    finally:
        if plain is not None:
            higher_order._hop_compile_and_call = plain


FUSED = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
)  # which take a fused path if no mode is there


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """Run attention and recurrent layers by ops that the dispatcher shows, instead of fused kernels, in this context."""

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not VISIBLE.get():
            return nn.Module.__call__(module, *args, **kwargs)
        with plain_rnn(module), BaseTorchFunctionMode() if isinstance(module, FUSED) else contextlib.nullcontext():
            return nn.Module.__call__(module, *args, **kwargs)

    with LOCK, functions_as_they_are():
        before = {kind: vars(kind).get("__call__") for kind in (nn.RNNBase, nn.RNNCellBase, *FUSED)}
        token = VISIBLE.set(True)
        try:
            for kind in before:
                kind.__call__ = called  # type: ignore[method-assign]
            yield
        finally:
            for kind, call in before.items():
                if call is None:
                    del kind.__call__  # back to that of nn.Module
                else:
                    kind.__call__ = call  # type: ignore[method-assign]
            VISIBLE.reset(token)
