"""Compare a pruned model with the masked original and with the zeroed original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.inputs import ExampleInputs
from fxprune.passes.capture.programs import OWN
from fxprune.passes.errors import PruneError, told
from fxprune.passes.ir.contents import contents, refill, written_back
from fxprune.passes.ir.module_tree import named_parameters, named_tensors, walk
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.quiet import unobserved
from fxprune.passes.verification.masked_model import relative_error

# float32 sums in another order differ by about this much over the depth of a deep network
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
REFUSED = " is refused: "


def tolerance_of(model: nn.Module) -> float:
    """The relative error up to which results of a model count as equal, by the dtypes of its parameters."""
    dtypes = {p.dtype for p in named_parameters(model).values() if p.is_floating_point()}
    return max((TOLERANCE.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)


@dataclass(frozen=True)
class Verification:
    """What a pruned model was compared with, and the largest relative error found.

    There are two references. The *masked* original computes with kept channels only, by the labels that its values carry. The
    *zeroed* original has its removed parameters set to zero and knows no labels; it is a reference wherever zero stays zero on
    the way (there is no mean or norm over channels). Where it is one, it decides. `prune` takes such means and norms over what
    is not zero, by the labels of the capture. Parameters whose elements are all equal would hide what they multiply: the same
    random numbers are added to them in all that is compared.

    Attributes:
        error: the largest absolute difference of an output over its largest absolute value, against the reference that decides.
        compared: a sentence for each comparison made.
        tolerance: the error up to which the result counts as equal, by the precision of the arithmetic done.
        blank: whether all outputs of a reference are zero: then the two agree whatever comes before.
        excused: input sizes that were not compared since the original itself fails there, with its error.
        masked: the error against the masked original; None where the zeroed one was enough.
        zeroed: the error against the zeroed original; None where its outputs have other shapes, or it does not run.
        no_zeroed: why the zeroed original is no reference; empty where it is one, or where the two agree.
    """

    error: float
    compared: tuple[str, ...]
    tolerance: float
    blank: bool = False
    excused: tuple[str, ...] = ()
    masked: float | None = None
    zeroed: float | None = None
    no_zeroed: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    @property
    def refused(self) -> tuple[str, ...]:
        """Those of the comparisons that could not be made, since the pruned program takes no such inputs."""
        return tuple(said for said in self.compared if REFUSED in said)

    @property
    def disagreement(self) -> str:
        """What to know where the two references disagree; empty where they agree."""
        if self.no_zeroed:
            return f"the zeroed original does not apply: {self.no_zeroed}"
        if self.zeroed is None or self.masked is None or (self.masked <= self.tolerance) == (self.zeroed <= self.tolerance):
            return ""
        if self.zeroed <= self.tolerance:
            return f"the masked original differs by {self.masked:.1e}, but the zeroed one applies and decides"
        return f"the masked original agrees to {self.masked:.1e}, but the zeroed one applies and decides"

    def __str__(self) -> str:
        verdict = "exact" if self.ok else "NOT exact"
        said = [*self.compared, *self.excused, *([self.disagreement] if self.disagreement else [])]
        said += ["all outputs are zero, which says little"] if self.blank else []
        one = "masked" if self.no_zeroed or self.zeroed is None else "zeroed"
        against = one if one == "masked" or self.disagreement or self.masked is None else "masked and the zeroed"
        return f"{verdict}: largest relative error {self.error:.1e} against the {against} original ({'; '.join(said)})"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, each module back in its own afterwards."""
    modes = {m: m.training for m in walk(model)}
    trains = any(modes.values())
    try:
        if trains:
            model.eval()
        yield
    finally:
        if trains or any(m.training for m in modes):
            model.train(modes[model])
            for module, training in modes.items():
                module.training = training


def quietly(pruned: nn.Module) -> Callable[..., Any]:
    """How to call a pruned model so that FX prints nothing where that fails, which is no news here."""
    call: Callable[..., Any] = pruned if pruned._forward_hooks or pruned._forward_pre_hooks else pruned.forward
    return call


@contextlib.contextmanager
def restoring(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Restore what a forward writes to, or assigns anew: attributes, containers, buffers, and with `parameters` those too.

    Gradients that a forward gives to parameters go.
    """
    tensors = [t for _, t in named_tensors(model) if parameters or not isinstance(t, nn.Parameter)]
    gradients = [(p, p.grad) for p in named_parameters(model).values()]
    seen: set[int] = set()
    held = [contents(vars(module), seen) for module in walk(model)]
    written = [written_back(t) for t in tensors]
    try:
        yield
    finally:
        for attributes in held:
            refill(attributes)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        refill(written)


def difference(wanted: Any, got: Any) -> float:
    """The largest relative error of any tensor; infinite where there are more or fewer than wanted."""
    a, b = collect(wanted, Tensor), collect(got, Tensor)
    return max(map(relative_error, a, b), default=0.0) if len(a) == len(b) else float("inf")


def without_zeros(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor without the slices that are zero, where that leaves the shape."""
    for dim, wanted in enumerate(shape) if tensor.dim() == len(shape) and tensor.shape != shape else ():
        if tensor.shape[dim] != wanted:
            others = [d for d in range(tensor.dim()) if d != dim]
            filled = ((tensor != 0).any(others) if others else tensor).nonzero().flatten()
            tensor = tensor.index_select(dim, filled) if len(filled) == wanted else tensor
    return tensor


def is_blank(returned: Any) -> bool:
    """Whether there is nothing but zeros in it."""
    return not any(bool(t.any()) for t in collect(returned, Tensor))


def unverifiable(model: nn.Module, inputs: ExampleInputs, error: Exception) -> PruneError:
    """The error for a pruned model that cannot be compared: the original's own, if it does not take the example inputs."""
    try:
        with unobserved(model), evaluating(model), restoring(model):
            inputs.call(model)
    except Exception as own:
        fix = "example_inputs on which model(*example_inputs) runs"
        return PruneError(f"{OWN} {told(own)}", where=type(model).__name__, fix=fix)
    return PruneError(
        f"the pruned model could not be verified: {type(error).__name__}: {error}",
        where=type(model).__name__,
        fix="freeze= the module it names, or verify=False to get the model as it is",
    )


def inexact(model: nn.Module, inputs: ExampleInputs, found: Verification) -> PruneError:
    """The error for a pruned model that differs from its original, or cannot be compared, as the original returns NaN."""
    with unobserved(model), evaluating(model), restoring(model):
        blank = any(bool(t.isnan().all()) for t in collect(inputs.call(model), Tensor) if t.numel())
    if blank:
        what = "the pruned model cannot be compared: the original itself returns nothing but NaN"
        fix = "inputs and weights for which it returns numbers, or verify=False"
    else:
        what = f"the pruned model is not exact: its relative error is {found.error:.1e}, and {found.tolerance:.0e} is allowed"
        fix = "report it with the model; verify=False returns the model as it is"
    return PruneError(what, where=type(model).__name__, fix=fix)
