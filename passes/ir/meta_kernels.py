"""Results of ops on the meta device, without the general meta kernels, many of which are written in Python and slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves as flat
from torch.utils._pytree import tree_map_only

from fxprune.passes.ir.module_tree import META, NOTHING, PLAIN_TENSORS, empty, empty_strided, like
from fxprune.passes.ir.pytree import ATOMS

aten = torch.ops.aten

ELEMENTWISE = frozenset(
    f"aten::{name}"
    for name in [
        *("relu hardtanh hardswish hardsigmoid silu gelu sigmoid tanh leaky_relu elu mish softplus selu".split()),
        *("add sub mul div maximum minimum _softmax _log_softmax".split()),
    ]
)
REDUCTIONS = frozenset(["aten::mean", "aten::sum", "aten::amax", "aten::amin"])
PRODUCTS = {"mm": (0, 2), "bmm": (0, 3), "addmm": (1, 2)}  # which argument is the first factor, and the rank of both
SHAPED = frozenset(f"aten::{name}" for name in ("convolution", "cat", "_grouped_mm", "clone", "roll", *PRODUCTS))
COMPARISONS = frozenset(f"aten::{name}" for name in "eq ne lt le gt ge".split())
LAYER_NORM = torch.ops.aten.native_layer_norm.default
NORMS = frozenset(["aten::native_batch_norm", "aten::native_layer_norm", "aten::native_group_norm"])
# in-place ops that change a tensor's shape rather than its contents: the tensor becomes another value
RESHAPING = frozenset(
    f"aten::{name}_" for name in "transpose t squeeze unsqueeze swapaxes swapdims as_strided resize resize_as set".split()
)
# the same view by way of the tensor's method, which has less to look through
VIEWS: dict[Any, Callable[..., Tensor]] = {
    aten.view.default: Tensor.view,
    aten._unsafe_view.default: Tensor.view,
    aten.permute.default: Tensor.permute,
    aten.expand.default: Tensor.expand,
    aten.transpose.int: Tensor.transpose,
    aten.t.default: Tensor.t,
    aten.select.int: Tensor.select,
    aten.unsqueeze.default: Tensor.unsqueeze,
    aten.squeeze.dim: Tensor.squeeze,
    aten.detach.default: Tensor.detach,
}


class MetaKernels:
    """Results of ops on the meta device, where a shape says all there is to say.

    The general meta kernels are Python, and slow. Here (1) what writes a tensor in place returns it; (2) arithmetic,
    activations and norms of floating tensors of one form keep it; (3) shapes of convolutions, products, reductions and `cat`
    are computed, and views are asked of the tensor; (4) any other pure op is run once for each shape, stride and dtype of its
    arguments. Anything else gets no answer, and what does not fit none here: torch says what is wrong.
    """

    def __init__(self) -> None:
        self.kinds: dict[Any, str] = {}
        self.known: dict[Any, Any] = {}

    def classify(self, func: Any) -> str:
        """What may be assumed of an op, by its schema."""
        schema = getattr(func, "_schema", None)
        if schema is None:
            return ""
        if schema.name in NORMS:
            return "norm"
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        named = schema.name.endswith("_") and not schema.name.endswith("__") and schema.name not in RESHAPING
        if named and written[0] and sum(written) == 1 and len(schema.returns) == 1:
            return "in place"
        if func in VIEWS:
            return "view"
        if schema.name == "aten::empty" and schema.overload_name == "memory_format":
            return "empty"
        if schema.name == "aten::scaled_dot_product_attention":
            return "attention"
        if schema.name in SHAPED and schema.overload_name in ("", "default"):
            return schema.name.removeprefix("aten::")
        if schema.name in REDUCTIONS and schema.overload_name in ("dim", "dim_IntList", ""):
            return "reduction"
        if schema.name in ELEMENTWISE:
            return "elementwise"
        if schema.name in COMPARISONS and schema.overload_name == "Scalar":
            return "comparison"
        if schema.name in ("aten::masked_fill", "aten::index"):
            return schema.name.removeprefix("aten::")
        pure = not schema.is_mutable and not any(r.alias_info for r in schema.returns)
        return "pure" if pure and all(str(r.type) == "Tensor" for r in schema.returns) else ""

    def result(self, func: Any, args: Any, kwargs: Any) -> Any:
        kind = self.kinds.get(func)
        if kind is None:
            kind = self.kinds[func] = self.classify(func)
        if not kind or not args:
            return None
        if kind == "empty" and len(args) == 1 and str(kwargs.get("device")) == "meta":
            return empty(args[0], dtype=kwargs.get("dtype"), device=META)
        if kind == "cat" and not kwargs:
            return joined(*args)
        first = args[0]
        if not isinstance(first, Tensor) or not first.is_meta:
            return None
        if kind == "view":
            return VIEWS[func](*args, **kwargs)
        if kind in PRODUCTS and not kwargs:
            added, ndim = PRODUCTS[kind]
            return multiplied(args[added:], args[:added], ndim)
        if kind == "_grouped_mm" and (shape := multiplied_in_runs(*args, **kwargs)) is not None:
            return empty(shape, dtype=first.dtype, device=META)
        if kind == "attention" and (shape := attended(*args, **kwargs)) is not None:
            return empty(shape, dtype=first.dtype, device=META)
        if kind == "norm":  # the statistics that it also returns are for training kernels, and have no readers
            return normalised(func, first), NOTHING.detach(), NOTHING.detach()
        if kind == "in place":
            return first
        if kind == "elementwise" and first.is_floating_point() and not any(isinstance(v, Tensor) for v in kwargs.values()):
            others = [a for a in args[1:] if type(a) not in ATOMS and isinstance(a, Tensor)]
            if not others:
                return like(first)
            widest = max([first, *others], key=Tensor.numel)
            form = (widest.shape, widest.stride(), widest.dtype)
            if all((a.shape, a.stride(), a.dtype) == form or narrower(a, widest) for a in (first, *others)):
                return like(widest)
            if len(others) == 1 and (shape := crossed(first, *others)) is not None:
                return empty(shape, dtype=first.dtype, device=META)
        if kind in FORMS and first.layout is torch.strided and (sizes := FORMS[kind](*args, **kwargs)) is not None:
            return empty(sizes, dtype=torch.bool if kind == "comparison" else first.dtype, device=META)
        if kind == "convolution":
            shape = convolved(*args)
            return empty(shape, dtype=first.dtype, device=META) if first.is_contiguous() else func(*args)
        if kind == "reduction" and not kwargs and len(args) > 1 and first.is_contiguous() and first.is_floating_point():
            left = reduced(*args)
            return None if left is None else empty(left, dtype=first.dtype, device=META)
        key = (func, signature(args), signature(kwargs)) if kwargs else (func, signature(args))
        if None in key:
            return None
        made = self.known.get(key)
        if made is None:
            out = func(*args, **kwargs)
            several = isinstance(out, tuple)
            outs = out if several else (out,)
            if all(isinstance(t, Tensor) and t.is_meta and t.layout is torch.strided for t in outs):
                self.known[key] = (several, [(t.shape, t.stride(), t.dtype) for t in outs])
            return out
        several, forms = made
        made_now = [empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in forms]
        return tuple(made_now) if several else made_now[0]

    def ran(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an op returns that is run; a pure one of meta tensors and others is run on meta, which torch itself refuses."""
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            given = [t for t in flat((args, kwargs)) if isinstance(t, Tensor)]
            schema = getattr(func, "_schema", None)
            if schema is None or schema.is_mutable or len({t.is_meta for t in given}) < 2:
                raise
            moved = tree_map_only(Tensor, lambda t: t if t.is_meta else like(t), (args, kwargs))
            return func(*moved[0], **moved[1])


