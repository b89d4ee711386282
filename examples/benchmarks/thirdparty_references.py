"""The zeroed reference of `thirdparty.py`: the original whose removed elements are zero, and when it is no reference."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from models import call
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.passes.ir.pytree import collect, map_tensors

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
# Ops whose result changes with the number of elements reduced, though what is removed is zero, and where their dims stand.
ATTENTION = ("query", "key", "value", "dropout_p", "is_causal")
STATISTICS = frozenset(
    "native_layer_norm native_group_norm _fused_rms_norm _softmax _log_softmax _safe_softmax mean var var_mean std std_mean"
    " amax amin max min argmax argmin topk sort median logsumexp prod".split()
)


def seed() -> None:
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def copied(inputs: Any) -> Any:
    """Some forwards write to lists among their arguments."""
    return map_tensors(inputs, torch.clone)


@torch.no_grad()
def zero_removed(network: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero the removed elements of floating-point parameters and buffers."""
    for name, tensor in [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]:
        if tensor.is_floating_point() and not bool(masks[name].all()):
            tensor.masked_fill_(~masks[name].to(tensor.device), 0)


def agreement(network: nn.Module, pruned: nn.Module, inputs: Any) -> tuple[float, bool]:
    """The relative error between two models and whether it is small enough, in double precision if need be."""
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    error = difference(run(network, inputs), run(pruned, inputs))
    if error <= max(TOLERANCES.get(d, 1e-3) for d in dtypes) or dtypes == {torch.float64}:
        return error, True
    try:
        wide = map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)
        network.double(), pruned.double()
        error = difference(run(network, wide), run(pruned, wide))
    except Exception:  # the model insists on its precision
        network.float(), pruned.float()
        return error, False
    network.float(), pruned.float()
    return error, error <= TOLERANCES[torch.float64]


