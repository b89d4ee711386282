"""Verify: the pruned model against the original whose removed elements are masked.

The original runs under a dispatcher mode that carries labels along, live, at any input size. Removed elements are zero where
they enter a contraction; statistics over channels (mean, softmax, layer norm, ...) see kept elements only. `MASKED` below is
the table of what "kept only" means for each op: it is the definition of exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.passes import rules
from fxprune.passes.kept import Cutter
from fxprune.passes.labels import Labels, lut
from fxprune.passes.reading import apply_rule
from fxprune.passes.rules import Call
from fxprune.passes.tape import Op, Recorder, Ref, collect, map_tensors
from fxprune.passes.ties import Rows, Ties, flat, row

Masked = Callable[["Masker", Call, Any, Any], Any]
MASKED: dict[str, Masked] = {}


def masked(*names: str) -> Callable[[Masked], Masked]:
    def file(function: Masked) -> Masked:
        for name in names:
            MASKED[f"aten::{name}"] = function
        return function

    return file


def masked_form(name: str) -> Masked | None:
    """What an op computes of kept elements, where that is not what it computes anyway."""
    begins = (m for k, m in MASKED.items() if k.endswith("*") and name.startswith(k[:-1]))
    return MASKED.get(name) or next(begins, None)


class Masker(Recorder):
    """Runs the original with removed elements masked.

    Arguments:
        names: the model's tensors by identity.
        leaves: their labels.
        kept: which labels are kept, shape (labels,).
        heads: as in coupling.
        fates: from an earlier run, which labels are kept, those made on the way included.
    """

    def __init__(
        self, names: dict[int, str], leaves: Mapping[str, Labels], kept: Tensor, heads: bool, fates: Tensor | None = None
    ) -> None:
        super().__init__(names)
        rules.load()
        self.leaf_labels = leaves
        self.kept = kept
        self.settled = torch.ones(len(kept), dtype=torch.bool)
        self.fates = fates
        self.late = False  # whether a label was found to be removed after it was made
        self.heads = heads
        self.labels: dict[int, Labels] = {}
        self.ties = Ties(size=len(kept))
        self.pairs: list[Any] = []  # ties of labels whose fate is open
        self.rows: list[Rows] = []

    def add(self, tensor: Tensor, *, from_input: bool, name: str | None = None) -> Ref:
        ref = super().add(tensor, from_input=from_input, name=name)
        if name is not None and name in self.leaf_labels:
            self.labels[ref.id] = self.leaf_labels[name]
        return ref

    def kept_of(self, value: Tensor) -> Tensor:
        """What stays of a value that the masked original computed."""
        for cut in Cutter(self.kept)(self.labels.get(self.ref(value).id, ()), value.shape):
            value = cut.take(value)
        return value

    def mask(self, ref: Ref) -> Tensor | None:
        """A boolean tensor broadcastable to the value, True where kept; None where all of it is."""
        labels = self.labels.get(ref.id)
        if not labels:
            return None
        mask = lut(labels, self.tape.shape(ref), self.kept)
        return None if bool(mask.all()) else mask

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = len(self.tape.ops)
        in_args, in_kwargs = map_tensors(args, self.ref), map_tensors(kwargs, self.ref)
        refs = collect((in_args, in_kwargs), Ref)
        function = masked_form(func._schema.name)
        if function is not None and any(self.mask(r) is not None for r in refs):
            shell = Call(Op(func, in_args, in_kwargs, (), -1), self.tape, self.labels, self.ties, self.heads, set())
            out = function(self, shell, args, kwargs)
            produced = super().__torch_dispatch__(lambda *a, **k: out, types, args, kwargs)
            self.tape.ops[-1] = Op(func, in_args, in_kwargs, self.tape.ops[-1].outs, -1)
        else:
            produced = super().__torch_dispatch__(func, types, args, kwargs)
        apply_rule(Call(self.tape.ops[-1], self.tape, self.labels, self.ties, self.heads, set()))
        self.settle()
        del self.tape.ops[before:]
        return produced

    def spread(self) -> bool:
        """Settle what is tied to something settled; whether that was anything."""
        found = False
        for pair in self.pairs:
            for new, old in (pair, pair[::-1]):
                open_ = ~self.settled[new] & self.settled[old]
                if bool(open_.any()):
                    self.kept[new[open_]] = self.kept[old[open_]]
                    self.settled[new[open_]] = found = True
                    self.late |= not bool(self.kept[old[open_]].all())
        for rows in self.rows:
            ready = ~self.settled[rows.labels] & self.settled[rows.entries].all(1)
            self.kept[rows.labels[ready]] = self.kept[rows.entries[ready]].any(1)
            self.settled[rows.labels[ready]] = True
            found |= bool(ready.any())
        return found

    def settle(self) -> None:
        """New labels (of broadcast copies, padding, constants) share the fate of what they are tied to."""
        if self.ties.size > len(self.kept):
            start, grown = len(self.kept), self.ties.size - len(self.kept)
            known = self.fates[start : start + grown] if self.fates is not None else torch.ones(grown, dtype=torch.bool)
            self.kept = torch.cat([self.kept, known])
            self.settled = torch.cat([self.settled, torch.full((grown,), self.fates is not None)])
        for event in self.ties.frozen:  # what a rule keeps is kept, whatever it is tied to later
            self.settled[torch.from_numpy(row(event.labels))] = True
        self.pairs += [tuple(torch.from_numpy(side) for side in flat(pair)) for pair in self.ties.pairs]
        self.rows += self.ties.rows
        while self.spread():
            pass
        self.pairs = [(a, b) for a, b in self.pairs if not bool((self.settled[a] & self.settled[b]).all())]
        self.rows = [rows for rows in self.rows if not bool(self.settled[rows.labels].all())]
        for name in ("pairs", "frozen", "coarse", "equal", "product", "rows"):
            getattr(self.ties, name).clear()


def filled(masker: Masker, call: Call, args: Any, kwargs: Any, value: float) -> tuple[Any, Any]:
    """The arguments with removed elements of every floating tensor set to one value."""

    def fill(tensor: Tensor) -> Tensor:
        mask = masker.mask(masker.ref(tensor))
        if mask is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return tensor.masked_fill(~mask.to(tensor.device), value)

    return map_tensors(args, fill), map_tensors(kwargs, fill)


@masked(
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "dot",
    "linear",
    "matmul",
    "convolution",
    "_convolution",
    "_trilinear",
)
@masked("sum", "norm", "linalg_vector_norm", "cumsum", "nansum", "addmv", "count_nonzero", "renorm")
@masked("_cdist_forward", "any", "col2im")
def with_zeros(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """A removed element adds nothing."""
    args, kwargs = filled(masker, call, args, kwargs, 0.0)
    return call.op.func(*args, **kwargs)


@masked("_scaled_dot_product_*", "scaled_dot_product_attention")
def attention(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """Removed widths add nothing to a score, removed keys get no weight."""
    keys = masker.mask(call["key"])
    args, kwargs = filled(masker, call, args, kwargs, 0.0)
    if keys is None or keys.shape[-2] == 1:
        return call.op.func(*args, **kwargs)
    named = dict(zip((a.name for a in call.op.func._schema.arguments), args, strict=False)) | kwargs
    q, k, v = named["query"], named["key"], named["value"]
    bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~keys.any(-1).unsqueeze(-2).to(q.device), -math.inf)
    given = named.get("attn_mask", named.get("attn_bias"))
    bias = bias if given is None else bias + given
    causal = bool(named.get("is_causal", False))
    if causal:
        bias = bias.masked_fill(~torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), -math.inf)
    scale = named.get("scale") or q.shape[-1] ** -0.5
    out = (q @ k.transpose(-1, -2) * scale + bias).softmax(-1) @ v
    rest = len(call.op.func._schema.returns) - 1
    return (out, *[out.new_empty(0)] * rest) if rest else out


@masked("amax", "max", "logsumexp", "argmax", "logcumsumexp", "cummax")
@masked("_softmax", "_log_softmax", "_safe_softmax", "_masked_softmax", "softmax", "log_softmax")
def with_least(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """A removed element is never the greatest and weighs nothing."""
    args, kwargs = filled(masker, call, args, kwargs, -math.inf)
    return call.op.func(*args, **kwargs)


@masked("amin", "min", "argmin", "cummin")
def with_greatest(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    args, kwargs = filled(masker, call, args, kwargs, math.inf)
    return call.op.func(*args, **kwargs)


@masked("aminmax")
def least_and_greatest(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    above, below = (filled(masker, call, args, kwargs, value) for value in (math.inf, -math.inf))
    return call.op.func(*above[0], **above[1])[0], call.op.func(*below[0], **below[1])[1]


@masked("median")
def median(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    args, kwargs = filled(masker, call, args, kwargs, math.nan)
    return getattr(torch.ops.aten.nanmedian, call.op.func._overloadname)(*args, **kwargs)


@masked("prod", "cumprod", "all")
def with_ones(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    args, kwargs = filled(masker, call, args, kwargs, 1.0)
    return call.op.func(*args, **kwargs)


def kept_mean(x: Tensor, mask: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean over kept elements, and their number."""
    count = mask.expand(x.shape).sum(list(dims), keepdim=True)
    total = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(list(dims), keepdim=True)
    return total / count.clamp(min=1), count