def multiplied(factors: Sequence[Tensor], added: Sequence[Tensor], ndim: int) -> Tensor | None:
    """The result of a product of two (stacks of) matrices, to which a row may be added; None where they do not fit."""
    a, b = factors
    if a.dim() != ndim or b.dim() != ndim or not all(t.is_meta for t in (a, b, *added)):
        return None
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2] or a.dtype != b.dtype:
        return None
    if any(t.dim() != 1 or t.shape[0] != b.shape[-1] or t.dtype != a.dtype for t in added):
        return None
    return empty([*a.shape[:-1], b.shape[-1]], dtype=a.dtype, device=META)


def normalised(func: Any, x: Tensor) -> Tensor:
    """The result of a norm: contiguous; with channels last where the input is so, but for layer norms."""
    lasting = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    kept = lasting is not None and func is not LAYER_NORM and x.is_contiguous(memory_format=lasting)
    return like(x) if kept or x.is_contiguous() else empty(x.shape, dtype=x.dtype, device=META)


def multiplied_in_runs(a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> list[int] | None:
    """The shape of a product in runs that end at `offs`, of which torch's own kernel on meta refuses all but bfloat16."""
    if not b.is_meta or a.shape[-1] != b.shape[-2] or a.dtype != b.dtype or bias is not None or out_dtype is not None:
        return None
    stacks = [len(offs)] if a.dim() == b.dim() == 2 else [len(a)] if a.dim() == b.dim() else []
    return [*stacks, a.shape[-2], b.shape[-1]]


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> list[int] | None:
    """The shape of scaled dot product attention; None where arguments, named as the op's, are broadcast or do not fit.

    The mask may be on another device: nothing here depends on its contents.
    """
    ndim, batch = query.dim(), query.shape[:-2]
    if ndim < 3 or not query.is_floating_point() or not query.numel() or not key.numel():
        return None
    if not all(t.is_meta and t.dim() == ndim and t.dtype == query.dtype for t in (key, value)):
        return None
    if value.shape[:-1] != key.shape[:-1] or key.shape[-1] != query.shape[-1]:
        return None
    grouped = enable_gqa and ndim > 3 and key.shape[:-3] == batch[:-1] and batch[-1] % key.shape[-3] == 0
    if not (grouped or key.shape[:-2] == batch):
        return None
    if attn_mask is not None:
        wanted = (*query.shape[:-1], key.shape[-2])
        sizes = (1,) * (ndim - attn_mask.dim()) + tuple(attn_mask.shape)
        fits = len(sizes) == ndim and all(n in (1, m) for n, m in zip(sizes, wanted, strict=True))
        if is_causal or not fits or attn_mask.dtype not in (torch.bool, query.dtype):
            return None
    return [*query.shape[:-1], value.shape[-1]]


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """The result of `cat` for meta tensors of one dtype and rank; None where channels may be last in memory."""
    if not tensors or not -tensors[0].dim() <= dim < tensors[0].dim():
        return None  # torch says what is wrong
    first = tensors[0]
    if not all(t.is_meta and t.dtype == first.dtype and t.dim() == first.dim() > 1 and in_order(t) for t in tensors):
        return None
    dim %= first.dim()
    others = [*first.shape[:dim], *first.shape[dim + 1 :]]
    if any([*t.shape[:dim], *t.shape[dim + 1 :]] != others for t in tensors):
        return None
    shape = [*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]]
    return empty(shape, dtype=first.dtype, device=META)


