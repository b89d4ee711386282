"""A captured program on several batches at once, node by node, so that a layer can be changed before what follows has run.

A *site* is where a parameter can be changed to good effect: a product of an activation with a weight of its own, or a
normalisation with running statistics. What counts is the dispatcher call, not the layer.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.criteria.evidence import BATCHES, Batch
from fxprune.criteria.roles import Product, products
from fxprune.errors import PruneError
from fxprune.passes.rules import Call
from fxprune.passes.tape import Recorder, collect, map_tensors
from fxprune.passes.ties import Ties
from fxprune.passes.tree import fetch, named_tensors

Key = tuple[str, int]  # the name of a parameter (or of a running mean), and which of its sites in the program
Span = tuple[str, int, int]  # part of a parameter: its name, the first and the last element in memory


@dataclass(slots=True)
class Met:
    """A site as one run met it; `weight`, `bias`, `mean` and `var` are views of the program's own tensors.

    Attributes:
        product: what the call multiplies; None for a normalisation.
        weight, source, out, bias: of a product; `source` and `out` also of a normalisation.
        mean, var: the running statistics of a normalisation.
        call: the call, with arguments by name.
        func, args, kwargs: the call, to be made again.
    """

    name: str
    product: Product | None
    source: Tensor
    out: Tensor
    call: Call
    func: Any
    args: Any
    kwargs: Any
    weight: Tensor
    bias: Tensor | None = None
    var: Tensor | None = None


@dataclass(slots=True)
class Site:
    """One site of a program.

    Attributes:
        key: what it is called, the same in the original and in the pruned program.
        norm: whether it is a normalisation.
        inside: which of the sites of its parameter within its node.
        reason: why it cannot be changed, or "".
        place: where a constant can be added to the result: `bias`, the key of the normalisation behind it, or None.
    """

    key: Key
    norm: bool
    inside: int
    reason: str = ""
    place: str | Key | None = None


class Watch(Recorder):
    """Sees the sites in what runs.

    Arguments:
        names: the program's tensors by identity.
        owned: names of its parameters by the address of their memory.
    """

    def __init__(self, names: dict[int, str], owned: Mapping[int, str]) -> None:
        super().__init__(names)
        self.owned = owned
        self.met: list[Met] = []
        self.computed: list[str] = []
        self.uses: Counter[Span] = Counter()
        self.readers: Counter[int] = Counter()

    def owner(self, tensor: Tensor | None) -> str | None:
        return None if tensor is None or not tensor.numel() else self.owned.get(tensor.untyped_storage().data_ptr())

    def span(self, tensor: Tensor) -> Span:
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        return self.owned[tensor.untyped_storage().data_ptr()], tensor.storage_offset(), tensor.storage_offset() + reach

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        call = Call(self.tape.ops[-1], self.tape, {}, Ties(size=1), False, set())
        given = collect((args, kwargs), Tensor)
        self.readers.update({r.id for r in call.inputs})
        made = {t.untyped_storage().data_ptr() for t in collect(out, Tensor) if t.numel()}
        self.uses.update(self.span(t) for t in given if self.owner(t) and t.untyped_storage().data_ptr() not in made)
        tensors = {r.id: t for r, t in zip(call.inputs, given, strict=True)}
        self.look(call, tensors, func, args, kwargs, out)
        return out

    def look(self, call: Call, tensors: dict[int, Tensor], func: Any, args: Any, kwargs: Any, out: Any) -> None:
        mean, var = call.get("running_mean"), call.get("running_var")
        if mean is not None and var is not None and not call.get("training", False):
            name = self.tape.values[mean.id].name
            if name is not None and self.tape.values[var.id].name is not None:
                first = out if isinstance(out, Tensor) else out[0]
                x = tensors[call.first.id]
                self.met.append(
                    Met(name, None, x, first, call, func, args, kwargs, tensors[mean.id], var=tensors[var.id])
                )
            return
        for found in products(call):
            weight, source = tensors[found.weight.id], tensors[found.source.id]
            name = self.owner(weight)
            if name is not None and self.owner(source) is None:
                bias = tensors[found.added.id] if found.added is not None else None
                self.met.append(Met(name, found, source, out, call, func, args, kwargs, weight, bias))
                return
            values = self.tape.values
            if name is None and values[found.source.id].from_input and not values[found.weight.id].from_input:
                self.computed.append(str(values[found.weight.id].name or ""))
                return


@dataclass(eq=False)
class Walk:
    """A program on its way through several batches.

    Arguments:
        program: in evaluation mode; its tensors may be changed on the way.
        batches: what to run.
        prefix: what the names of its tensors begin with, and those of the model do not.
    """

    program: fx.GraphModule
    batches: Sequence[Batch]
    prefix: str = ""
    sites: dict[fx.Node, list[Site]] = field(default_factory=dict)
    computed: int = 0
    at: int = 0
    seen: dict[Key, list[Met]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = list(self.program.graph.nodes)
        self.tensors = {name.removeprefix(self.prefix): t for name, t in named_tensors(self.program)}
        self.names = {id(t): name for name, t in self.tensors.items()}
        self.owned = {
            t.untyped_storage().data_ptr(): name
            for name, t in self.tensors.items()
            if isinstance(t, nn.Parameter) and t.is_floating_point() and t.numel()
        }
        last = {n: node for node in self.nodes for n in node.all_input_nodes}
        self.dying: dict[fx.Node, list[fx.Node]] = {}
        for n, node in last.items():
            self.dying.setdefault(node, []).append(n)
        self.survey()
        self.values: list[dict[fx.Node, Any]] = [{} for _ in self.batches]
        self.result: list[Any] = [None for _ in self.batches]

    # -- running --------------------------------------------------------------------------------------------------------

    def call(self, node: fx.Node, values: Mapping[fx.Node, Any], batch: Batch, *, aside: bool = False) -> Any:
        """What a node computes; `aside`, on copies of its arguments, so that it can be called again."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        if aside:
            own = lambda t: t.untyped_storage().data_ptr() in self.owned if t.numel() else False  # noqa: E731
            args, kwargs = map_tensors((args, kwargs), lambda t: t if own(t) or id(t) in self.names else t.clone())
        if node.op == "placeholder":
            return bound(self.program, batch)[str(node.target).lstrip("*")]
        if node.op == "get_attr":
            return fetch(self.program, str(node.target))
        if node.op == "call_module":
            return self.program.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]

    def survey(self) -> None:
        """Run the first batch to find the sites, what else uses their parameters, and where a constant can go."""
        watch = Watch(self.names, self.owned)
        values: dict[fx.Node, Any] = {}
        batch = self.batches[0]
        for tensor in collect((batch.args, batch.kwargs), Tensor):
            watch.add(tensor, from_input=True)
        sites: list[tuple[Site, Met, int]] = []
        count: Counter[str] = Counter()
        with watch:
            for node in self.nodes:
                values[node] = self.call(node, values, batch)
                here: Counter[str] = Counter()
                for met in watch.met:
                    site = Site((met.name, count[met.name]), met.product is None, here[met.name])
                    count[met.name] += 1
                    here[met.name] += 1
                    self.sites.setdefault(node, []).append(site)
                    sites.append((site, lean(met), call_out(met)))
                watch.met.clear()
                for n in self.dying.get(node, ()):
                    del values[n]
        self.computed = len(watch.computed)
        returned = {watch.ref(t).id for t in collect(list(values.values()), Tensor)}
        norms = {met.call.first.id: site for site, met, _ in sites if site.norm}
        for site, met, out in sites:
            site.reason = refusal(site, met, watch, count)
            bias = met.bias
            scaled = any(met.call.get(name, 1) != 1 for name in ("alpha", "beta"))
            if bias is not None and watch.owner(bias) and bias.dim() == 1 and overlaps(watch.span(bias), watch.uses) == 1:
                site.place = None if scaled else "bias"
            elif out in norms and watch.readers[out] == 1 and out not in returned and count[norms[out].key[0]] == 1:
                site.place = norms[out].key

    def run(self, node: fx.Node, *, watched: bool = False) -> dict[Key, list[Met]]:
        """Run a node on every batch; `watched`, returns what each of its sites met, batch by batch."""
        found: dict[Key, list[Met]] = {}
        for i, batch in enumerate(self.batches):
            values = self.values[i]
            if watched:
                watch = Watch(self.names, self.owned)
                with watch:
                    values[node] = self.call(node, values, batch)
                for site in self.sites[node]:
                    found.setdefault(site.key, []).append(pick(watch.met, site))
            else:
                values[node] = self.call(node, values, batch)
            if node.op == "output":
                self.result[i] = values[node]
            for n in self.dying.get(node, ()):
                del values[n]
        return found

    def measure(self, node: fx.Node, site: Site) -> Iterator[Met]:
        """What a site meets on each batch if its node runs now; the node can be run again."""
        for values, batch in zip(self.values, self.batches, strict=True):
            watch = Watch(self.names, self.owned)
            with watch:
                self.call(node, values, batch, aside=True)
            yield pick(watch.met, site)

    def reach(self, key: Key) -> list[Met]:
        """Run up to and with the node of a site, and return what it met on each batch; empty if there is no such site."""
        while key not in self.seen and self.at < len(self.nodes):
            node = self.nodes[self.at]
            self.seen = self.run(node, watched=node in self.sites)
            self.at += 1
        return self.seen.get(key, [])

    def finish(self) -> None:
        for node in self.nodes[self.at :]:
            self.run(node)
        self.at = len(self.nodes)


