"""Names of functions that hide the program from a tracer, and kernels that show it to the dispatcher."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

CACHED = type(functools.lru_cache(len))
CALLABLE = (CACHED, types.FunctionType, staticmethod, classmethod)
TRANSFORMS = ((torch._functorch.vmap, "_add_batch_dim"), (torch._functorch.eager_transforms, "_wrap_for_grad"))
CHECKS = [name for name in vars(torch) if name.startswith("_check") and callable(getattr(torch, name))]
FACTORIES = (
    "zeros ones full empty arange linspace logspace eye rand randn randint randperm tensor as_tensor range"
    " tril_indices triu_indices hann_window"
    # overloads with a leading Scalar take anything that says it is a Tensor for one, and read its memory
    " where pow float_power remainder isin xlogy bitwise_and bitwise_or bitwise_xor bitwise_left_shift"
    " bitwise_right_shift result_type"
).split()


@contextlib.contextmanager
def plain_rnn(module: nn.Module) -> Iterator[None]:
    """Recurrent kernels of vendors hide their arithmetic from the dispatcher: use the decomposed ones."""
    if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield
        return
    # torch.backends.mkldnn.flags() sets other flags too, and warns of them
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)


def named_apply(cls: type) -> Callable[..., Any]:
    """A custom autograd function's `apply` under a name that generated code can refer to."""

    def applied(*args: Any) -> Any:
        return cls.apply(*args)  # type: ignore[attr-defined]

    applied.__name__ = applied.__qualname__ = f"{cls.__name__}_apply"
    applied.__module__ = cls.__module__
    return applied


@contextlib.contextmanager
def visible() -> Iterator[None]:
    """Run attention and recurrent layers by ops that the dispatcher shows, instead of fused kernels."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)

    def plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with plain_rnn(module):
            return nn.Module.__call__(module, *args, **kwargs)

    try:
        nn.RNNBase.__call__ = nn.RNNCellBase.__call__ = plain  # type: ignore[method-assign]
        yield
    finally:
        del nn.RNNBase.__call__, nn.RNNCellBase.__call__  # back to that of nn.Module
        torch.backends.mha.set_fastpath_enabled(fast)
