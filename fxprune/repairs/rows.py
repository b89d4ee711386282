"""What a product reads and what is wanted of it, row by row: gathered once, and fitted as often as the aim moves.

A row is a sample and a position. Of a convolution with many more positions than inputs, some are drawn (as in ThiNet).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fxprune.criteria.activation_stats import wide
from fxprune.criteria.windows import windows
from fxprune.repairs import least_squares
from fxprune.repairs.least_squares import (
    NormalEquations,
    count_inputs,
    groups,
    is_convolution,
    lifted,
    relative,
    sum_of_squares,
)
from fxprune.repairs.look_ahead import Path, divisor
from fxprune.repairs.sites import SiteCall

LARGEST = 1 << 24  # elements of a matrix of inputs: windows are taken from a part of the samples at a time
FARTHER = 1.6  # than the best fit to a bound of what is left; nearer than 2 it falls, and rounds get on faster
ENOUGH = 0.01  # of what is left: a round that gains less is the last one
HELD = 1 << 28  # elements of the inputs of one product; of what is beyond, windows are taken again each time


@dataclass(slots=True)
class Rows:
    """Some rows of one product.

    Attributes:
        make: what its inputs are, (groups, rows, columns); `elements`, how many; `inputs`, the same where they are held.
        aim, found: what its results are to be, and are, (groups, rows, outputs).
        line: what they become along a path is these times the first number, plus the second one; they broadcast.
        size: the sum of squares of the original's results.
        least, most: of the residuals, where the reader of the results does not tell more apart.
    """

    make: Callable[[], Tensor]
    elements: int
    aim: Tensor
    found: Tensor
    line: tuple[Tensor, Tensor] | None
    size: float
    inputs: Tensor | None = None
    least: Tensor | None = None
    most: Tensor | None = None

    def __len__(self) -> int:
        return self.aim.shape[1]

    def read(self) -> Tensor:
        return self.make() if self.inputs is None else self.inputs

    def bound(self, low: float, high: float) -> None:
        """From now on, what a path makes of the results is not told apart beyond two bounds."""
        assert self.line is not None
        slope, offset = self.line
        ends = torch.stack([(low - offset) / slope, (high - offset) / slope]).sort(0).values
        below, above = self.aim <= ends[0], self.aim >= ends[1]
        self.aim = self.aim.clamp(ends[0], ends[1])
        self.most = torch.full_like(self.aim, math.inf).masked_fill_(below, 0)
        self.least = torch.full_like(self.aim, -math.inf).masked_fill_(above, 0) if bool(above.any()) else None

    def residual(self, found: Tensor | None = None) -> Tensor:
        """By how much the results should be larger."""
        left = self.aim - (self.found if found is None else found)
        return left if self.most is None else left.clamp_(self.least, self.most)

    def moved(self, change: Tensor, shift: Tensor) -> Tensor:
        """What the results become after a change of the weight and of the constant."""
        return (self.read() @ change.to(self.found.dtype)).add_(shift.unsqueeze(1).to(self.found.dtype)).add_(self.found)


def rows_of(wanted: SiteCall, call: SiteCall, keep: Callable[[Tensor], Tensor], samples: int, seed: int) -> Iterator[Rows]:
    """Rows of a product in the pruned program.

    Arguments:
        wanted: its call in the original; `keep` takes from a result of that what the pruned program computes, too.
        samples: of which as many rows are drawn as a fit needs.
    """
    whole, slope = [wanted.out, call.out], call.slope
    if call.ahead is not None and slope is not None and wanted.ahead is not None:
        whole += [wanted.ahead, call.ahead, *([slope] if slope.shape == call.out.shape else [])]
    for make, elements, (target, out, *ahead) in take(call, whole, samples, seed):
        kept, line = keep(target), None
        aim, found = by_rows(call, kept), by_rows(call, out)
        fits = kept.shape == out.shape
        if ahead and slope is not None and fits:
            grown = by_rows(call, ahead[2] if len(ahead) > 2 else slope)
            aim, found = by_rows(call, keep(ahead[0])) / grown, by_rows(call, ahead[1]) / grown
            line = grown, torch.zeros_like(grown)
        elif call.line is not None and wanted.line is not None and call.product is not None and fits:
            theirs = [by_rows(call, keep(lifted(t, target, call.product.out))) for t in wanted.line]
            grown, offset = (by_rows(call, lifted(t, out, call.product.out)) for t in call.line)
            line = divisor(grown), offset
            if not all(map(torch.equal, theirs, line)):
                aim = (aim * theirs[0] + (theirs[1] - offset)) / line[0]
                aim = torch.where(grown == line[0], aim, found)  # what is not read is as it is to be
        yield Rows(make, elements, aim, found, line, sum_of_squares(wide(kept)))


def take(
    call: SiteCall, results: Sequence[Tensor], samples: int, seed: int
) -> Iterator[tuple[Callable[[], Tensor], int, list[Tensor]]]:
    """Parts of one run of a product: what makes the inputs of each, their number, and some results there.

    Arguments:
        results: of the shape of the product's, save for the number of channels.
        samples: of which as many rows are drawn as a fit needs.
    """
    if not is_convolution(call):
        assert call.product is not None
        x = flat(call, call.source, call.product.along)
        yield lambda: x, x.numel(), list(results)
        return
    each = count_inputs(call) * groups(call)
    positions, generator = results[0].shape[2:].numel(), torch.Generator().manual_seed(seed)
    rows = max(least_squares.ENOUGH_ROWS * count_inputs(call), least_squares.FEWEST_ROWS // groups(call))
    drawn = min(positions, math.ceil(rows / samples))
    step = max(1, LARGEST // max(drawn * each, 1))
    for source, *parts in zip(call.source.split(step), *(r.split(step) for r in results), strict=True):
        at = None
        if drawn < positions:
            at = torch.randperm(positions, generator=generator)[:drawn].to(source.device)
            parts = [part.flatten(2).index_select(2, at) for part in parts]
        make = functools.partial(windows, call.op, call.weight.shape[2:], wide(source), at)
        yield make, len(source) * drawn * each, parts


def add_call(normal: NormalEquations, call: SiteCall, residual: Tensor) -> None:
    """Add one run of a product, whose result should have been larger by `residual`."""
    for make, _, (part,) in take(call, [residual], len(residual), normal.count):
        normal.add(make(), by_rows(call, part))


def by_rows(call: SiteCall, r: Tensor) -> Tensor:
    """Results, or what broadcasts to them, as (groups, rows, outputs); those of a convolution are (samples, channels, ...)."""
    if not is_convolution(call):
        assert call.product is not None
        return flat(call, r, call.product.out)
    n, g = len(r), groups(call)
    return wide(r).reshape(n, g, r.shape[1] // g, -1).permute(1, 0, 3, 2).reshape(g, -1, r.shape[1] // g)


def flat(call: SiteCall, x: Tensor, dim: int) -> Tensor:
    """A matrix with one of its dimensions last; a batch of matrices stays one."""
    batched = x.dim() == 3 and call.weight.dim() == 3
    return wide(x).movedim(dim, -1).reshape(len(x) if batched else 1, -1, x.shape[dim])


class RowFit:
    """A fit of one product to its rows.

    The first one is to what is wanted; further ones, behind which the reader tells less apart, to what it does not tell from
    that, nearest to what there is, as long as what is left falls (arXiv:1505.06798 fits an auxiliary variable likewise).

    Arguments:
        fitted, unseen: the rows to fit, and those held out, by which it is judged if there are any.
        path: of results whose reader does not tell all apart.
        constant: whether a constant may be fitted beside the weight.

    Attributes:
        change, shift: of the weight, (groups, columns, outputs), and of the constant, (groups, outputs).
    """

    def __init__(self, fitted: list[Rows], unseen: list[Rows], path: Path, *, constant: bool) -> None:
        self.fitted, self.unseen, self.path, self.normal = fitted, unseen, path, NormalEquations(constant)
        for rows in fitted:
            self.normal.add(rows.read(), rows.residual())
        self.size, self.size_unseen = (sum(part.size for part in parts) for parts in (fitted, unseen))
        self.change, self.shift = torch.zeros_like(self.normal.cross), torch.zeros_like(self.normal.residuals)
        self.start = self.normal.squares, squares(unseen)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.normal.squares + float(self.normal.gram.sum()) + self.start[1])

    def left(self, change: Tensor, shift: Tensor) -> float:
        """What a change leaves of the residuals held out."""
        return sum(sum_of_squares(rows.residual(rows.moved(change, shift))) for rows in self.unseen)

    def run(self, ridge: float | None, rounds: int) -> None:
        change, shift, ridge = least_squares.fit(self.normal, ridge, self.left if self.unseen else None)
        start = [rows.found for rows in (*self.fitted, *self.unseen)]
        self.move(change, shift)
        if not self.path.is_bounded or any(rows.line is None for rows in (*self.fitted, *self.unseen)):
            return
        for rows in (*self.fitted, *self.unseen):
            rows.bound(*self.path.bounds)
        found = dict(zip(map(id, (*self.fitted, *self.unseen)), start, strict=True))
        self.start = squares(self.fitted, found), squares(self.unseen, found)
        judges = self.unseen or self.fitted
        least = squares(judges)
        for _ in range(rounds):
            self.normal.forget_residuals()
            for rows in self.fitted:
                self.normal.add_residuals(rows.read(), rows.residual())
            change, shift = (FARTHER * each for each in self.normal.solve(ridge))
            before = [rows.found for rows in (*self.fitted, *self.unseen)]
            self.move(change, shift)
            now = squares(judges)
            if not now < least:
                self.move(-change, -shift, before)
                break
            if now > (1 - ENOUGH) * least:
                break
            least = now

    def move(self, change: Tensor, shift: Tensor, found: Sequence[Tensor] | None = None) -> None:
        """Add a change; `found` is what results become, where that is known."""
        self.change, self.shift = self.change + change, self.shift + shift
        for i, rows in enumerate((*self.fitted, *self.unseen)):
            rows.found = rows.moved(change, shift) if found is None else found[i]

    @property
    def errors(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The relative errors before and now, of the rows that were fitted and of those held out."""
        now = squares(self.fitted), squares(self.unseen)
        fitted, unseen = zip(self.start, now, strict=True)
        return tuple(relative(s, self.size) for s in fitted), tuple(relative(s, self.size_unseen) for s in unseen)  # type: ignore


def squares(rows: Sequence[Rows], found: Mapping[int, Tensor] = MappingProxyType({})) -> float:
    """What is left of the residuals; `found` are results by the identity of their rows, where they are others."""
    return sum(sum_of_squares(part.residual(found.get(id(part)))) for part in rows)
