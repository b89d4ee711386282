"""What `prune` would leave at other ratios: computed from the shapes that each choice leaves, as its budgets are."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.criteria.calibration import read
from fxprune.errors import PruneWarning
from fxprune.passes.coupling.families import families
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.slices import Slicer
from fxprune.pipeline import Choice, Compilation
from fxprune.selection.costs import Costs
from fxprune.selection.latency import measure_seconds
from fxprune.selection.latency_model import LatencyModel
from fxprune.selection.options import Memo, Options

RATIOS = tuple(i / 20 for i in range(1, 20))


@dataclass(frozen=True)
class RatioCosts:
    """What a ratio leaves of a model.

    Attributes:
        ratio: the share of units removed from every family.
        parameters: how many are left.
        macs: multiply-accumulates of one forward, if example inputs were given.
        bytes: of parameters and buffers.
        kept: how many units each family keeps, in the order of the report's `changes`.
        seconds: of one forward, estimated from its products timed one by one; None where nothing was timed.
        refused: why `prune` raises at this ratio, where it does; the numbers are those of the whole model then.
    """

    ratio: float
    parameters: int
    macs: int | None
    bytes: int
    kept: tuple[int, ...]
    seconds: float | None = None
    refused: str = ""


class Chooser:
    """Chooses from one coupling again and again, each time as `prune` does; what is scored is scored once."""

    def __init__(self, compilation: Compilation) -> None:
        self.compilation, self.solution, self.memo = compilation, compilation.couple(), Memo()

    def choose(self, options: Options) -> tuple[Compilation, Choice]:
        """What stays, and the compilation that can emit it; raises PruneError as `prune` does."""
        compilation, options = self.compilation, dataclasses.replace(options, memo=self.memo)
        if not self.solution.captures[0].unseen:
            return compilation, compilation.choose(options, self.solution)
        # which modules fail once they are cut depends on the choice: each starts from what is known of none
        fresh = Compilation(compilation.model, compilation.inputs, compilation.options)
        return fresh, fresh.choose(options)


class RatioSweep:
    """Chooses units as `prune` does, ratio by ratio; they are scored once.

    Arguments:
        compilation: the model, its inputs and what may go.
        options: how units are chosen; their ratio does not count.
    """

    def __init__(self, compilation: Compilation, options: Options) -> None:
        if options.data is not None:
            options = dataclasses.replace(options, data=list(read(options.data)))  # which may be read again
        self.compilation, self.options, self.chooser = compilation, options, Chooser(compilation)

    def costs(
        self, ratios: Sequence[float], names: Sequence[str], *, macs: bool, seconds: float | None = None
    ) -> Iterator[RatioCosts]:
        """What each ratio leaves.

        Arguments:
            ratios: shares of units.
            names: those of the families, in the order in which what they keep is listed.
            macs: whether the example inputs are the user's, so that they count.
            seconds: of the original, measured, where those of the others are to be estimated.
        """
        chosen = [self.attempt(ratio) for ratio in progress_bar(ratios, "costs of ratios", "ratio")]
        times: list[Any] = [None] * len(chosen)
        if seconds is not None:
            times = self.estimates([choice.slicer for choice, _ in chosen], seconds)
        for ratio, (choice, refused), time in zip(ratios, chosen, times, strict=True):
            of = Costs(choice.solution, self.compilation.tensors)
            left = [of.of(choice.slicer, kind) for kind in ("params", "macs", "memory")]
            found = families(choice.solution, set(named_parameters(self.compilation.model)))
            kept = {family.name: int(choice.kept.numpy()[family.units].sum()) for family in found}
            counts = tuple(kept.get(name, 0) for name in names)
            yield RatioCosts(ratio, left[0], left[1] if macs else None, left[2], counts, time, refused)

    def attempt(self, ratio: float) -> tuple[Choice, str]:
        """What stays at a ratio; or everything, with the reason why `prune` raises."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PruneWarning)  # `prune` says it, where it is asked
                return self.chooser.choose(dataclasses.replace(self.options, ratio=ratio))[1], ""
        except PruneError as error:
            return self.compilation.unpruned(), error.what

    def estimates(self, slicers: Sequence[Slicer], total: float) -> list[float]:
        """Seconds with what each of some choices leaves, where the original takes `total`."""
        compilation = self.compilation
        probe = compilation.latency_probe()
        with probe.restore_random_state(), torch.no_grad():
            model = LatencyModel([], Costs(self.chooser.solution, compilation.tensors), probe.device, probe.seconds, total)
            return model.of_each(slicers, measure_seconds)
