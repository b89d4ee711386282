"""Names of functions that hide the program from a tracer, and kernels that show it to the dispatcher."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops import utils as higher_order
from torch.overrides import BaseTorchFunctionMode

from fxprune.passes.capture.proxy import PROXIES, unwrap
from fxprune.passes.ir.program import IS_GRAD_ENABLED, SET_GRAD_ENABLED, enter_autocast, exit_autocast
from fxprune.passes.ir.pytree import record

VISIBLE = contextvars.ContextVar("visible", default=False)  # which a thread may take over from another one
LOCK = threading.RLock()  # what is replaced belongs to the process: one thread at a time
CACHED = type(functools.lru_cache(len))
NOT_MODELS = frozenset(["torch", "fxprune", *sys.stdlib_module_names])  # packages that hold no code of a model's
CALLABLE = (CACHED, types.FunctionType, staticmethod, classmethod)
CHECKS = [name for name in vars(torch) if name.startswith("_check") and callable(getattr(torch, name))]
FACTORIES = (
    "zeros ones full empty arange linspace logspace eye rand randn randint randperm tensor as_tensor range"
    " tril_indices triu_indices hann_window"
    # overloads with a leading Scalar take anything that says it is a Tensor for one, and read its memory
    " where pow float_power remainder isin xlogy bitwise_and bitwise_or bitwise_xor bitwise_left_shift"
    " bitwise_right_shift result_type"
).split()


empty, tensor = torch.empty, torch.tensor  # the originals: a capture replaces factories of torch
LEGACY = {name: kind for name, kind in vars(torch).items() if type(kind) is type(torch.FloatTensor)}


def legacy(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """What a call of a tensor's class comes to, as the parts of a node: its arguments are sizes, or data, or a tensor."""
    dtype = torch.get_default_dtype() if kind is torch.Tensor else kind.dtype
    data = args[0] if len(args) == 1 else None
    if isinstance(data, torch.Tensor):
        return "call_method", "detach", args, {}
    shape = isinstance(data, torch.Size) or isinstance(getattr(data, "value", None), torch.Size)  # of another tensor
    if isinstance(data, list | tuple) and not shape:
        return "call_function", tensor, args, kwargs | {"dtype": dtype}
    return "call_function", empty, (data if shape else tuple(args),), kwargs | {"dtype": dtype}


class TensorClass(type(torch.Tensor)):  # type: ignore[misc]
    """The class of what stands for `torch.Tensor` in files of the model's while it is traced, to see what it is called with."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return STANDS_FOR_TORCH.construct(torch.Tensor, args, kwargs)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch.Tensor)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is torch.Tensor

    def __hash__(cls) -> int:
        return hash(torch.Tensor)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, torch.Tensor)


class LegacyType(str):
    """Stands for a class such as `torch.LongTensor`; C++ takes such a class by its name, too."""

    kind: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return STANDS_FOR_TORCH.construct(self.kind, args, kwargs)

    def __instancecheck__(self, value: object) -> bool:
        """A tensor is of such a class by its dtype and device, of which a capture without values has another."""
        if type(value) in PROXIES:
            return isinstance(value, torch.Tensor) and value.dtype == self.kind.dtype and str(value.device) == "cpu"
        return isinstance(value, self.kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(LEGACY[self.rpartition(".")[2]], name)


class TorchModule(types.ModuleType):
    """Stands for `torch` in files of the model's while it is traced: only its classes of tensors are others.

    Attributes:
        construct: creates a tensor of such a class from the arguments of a call.
    """

    construct: Callable[[Any, Any, Any], Any]

    def __init__(self) -> None:
        super().__init__("torch")
        held = vars(self)
        held["construct"] = constructed
        held["Tensor"] = TensorClass("Tensor", (torch.Tensor,), {"__module__": "torch"})
        for name, kind in LEGACY.items():
            held[name] = made = LegacyType(f"torch.{name}")
            made.kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(torch, name, value)


def constructed(kind: Any, args: Any, kwargs: Any) -> Any:
    return kind(*args, **kwargs)


STANDS_FOR_TORCH = TorchModule()
STAND_INS: dict[int, Any] = {id(torch): STANDS_FOR_TORCH, id(torch.Tensor): STANDS_FOR_TORCH.Tensor}
STAND_INS |= {id(kind): vars(STANDS_FOR_TORCH)[name] for name, kind in LEGACY.items()}


BUILTINS: dict[int, str] = torch.jit._builtins._get_builtin_table()  # which torch makes of what is there when it is asked first


def not_a_models(names: dict[str, Any]) -> bool:
    """Whether the variables of a file are those of a package that holds no code of a model's."""
    return str(names.get("__name__", "")).partition(".")[0] in NOT_MODELS


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
        return enter(region)

    def left(region: Any, *error: Any) -> Any:
        if patches.tracing():
            patches.tracer.note_region(exit_autocast, vars(region).pop("fxprune_line"))
        return leave(region, *error)

    patches.patch(kind, "__init__", made)
    patches.patch(kind, "__enter__", entered)
    patches.patch(kind, "__exit__", left)


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


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """Run attention and recurrent layers by ops that the dispatcher shows, instead of fused kernels, in this context.

    Layers of attention take no fused path while functions of torch are overridden, as they are by any mode.
    """

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not VISIBLE.get():
            return nn.Module.__call__(module, *args, **kwargs)
        with plain_rnn(module):
            return nn.Module.__call__(module, *args, **kwargs)

    with LOCK, BaseTorchFunctionMode(), functions_as_they_are():
        before = {kind: vars(kind).get("__call__") for kind in (nn.RNNBase, nn.RNNCellBase)}
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
