"""The zeroed original as the reference of a comparison: with no more zeros than are needed, and what it is not to count."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.inputs import ExampleInputs
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.quiet import random_state, set_random_state
from fxprune.passes.verification.index_order import InIndexOrder
from fxprune.passes.verification.kept_statistics import KeptStatistics, Statistics
from fxprune.passes.verification.masked_model import MaskedOriginal
from fxprune.passes.verification.outlook import Outlook
from fxprune.passes.verification.shifted_parameters import Shifts
from fxprune.passes.verification.zero_flow import why_zeroed_does_not_apply
from fxprune.passes.verification.zeroed_model import Slices, ZeroedOriginal
from fxprune.verification import difference, is_blank, restoring, without_zeros


class ZeroedReference:
    """The zeroed original, made when it is first run.

    Arguments:
        masked: the masked original; it shares what this one has copied, and says what a run of it has shown of the model.
        outlook: what the capture says of a run.
        devices: numbers of the GPUs whose random state counts.

    Attributes:
        why_not: why it is no reference; empty where it is one.
        partial, blank: whether some of what it returned has other shapes; whether all of it was zero.
    """

    def __init__(
        self,
        model: nn.Module,
        slices: Slices,
        shifts: Shifts,
        masked: MaskedOriginal,
        outlook: Outlook | None,
        devices: Sequence[int],
    ) -> None:
        self.model, self.slices, self.shifts, self.masked, self.outlook = model, slices, shifts, masked, outlook
        self.devices = list(devices)
        self.made: ZeroedOriginal | None = None
        self.why_not = ""
        self.partial = self.blank = False
        self.statistics: Statistics = outlook.statistics if outlook else {}  # which are taken over what is kept
        self.needed = outlook.zeros if outlook and not outlook.writes else None  # the zeros it has; None: all

    def drawing(self) -> contextlib.AbstractContextManager[Any]:
        """The surroundings in which a run draws the numbers that the masked original drew."""
        return InIndexOrder() if self.draws else contextlib.nullcontext()

    @property
    def draws(self) -> bool:
        """Whether a forward draws random numbers."""
        return self.masked.draws or (self.outlook is not None and self.outlook.draws)

    @property
    def writes(self) -> bool:
        """Whether a forward writes to parameters."""
        return self.masked.writes or (self.outlook is not None and self.outlook.writes)

    @property
    def counts_zeros(self) -> bool:
        """Whether zeros count in its statistics, which are not taken over what is kept."""
        return self.outlook is not None and bool(self.outlook.statistics) and not self.statistics

    def original(self) -> ZeroedOriginal:
        if self.made is None:
            self.made = ZeroedOriginal(self.model, self.slices, self.shifts, self.needed)
        return self.made

    def share(self) -> None:
        """Have the masked original use the copies of this one."""
        if self.made is not None and self.needed is None and not self.writes:
            self.masked.share(self.made.tensors, self.slices)

    def settles(self, error: float | None, tolerance: float) -> bool:
        """Whether an error against it says all there is to say."""
        return error is not None and error <= tolerance and not (self.partial or self.blank or self.counts_zeros)

    def error(self, got: Any, inputs: ExampleInputs, drawn: list[Any], tolerance: float) -> float | None:
        """The error of what a pruned model returned, with all zeros where those that are needed do not settle it.

        None where it is no reference; `why_not` then says why.
        """
        set_random_state(drawn, self.devices)
        error = self.error_of([got], inputs)
        if self.needed is None or self.outlook is None or self.settles(error, tolerance):
            return error
        self.needed = self.made = None
        self.start_again()
        return self.error(got, inputs, drawn, tolerance)

    def start_again(self) -> None:
        """Forget what a run that did not settle it has found."""
        self.statistics, self.why_not = (self.outlook.statistics if self.outlook else {}), ""

    def error_of(self, got: Sequence[Any], inputs: ExampleInputs) -> float | None:
        """The largest error of several results that should be what it returns; None where it is no reference."""
        self.partial = False
        try:
            wanted = self.run(inputs)
        except Exception as error:
            self.why_not = f"it raises {type(error).__name__}"
            return None
        errors = [self.compare(collect(wanted, Tensor), collect(one, Tensor)) for one in got]
        return None if None in errors else max(e for e in errors if e is not None)

    def compare(self, expected: list[Tensor], found: list[Tensor]) -> float | None:
        """The error of the tensors of one result; None where they cannot be compared."""
        if len(expected) == len(found):  # what has other shapes has lost channels: caches, and outputs that were released
            expected = [without_zeros(t, f.shape) for t, f in zip(expected, found, strict=True)]
            alike = [i for i, t in enumerate(expected) if t.shape == found[i].shape]
            self.partial |= len(alike) < len(expected)
            expected, found = [expected[i] for i in alike], [found[i] for i in alike]
        if not expected or len(expected) != len(found):
            self.why_not = "the pruned model returns fewer channels"
            return None
        if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in expected):
            self.why_not = "it returns values that are not finite"
            return None
        self.blank = is_blank(expected)
        return difference(expected, found)

    def run(self, inputs: ExampleInputs) -> Any:
        """What it returns, with its statistics over what is kept where the run is that of the capture."""
        zeroed, once = self.original(), self.needed is not None  # a copy costs no more than to restore it
        args, kwargs = map_tensors((inputs.args, inputs.kwargs), torch.clone)
        self.made = None if once else zeroed
        unchanged = contextlib.nullcontext() if once else restoring(zeroed.model, parameters=self.writes)
        with unchanged, self.drawing():
            if not (self.outlook and self.statistics):
                return zeroed(args, kwargs)
            drawn, over_kept = random_state(self.devices), KeptStatistics(self.statistics, self.outlook.kept)
            with contextlib.suppress(Exception):
                made = zeroed(args, kwargs, over_kept)
                over_kept.check()
                return made
        set_random_state(drawn, self.devices)
        self.statistics = {}
        return self.run(inputs)

    def find_why_not(self, inputs: ExampleInputs) -> str:
        """Why it is no reference; empty where it is one.

        One sample may not take it, or not show it: its variance over the batch is zero, whatever is removed.
        """
        if self.masked.redrawn:
            return "it draws numbers for what is removed, and others than the pruned model for what is kept"
        zeroed = self.original()
        with restoring(zeroed.model, parameters=self.writes):
            one = inputs.first_sample()
            why = why_zeroed_does_not_apply(zeroed, one.args, one.kwargs)
            enough = why and not why.startswith("it raises")
            return why if enough else why_zeroed_does_not_apply(zeroed, inputs.args, inputs.kwargs)
