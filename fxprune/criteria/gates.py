"""Gates: one for each unit, trained alone against what the model may cost.

A gate multiplies the weights that read its unit, and all weights of a unit that no weight reads. Gates are hard concrete
(Louizos et al., arXiv:1712.01312, equations 9 to 12): stretched beyond 0 and 1 and cut there, so that many are exactly 0 or 1
at any step. At 0 the model computes what it does without the unit: where something counts channels (layer normalisation, a
mean over channels), it runs as the masked model that `verify` compares with. At 1 it is the original.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.criteria.activation_stats import wide
from fxprune.criteria.base import CriterionOptions
from fxprune.criteria.calibration import Batch, Source, loss_in
from fxprune.criteria.parameter_roles import roles
from fxprune.passes.coupling.families import Family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.pytree import collect
from fxprune.passes.verification.masked_model import MaskedRun, Removal

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as its authors have them
START = 2.5  # log-odds of all gates at first: open in 97 of 100 draws
CLOSE = 1e-4  # relative difference up to which zeros alone compute what the masked model does


@dataclass(frozen=True, kw_only=True)
class Gates(CriterionOptions):
    """The log-odds of a gate on each unit, after training the gates alone; comparable over all families.

    What is trained on is the loss, or without one the squared distance to the original's outputs, in units of what it rises by
    where every second gate is closed; and a Lagrangian of the expected cost, which falls to what the budget (or the ratio)
    allows within the first half of the steps (as CoFi has it, arXiv:2204.00408). Parameters stay as they were, and gates are
    the same for the same data and seed.

    Arguments:
        steps: batches to train on; the data are read once, held, and used over and over.
        rate: Adam's.
        seed: of the gates' noise; torch's own random state is left alone.
    """

    steps: int = 300
    rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise PruneError(f"steps must be a positive integer, not {self.steps!r}", where="criterion Gates", fix="steps=300")
        if not (isinstance(self.rate, int | float) and 0 < self.rate < float("inf")):
            raise PruneError(f"rate must be a positive number, not {self.rate!r}", where="criterion Gates", fix="rate=0.1")

    def __call__(self, weight: Tensor) -> Tensor:
        raise PruneError("gates score the units of all families together, and no parameter alone", fix="criterion='magnitude'")

    def score_families(self, source: Source, families: Sequence[Family]) -> tuple[np.ndarray, np.ndarray]:
        """The score of each unit of some families, and whether it has one; shape (labels,)."""
        assert source.solution is not None
        units = torch.from_numpy(np.unique(np.concatenate([f.units for f in families])))
        model = GatedModel(source, units)
        batches = [(batch, model.original(batch)) for batch in source.batches()]
        use = (lambda stays: 2 * stays[units].mean()) if source.target.use is None else source.target.use()
        odds = torch.full((len(units),), START, dtype=torch.float64, requires_grad=True)
        prices = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([odds], self.rate)
        ascent = torch.optim.Adam([prices], self.rate, maximize=True)
        noise = torch.Generator().manual_seed(self.seed)
        start = float(use(model.by_unit(probability(odds.detach()))))
        for step, (batch, target) in zip(self.progress(), itertools.cycle(batches), strict=False):
            optimizer.zero_grad()
            ascent.zero_grad()
            model.loss(hard_concrete(odds, noise), batch, target).backward()
            allowed = start + (min(start, 1.0) - start) * min(1.0, 2 * (step + 1) / self.steps)
            over = use(model.by_unit(probability(odds))) - allowed
            (prices[0] * over + prices[1] * over.square()).backward()
            optimizer.step()
            ascent.step()
        if not bool(odds.isfinite().all()):
            raise PruneError(
                "the gates become NaN", where="criterion gates", fix="a smaller rate: fxprune.criteria.Gates(rate=0.01)"
            )
        score, seen = np.zeros(model.size), np.zeros(model.size, bool)
        score[units.numpy()], seen[units.numpy()] = odds.detach().numpy(), True
        return score, seen

    def progress(self) -> Iterator[int]:
        return iter(progress_bar(range(self.steps), "training gates", "step"))


def hard_concrete(odds: Tensor, noise: torch.Generator) -> Tensor:
    """A draw of gates in [0, 1] by their log-odds, shape (units,)."""
    u = torch.rand(odds.shape, generator=noise, dtype=odds.dtype).clamp(1e-6, 1 - 1e-6)
    soft = ((u.log() - (1 - u).log() + odds) / TEMPERATURE).sigmoid()
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def probability(odds: Tensor) -> Tensor:
    """The probability that a gate is not 0, by its log-odds, shape (units,)."""
    return (odds - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


class GatedModel:
    """A model whose units are multiplied by gates.

    Arguments:
        source: its copy, whose parameters get memory of their own, and its coupling.
        units: those with a gate, ascending.
    """

    def __init__(self, source: Source, units: Tensor) -> None:
        assert source.solution is not None
        self.source, self.units, self.model = source, units, source.model
        self.leaves, self.unit_of = source.solution.leaves, source.solution.unit_of
        self.size = len(self.unit_of)
        self.whole = {name: p.detach() for name, p in source.parameters.items()}
        self.gated = self.find_gated(roles(source.captures).reads)
        self.masked, self.rise = False, 0.0
        source.model = self.run  # type: ignore[assignment]
        self.kept = torch.ones(self.size, dtype=torch.bool)

    def find_gated(self, reads: set[tuple[str, int]]) -> dict[str, list[Tensor]]:
        """For each parameter the units of its labels, along each factor that its gates multiply."""
        mine, read = (torch.zeros(self.size, dtype=torch.bool) for _ in range(2))
        mine[self.units] = True
        spans = [(n, f, self.unit_of[f.labels]) for n, labels in self.leaves.items() if n in self.whole for f in labels]
        for name, f, span in spans:
            if (name, f.major_to_minor[-1]) in reads:
                read[span] = True
        found: dict[str, list[Tensor]] = {}
        for name, f, span in spans:
            open_ones = mine & (torch.ones_like(read) if (name, f.major_to_minor[-1]) in reads else ~read)
            if bool(open_ones[span].any()):
                found.setdefault(name, []).append(torch.where(open_ones[span], span, -1))
        return found

    def by_unit(self, values: Tensor) -> Tensor:
        """Values of the gates by unit, 1 for units without a gate, shape (labels,)."""
        return torch.ones(self.size, dtype=values.dtype).index_put((self.units,), values)

    def original(self, batch: Batch) -> list[Tensor]:
        """What the original returns, where there is no loss to train on; learns whether zeros do for closed gates."""
        half = self.by_unit(torch.arange(len(self.units), dtype=torch.float64) % 2)
        with torch.no_grad():
            if not self.masked:
                self.close(half)
                plain = outputs(self.model(*batch.args, **batch.kwargs))
                masked = outputs(self.run_masked(*batch.args, **batch.kwargs))
                self.masked = any(
                    float((a - b).abs().max()) > CLOSE * float(b.abs().max()) for a, b in zip(plain, masked, strict=True)
                )
                self.close(torch.ones_like(half))
            out = self.source.run(batch)
            target = outputs(out) if self.source.loss is None and loss_in(out) is None else []
        if not self.rise:
            values = []
            for gates in (half, torch.ones_like(half)):
                self.close(gates)
                values.append(float(self.value(batch, target).detach()))
            self.rise = abs(values[0] - values[1])
        return target

    def close(self, gates: Tensor) -> dict[str, Tensor]:
        """Give the copy parameters times gates, shape (labels,); returns them, with their dependence on the gates."""
        self.kept = gates.detach() > 0
        every = torch.cat([gates, torch.ones(1, dtype=gates.dtype)])  # the last one is of entries without a gate
        made = {}
        for name, spans in self.gated.items():
            weight = self.whole[name]
            for span in spans:
                weight = weight * every[span].to(weight.device, weight.dtype)
            made[name] = weight
            self.source.parameters[name].data = weight.detach()
        return made

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return (self.run_masked if self.masked else self.model)(*args, **kwargs)

    def run_masked(self, *args: Any, **kwargs: Any) -> Any:
        """What the masked model returns in which units go whose gates are 0."""
        names = {id(p): name for name, p in self.source.parameters.items()}
        removal = Removal(self.leaves, self.kept[self.unit_of], self.source.target.heads)
        fates = None
        while True:
            masker = MaskedRun(names, removal, fates)
            for tensor in collect((args, kwargs), Tensor):
                masker.add(tensor, from_input=True)
            with masker:
                out = self.model(*args, **kwargs)
            if fates is not None or not masker.kept_labels.late:
                return out
            fates = masker.kept

    def value(self, batch: Batch, target: Sequence[Tensor]) -> Tensor:
        """The loss, or without one the squared distance to what the original returns."""
        if not target:
            return self.source.value(batch)
        out = outputs(self.source.run(batch))
        return torch.stack([(a - b).square().sum() for a, b in zip(out, target, strict=True)]).sum()

    def loss(self, gates: Tensor, batch: Batch, target: Sequence[Tensor]) -> Tensor:
        """Something whose gradient with respect to the gates is that of the loss."""
        made = self.close(self.by_unit(gates))
        value = self.value(batch, target) / (self.rise or 1.0)
        gradients = dict(self.source.gradients(value))
        return torch.stack([(made[n] * g).sum().double().cpu() for n, g in gradients.items() if n in made]).sum()


def outputs(out: Any) -> list[Tensor]:
    """The tensors of fractions among what a model returns."""
    return [wide(t) if not t.requires_grad else t for t in collect(out, Tensor) if t.is_floating_point()]
