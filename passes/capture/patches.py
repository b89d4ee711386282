"""Names of functions that hide the program from a tracer, and kernels that show it to the dispatcher."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

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


def not_a_models(names: dict[str, Any]) -> bool:
    """Whether the variables of a file are those of a package that holds no code of a model's."""
    return str(names.get("__name__", "")).partition(".")[0] in NOT_MODELS


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
        self.make, self.cls, self.run = make, cls, run
        self.__name__ = self.__qualname__ = name
        self.__module__ = outside_torch(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.make, (self.cls,)


def named_apply(cls: type) -> NamedFunction:
    """A custom autograd function's `apply`."""
    return NamedFunction(named_apply, cls, f"{cls.__name__}_apply", cls.apply)  # type: ignore[attr-defined]


def creating(cls: type) -> NamedFunction:
    """A function that creates an object of a class from the values of its attributes."""

    def created(**attributes: Any) -> Any:
        made: Any = object.__new__(cls)
        for name, value in attributes.items():
            object.__setattr__(made, name, value)
        return made

    return NamedFunction(creating, cls, f"new_{cls.__name__}", created)


def outside_torch(cls: type) -> str:
    """The module of a class; this one if it is torch's, where FX would look up whatever is said to be there."""
    return __name__ if cls.__module__.partition(".")[0] == "torch" else cls.__module__


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """Run attention and recurrent layers by ops that the dispatcher shows, instead of fused kernels, in this thread.

    Layers of attention take no fused path while functions of torch are overridden, as they are by any mode.
    """
    thread = threading.get_ident()

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return nn.Module.__call__(module, *args, **kwargs)
        with plain_rnn(module):
            return nn.Module.__call__(module, *args, **kwargs)

    with LOCK, BaseTorchFunctionMode():
        before = {kind: vars(kind).get("__call__") for kind in (nn.RNNBase, nn.RNNCellBase)}
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