def in_order(x: Tensor) -> bool:
    return x.is_contiguous() or (x.layout is torch.strided and (x.dim() not in (4, 5) or x.stride(1) > x.stride(-1)))


def narrower(a: Tensor, b: Tensor) -> bool:
    """Whether `a` is broadcast to the shape of `b`, which is contiguous, so that the result is as `b` is."""
    sizes = (1,) * (b.dim() - a.dim()) + tuple(a.shape)
    fits = len(sizes) == b.dim() and all(n in (1, m) for n, m in zip(sizes, b.shape, strict=True))
    return fits and a.dtype == b.dtype and b.is_contiguous()


def crossed(a: Tensor, b: Tensor) -> list[int] | None:
    """The shape of the result where each of two contiguous tensors is broadcast along dimensions of the other."""
    if not (b.is_meta and a.dtype == b.dtype and a.dim() == b.dim() and a.is_contiguous() and b.is_contiguous()):
        return None
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    fits = all(n in (1, m) for t in (a, b) for n, m in zip(t.shape, shape, strict=True))
    return shape if fits and min(shape, default=1) > 1 else None  # the stride of a single entry is anything


def copied(x: Tensor, memory_format: Any = torch.preserve_format) -> torch.Size | None:
    kept = memory_format is torch.preserve_format and x.is_contiguous()
    return x.shape if kept or memory_format is torch.contiguous_format else None


