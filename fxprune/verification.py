"""Compare a pruned model with the masked original and with the zeroed original."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import GuardError
from fxprune.passes.ir.contents import contents, refill
from fxprune.passes.ir.module_tree import named_parameters, named_tensors, private_copy
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.quiet import own_random_state, random_state, set_random_state
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.verification.masked_model import (
    InIndexOrder,
    MaskedOriginal,
    Removal,
    relative_error,
)
from fxprune.passes.verification.zeroed_model import Slices, ZeroedOriginal, why_zeroed_does_not_apply
from fxprune.plan import plan_between, shapes_of

# float32 sums in another order differ by about this much over the depth of a deep network
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
REFUSED = " is refused: "
EXAMPLE = "the example inputs"


def tolerance_of(model: nn.Module) -> float:
    """The relative error up to which results of a model count as equal, by the dtypes of its parameters."""
    dtypes = {p.dtype for p in named_parameters(model).values() if p.is_floating_point()}
    return max((TOLERANCE.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)


@dataclass(frozen=True)
class Verification:
    """What a pruned model was compared with, and the largest relative error found.

    There are two references. The *masked* original computes with kept channels only, by the labels that its values carry. The
    *zeroed* original has its removed parameters set to zero and knows no labels; it is a reference wherever zero stays zero on
    the way (there is no mean or norm over channels). Where it is one, it decides.

    Attributes:
        error: the largest absolute difference of an output over its largest absolute value, against the reference that decides.
        compared: a sentence for each comparison made.
        tolerance: the error up to which the result counts as equal, by the precision of the arithmetic done.
        blank: whether all outputs of the masked original are zero, as with a last layer that starts at zero: then the two
            agree whatever comes before it.
        excused: input sizes that were not compared since the original itself fails there, with its error.
        masked: the error against the masked original.
        zeroed: the error against the zeroed original; None where its outputs have other shapes, or it does not run.
        no_zeroed: why the zeroed original is no reference; empty where it is one, or where the two agree.
    """

    error: float
    compared: tuple[str, ...]
    tolerance: float
    blank: bool = False
    excused: tuple[str, ...] = ()
    masked: float = 0.0
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
        if self.zeroed is None or (self.masked <= self.tolerance) == (self.zeroed <= self.tolerance):
            return ""
        if self.zeroed <= self.tolerance:
            return f"the masked original differs by {self.masked:.1e}, but the zeroed one applies and decides"
        return f"the masked original agrees to {self.masked:.1e}, but the zeroed one applies and decides"

    def __str__(self) -> str:
        verdict = "exact" if self.ok else "NOT exact"
        said = [*self.compared, *self.excused, *([self.disagreement] if self.disagreement else [])]
        said += ["all outputs are zero, which says little"] if self.blank else []
        against = (
            "masked" if self.no_zeroed or self.zeroed is None else "zeroed" if self.disagreement else "masked and the zeroed"
        )
        return f"{verdict}: largest relative error {self.error:.1e} against the {against} original ({'; '.join(said)})"


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


def quietly(pruned: nn.Module) -> Callable[..., Any]:
    """How to call a pruned model so that FX prints nothing where that fails, which is no news here."""
    call: Callable[..., Any] = pruned if pruned._forward_hooks or pruned._forward_pre_hooks else pruned.forward
    return call


@contextlib.contextmanager
def restoring(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Restore what a forward writes to, or assigns anew: attributes, containers, buffers, and with `parameters` those too."""
    tensors = [t for _, t in named_tensors(model) if parameters or not isinstance(t, nn.Parameter)]
    seen: set[int] = set()
    held = [contents(vars(module), seen) for module in model.modules()]
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        for attributes in held:
            refill(attributes)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def compare(model: nn.Module, pruned: fx.GraphModule, removal: Removal, inputs: ExampleInputs, *, sizes: bool) -> Verification:
    """Run a pruned model and both references on the example inputs, and at other sizes where the original takes them.

    What differs in the model's own precision is compared once more in double precision: where scores are ranked, rounding
    decides which of two comes first, and everything after depends on it.

    Arguments:
        model: the original.
        pruned: the result; its plan is in `meta["plan"]`.
        removal: what is removed of the original.
        inputs: example inputs.
        sizes: whether to try another batch and another image size.
    """
    slices = slices_of(model, pruned, removal)
    found = Comparison(model, pruned, removal, slices).run(inputs, sizes=sizes)
    if found.ok or found.tolerance <= TOLERANCE[torch.float64]:
        return found
    try:
        reference = private_copy(model, doubled)
        inputs = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        again = Comparison(reference, copy.deepcopy(pruned).double(), removal, slices).run(inputs, sizes=sizes)
    except Exception:  # the model insists on its precision
        return found
    return replace(again, compared=(*again.compared, "in double precision")) if again.ok else found


