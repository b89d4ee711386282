"""Samples that are held out of a fit: which they are, and how far they let the whole of a repair go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxprune.criteria.calibration import Batch
from fxprune.passes.ir.outputs import named_outputs
from fxprune.passes.ir.pytree import TensorRef, map_tensors
from fxprune.repairs.least_squares import PART, relative
from fxprune.repairs.side_by_side import Programs

FEWEST = 2  # samples held out: of one alone the spread is not known
MANY = 8  # batches, of which some are held out whole
SHARES = (1.0, 0.5, 0.25, 0.125)


def split(batches: Sequence[Batch], share: float) -> list[tuple[Batch, bool]]:
    """The batches, each with whether it is held out; those of which some rows are held out come in two parts.

    What is held out lies evenly among the rest. Of four samples or more it is two at least.
    """
    total = len(batches) if len(batches) >= MANY else sum(batch.size for batch in batches)
    if not share or total < 2 * FEWEST:
        return [(batch, False) for batch in batches]
    step = min(1 / share, total / FEWEST)
    is_held = [math.floor((i + 1) / step + 1e-9) > math.floor(i / step + 1e-9) for i in range(total)]
    if len(batches) >= MANY:
        return list(zip(batches, is_held, strict=True))
    parts: list[tuple[Batch, bool]] = []
    start = 0
    for batch in batches:
        mine = is_held[start : start + batch.size]
        start += batch.size
        for held in (False, True):
            rows = [i for i, h in enumerate(mine) if h == held]
            if rows:
                parts.append((batch if len(rows) == batch.size else batch.rows(rows), held))
    return parts


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a repair.

    Attributes:
        share: how much of the way from the values that there were to the repaired ones was gone.
        errors: the relative errors of the output before and after; None where there are no data.
    """

    share: float
    errors: tuple[float, float] | None


def choose_share(programs: Programs, start: Mapping[str, Tensor], made: Mapping[str, Tensor], *, check: bool) -> Outcome:
    """Go as much of the way as surely brings the output closer to the original's on the samples held out.

    What is tested is by how much the squared error of each of them falls.

    Arguments:
        start: the tensors of the pruned model as it was.
        made: those of the copy that was repaired, which are changed.
        check: whether any data is held out; the whole way is gone where none is.
    """
    at = [i for i, held in enumerate(programs.held) if held == check]
    wanted = [programs.wanted[i] for i in at]
    batches = [programs.batches[i][1] for i in at]
    before = Errors.of(wanted, [programs.before[i] for i in at], batches)
    after = Errors.of(wanted, [programs.after[i] for i in at], batches)
    if not check:
        return Outcome(1.0, (before.relative, after.relative))
    moves = {name: tensor.clone() for name, tensor in made.items() if tensor.is_floating_point() or tensor.is_complex()}
    for share in SHARES:
        if share < 1:
            for name, tensor in moves.items():
                made[name].copy_(start[name].lerp(tensor, share))
            after = Errors.of(wanted, programs.outputs(at), batches)
        if after.surely_less_than(before):
            return Outcome(share, (before.relative, after.relative))
    for name in moves:
        made[name].copy_(start[name])
    return Outcome(0.0, (before.relative, before.relative))


@dataclass(frozen=True, slots=True)
class Errors:
    """The squared error of the output for each sample, and the sum of squares of the wanted output."""

    squares: list[float]
    size: float

    @classmethod
    def of(cls, wanted: Sequence[Any], found: Sequence[Any], batches: Sequence[Batch]) -> Errors:
        """Over all floating outputs but those that have lost channels, which are no worse for it; caches are no outputs.

        A batch whose outputs do not come by samples counts as one sample.
        """
        squares: list[float] = []
        size = 0.0
        for one, other, batch in zip(wanted, found, batches, strict=True):
            mine, its = tensors_returned(one), tensors_returned(other)
            both = [(mine[name], its[name]) for name in mine if name in its and mine[name].shape == its[name].shape]
            pairs = [(a, b) for a, b in both if a.is_floating_point()]
            by_sample = all(a.dim() and len(a) == batch.size for a, _ in pairs)
            rows = [0.0] * (batch.size if by_sample else 1)
            for whole, other in pairs:
                samples = zip(whole, other, strict=True) if by_sample else [(whole, other)]
                for i, sample in enumerate(samples):
                    for x, y in zip(*(t.reshape(-1).split(PART) for t in sample), strict=True):
                        a, b = x.double(), y.double()
                        rows[i] += float((a - b).masked_fill(a == b, 0).square().sum())  # also where both are infinite
                        size += float(a.masked_fill(a.isinf(), 0).square().sum())
            squares += rows
        return cls(squares, size)

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        return cls([square for part in parts for square in part.squares], sum(part.size for part in parts))

    @property
    def relative(self) -> float:
        return relative(sum(self.squares), self.size)

    def surely_less_than(self, other: Errors) -> bool:
        """Whether the mean is smaller by more than its standard error explains: a one-sided t-test.

        Its level is 95 % over all `SHARES` that may be tried (Bonferroni).
        """
        falls = [b - a for a, b in zip(self.squares, other.squares, strict=True)]
        mean = sum(falls) / len(falls)
        if not math.isfinite(mean) or mean <= 0 or len(falls) < FEWEST:
            return False
        spread = sum((f - mean) ** 2 for f in falls) / (len(falls) - 1)
        return mean > t_quantile(len(falls) - 1) * math.sqrt(spread / len(falls))


def tensors_returned(output: Any) -> dict[str, Tensor]:
    """The tensors in what a model returned, by where they stand."""
    found: list[Tensor] = []

    def number(tensor: Tensor) -> TensorRef:
        found.append(tensor)
        return TensorRef(len(found) - 1)

    return {name: found[ref.id] for name, ref in named_outputs(map_tensors(output, number), {})}


def t_quantile(degrees: int) -> float:
    """The quantile at 1 - 0.05 / 4 of Student's t, to 2 % (Abramowitz and Stegun, 26.7.5, from five degrees on)."""
    if degrees <= 4:
        return (25.452, 6.205, 4.177, 3.495)[degrees - 1]
    z = 2.2414
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