def lean(met: Met) -> Met:
    """Without activations."""
    met.source = met.out = torch.empty(0)
    met.args = met.kwargs = ()
    return met


def call_out(met: Met) -> int:
    return met.call.outputs[0].id if met.call.outputs else -1


def pick(met: Sequence[Met], site: Site) -> Met:
    return [m for m in met if m.name == site.key[0] and (m.product is None) == site.norm][site.inside]


def refusal(site: Site, met: Met, watch: Watch, count: Counter[str]) -> str:
    """Why a site's parameter cannot be changed for it alone, or ""."""
    if site.norm:
        return "" if count[met.name] == 1 else f"its statistics are used {count[met.name]} times"
    times = overlaps(watch.span(met.weight), watch.uses)
    if times > 1:
        return f"its weight is used {times} times"
    if any(n > 1 and s == 0 for n, s in zip(met.weight.shape, met.weight.stride(), strict=True)):
        return "its weight is repeated"
    if any(met.call.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "its product is scaled"
    return ""


def overlaps(span: Span, uses: Mapping[Span, int]) -> int:
    """How many uses share memory with a part of a parameter."""
    name, low, high = span
    return sum(n for (other, a, b), n in uses.items() if other == name and a <= high and low <= b)


def bound(program: fx.GraphModule, batch: Batch) -> dict[str, Any]:
    """The arguments of a batch by name; raises PruneError where the program has none of them."""
    try:
        given = inspect.signature(program.forward).bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        raise PruneError(f"a batch of data does not fit the pruned model: {error}", fix=BATCHES) from error
    given.apply_defaults()
    return given.arguments
