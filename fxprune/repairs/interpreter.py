"""Run a captured program on several batches at once, node by node, so that a layer can be changed before later ones run."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.criteria.calibration import BATCHES, Batch, batch_refused
from fxprune.passes.capture.modules import after_forward, before_forward
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.program import REGIONS, SET_GRAD_ENABLED
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ops.call import OpView
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.repairs.look_ahead import PRECISE, Line, Trace, by_channel
from fxprune.repairs.sites import (
    Key,
    RepairSite,
    SiteCall,
    SiteObserver,
    address,
    count_overlaps,
    drop_activations,
    find_call,
    why_fixed,
)


class BatchInterpreter(fx.Interpreter):
    """Runs a program on one batch; values that no later node reads are dropped.

    Arguments:
        program: in evaluation mode.
        batch: what to run it on.
        own: the addresses of the memory of its tensors.
    """

    def __init__(self, program: fx.GraphModule, batch: Batch, own: set[int]) -> None:
        super().__init__(program)
        self.own = own
        self.copies = False  # whether nodes are run on copies of their arguments
        try:
            if program._forward_pre_hooks:
                batch = batch.map(torch.clone)  # which a hook may write to
            self.given = before_forward(program, batch.args, batch.kwargs)
            given = inspect.signature(program.forward).bind(*self.given[0], **self.given[1])
        except TypeError as error:
            raise PruneError(f"a batch of data does not fit the pruned model: {error}", fix=BATCHES) from error
        given.apply_defaults()
        self.arguments = given.arguments

    def step(self, node: fx.Node) -> Any:
        """Run a node, whose arguments have been computed."""
        self.env[node] = value = self.run_node(node)
        for last in self.user_to_last_uses.get(node, ()):
            del self.env[last]
        return value

    def step_on_copies(self, node: fx.Node) -> Any:
        """Run a node on copies of its arguments, so that it can be run again."""
        self.copies = True
        try:
            return self.run_node(node)
        finally:
            self.copies = False

    def look_ahead(self, call: SiteCall, site: RepairSite, value: Tensor, lines: dict[Key, Line | None]) -> SiteCall:
        """The call of a site with what its result, which a node returned as `value`, becomes.

        Arguments:
            lines: those of sites that are known; grows.
        """
        if not site.path.nodes:
            return call
        if site.key not in lines:
            dim = 1 if call.product is None else call.product.out
            if dim % call.out.dim() == call.out.dim() - 1:
                dim = -1  # also where tokens are in one line
            by_expert = call.weight.dim() == 3 and "dilation" not in call.op.named  # in a batch of matrices
            known = not by_expert and (dim == -1 or value.shape == call.out.shape)
            lines[site.key] = site.path.line(self, value, dim) if known else None
        call.line = lines[site.key]
        if call.line is None:
            call.ahead = site.path.follow(self, value).reshape(call.out.shape)
        return call

    def run_node(self, node: fx.Node) -> Any:
        try:
            return super().run_node(node)
        except PruneError:
            raise
        except Exception as error:
            raise batch_refused(error) from error

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(node)
        if self.copies:
            args, kwargs = map_tensors((args, kwargs), lambda t: t if address(t) in self.own else t.clone())
        return tuple(args), kwargs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Programs run in turns, and what is solved in between is in full precision: no region of autocast is entered."""
        return None if target in REGIONS and target is not SET_GRAD_ENABLED else super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return after_forward(self.module, *self.given, super().output(target, args, kwargs))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An argument of the batch, copied, since a program may write to its inputs."""
        return map_tensors(self.arguments[str(target).lstrip("*")], torch.clone)


class ProgramRun:
    """A program on its way through several batches.

    Arguments:
        program: in evaluation mode; its tensors may be changed between nodes.
        batches: what to run it on.
        name: from the path of a tensor of the program to its name.

    Attributes:
        sites: what can be repaired, by node.
        computed: how many products have a weight that is computed from parameters.
        position: how many nodes have run.
        result: the output for each batch.
    """

    def __init__(self, program: fx.GraphModule, batches: Sequence[Batch], name: Callable[[str], str] = str) -> None:
        program = program.flat() if isinstance(program, PrunedModule) else program
        self.nodes = list(program.graph.nodes)
        self.tensors = {name(path): t for path, t in named_tensors(program)}
        self.names = {id(t): name for name, t in self.tensors.items()}
        self.owned = {
            address(t): name
            for name, t in self.tensors.items()
            if isinstance(t, nn.Parameter) and t.is_floating_point() and t.numel()
        }
        own = {address(t) for t in self.tensors.values()} - {0}
        self.sites: dict[fx.Node, list[RepairSite]] = {}
        self.computed = 0
        self.slopes: dict[Key, Tensor] = {}  # of sites for whose channels they are numbers
        self.lines: dict[Key, Line | None] = {}  # of sites as they are now
        self.followed: dict[Key, fx.Node] = {}  # nodes whose result is that of a site
        self.find_sites(BatchInterpreter(program, min(batches, key=lambda batch: batch.size), own))
        self.interpreters = [BatchInterpreter(program, batch, own) for batch in batches]
        self.position = 0
        self.calls: dict[Key, list[SiteCall]] = {}
        self.result: list[Any] = [None for _ in batches]

    def find_sites(self, interpreter: BatchInterpreter) -> None:
        """Run a batch to find the sites, what else uses their parameters, and where a constant can be added."""
        observer = SiteObserver(self.names, self.owned)
        found: list[tuple[RepairSite, SiteCall, int]] = []
        count: Counter[str] = Counter()
        trace, positions = Trace(), {node: i for i, node in enumerate(self.nodes)}
        for node in self.nodes:
            observer.writes, begin = False, len(observer.op_trace.ops)
            with observer:
                value = interpreter.step(node)
            trace.ops[node] = [OpView(op, observer.op_trace) for op in observer.op_trace.ops[begin:]]
            if isinstance(value, Tensor):
                trace.shapes[node] = tuple(value.shape)
            if observer.writes:
                trace.note_write(node, value, interpreter.env)
            if node.op == "placeholder":
                for tensor in collect(value, Tensor):
                    observer.op_trace.values[observer.ref(tensor).id].from_input = True
            here: Counter[str] = Counter()
            for call in observer.calls:
                site = RepairSite((call.name, count[call.name]), call.product is None, here[call.name])
                count[call.name] += 1
                here[call.name] += 1
                self.sites.setdefault(node, []).append(site)
                self.followed |= {site.key: node} if is_result(call, value) else {}
                found.append((site, drop_activations(call), call.op.outputs[0].id))
            observer.calls.clear()
        self.computed, self.writing = len(observer.computed), trace.writing
        returned = {observer.ref(t).id for t in collect(list(interpreter.env.values()), Tensor)}
        norms = {call.op.first.id: site for site, call, _ in found if site.norm}
        for site, call, out in found:
            site.reason = why_fixed(site, call, observer, count)
            if site.key in self.followed:
                site.path = trace.path(self.followed[site.key], positions)
            bias = call.bias
            scaled = any(call.op.get(name, 1) != 1 for name in ("alpha", "beta"))
            own = bias is not None and bias.dim() == 1 and observer.owner(bias)
            if bias is not None and own and count_overlaps(observer.span(bias), observer.uses) == 1:
                site.place = None if scaled else "bias"
            elif out in norms and observer.readers[out] == 1 and out not in returned and count[norms[out].key[0]] == 1:
                site.place = norms[out].key

    def run(self, node: fx.Node) -> None:
        """Run a node on every batch."""
        for i, interpreter in enumerate(self.interpreters):
            value = interpreter.step(node)
            if node.op == "output":
                self.result[i] = value

    def run_observed(self, node: fx.Node) -> dict[Key, list[SiteCall]]:
        """Run a node on every batch and return the calls of each of its sites, batch by batch; none where a batch has none."""
        found: dict[Key, list[SiteCall]] = {site.key: [] for site in self.sites[node]}
        for interpreter in self.interpreters:
            observer = SiteObserver(self.names, self.owned)
            with observer:
                value = interpreter.step(node)
            for site in self.sites[node]:
                if (call := find_call(observer.calls, site)) is not None:
                    found[site.key].append(interpreter.look_ahead(call, site, value, self.lines))
        return {key: calls if len(calls) == len(self.interpreters) else [] for key, calls in found.items()}

    def run_until(self, key: Key) -> tuple[fx.Node, RepairSite] | None:
        """Run the nodes before that of a site, and return both; None if there is no such site, or its node has run."""
        pending = [
            (i, s) for i, n in enumerate(self.nodes) for s in self.sites.get(n, ()) if s.key == key and i >= self.position
        ]
        for position, site in pending:
            for node in self.nodes[self.position : position]:
                self.run(node)
            self.position = position
            return self.nodes[position], site
        return None

    def measure(self, node: fx.Node, site: RepairSite, batches: Collection[int]) -> Iterator[SiteCall]:
        """The call of a site on those of some batches that have one, if its node ran now; the node can be run again."""
        for interpreter in [self.interpreters[i] for i in sorted(batches)]:
            observer = SiteObserver(self.names, self.owned)
            with observer:
                value = interpreter.step_on_copies(node) if node in self.writing else interpreter.run_node(node)
            if (call := find_call(observer.calls, site)) is None:
                continue
            call = interpreter.look_ahead(call, site, value, self.lines)
            if call.ahead is not None:
                call.slope = self.slopes.get(site.key)
                if call.slope is None:
                    dim = 1 if call.product is None else call.product.out
                    whole = site.path.slope(interpreter, value, call.ahead.reshape(value.shape)).reshape(call.out.shape)
                    call.slope = by_channel(whole, dim)
                    if call.slope.numel() == call.out.shape[dim]:
                        self.slopes[site.key] = call.slope
            yield call

    def run_to(self, key: Key) -> list[SiteCall]:
        """Run the nodes up to that of a site and return its call on each batch; empty if there is none, or it has run."""
        if key not in self.calls:
            self.calls = {}
            if (found := self.run_until(key)) is not None:
                self.calls = self.run_observed(found[0])
                self.position += 1
        return self.calls.get(key, [])

    def finish(self) -> None:
        """Run the nodes that have not run yet."""
        for node in self.nodes[self.position :]:
            self.run(node)
        self.position = len(self.nodes)


def is_result(call: SiteCall, value: Any) -> bool:
    """Whether a node returned what a call did, if in another shape, and precisely enough to tell a slope."""
    if not isinstance(value, Tensor) or value.dtype not in PRECISE or value.numel() != call.out.numel():
        return False
    return torch.equal(value.reshape(call.out.shape), call.out)