def kept_variance(x: Tensor, mask: Tensor, dims: Sequence[int], correction: float) -> tuple[Tensor, Tensor]:
    """The variance and mean over kept elements."""
    mean, count = kept_mean(x, mask, dims)
    squares = torch.where(mask, (x - mean).square(), torch.zeros((), dtype=x.dtype, device=x.device))
    return squares.sum(list(dims), keepdim=True) / (count - correction).clamp(min=0), mean


def squeezed(out: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return out if keepdim else out.squeeze(tuple(dims))


@masked("mean", "nanmean")
def mean(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    dims = call.dims(call.get("dim"), x.dim())
    return squeezed(kept_mean(x, mask, dims)[0], dims, bool(call.get("keepdim", False)))


@masked("var", "std", "var_mean", "std_mean")
def variance(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    name = call.op.func._schema.name
    dims = call.dims(call.get("dim"), x.dim())
    correction = call.get("correction")
    correction = (1 if call.get("unbiased", True) else 0) if correction is None else correction
    var, average = kept_variance(x, mask, dims, correction)
    first = var.sqrt() if "std" in name else var
    keepdim = bool(call.get("keepdim", False))
    out = squeezed(first, dims, keepdim)
    return (out, squeezed(average, dims, keepdim)) if name.endswith("_mean") else out


@masked("native_layer_norm", "_fused_rms_norm")
def layer_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    dims = list(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    if "rms" in call.op.func._schema.name:
        eps = call["eps"] if call["eps"] is not None else torch.finfo(x.dtype).eps
        rstd = (kept_mean(x.square(), mask, dims)[0] + eps).rsqrt()
        out = x * rstd
        return (out if args[2] is None else out * args[2]), rstd
    var, average = kept_variance(x, mask, dims, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = (x - average) * rstd
    weight, bias = (args[2] if len(args) > 2 else None), (args[3] if len(args) > 3 else None)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), average, rstd


@masked("native_group_norm")
def group_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    x, mask = args[0], subject(masker, args[0])
    groups = call["group"]
    shape = (x.shape[0], groups, -1, *x.shape[2:])
    grouped, kept = x.reshape(shape), mask.expand(x.shape).reshape(shape)
    dims = list(range(2, grouped.dim()))
    var, average = kept_variance(grouped, kept, dims, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = ((grouped - average) * rstd).reshape(x.shape)
    affine = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = args[1], args[2]
    out = out if weight is None else out * weight.reshape(affine)
    out = out if bias is None else out + bias.reshape(affine)
    return out, average.flatten(1), rstd.flatten(1)


@masked("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit.no_stats")
def batch_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """Statistics of the batch are taken over kept positions; running ones are given."""
    x = args[0]
    mask = masker.mask(masker.ref(x))
    positions = [d for d in range(x.dim()) if d != 1]
    training = call.get("training", True)
    if not training or mask is None or all(mask.shape[d] == 1 for d in positions):
        return call.op.func(*args, **kwargs)
    var, average = kept_variance(x, mask.to(x.device), positions, 0)
    rstd = (var + call["eps"]).rsqrt()
    out = (x - average) * rstd
    affine = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = call.get("weight"), call.get("bias")
    out = out if weight is None else out * args[1].reshape(affine)
    out = out if bias is None else out + args[2].reshape(affine)
    return out, average.flatten(), rstd.flatten()


def subject(masker: Masker, x: Tensor) -> Tensor:
    mask = masker.mask(masker.ref(x))
    return (torch.ones((1,) * x.dim(), dtype=torch.bool) if mask is None else mask).to(x.device)


@masked("_weight_norm_interface")
def weight_norm(masker: Masker, call: Call, args: Any, kwargs: Any) -> Any:
    """Zeros add nothing to a norm; a removed row's own norm is zero and must not divide."""
    v, g = args[0], args[1]
    dims = [d for d in range(v.dim()) if d != call.get("dim", 0)]
    mask = masker.mask(masker.ref(v))
    v = v if mask is None else v.masked_fill(~mask.to(v.device), 0.0)
    norm = v.square().sum(list(dims), keepdim=True).sqrt()
    return v * (g / norm.masked_fill(norm == 0, 1.0)), norm


def masked_copy(model: Any, leaves: Mapping[str, Labels], kept: Tensor) -> Any:
    """A copy of the model, in evaluation mode, whose removed parameter and buffer elements are zero."""
    from fxprune.passes.tree import copy_tree, named_tensors

    swap: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            labels = leaves.get(name, ())
            mask = lut(labels, tensor.shape, kept)
            new = tensor.detach()
            if not bool(mask.all()) and (new.is_floating_point() or new.is_complex()):
                new = new.masked_fill(~mask.to(new.device), 0.0)
            swap[id(tensor)] = torch.nn.Parameter(new, False) if isinstance(tensor, torch.nn.Parameter) else new.clone()
    return copy_tree(model, swap).eval()


def random_state(devices: Sequence[int]) -> list[Tensor]:
    """Of the processor and of some GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def set_random_state(devices: Sequence[int], state: Sequence[Tensor]) -> None:
    """As `random_state` gave it."""
    torch.set_rng_state(state[0])
    for device, its in zip(devices, state[1:], strict=True):
        torch.cuda.set_rng_state(its, device)


def masked_outputs(
    model: Any,
    leaves: Mapping[str, Labels],
    kept: Tensor,
    heads: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: Sequence[Labels] = (),
    *,
    whole: bool = True,
) -> Any:
    """What the masked original returns.

    Arguments:
        given: the labels of the tensors among its arguments, if they have any.
        whole: with what was removed of it as zeros or whatever else it came to (else without).
    """
    from fxprune.passes.patches import visible
    from fxprune.passes.tree import named_tensors

    reference = masked_copy(model, leaves, kept)
    devices = sorted({t.device.index or 0 for _, t in named_tensors(reference) if t.is_cuda})
    drawn = random_state(devices)
    names = {id(t): n for n, t in named_tensors(reference)}
    fates: Tensor | None = None
    while True:  # a label made on the way may learn its fate only after a statistic has seen it: then it runs once more
        set_random_state(devices, drawn)
        masker = Masker(names, leaves, kept, heads, fates)
        a, k = map_tensors((args, kwargs), torch.clone)
        with torch.no_grad(), visible():
            refs = [masker.add(tensor, from_input=True) for tensor in collect((a, k), Tensor)]
            masker.labels.update({r.id: labels for r, labels in zip(refs, given, strict=False)})
            with masker:
                out = reference(*a, **k)
        if fates is not None or not masker.late:
            return out if whole else map_tensors(out, masker.kept_of)
        fates = masker.kept


def relative_error(reference: Tensor, result: Tensor) -> float:
    """The largest difference, relative to the largest reference value; infinite where shapes or NaNs differ."""
    if reference.shape != result.shape:
        return math.inf
    if not reference.numel():
        return 0.0
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, result) else math.inf
    a, b = reference.detach(), result.detach()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(a.isnan().all()):
        return math.inf  # nothing was compared
    if bool(same.all()):
        return 0.0
    worst = float((a - b).abs().masked_fill(same, 0).max())
    finite = a.abs()[a.isfinite()]
    scale = float(finite.max()) if finite.numel() else 1.0
    return worst / max(scale, 1e-30) if math.isfinite(worst) else math.inf