def slices_of(model: nn.Module, pruned: fx.GraphModule, removal: Removal) -> Slices:
    """The slices of the model's own tensors: those of the plan, or of the same choice where there is no plan yet."""
    if pruned.meta.get("plan") is not None:
        slices: Slices = plan_between(model, pruned).fitted(shapes_of(model)).slices
        return slices
    slicer = Slicer(removal.kept)
    return {name: slicer(removal.leaves.get(name, ()), tensor.shape) for name, tensor in named_tensors(model)}


def doubled(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double()
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


class Comparison:
    """A pruned model against both references, in the precision that model and inputs have. Arguments as for `compare`."""

    def __init__(self, model: nn.Module, pruned: fx.GraphModule, removal: Removal, slices: Slices) -> None:
        self.model, self.pruned, self.slices = model, pruned, slices
        self.masked = MaskedOriginal(model, removal)
        self.zeroed: ZeroedOriginal | None = None
        self.devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
        self.least_tolerance = tolerance_of(model)
        self.errors: list[tuple[float, float | None]] = []  # against the masked and the zeroed original
        self.compared: list[str] = []
        self.excused: list[str] = []
        self.no_zeroed = ""
        self.blank = False

    @property
    def tolerance(self) -> float:
        return max(self.least_tolerance, *(TOLERANCE[dtype] for dtype in self.masked.dtypes), 0.0)

    def run(self, inputs: ExampleInputs, *, sizes: bool) -> Verification:
        with evaluating(self.pruned), torch.no_grad(), torch.random.fork_rng(devices=self.devices), own_random_state():
            self.compare_example(inputs)
            other = inputs.other_size() if sizes else None
            if other is None or not self.agree(*other):
                for name, changed in inputs.other_sizes() if sizes else ():
                    if not self.agree([name], changed):
                        self.compare_other(f"another {name}", changed)
        masked = max(error for error, _ in self.errors)
        zeroed = [error for _, error in self.errors if error is not None]
        decides = bool(zeroed) and not self.no_zeroed
        error = max(zeroed) if decides and self.disagrees(masked, max(zeroed)) else max([masked, *(zeroed if decides else [])])
        return Verification(
            error,
            tuple(self.compared),
            self.tolerance,
            self.blank,
            tuple(self.excused),
            masked,
            max(zeroed, default=None),
            self.no_zeroed,
        )

    def disagrees(self, masked: float, zeroed: float) -> bool:
        """Whether one reference calls the result exact and the other one does not."""
        return (masked <= self.tolerance) != (zeroed <= self.tolerance)

    def compare_example(self, inputs: ExampleInputs) -> None:
        drawn = random_state(self.devices)  # a model may draw in evaluation, too: all draw the same numbers
        wanted = self.masked(inputs.args, inputs.kwargs, whole=False)
        self.blank = not any(bool(t.any()) for t in collect(wanted, Tensor))
        got = self.result(inputs, drawn)
        self.decide(EXAMPLE, inputs, got, difference(wanted, got), drawn)

    def agree(self, names: list[str], inputs: ExampleInputs) -> bool:
        """Compare at other sizes in the quickest way; False where anything fails: then each size is looked at alone.

        The reference is the zeroed original where it agreed on the example inputs: it runs without a look at each operator.
        """
        drawn = random_state(self.devices)
        zeroed = None if self.errors[0][1] is None or self.no_zeroed else self.zeroed
        try:
            got = self.result(inputs, drawn)
            set_random_state(drawn, self.devices)
            if zeroed is None:
                error = difference(self.masked(inputs.args, inputs.kwargs, whole=False), got)
            else:
                with self.drawing():
                    error = difference(zeroed(*map_tensors((inputs.args, inputs.kwargs), torch.clone)), got)
        except Exception:  # whose fault it is is asked when each size is looked at
            error = float("inf")
        if not error <= self.tolerance:
            set_random_state(drawn, self.devices)
            return False
        self.errors.append((error, None) if zeroed is None else (0.0, error))
        self.compared += [f"another {name}" for name in names]
        return True

    def compare_other(self, name: str, inputs: ExampleInputs) -> None:
        """Compare on inputs of another size; only an exception of the original itself excuses them."""
        drawn = random_state(self.devices)
        try:
            got = self.result(inputs, drawn)
            set_random_state(drawn, self.devices)
            masked = difference(self.masked(inputs.args, inputs.kwargs, whole=False), got)
        except Exception as error:
            failure = why_original_fails(self.model, inputs)
            if failure:
                self.excused.append(f"{name} is not taken by the original: {failure}")
            elif isinstance(error, GuardError):
                self.compared.append(f"{name}{REFUSED}{error}")
            else:
                raise
            return
        self.decide(name, inputs, got, masked, drawn)

    def result(self, inputs: ExampleInputs, drawn: list[Any]) -> Any:
        """What the pruned model returns."""
        set_random_state(drawn, self.devices)
        with restoring(self.pruned, parameters=self.masked.writes), self.drawing():
            return inputs.map(torch.clone).call(quietly(self.pruned))  # it may write to them

    def decide(self, name: str, inputs: ExampleInputs, got: Any, masked: float, drawn: list[Any]) -> None:
        """Note an error against the masked original, beside that against the zeroed one where it has a say."""
        zeroed = None
        if name == EXAMPLE or masked > self.tolerance:
            set_random_state(drawn, self.devices)
            zeroed = self.against_zeroed(got, inputs)
            if zeroed is not None and not self.no_zeroed and self.disagrees(masked, zeroed):
                assert self.zeroed is not None
                self.no_zeroed = why_zeroed_does_not_apply(self.zeroed, inputs.args, inputs.kwargs)
        self.errors.append((masked, zeroed))
        self.compared.append(name)

    def drawing(self) -> contextlib.AbstractContextManager[Any]:
        """The surroundings in which a run draws the numbers that the masked original drew."""
        return InIndexOrder() if self.masked.draws else contextlib.nullcontext()

    def against_zeroed(self, got: Any, inputs: ExampleInputs) -> float | None:
        """The error against the zeroed original; None where there is none, and why."""
        try:
            self.zeroed = self.zeroed or ZeroedOriginal(self.model, self.slices)
            with self.drawing():
                wanted = self.zeroed(*map_tensors((inputs.args, inputs.kwargs), torch.clone))
        except Exception as error:
            self.no_zeroed = f"it raises {type(error).__name__}"
            return None
        expected, found = collect(wanted, Tensor), collect(got, Tensor)
        if len(expected) == len(found):  # what has other shapes has lost channels: caches, and outputs that were released
            alike = [i for i, t in enumerate(expected) if t.shape == found[i].shape]
            expected, found = [expected[i] for i in alike], [found[i] for i in alike]
        if not expected or len(expected) != len(found):
            self.no_zeroed = "the pruned model returns fewer channels"
            return None
        if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in expected):
            self.no_zeroed = "it returns values that are not finite"
            return None
        return difference(expected, found)


def why_original_fails(model: nn.Module, inputs: ExampleInputs) -> str:
    """The exception that the original raises on some inputs; empty where it takes them."""
    try:
        inputs.map(torch.clone).call(private_copy(model).eval())
    except Exception as error:
        said = " ".join(str(error).split())
        return f"{type(error).__name__}: {said[:120]}"
    return ""


def difference(wanted: Any, got: Any) -> float:
    """The largest relative error of any tensor; infinite where there are more or fewer than wanted."""
    a, b = collect(wanted, Tensor), collect(got, Tensor)
    return max(map(relative_error, a, b), default=0.0) if len(a) == len(b) else float("inf")