@torch.no_grad()
def run(network: nn.Module, inputs: Any) -> list[Tensor]:
    seed()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer hides its statistics
    try:
        return collect(call(network, copied(inputs)), Tensor)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference relative to the largest value of each output; infinite where shapes or numbers differ."""
    if len(wanted) != len(got) or not wanted or any(a.shape != b.shape for a, b in zip(wanted, got)):
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, got):
        a, b = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
        if a.numel():
            error = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
            worst = max(worst, error if error == error else float("inf"))
    return worst


def agreement_over_kept(network: nn.Module, pruned: nn.Module, inputs: Any) -> tuple[bool, str]:
    """Whether a zeroed model agrees once its statistics leave out what is zero; and why it is no reference as it is.

    The reason is empty where nothing says so. Arguments as in `agreement`.
    """
    if any(bool(t.isnan().any()) for t in run(network, inputs) if t.is_floating_point()):
        return False, "zeroed parameters give NaN"
    with Statistics() as before:
        run(network, inputs)
    with Statistics() as after:
        wanted = run(pruned, inputs)
    why = shrunk(before.extents, after.extents)
    if not why or [op for op, _ in before.extents] != [op for op, _ in after.extents]:
        return False, why
    with Statistics([extent for _, extent in after.extents]) as kept:
        got = run(network, inputs)
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    return kept.complete and difference(got, wanted) <= max(TOLERANCES.get(d, 1e-3) for d in dtypes), why


def shrunk(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> str:
    """The first statistic that is taken over fewer elements afterwards, in words; empty if there is none."""
    for op in sorted({op for op, _ in before}):
        wide, narrow = ([extent for name, extent in run if name == op] for run in (before, after))
        if len(wide) == len(narrow):
            pairs = [(a, b) for a, b in zip(wide, narrow) if b < a]
        else:
            gone = list((Counter(wide) - Counter(narrow)).elements())
            new = list((Counter(narrow) - Counter(wide)).elements())
            pairs = [(a, b) for a in gone for b in new if b < a]
        if pairs:
            return f"{op} over {pairs[0][0]} elements, of which {pairs[0][1]} are kept"
    return ""


class Statistics(TorchDispatchMode):
    """Records over how many elements each statistic is taken; or takes each over fewer, those that are not zero.

    Arguments:
        extents: how many elements each is to be taken over, in the order of the calls.

    Attributes:
        complete: whether all could be: as many as are asked for were not zero.
    """

    def __init__(self, extents: Sequence[int] | None = None) -> None:
        super().__init__()
        self.extents: list[tuple[str, int]] = []
        self.wanted, self.complete = extents, True

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # attention with a function for its mask insists on a compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):  # the ops that it comes to are seen one by one
            with self:
                return func.py_kernels[DispatchKey.CompositeExplicitAutograd](*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_scaled_dot_product_flash_attention_for_cpu":  # one operator that hides a softmax
            given = {"dropout_p": 0.0, "is_causal": False} | dict(zip(ATTENTION[3:], args[3:])) | kwargs
            with self:
                return torch.ops.aten._scaled_dot_product_attention_math.default.decompose(*args[:3], **given)
        if name in STATISTICS and args and isinstance(args[0], Tensor):
            given = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
            wide = extent(name, args[0], given)
            self.extents.append((name, wide))
            if self.wanted is not None:
                narrow = self.wanted[len(self.extents) - 1] if len(self.extents) <= len(self.wanted) else wide
                if narrow < wide:
                    form = OVER_KEPT.get(name)
                    made = form(func, args, kwargs, given, narrow) if form is not None else None
                    if made is not None:
                        return made
                    self.complete = False
        return func(*args, **kwargs)


def alive(value: Tensor, dims: Sequence[int], number: int) -> Tensor | None:
    """Which positions along dims are not zero throughout, broadcastable to the value; None unless that many are."""
    dims = [d % value.dim() for d in dims]
    others = [d for d in range(value.dim()) if d not in dims]
    mask = (value != 0).any(dim=others, keepdim=True) if others else value != 0
    return mask if int(mask.sum()) == number else None


def mean_over_kept(func: Any, args: Any, kwargs: Any, given: Any, narrow: int) -> Any:
    return func(*args, **kwargs) * (extent("mean", args[0], given) / narrow)


def norm_over_kept(func: Any, args: Any, kwargs: Any, given: Any, narrow: int) -> Any:
    """Layer norm, RMS norm and group norm."""
    value, shape = args[0], args[0].shape
    if "normalized_shape" in given:
        dims = list(range(value.dim() - len(given["normalized_shape"]), value.dim()))
        mask = alive(value, dims, narrow)
    else:  # (batch, group, channels in it and positions)
        value = value.reshape(given["N"], given["group"], given["C"] // given["group"], -1)
        dims = [2, 3]
        mask = (value != 0).any(dim=0, keepdim=True).any(dim=3, keepdim=True)
        if bool((mask.sum(dim=2) * value.shape[3] != narrow).any()):
            return None
    if mask is None:
        return None
    rms = "rms" in func._schema.name
    eps = given.get("eps") or torch.finfo(value.dtype).eps
    mean = 0 if rms else (value * mask).sum(dims, keepdim=True) / narrow
    spread = (((value - mean) ** 2 * mask).sum(dims, keepdim=True) / narrow + eps).rsqrt()
    normed = ((value - mean) * spread * mask).reshape(shape)
    weight, bias = given.get("weight"), given.get("bias")
    if "group" in given:
        weight, bias = (t if t is None else t.view(-1, *[1] * (len(shape) - 2)) for t in (weight, bias))
    normed = normed if weight is None else normed * weight
    normed = normed if bias is None else normed + bias
    return (normed, spread) if rms else (normed, spread, spread)


def spread_over_kept(func: Any, args: Any, kwargs: Any, given: Any, narrow: int) -> Any:
    """Variance and standard deviation, alone or with the mean."""
    value, dims = args[0], given.get("dim") or list(range(args[0].dim()))
    mask = alive(value, dims, narrow)
    if mask is None:
        return None
    keep = bool(given.get("keepdim", False))
    correction = given.get("correction", 1)
    correction = int(given["unbiased"]) if "unbiased" in given else 1 if correction is None else correction
    mean = (value * mask).sum(dims, keepdim=True) / narrow
    spread = ((value - mean) ** 2 * mask).sum(dims, keepdim=keep) / (narrow - correction)
    name = func._schema.name
    spread = spread.sqrt() if "std" in name else spread
    return (spread, mean if keep else mean.squeeze(dims)) if "mean" in name else spread


def without_zeros(func: Any, args: Any, kwargs: Any, given: Any, narrow: int) -> Any:
    """Softmax and extrema."""
    dims = given.get("dim")
    if dims is None or dims == []:
        return None
    mask = alive(args[0], [dims] if isinstance(dims, int) else dims, narrow)
    least = float("inf") if "min" in func._schema.name else float("-inf")
    return None if mask is None else func(args[0].masked_fill(~mask, least), *args[1:], **kwargs)


OVER_KEPT: dict[str, Callable[..., Any]] = {
    "mean": mean_over_kept,
    **dict.fromkeys("native_layer_norm native_group_norm _fused_rms_norm".split(), norm_over_kept),
    **dict.fromkeys("var var_mean std std_mean".split(), spread_over_kept),
    **dict.fromkeys("_softmax _log_softmax _safe_softmax amax amin max min argmax argmin".split(), without_zeros),
}


def extent(name: str, value: Tensor, given: dict[str, Any]) -> int:
    """How many elements an op reduces to one statistic."""
    if name in ("native_layer_norm", "_fused_rms_norm"):
        return int(numpy.prod(given["normalized_shape"]))
    if name == "native_group_norm":
        return value.numel() // (int(given["N"]) * int(given["group"])) if value.numel() else 0
    dims = given.get("dim")
    if dims is None or dims == []:
        return value.numel()
    return int(numpy.prod([value.shape[d] for d in ([dims] if isinstance(dims, int) else dims)])) if value.dim() else 1
