"""Single ops on torch's own samples (OpInfo), each as a small program whose tensors are parameters, pruned at random.

What stays of the results, as the rule of the op says it, is compared three ways: its rewritten call on the sliced tensors, its
masked form on the whole tensors, and brute force, which knows nothing of labels (`brute_force.py`).

A sample is laid out in several ways, so that its labels are more than consecutive numbers: shuffled along a dimension, repeated
along one, or with two dimensions that were one before, which may keep other columns in each row.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from brute_force import Judge, agree, packed
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import fxprune
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import EngineFault
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.registry import UNKNOWN, find
from fxprune.passes.ops.rewriting import function_name
from fxprune.passes.verification.masked_model import MaskedOriginal
from fxprune.pipeline import Compilation
from fxprune.selection.choice import Choice
from fxprune.selection.options import Options
from fxprune.stage_checks import StageFault

X = torch.ones(2, 3, dtype=torch.float64)
OPS = {f"{info.name}{'.' + info.variant_test_name if info.variant_test_name else ''}": info for info in op_db}
LAYOUTS = ("plain", "shuffled", "repeated", "joint")
BEYOND = " is not what brute force computes"
MOST_SAMPLES = 256  # of an op, among which some are chosen


class OneOp(nn.Module):
    """A call of one op: its floating tensors are parameters, other tensors are buffers.

    Arguments:
        function, args, kwargs: the call.
        layout: how the parameters lie; `plain` is as they are given.
        seed: of the order that they are shuffled in.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, layout: str = "plain", seed: int = 0) -> None:
        super().__init__()
        self.function, self.layout = function, layout
        leaves, self.spec = tree_flatten((args, kwargs))
        self.values: list[Any] = []
        self.dims: dict[str, int] = {}  # along which a parameter is laid out otherwise
        self.sizes: dict[str, tuple[int, ...]] = {}
        generator = torch.Generator().manual_seed(seed)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                name = f"t{i}"
                value = leaf.detach().clone()
                if value.is_floating_point() or value.is_complex():
                    setattr(self, name, nn.Parameter(self.laid_out(name, value, generator)))
                else:
                    self.register_buffer(name, value)
                self.values.append(name)
            else:
                self.values.append((leaf,))

    def laid_out(self, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
        """A parameter such that `argument` makes the value of it; where it repeats entries, another value of that shape."""
        width = 2 if self.layout == "joint" else 1
        dims = [d for d in range(value.dim() - width + 1) if min(value.shape[d : d + width]) > 1]
        if self.layout == "plain" or not dims or value.layout is not torch.strided:
            return value
        dim = self.dims[name] = dims[int(torch.randint(len(dims), (), generator=generator))]
        n = value.shape[dim]
        if self.layout == "joint":
            self.sizes[name] = tuple(value.shape[dim : dim + 2])
            return value.flatten(dim, dim + 1)
        if self.layout == "repeated":
            picks = torch.randint(max(2, 2 * n // 3), (n,), generator=generator)
            self.register_buffer(f"{name}_picks", picks)
            return value.narrow(dim, 0, max(2, 2 * n // 3)).clone()
        picks = torch.randperm(n, generator=generator)
        self.register_buffer(f"{name}_picks", picks)
        return value.index_select(dim, picks.argsort())

    def argument(self, name: str, value: Tensor) -> Tensor:
        """What the op is given for one of the tensors."""
        if name not in self.dims:
            return value
        if name in self.sizes:
            return value.unflatten(self.dims[name], self.sizes[name])
        return value.index_select(self.dims[name], getattr(self, f"{name}_picks"))

    def forward(self, x: Tensor) -> Any:
        return self.call([self.argument(v, getattr(self, v)) if isinstance(v, str) else v[0] for v in self.values])

    def call(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)

    # -- for brute force --------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {v: getattr(self, v).detach() for v in self.values if isinstance(v, str)}

    def compute(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        return tree_leaves(
            self.call([self.argument(v, values[v].clone()) if isinstance(v, str) else v[0] for v in self.values])
        )

    def integers(self) -> list[int]:
        return [v[0] for v in self.values if not isinstance(v, str) and type(v[0]) is int]

    def alone(self, values: Mapping[str, Tensor], kept: Mapping[str, Tensor], integers: Sequence[int]) -> list[Tensor]:
        """The op on kept entries and nothing else, with other integers."""
        given = iter(integers)
        leaves: list[Any] = []
        for v in self.values:
            if isinstance(v, str):
                leaves.append(packed(self.argument(v, values[v]), self.argument(v, kept[v])))
            else:
                leaves.append(next(given) if type(v[0]) is int else v[0])
        return tree_leaves(self.call(leaves))


class Dispatched(TorchDispatchMode):
    """The dispatcher functions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@dataclass
class Outcome:
    """How a sample ended.

    Attributes:
        status: `exact`; `whole` where nothing could go; `several` where the op is a program of several calls, which agrees with
            its masked form, while brute force, which judges one call, has nothing to say; `wrong`; `crashed`; `skipped` where
            the sample says nothing.
        message: what is wrong, or why it is skipped.
        references: what brute force found each result to equal.
        unknown: dispatcher functions that have no specification.
    """

    status: str
    message: str = ""
    references: list[str] = field(default_factory=list)
    unknown: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "crashed")


def is_several(choice: Choice) -> bool:
    """Whether the op is a function of Python's that makes several calls, which the program captured has one by one."""
    capture = choice.solution.captures[0]
    moves = ("index_select", "unflatten", "getitem")
    calls = [node for node in capture.graph.nodes if node.op in ("call_function", "call_method")]
    made = [node for node in calls if collect(capture.results[node], TensorRef)]
    return len([node for node in made if function_name(node) not in moves]) > 1


class Skipped(Exception):
    """Why a sample says nothing."""


def samples(name: str, count: int) -> list[Any]:
    """Samples of an op, of fractions of 64 bits: `count` of them, drawn from those that torch has."""
    info = OPS[name]
    if torch.float64 not in info.dtypes:
        return []
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=False), MOST_SAMPLES))
    drawn = sorted(random.Random(0).sample(range(len(found)), min(count, len(found))))
    return [found[i] for i in drawn]


def check(name: str, sample: Any, layout: str = "plain", seed: int = 0) -> Outcome | None:
    """Prune one sample in one layout; None where the layout is the plain one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = OneOp(OPS[name].op, (sample.input, *sample.args), sample.kwargs, layout, seed).eval()
        if layout != "plain" and not model.dims:
            return None
        try:
            unknown = survey(model)
        except Skipped as reason:
            return Outcome("skipped", str(reason))
        found = Trial(model, seed).run()
        found.unknown = unknown
        return found


def survey(model: OneOp) -> tuple[str, ...]:
    """The dispatcher functions without a specification; raises Skipped where a sample says nothing."""
    if not list(model.parameters()):
        raise Skipped("has no tensor of fractions")
    if any(tensor.layout is not torch.strided for tensor in model.tensors().values()):
        raise Skipped("takes sparse tensors")
    outs = []
    with torch.no_grad():
        for attempt in range(2):
            torch.manual_seed(attempt)
            with Dispatched() as dispatched:
                try:
                    outs.append(tree_leaves(model(X)))
                except Exception as error:
                    raise Skipped(f"raises {type(error).__name__} itself") from None
    first, second = outs
    if not first or not all(isinstance(leaf, Tensor) for leaf in first):
        raise Skipped("returns no tensors")
    if any(leaf.layout is not torch.strided for leaf in first):
        raise Skipped("returns sparse tensors")
    if any(torch.Tag.nondeterministic_seeded in f.tags for f in dispatched.functions):
        raise Skipped("draws random numbers")
    if dispatched.functions and "empty" in dispatched.functions[-1]._schema.name:
        raise Skipped("returns memory that was not written")
    if any(leaf.dtype == torch.complex32 for leaf in first):
        raise Skipped("returns complex numbers of half precision")
    if any(bool((leaf != leaf).any()) for leaf in first):
        raise Skipped("returns NaN")
    if not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise Skipped("is not deterministic")
    return tuple(sorted({str(f) for f in dispatched.functions if find(f) is UNKNOWN}))


class Trial:
    """One program, some of whose channels are removed at random."""

    def __init__(self, model: OneOp, seed: int) -> None:
        self.model = model
        self.x = X.to(next(model.parameters()).real.dtype)
        self.options = Options.parse(
            model,
            ratio=(0.5, 0.7)[seed % 2],
            criterion=fxprune.criteria.Random(seed),
            release="*",
            attention="heads" if seed % 2 == 0 else "dims",
            verify=False,
        )
        self.compilation = Compilation(model, ExampleInputs.parse(self.x), self.options.coupling)

    @torch.no_grad()
    def run(self) -> Outcome:
        try:
            with entry_point(self.model):
                choice = self.compilation.choose(self.options)
                several = is_several(choice)
                pruned = self.compilation.emit(choice)
        except fxprune.PruneError as error:
            whole = str(error).startswith("nothing in the model can be pruned")
            return Outcome("whole" if whole else "crashed", str(error))
        except (Exception, StageFault, EngineFault) as error:
            return Outcome("crashed", f"{type(error).__name__}: {error}")
        if not any(choice.slices.values()):
            return Outcome("whole")
        try:
            found = tree_leaves(pruned(self.x))
            masked = MaskedOriginal(self.model, choice.removal(self.options.coupling.heads))
            wanted = tree_leaves(masked((self.x,), {}, whole=False))
        except (Exception, StageFault, EngineFault) as error:
            return Outcome("crashed", f"{type(error).__name__}: {error}\n{pruned.code}")
        judge = self.judge(choice)
        if len(found) != len(judge.whole):
            return Outcome("crashed", f"{len(found)} results instead of {len(judge.whole)}")
        references = judge.references(found)
        faults = [f"result {i}{BEYOND}" for i, name in enumerate(references) if not name]
        pairs = enumerate(zip(wanted, found, strict=True))
        faults += [f"result {i} is not what the masked form computes" for i, (want, got) in pairs if not agree(want, got)]
        faults += [lost] if (lost := judge.lost()) else []
        if faults and several and not [fault for fault in faults if not fault.endswith(BEYOND)]:
            return Outcome("several", references=references)
        return Outcome("wrong", "; ".join(faults) + "\n" + pruned.code) if faults else Outcome("exact", references=references)

    def judge(self, choice: Choice) -> Judge:
        labels = choice.solution.values[0]
        outputs = [
            choice.slicer(labels.get(ref.id, ()), choice.solution.captures[0].op_trace.shape(ref))
            for _, ref in choice.solution.captures[0].outputs
        ]
        model = self.model
        return Judge(model.compute, model.alone, model.integers(), model.tensors(), choice.slices, outputs)


def layouts_of(name: str, sample: Any) -> Iterator[tuple[str, Outcome]]:
    """The outcome of a sample in each layout that it has."""
    for seed, layout in enumerate(LAYOUTS):
        outcome = check(name, sample, layout, seed)
        if outcome is not None:
            yield layout, outcome
