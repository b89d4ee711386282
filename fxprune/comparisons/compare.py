"""Compare a pruned model with the masked original and with the zeroed original."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.comparisons.zeroed_reference import ZeroedReference
from fxprune.inputs import EXAMPLE, ExampleInputs
from fxprune.passes.errors import GuardError
from fxprune.passes.ir.index_contents import storage_of
from fxprune.passes.ir.module_tree import named_parameters, named_tensors, own_copy, private_copy, set_mode
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.quiet import gc_paused, gpus_of, own_random_state, random_state, set_random_state
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.verification.masked_model import MaskedOriginal, Removal
from fxprune.passes.verification.outlook import Outlook
from fxprune.passes.verification.shared_weights import SharedWeights
from fxprune.passes.verification.shifted_parameters import shifted, shifts_of
from fxprune.passes.verification.zeroed_model import Slices
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
        self.devices = gpus_of(model)
        self.zeroed = ZeroedReference(model, slices, self.shifts, self.masked, outlook, self.devices)
        self.least_tolerance = tolerance_of(model)
        self.errors: list[tuple[float | None, float | None]] = []  # against the masked and the zeroed original
        self.compared: list[str] = []
        self.excused: list[str] = []
        self.blank = False  # whether all that the masked original returns is zero

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
        counted = None if self.zeroed.why_not else zeroed
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
            self.zeroed.why_not,
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
        done = next((names for names, changed in tries if self.agree_with_few(changed)), None)
        if done is None:
            self.compare_example(inputs)
        self.compared += done or []
        for name, changed in inputs.other_sizes() if sizes else ():
            other = f"another {name}"
            if done is not None and other not in done and self.agree_quickly(changed):
                self.compared.append(other)
            elif other not in (done or []):
                self.compare_other(other, changed)

    def agree_with_few(self, inputs: ExampleInputs) -> bool:
        """Compare a batch in the way that runs the fewest samples, and as it is where that does not settle it."""
        if inputs.batch in (None, 1) or self.zeroed.draws or self.zeroed.why_not:
            return self.agree_quickly(inputs)
        drawn = random_state(self.devices)
        try:
            got = self.result(inputs.between_twice_the_first(), drawn)
        except Exception:  # as on any batch of this size of images
            set_random_state(drawn, self.devices)
            return False
        return self.agree_at_both_ends(got, inputs) or self.agree_quickly(inputs)

    def agree_at_both_ends(self, got: Any, inputs: ExampleInputs) -> bool:
        """Compare the first and the last sample of three, which are the same, with the zeroed original of that sample alone.

        The one between them shows if samples are mixed. The original, which is the larger of the two, runs one sample.
        """
        tensors = collect(got, Tensor)
        if all(t.dim() and t.shape[0] == 3 for t in tensors):
            ends = [[t[:1] for t in tensors], [t[2:] for t in tensors]]
            error = self.zeroed.error_of(ends, inputs.first_sample())
            if self.zeroed.settles(error, self.tolerance):
                self.errors.append((None, error))
                return True
        self.zeroed.start_again()
        return False

    def agree_quickly(self, inputs: ExampleInputs) -> bool:
        """Compare with the zeroed original, and with the masked one where that is no reference; whether what counts agrees."""
        drawn, reason = random_state(self.devices), self.zeroed.why_not
        try:
            errors = self.least_errors(inputs, drawn)
            counted = (errors[0], None if self.zeroed.why_not else errors[1])
            if all(error is None or error <= self.tolerance for error in counted):
                self.errors.append(errors)
                return True
        except Exception:  # whose fault it is is asked when each size is looked at
            pass
        set_random_state(drawn, self.devices)
        self.zeroed.why_not = reason
        return False

    def least_errors(self, inputs: ExampleInputs, drawn: list[Any]) -> tuple[float | None, float | None]:
        """The errors against the masked and the zeroed original, each where it is needed."""
        got = self.result(inputs, drawn)
        zeroed = None if self.zeroed.why_not else self.zeroed.error(got, inputs, drawn, self.tolerance)
        if self.zeroed.settles(zeroed, self.tolerance):
            return None, zeroed
        set_random_state(drawn, self.devices)
        self.zeroed.share()
        masked = self.against_masked(got, inputs)
        if zeroed is not None and masked <= self.tolerance < zeroed:
            self.zeroed.why_not = self.zeroed.find_why_not(inputs)
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
        by_zeroed = self.errors[0][1] is not None and not self.zeroed.why_not
        try:
            got = self.result(inputs, drawn)
            set_random_state(drawn, self.devices)
            wanted = self.zeroed.run(inputs) if by_zeroed else self.masked(inputs.args, inputs.kwargs, whole=False)
            error = difference(wanted, got)
        except Exception:  # whose fault it is is asked when each size is looked at
            error = float("inf")
        if not error <= self.tolerance:
            set_random_state(drawn, self.devices)
            return False
        self.errors.append((0.0, error) if by_zeroed else (error, None))
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
        with restoring(self.pruned, parameters=self.zeroed.writes), self.zeroed.drawing():
            return inputs.map(torch.clone).call(quietly(self.pruned))  # it may write to them

    def decide(self, name: str, inputs: ExampleInputs, got: Any, masked: float, drawn: list[Any]) -> None:
        """Note an error against the masked original, beside that against the zeroed one where it has a say."""
        zeroed = None
        if name == EXAMPLE or masked > self.tolerance:
            zeroed = self.zeroed.error(got, inputs, drawn, self.tolerance)
            self.blank = self.blank if zeroed is None else self.zeroed.blank
            if zeroed is not None and not self.zeroed.why_not and self.disagrees(masked, zeroed):
                self.zeroed.why_not = self.zeroed.find_why_not(inputs)
        self.errors.append((masked, zeroed))
        self.compared.append(name)


def why_original_fails(model: nn.Module, inputs: ExampleInputs) -> str:
    """The exception that the original raises on some inputs; empty where it takes them."""
    sharing = SharedWeights(frozenset(storage_of(p) for p in named_parameters(model).values() if p.layout is torch.strided), {})
    for stand_in, context in ((None, sharing), (own_copy, contextlib.nullcontext())):
        try:
            with context:
                inputs.map(torch.clone).call(set_mode(private_copy(model, stand_in), False))
        except Exception as error:
            if stand_in is None and sharing.refused:  # it may write to parameters at this size
                continue
            said = " ".join(str(error).split())
            return f"{type(error).__name__}: {said[:120]}"
        break
    return ""
