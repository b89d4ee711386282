"""Single ops on torch's own samples (OpInfo), each as a small program whose tensors are parameters, pruned and verified.

What an op's specification says is compared with the op itself: its masked form on the whole tensors, then sliced, against its
rewritten call on the sliced tensors.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import fxprune
from fxprune.passes.ops.registry import UNKNOWN, find

X = torch.ones(2, 3, dtype=torch.float64)
TOLERANCE = 1e-8
OPS = {f"{info.name}{'.' + info.variant_test_name if info.variant_test_name else ''}": info for info in op_db}


class OneOp(nn.Module):
    """A call of one op: its floating tensors are parameters, other tensors are buffers."""

    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.function = function
        leaves, self.spec = tree_flatten((args, kwargs))
        self.values: list[Any] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                name = f"t{i}"
                if leaf.is_floating_point() or leaf.is_complex():
                    setattr(self, name, nn.Parameter(leaf.detach().clone()))
                else:
                    self.register_buffer(name, leaf.clone())
                self.values.append(name)
            else:
                self.values.append((leaf,))

    def forward(self, x: Tensor) -> Any:
        leaves = [getattr(self, v) if isinstance(v, str) else v[0] for v in self.values]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)


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
        status: `exact`; `whole` where nothing could go; `wrong`; `crashed`; `skipped` where the sample says nothing.
        removed: the share of the elements of its parameters that went.
        unknown: dispatcher functions that have no specification.
    """

    status: str
    message: str = ""
    error: float = 0.0
    removed: float = 0.0
    unknown: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "crashed")


def samples(name: str, count: int) -> Iterator[Any]:
    """The first samples of an op, of fractions of 64 bits."""
    info = OPS[name]
    if torch.float64 in info.dtypes:
        torch.manual_seed(0)
        yield from itertools.islice(info.sample_inputs("cpu", torch.float64, requires_grad=False), count)


def alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def check(name: str, sample: Any, seed: int = 0) -> Outcome:
    """Prune and verify one sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checked(name, sample, seed)


def checked(name: str, sample: Any, seed: int) -> Outcome:
    model = OneOp(OPS[name].op, (sample.input, *sample.args), sample.kwargs).eval()
    if not list(model.parameters()):
        return Outcome("skipped", "no tensor of fractions")
    outs = []
    with torch.no_grad():
        for attempt in range(2):
            torch.manual_seed(attempt)
            with Dispatched() as dispatched:
                try:
                    outs.append(model(X))
                except Exception as error:
                    return Outcome("skipped", f"the op itself raises {type(error).__name__}")
    unknown = tuple(sorted({str(f) for f in dispatched.functions if find(f) is UNKNOWN}))
    first, second = (tree_leaves(out) for out in outs)
    if not first or not all(isinstance(leaf, Tensor) for leaf in first):
        return Outcome("skipped", "it returns no tensors", unknown=unknown)
    if any(leaf.layout is not torch.strided for leaf in first):
        return Outcome("skipped", "it returns sparse tensors", unknown=unknown)
    if any(torch.Tag.nondeterministic_seeded in f.tags for f in dispatched.functions):
        return Outcome("skipped", "it draws random numbers", unknown=unknown)
    if any(bool((leaf != leaf).any()) for leaf in first):
        return Outcome("skipped", "its sample is not in its domain", unknown=unknown)
    if not all(alike(a.detach(), b.detach()) for a, b in zip(first, second, strict=True)):
        return Outcome("skipped", "it draws random numbers", unknown=unknown)
    x = X.to(next(model.parameters()).real.dtype)
    try:
        pruned = fxprune.prune(model, 0.5, example_inputs=x, criterion=fxprune.criteria.Random(seed), release="*", verify=False)
    except fxprune.PruneError as error:
        whole = "nothing in the model can be pruned" in str(error)
        return Outcome("whole" if whole else "crashed", str(error), unknown=unknown)
    except Exception as error:
        return Outcome("crashed", f"{type(error).__name__}: {error}", unknown=unknown)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
    if before == after:
        return Outcome("whole", unknown=unknown)
    try:
        error = fxprune.verify(model, pruned, x).error
    except Exception as failure:
        return Outcome("crashed", f"{type(failure).__name__}: {failure}", removed=1 - after / before, unknown=unknown)
    status = "exact" if error <= TOLERANCE else "wrong"
    return Outcome(status, "" if status == "exact" else pruned.code, error, 1 - after / before, unknown)
