"""Compare a pruned model with the masked original and with the zeroed original."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.inputs import EXAMPLE, ExampleInputs
from fxprune.passes.errors import GuardError
from fxprune.passes.ir.module_tree import named_tensors, private_copy
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.quiet import gc_paused, own_random_state, random_state, set_random_state
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.verification.index_order import InIndexOrder
from fxprune.passes.verification.kept_statistics import KeptStatistics, Statistics
from fxprune.passes.verification.masked_model import MaskedOriginal, Removal
from fxprune.passes.verification.outlook import Outlook
from fxprune.passes.verification.shifted_parameters import shifted, shifts_of
from fxprune.passes.verification.zeroed_model import Slices, ZeroedOriginal, why_zeroed_does_not_apply
from fxprune.plan import plan_between, shapes_of
from fxprune.verification import (
    REFUSED,
    TOLERANCE,
    Verification,
    difference,
    evaluating,
    is_blank,
    quietly,
    restoring,
    tolerance_of,
    without_zeros,
)


def compare(
    model: nn.Module,
    pruned: nn.Module,
    removal: Removal,
    inputs: ExampleInputs,
    *,
    sizes: bool,
    outlook: Outlook | None = None,
) -> Verification:
    """Run a pruned model and both references on the example inputs, and at other sizes where the original takes them.

    What differs in the model's own precision is compared once more in double precision: where scores are ranked, rounding
    decides which of two comes first, and everything after depends on it.

    Arguments:
        model: the original.
        pruned: the result; its plan is in `meta["plan"]`.
        removal: what is removed of the original.
        inputs: example inputs.
        sizes: whether to try another batch and another image size.
        outlook: what the capture says of a run. With it, no more is run than is needed: see `Comparison.run_briefly`.
    """
    slices = slices_of(model, pruned, removal)
    found = Comparison(model, pruned, removal, slices, outlook).run(inputs, sizes=sizes)
    if found.ok or found.tolerance <= TOLERANCE[torch.float64]:
        return found
    try:
        reference = private_copy(model, doubled)
        inputs = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        again = Comparison(reference, copy.deepcopy(pruned).double(), removal, slices, outlook).run(inputs, sizes=sizes)
    except Exception:  # the model insists on its precision
        return found
    return replace(again, compared=(*again.compared, "in double precision")) if again.ok else found


def slices_of(model: nn.Module, pruned: nn.Module, removal: Removal) -> Slices:
    """The slices of the model's own tensors: those of the plan, or of the same choice where there is no plan yet."""
    if getattr(pruned, "meta", {}).get("plan") is not None:
        slices: Slices = plan_between(model, pruned).fitted(shapes_of(model)).slices
        return slices
    slicer = Slicer(removal.kept)
    return {name: slicer(removal.leaves.get(name, ()), tensor.shape) for name, tensor in named_tensors(model)}


