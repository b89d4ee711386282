"""A captured program on several batches at once, node by node, so that a layer can be changed before what follows has run."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.criteria.calibration import BATCHES, Batch
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import fetch, named_tensors
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.repair.sites import Key, Met, RepairSite, SiteObserver, lean, overlaps, pick, refusal


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
    sites: dict[fx.Node, list[RepairSite]] = field(default_factory=dict)
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
        try:
            return self.called(node, values, batch, aside)
        except PruneError:
            raise
        except Exception as error:
            raise PruneError(f"the model raises {type(error).__name__} on a batch of data: {error}", fix=BATCHES) from error

    def called(self, node: fx.Node, values: Mapping[fx.Node, Any], batch: Batch, aside: bool) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        if aside:
            own = lambda t: t.untyped_storage().data_ptr() in self.owned if t.numel() else False  # noqa: E731
            args, kwargs = map_tensors((args, kwargs), lambda t: t if own(t) or id(t) in self.names else t.clone())
        if node.op == "placeholder":  # a program may write to its inputs, and the data is not its own
            return map_tensors(bound(self.program, batch)[str(node.target).lstrip("*")], torch.clone)
        if node.op == "get_attr":
            return fetch(self.program, str(node.target))
        if node.op == "call_module":
            return self.program.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator]

    def survey(self) -> None:
        """Run the first batch to find the sites, what else uses their parameters, and where a constant can go."""
        watch = SiteObserver(self.names, self.owned)
        values: dict[fx.Node, Any] = {}
        batch = self.batches[0]
        sites: list[tuple[RepairSite, Met, int]] = []
        count: Counter[str] = Counter()
        with watch:
            for node in self.nodes:
                values[node] = self.call(node, values, batch)
                if node.op == "placeholder":
                    for tensor in collect(values[node], Tensor):
                        watch.op_trace.values[watch.ref(tensor).id].from_input = True
                here: Counter[str] = Counter()
                for met in watch.met:
                    site = RepairSite((met.name, count[met.name]), met.product is None, here[met.name])
                    count[met.name] += 1
                    here[met.name] += 1
                    self.sites.setdefault(node, []).append(site)
                    sites.append((site, lean(met), met.call.outputs[0].id))
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
                watch = SiteObserver(self.names, self.owned)
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

    def measure(self, node: fx.Node, site: RepairSite) -> Iterator[Met]:
        """What a site meets on each batch if its node runs now; the node can be run again."""
        for values, batch in zip(self.values, self.batches, strict=True):
            watch = SiteObserver(self.names, self.owned)
            with watch:
                self.call(node, values, batch, aside=True)
            yield pick(watch.met, site)

    def reach(self, key: Key) -> list[Met]:
        """Run up to and with the node of a site, and return what it met on each batch; empty if there is no such site."""
        if not any(site.key == key for sites in self.sites.values() for site in sites):
            return []
        while key not in self.seen and self.at < len(self.nodes):
            node = self.nodes[self.at]
            self.seen = self.run(node, watched=node in self.sites)
            self.at += 1
        return self.seen.get(key, [])

    def finish(self) -> None:
        for node in self.nodes[self.at :]:
            self.run(node)
        self.at = len(self.nodes)


def bound(program: fx.GraphModule, batch: Batch) -> dict[str, Any]:
    """The arguments of a batch by name; raises PruneError where the program has none of them."""
    try:
        given = inspect.signature(program.forward).bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        raise PruneError(f"a batch of data does not fit the pruned model: {error}", fix=BATCHES) from error
    given.apply_defaults()
    return given.arguments
