"""Comparison of a pruned model with the masked original."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import GuardError
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.module_tree import private_copy
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.verification.masked_model import MaskedOriginal, random_state, relative_error, set_random_state

# float32 sums in another order differ by about this much over the depth of a deep network
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
REFUSED = " is refused: "


def tolerance_of(model: nn.Module) -> float:
    """The relative error up to which results of a model count as equal, by the dtypes of its parameters."""
    return max((TOLERANCE.get(p.dtype, 1e-3) for p in model.parameters() if p.is_floating_point()), default=1e-3)


@dataclass(frozen=True)
class Verification:
    """What was compared, and the largest relative error found.

    Attributes:
        error: the largest absolute difference of an output over its largest absolute value.
        compared: a sentence for each comparison made.
        tolerance: the error up to which the result counts as equal, by dtype.
        blank: whether all that the masked original returned was zero, as with a last layer that starts at zero: then the two
            agree whatever comes before it.
    """

    error: float
    compared: tuple[str, ...]
    tolerance: float
    blank: bool = False

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    @property
    def refused(self) -> tuple[str, ...]:
        """Those of the comparisons that could not be made, since the pruned program takes no such inputs."""
        return tuple(said for said in self.compared if REFUSED in said)

    def __str__(self) -> str:
        verdict = "exact" if self.ok else "NOT exact"
        said = (*self.compared, "all outputs are zero, which says little") if self.blank else self.compared
        return f"{verdict}: largest relative error {self.error:.1e} against the masked original ({'; '.join(said)})"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, each module back in its own afterwards."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        yield
    finally:
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def restoring(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """What a forward writes into buffers (running statistics, caches) is taken back; into parameters, where that is asked."""
    tensors = [*model.buffers(), *(model.parameters() if parameters else ())]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def compare(
    model: nn.Module,
    pruned: fx.GraphModule,
    leaves: Mapping[str, Labels],
    kept: Tensor,
    heads: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    sizes: bool,
) -> Verification:
    """Run both on the example inputs, and at other sizes where the original takes them.

    What differs in the model's own precision is compared in double precision once more: where scores are ranked, rounding
    decides which of two comes first, and then everything after it is another one's.
    """
    found = compare_as_they_are(model, pruned, leaves, kept, heads, args, kwargs, sizes=sizes)
    if found.ok or found.tolerance <= TOLERANCE[torch.float64]:
        return found
    try:
        reference = private_copy(model, doubled)
        args, kwargs = map_tensors((args, kwargs), lambda t: t.double() if t.is_floating_point() else t)
        again = compare_as_they_are(reference, copy.deepcopy(pruned).double(), leaves, kept, heads, args, kwargs, sizes=sizes)
    except Exception:  # the model insists on its precision
        return found
    return replace(again, compared=(*again.compared, "in double precision")) if again.ok else found


def doubled(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double()
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


def compare_as_they_are(
    model: nn.Module,
    pruned: fx.GraphModule,
    leaves: Mapping[str, Labels],
    kept: Tensor,
    heads: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    sizes: bool,
) -> Verification:
    """`compare` in the precision that model and inputs have."""
    error, compared, blank = 0.0, [], True
    tolerance = tolerance_of(model)
    cases = [("the example inputs", args, kwargs)]
    if sizes:
        cases += [(name, i.args, i.kwargs) for name, i in ExampleInputs(args, kwargs).other_sizes()]
    masked = MaskedOriginal(model, leaves, kept, heads)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with evaluating(pruned), torch.no_grad(), torch.random.fork_rng(devices=devices):
        for name, a, k in cases:
            try:
                drawn = random_state(devices)  # a model may draw in evaluation, too: both draw the same numbers
                wanted = masked(a, k, whole=False)
            except Exception:
                if name == "the example inputs":
                    raise
                continue  # the original does not take this size
            try:
                set_random_state(devices, drawn)
                with restoring(pruned, parameters=masked.writes):
                    got = pruned(*a, **k)
            except GuardError as refused:
                if name == "the example inputs":
                    raise
                compared.append(f"another {name}{REFUSED}{refused}")
                continue
            error = max([error, *differences(wanted, got)])
            blank = blank and not any(bool(t.any()) for t in collect(wanted, Tensor))
            compared.append(name if name == "the example inputs" else f"another {name}")
    return Verification(error, tuple(compared), tolerance, blank)


def differences(wanted: Any, got: Any) -> list[float]:
    a, b = collect(wanted, Tensor), collect(got, Tensor)
    if len(a) != len(b):
        return [float("inf")]
    return [relative_error(x, y) for x, y in zip(a, b, strict=True)]
