"""Find the sites of a program: calls whose parameters can be repaired.

A site is a dispatcher call, whatever the layer: a product of an activation with a weight of its own, or a normalisation with
running statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import Product, find
from fxprune.repairs.look_ahead import Line, Path

Key = tuple[str, int]  # the name of a parameter (or of a running mean), and which of its sites in the program
Span = tuple[str, int, int]  # part of a parameter: its name, the first and the last element in memory


@dataclass(slots=True)
class SiteCall:
    """The call of a site in one run; `weight`, `bias` and `var` are views of the program's own tensors.

    Attributes:
        product: what the call multiplies; None for a normalisation.
        weight, source, out, bias: of a product; `source` and `out` also of a normalisation.
        op: the call with arguments by name.
        func, args, kwargs: the call, to be made again.
        var: the running variance of a normalisation, whose running mean is its `weight`.
        ahead: what `out` becomes along the path of the site, in its shape; `slope`, by how much that grows with it.
        line: in their place by channel what `out` is multiplied by and what is added, where these are numbers.
    """

    name: str
    product: Product | None
    source: Tensor
    out: Tensor
    op: OpView
    func: Any
    args: Any
    kwargs: Any
    weight: Tensor
    bias: Tensor | None = None
    var: Tensor | None = None
    ahead: Tensor | None = None
    slope: Tensor | None = None
    line: Line | None = None


@dataclass(slots=True)
class RepairSite:
    """One site of a program.

    Attributes:
        key: its name, the same in the original and in the pruned program.
        norm: whether it is a normalisation.
        inside: its position among the sites of its parameter within its node.
        reason: why it cannot be changed, or "".
        place: where a constant can be added to the result: `bias`, the key of the normalisation behind it, or None.
        path: to where the result is read.
    """

    key: Key
    norm: bool
    inside: int
    reason: str = ""
    place: str | Key | None = None
    path: Path = field(default_factory=Path)


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 where it has none, or is sparse."""
    return int(tensor.untyped_storage().data_ptr()) if tensor.layout is torch.strided and tensor.numel() else 0


class SiteObserver(Recorder):
    """Records the calls of sites while a program runs.

    Arguments:
        names: the program's tensors by identity.
        owned: names of its parameters by the address of their memory.
    """

    def __init__(self, names: dict[int, str], owned: Mapping[int, str]) -> None:
        super().__init__(names)
        self.owned = owned
        self.calls: list[SiteCall] = []
        self.computed: list[str] = []
        self.uses: Counter[Span] = Counter()
        self.readers: Counter[int] = Counter()
        self.writes = False  # whether any call writes to its arguments

    def owner(self, tensor: Tensor | None) -> str | None:
        return None if tensor is None else self.owned.get(address(tensor))

    def span(self, tensor: Tensor) -> Span:
        start = int(tensor.storage_offset())
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return self.owned[address(tensor)], start, start + reach

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.writes = True
            self.copy_written({address(t) for t in collect((args, kwargs), Tensor)} - {0})
        out = super().__torch_dispatch__(func, types, args, kwargs)
        call = OpView(self.op_trace.ops[-1], self.op_trace)
        given = collect((args, kwargs), Tensor)
        self.readers.update({r.id for r in call.inputs})
        made = set(map(address, collect(out, Tensor)))
        self.uses.update(self.span(t) for t in given if self.owner(t) and address(t) not in made)
        tensors = {r.id: t for r, t in zip(call.inputs, given, strict=True)}
        self.record(call, tensors, func, args, kwargs, out)
        return out

    def copy_written(self, written: set[int]) -> None:
        """Copy what sites have read or returned before it is overwritten."""
        for call in self.calls:
            for role in ("source", "out"):
                tensor = getattr(call, role)
                if address(tensor) in written:
                    own = tensor.clone()
                    setattr(call, role, own)
                    swap = lambda t: own if t is tensor else t  # noqa: B023, E731
                    call.args, call.kwargs = map_tensors((call.args, call.kwargs), swap)

    def record(self, call: OpView, tensors: dict[int, Tensor], func: Any, args: Any, kwargs: Any, out: Any) -> None:
        mean, var = call.get("running_mean"), call.get("running_var")
        if mean is not None and var is not None and not call.get("training", False):
            name = self.op_trace.values[mean.id].name
            if name is not None and self.op_trace.values[var.id].name is not None:
                first = out if isinstance(out, Tensor) else out[0]
                x = tensors[call.first.id]
                self.calls.append(
                    SiteCall(name, None, x, first, call, func, args, kwargs, tensors[mean.id], var=tensors[var.id])
                )
            return
        for found in find(func).products_of(call):
            weight, source = tensors[found.weight.id], tensors[found.source.id]
            name = self.owner(weight)
            if name is not None and self.owner(source) is None:
                bias = tensors[found.added.id] if found.added is not None else None
                self.calls.append(SiteCall(name, found, source, out, call, func, args, kwargs, weight, bias))
                return
            values = self.op_trace.values
            if name is None and values[found.source.id].from_input and not values[found.weight.id].from_input:
                self.computed.append(str(values[found.weight.id].name or ""))
                return


def drop_activations(call: SiteCall) -> SiteCall:
    call.source = call.out = torch.empty(0)
    call.args = call.kwargs = ()
    return call


def find_call(calls: Sequence[SiteCall], site: RepairSite) -> SiteCall | None:
    """The call of a site among those of its node; None where a batch has none, as an expert that no token was sent to."""
    return dict(enumerate(c for c in calls if c.name == site.key[0] and (c.product is None) == site.norm)).get(site.inside)


def why_fixed(site: RepairSite, call: SiteCall, observer: SiteObserver, count: Counter[str]) -> str:
    """Why a site's parameter cannot be changed for it alone, or ""."""
    if site.norm:
        return "" if count[call.name] == 1 else f"its statistics are used {count[call.name]} times"
    times = count_overlaps(observer.span(call.weight), observer.uses)
    if times > 1:
        return f"its weight is used {times} times"
    if any(n > 1 and s == 0 for n, s in zip(call.weight.shape, call.weight.stride(), strict=True)):
        return "its weight is repeated"
    if call.weight.dim() > max(2, len(call.op.shape(call.op.outputs[0]))):
        return "each of its matrices multiplies some of the rows"
    if any(call.op.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "its product is scaled"
    return ""


def count_overlaps(span: Span, uses: Mapping[Span, int]) -> int:
    """How many uses share memory with a part of a parameter."""
    name, low, high = span
    return sum(n for (other, a, b), n in uses.items() if other == name and a <= high and low <= b)


def merged(programs: Sequence[Sequence[RepairSite]]) -> list[RepairSite]:
    """The sites of several programs in one order: each behind the one that comes before it in the first program that has it."""
    found: dict[Key, RepairSite] = {}
    order: list[Key] = []
    for sites in programs:
        last = -1
        for site in sites:
            known = found.get(site.key)
            if known is None:
                found[site.key] = site
                order.insert(last + 1, site.key)
            else:
                place = site.place if site.place == known.place else None
                found[site.key] = replace(known, reason=known.reason or site.reason, place=place)
            last = order.index(site.key)
    return [found[key] for key in order]