def doubled(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double()
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


class Comparison:
    """A pruned model against both references, in the precision that model and inputs have. Arguments as for `compare`."""

    def __init__(self, model: nn.Module, pruned: nn.Module, removal: Removal, slices: Slices, outlook: Outlook | None) -> None:
        self.model, self.pruned, self.slices, self.outlook = model, pruned, slices, outlook
        self.shifts = shifts_of(model, pruned, slices)
        self.masked = MaskedOriginal(model, removal, self.shifts)
        self.zeroed: ZeroedOriginal | None = None
        self.devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
        self.least_tolerance = tolerance_of(model)
        self.errors: list[tuple[float | None, float | None]] = []  # against the masked and the zeroed original
        self.compared: list[str] = []
        self.excused: list[str] = []
        self.no_zeroed = ""
        self.blank = self.partial = False  # whether all that a reference returns is zero; whether some has other shapes
        self.statistics: Statistics = outlook.statistics if outlook else {}  # which the zeroed original takes over what is kept

    @property
    def tolerance(self) -> float:
        return max(self.least_tolerance, *(TOLERANCE[dtype] for dtype in self.masked.dtypes), 0.0)

    def run(self, inputs: ExampleInputs, *, sizes: bool) -> Verification:
        random, shifting = torch.random.fork_rng(devices=self.devices), shifted(self.pruned, self.shifts, self.slices)
        with evaluating(self.pruned), torch.no_grad(), random, own_random_state(), gc_paused(), shifting:
            if self.outlook is None:
                self.run_all(inputs, sizes)
            else:
                self.run_briefly(inputs, sizes)
        masked = max((error for error, _ in self.errors if error is not None), default=None)
        zeroed = max((error for _, error in self.errors if error is not None), default=None)
        counted = None if self.no_zeroed else zeroed
        error = max(e for e in (masked, counted) if e is not None)
        if masked is not None and counted is not None and self.disagrees(masked, counted):
            error = counted
        return Verification(
            error,
            tuple(self.compared),
            self.tolerance,
            self.blank,
            tuple(self.excused),
            masked,
            zeroed,
            self.no_zeroed,
        )

    def disagrees(self, masked: float, zeroed: float) -> bool:
        """Whether one reference calls the result exact and the other one does not."""
        return (masked <= self.tolerance) != (zeroed <= self.tolerance)

    def run_all(self, inputs: ExampleInputs, sizes: bool) -> None:
        """The example inputs by both references, then other sizes."""
        self.compare_example(inputs)
        other = inputs.other_size() if sizes else None
        if other is None or not self.agree(*other):
            for name, changed in inputs.other_sizes() if sizes else ():
                if not self.agree([name], changed):
                    self.compare_other(f"another {name}", changed)

    def run_briefly(self, inputs: ExampleInputs, sizes: bool) -> None:
        """One run of the pruned model and one of a reference, at the smallest sizes that the model takes.

        The program was captured from the example inputs: what holds for them alone, such as a size that became a number, is
        wrong at other sizes, and no line of it runs for the example inputs only. Where no such run is exact, the example
        inputs are compared by both references, and each other size alone.
        """
        tries = [*(inputs.fewer() if sizes else ()), ([EXAMPLE], inputs)]
        done = next((names for names, changed in tries if self.agree_quickly(changed)), None)
        if done is None:
            self.compare_example(inputs)
        self.compared += done or []
        for name, changed in inputs.other_sizes() if sizes else ():
            other = f"another {name}"
            if done is not None and other not in done and self.agree_quickly(changed):
                self.compared.append(other)
            elif other not in (done or []):
                self.compare_other(other, changed)

    def agree_quickly(self, inputs: ExampleInputs) -> bool:
        """Compare with the zeroed original, and with the masked one where that is no reference; whether what counts agrees."""
        drawn, reason = random_state(self.devices), self.no_zeroed
        try:
            errors = self.least_errors(inputs, drawn)
            if all(error is None or error <= self.tolerance for error in (errors[0], None if self.no_zeroed else errors[1])):
                self.errors.append(errors)
                return True
        except Exception:  # whose fault it is is asked when each size is looked at
            pass
        set_random_state(drawn, self.devices)
        self.no_zeroed = reason
        return False

    def least_errors(self, inputs: ExampleInputs, drawn: list[Any]) -> tuple[float | None, float | None]:
        """The errors against the masked and the zeroed original, each where it is needed."""
        got, zeroed = self.result(inputs, drawn), None
        if not self.no_zeroed:
            set_random_state(drawn, self.devices)
            zeroed = self.against_zeroed(got, inputs)
        if zeroed is not None and zeroed <= self.tolerance and not (self.partial or self.blank or self.counts_zeros):
            return None, zeroed
        set_random_state(drawn, self.devices)
        if self.zeroed is not None and not self.writes:
            self.masked.share(self.zeroed.tensors, self.slices)
        masked = self.against_masked(got, inputs)
        if zeroed is not None and masked <= self.tolerance < zeroed:
            self.no_zeroed = self.why_not_zeroed(inputs)
        return masked, zeroed

    def compare_example(self, inputs: ExampleInputs) -> None:
        drawn = random_state(self.devices)  # a model may draw in evaluation, too: all draw the same numbers
        wanted = self.masked(inputs.args, inputs.kwargs, whole=False)
        self.blank = is_blank(wanted)
        got = self.result(inputs, drawn)
        self.decide(EXAMPLE, inputs, got, difference(wanted, got), drawn)

    def against_masked(self, got: Any, inputs: ExampleInputs) -> float:
        wanted = self.masked(inputs.args, inputs.kwargs, whole=False)
        self.blank = is_blank(wanted)
        return difference(wanted, got)

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
                error = difference(self.of_zeroed(inputs), got)
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
        with restoring(self.pruned, parameters=self.writes), self.drawing():
            return inputs.map(torch.clone).call(quietly(self.pruned))  # it may write to them

    def decide(self, name: str, inputs: ExampleInputs, got: Any, masked: float, drawn: list[Any]) -> None:
        """Note an error against the masked original, beside that against the zeroed one where it has a say."""
        zeroed = None
        if name == EXAMPLE or masked > self.tolerance:
            set_random_state(drawn, self.devices)
            zeroed = self.against_zeroed(got, inputs)
            if zeroed is not None and not self.no_zeroed and self.disagrees(masked, zeroed):
                self.no_zeroed = self.why_not_zeroed(inputs)
        self.errors.append((masked, zeroed))
        self.compared.append(name)

    def drawing(self) -> contextlib.AbstractContextManager[Any]:
        """The surroundings in which a run draws the numbers that the masked original drew."""
        draws = self.masked.draws or (self.outlook is not None and self.outlook.draws)
        return InIndexOrder() if draws else contextlib.nullcontext()

    @property
    def writes(self) -> bool:
        """Whether a forward writes to parameters."""
        return self.masked.writes or (self.outlook is not None and self.outlook.writes)

    def zeroed_original(self) -> ZeroedOriginal:
        if self.zeroed is None:
            self.zeroed = ZeroedOriginal(self.model, self.slices, self.shifts)
        return self.zeroed

    @property
    def counts_zeros(self) -> bool:
        """Whether zeros count in statistics of the zeroed original, which are not taken over what is kept."""
        return self.outlook is not None and bool(self.outlook.statistics) and not self.statistics

    def of_zeroed(self, inputs: ExampleInputs) -> Any:
        """What the zeroed original returns, with its statistics over what is kept where the run is that of the capture."""
        zeroed = self.zeroed_original()
        args, kwargs = map_tensors((inputs.args, inputs.kwargs), torch.clone)
        with restoring(zeroed.model, parameters=self.writes), self.drawing():
            if not (self.outlook and self.statistics):
                return zeroed(args, kwargs)
            drawn, over_kept = random_state(self.devices), KeptStatistics(self.statistics, self.outlook.kept)
            with contextlib.suppress(Exception), over_kept:
                made = zeroed(args, kwargs)
                over_kept.check()
                return made
        set_random_state(drawn, self.devices)
        self.statistics = {}
        return self.of_zeroed(inputs)

    def why_not_zeroed(self, inputs: ExampleInputs) -> str:
        """Why the zeroed original is no reference; empty where it is one."""
        zeroed = self.zeroed_original()
        with restoring(zeroed.model, parameters=self.writes):
            one = inputs.first_sample()
            why = why_zeroed_does_not_apply(zeroed, one.args, one.kwargs)
            return why_zeroed_does_not_apply(zeroed, inputs.args, inputs.kwargs) if why.startswith("it raises") else why

    def against_zeroed(self, got: Any, inputs: ExampleInputs) -> float | None:
        """The error against the zeroed original; None where there is none, and why."""
        try:
            wanted = self.of_zeroed(inputs)
        except Exception as error:
            self.no_zeroed = f"it raises {type(error).__name__}"
            return None
        expected, found = collect(wanted, Tensor), collect(got, Tensor)
        if len(expected) == len(found):  # what has other shapes has lost channels: caches, and outputs that were released
            expected = [without_zeros(t, f.shape) for t, f in zip(expected, found, strict=True)]
            alike = [i for i, t in enumerate(expected) if t.shape == found[i].shape]
            self.partial = len(alike) < len(expected)
            expected, found = [expected[i] for i in alike], [found[i] for i in alike]
        if not expected or len(expected) != len(found):
            self.no_zeroed = "the pruned model returns fewer channels"
            return None
        if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in expected):
            self.no_zeroed = "it returns values that are not finite"
            return None
        self.blank = is_blank(expected)
        return difference(expected, found)


def why_original_fails(model: nn.Module, inputs: ExampleInputs) -> str:
    """The exception that the original raises on some inputs; empty where it takes them."""
    try:
        inputs.map(torch.clone).call(private_copy(model).eval())
    except Exception as error:
        said = " ".join(str(error).split())
        return f"{type(error).__name__}: {said[:120]}"
    return ""
