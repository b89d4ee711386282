"""What `prune` would leave at other ratios: computed from the shapes that each choice leaves, as its budgets are."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxprune.errors import PruneWarning
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.progress import progress_bar
from fxprune.pipeline import Choice, Compilation
from fxprune.selection.costs import Costs
from fxprune.selection.latency_model import LatencyModel
from fxprune.selection.options import Options
from fxprune.selection.select import allocate, check_effect, score_families

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


class RatioSweep:
    """Chooses units as `prune` does, ratio by ratio; they are scored once.

    Arguments:
        compilation: the model, its inputs and what may go.
        options: how units are chosen; their ratio does not count.
    """

    def __init__(self, compilation: Compilation, options: Options) -> None:
        if options.data is not None:
            options = dataclasses.replace(options, data=list(options.data))  # which may be read again
        self.compilation, self.options = compilation, options
        self.solution = compilation.couple()
        self.scored: tuple[Solution, Any, Any] | None = None

    def choose(self, ratio: float) -> Choice:
        """What stays at a ratio; raises PruneError as `prune` does."""
        compilation = self.compilation
        if not self.solution.captures[0].unseen:
            return compilation.choose_by(lambda coupled: self.select(coupled, ratio), self.solution)
        # which modules fail once they are cut depends on the ratio: each starts from what is known of none
        fresh = Compilation(compilation.model, compilation.inputs, compilation.options)
        return fresh.choose_by(lambda coupled: self.select(coupled, ratio))

    def select(self, coupled: Solution, ratio: float) -> Any:
        model, options = self.compilation.model, dataclasses.replace(self.options, ratio=ratio)
        if self.scored is None or self.scored[0] is not coupled:
            self.scored = coupled, *score_families(model, coupled, options)
        free, score = self.scored[1:]
        kept, slicer = allocate(free, score, Costs(coupled, self.compilation.tensors), options)
        check_effect(model, free, score, coupled, options, kept)
        return kept, slicer

    def costs(
        self, ratios: Sequence[float], names: Sequence[str], *, macs: bool = True, times: LatencyModel | None = None
    ) -> Iterator[RatioCosts]:
        """What each ratio leaves.

        Arguments:
            ratios: shares of units.
            names: those of the families, in the order in which what they keep is listed.
            macs: whether the example inputs are the user's, so that they count.
            times: estimates seconds of the model as it is coupled here.
        """
        for ratio in progress_bar(ratios, "costs of ratios", "ratio"):
            refused = ""
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", PruneWarning)  # `prune` says it, where it is asked
                    choice = self.choose(ratio)
            except PruneError as error:
                refused, choice = error.what, self.compilation.unpruned()
            of = Costs(choice.solution, self.compilation.tensors)
            left = [of.of(choice.slicer, kind) for kind in ("params", "macs", "memory")]
            found = families(choice.solution, set(named_parameters(self.compilation.model)))
            kept = {family.name: int(choice.kept.numpy()[family.units].sum()) for family in found}
            seconds = None if times is None else times.of(choice.slicer)
            counts = tuple(kept.get(name, 0) for name in names)
            yield RatioCosts(ratio, left[0], left[1] if macs else None, left[2], counts, seconds, refused)

    def latency_model(self, device: Any, seconds: Any, total: float) -> LatencyModel:
        """Estimates of seconds; see `LatencyModel`."""
        return LatencyModel([], Costs(self.solution, self.compilation.tensors), device, seconds, total)