def rolled(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> torch.Size | None:
    fits = x.is_contiguous() and x.numel() and 0 < len(dims) == len(shifts) and all(-x.dim() <= d < x.dim() for d in dims)
    return x.shape if fits else None


def filled(x: Tensor, mask: Tensor, value: Any) -> torch.Size | None:
    sizes = (1,) * (x.dim() - mask.dim()) + tuple(mask.shape)
    fits = x.is_contiguous() and len(sizes) == x.dim() and all(n in (1, m) for n, m in zip(sizes, x.shape, strict=True))
    return x.shape if fits and mask.dtype is torch.bool and type(value) in ATOMS else None


def looked_up(x: Tensor, indices: Sequence[Tensor | None]) -> list[int] | None:
    """The shape of rows that are looked up by whole numbers."""
    at = indices[0]
    if at is None or len(indices) > 1 or at.dtype is not torch.int64 or not x.dim():
        return None
    return [*at.shape, *x.shape[1:]] if x.is_contiguous() and at.is_contiguous() else None


# shapes of results that are contiguous; None for others
FORMS: dict[str, Callable[..., Sequence[int] | None]] = {
    "clone": copied,
    "roll": rolled,
    "masked_fill": filled,
    "index": looked_up,
    "comparison": lambda x, other: x.shape if type(other) in ATOMS and x.is_contiguous() and not x.is_complex() else None,
}


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    extra: list[int],
    groups: int,
) -> list[int]:
    """The shape of a convolution's result; raises ValueError where the channels do not fit."""
    given, kernel = tuple(x.shape), tuple(weight.shape)
    if len(given) != len(kernel) or given[1] != (kernel[0] if transposed else kernel[1] * groups):
        raise ValueError(f"a convolution with a weight of shape {kernel} is given {given}")
    shape = [given[0], kernel[1] * groups if transposed else kernel[0]]
    for i, (n, k) in enumerate(zip(given[2:], kernel[2:], strict=True)):
        s, p, d = [v[i] if len(v) > 1 else v[0] for v in (stride, padding, dilation)]
        reach = d * (k - 1) + 1
        if transposed:
            shape.append((n - 1) * s - 2 * p + reach + (extra[i] if len(extra) > 1 else extra[0]))
        else:
            shape.append((n + 2 * p - reach) // s + 1)
    return shape


def reduced(x: Tensor, dims: Any, keep: bool = False, *_: Any) -> list[int] | None:
    """The shape of a mean or sum over some dimensions; no dimensions are all of them. None where there are no such ones."""
    ndim = x.dim()
    given = [dims] if isinstance(dims, int) else dims or range(ndim)
    if any(not -ndim <= d < ndim for d in given):
        return None
    gone = {d % ndim for d in given}
    return [1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone]


def signature(x: Any) -> Any:
    """What a meta kernel can see of its arguments, hashable; None where they hold more than meta tensors and numbers."""
    if isinstance(x, Tensor):
        return (x.shape, x.stride(), x.dtype) if x.is_meta and type(x) in PLAIN_TENSORS else None
    if type(x) in ATOMS:
        return (type(x), x)
    if isinstance(x, tuple | list):
        parts = tuple(signature(v) for v in x)
        return None if None in parts else parts
    if isinstance(x, dict):
        parts = tuple((k, signature(v)) for k, v in x.items())
        return None if any(v is None for _, v in parts) else parts
    return (type(x), x) if isinstance(x, torch.memory_format | torch.layout) else None
