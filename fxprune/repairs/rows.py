"""What a product reads and what is wanted of it, row by row: gathered once, and fitted as often as the aim moves.

A row is a sample and a position. Of a convolution with many more positions than inputs, some are drawn (as in ThiNet).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxprune.criteria.activation_stats import wide
from fxprune.criteria.windows import windows
from fxprune.repairs import least_squares
from fxprune.repairs.inputs import Inputs, Matrix, Windows
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
FORMED = 3  # as many positions cost as much as one whose windows are formed
HELD = 1 << 28  # elements of the inputs of one product; of what is beyond, windows are taken again each time


@dataclass(slots=True)
class Rows:
    """Some rows of one product.

    Attributes:
        make: what its inputs are; `elements`, how many are formed; `inputs`, the same once they are held, if it `holds` them.
        aim, found: what its results are to be, and are, in the form that belongs to the inputs.
        line: what they become along a path is these times the first number, plus the second one; they broadcast.
        size: the sum of squares of the original's results.
        least, most: of the residuals, where the reader of the results does not tell more apart.
    """

    make: Callable[[], Inputs]
    elements: int
    aim: Tensor
    found: Tensor
    line: tuple[Tensor, Tensor] | None
    size: float
    inputs: Inputs | None = None
    holds: bool = False
    least: Tensor | None = None
    most: Tensor | None = None

    def read(self) -> Inputs:
        inputs = self.make() if self.inputs is None else self.inputs
        self.inputs = inputs if self.holds else None
        return inputs

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
        return self.read().times(change.to(self.found.dtype), shift.to(self.found.dtype)).add_(self.found)


def rows_of(wanted: SiteCall, call: SiteCall, keep: Callable[[Tensor], Tensor], samples: int, seed: int) -> Iterator[Rows]:
    """Rows of a product in the pruned program.

    Arguments:
        wanted: its call in the original; `keep` takes from a result of that what the pruned program computes, too.
        samples: of which as many rows are drawn as a fit needs.
    """
    whole, slope = [wanted.out, call.out], call.slope
    if call.ahead is not None and slope is not None and wanted.ahead is not None:
        whole += [wanted.ahead, call.ahead, *([slope] if slope.shape == call.out.shape else [])]
    for make, elements, by_rows, (target, out, *ahead) in take(call, whole, samples, seed):
        kept, line = keep(target), None
        aim, found = by_rows(kept), by_rows(out)
        fits = kept.shape == out.shape
        if ahead and slope is not None and fits:
            grown = by_rows(ahead[2] if len(ahead) > 2 else slope)
            aim, found = by_rows(keep(ahead[0])) / grown, by_rows(ahead[1]) / grown
            line = grown, torch.zeros_like(grown)
        elif call.line is not None and wanted.line is not None and call.product is not None and fits:
            theirs = [by_rows(keep(lifted(t, target, call.product.out))) for t in wanted.line]
            grown, offset = (by_rows(lifted(t, out, call.product.out)) for t in call.line)
            line = divisor(grown), offset
            if not all(map(torch.equal, theirs, line)):
                aim = (aim * theirs[0] + (theirs[1] - offset)) / line[0]
                aim = torch.where(grown == line[0], aim, found)  # what is not read is as it is to be
        yield Rows(make, elements, aim, found, line, sum_of_squares(wide(kept)))


Part = tuple[Callable[[], Inputs], int, Callable[[Tensor], Tensor], list[Tensor]]


def take(call: SiteCall, results: Sequence[Tensor], samples: int, seed: int) -> Iterator[Part]:
    """Parts of one run of a product: what makes the inputs of each, how many are formed, the form of results, and some there.

    Arguments:
        results: of the shape of the product's, save for the number of channels.
        samples: of which as many rows are drawn as a fit needs.
    """
    form = functools.partial(by_rows, call)
    if not is_convolution(call):
        assert call.product is not None
        x = flat(call, call.source, call.product.along)
        yield lambda: Matrix(x), x.numel(), form, list(results)
        return
    each, sizes = count_inputs(call) * groups(call), call.weight.shape[2:]
    positions, generator = results[0].shape[2:].numel(), torch.Generator().manual_seed(seed)
    rows = max(least_squares.ENOUGH_ROWS * count_inputs(call), least_squares.FEWEST_ROWS // groups(call))
    drawn = min(positions, math.ceil(rows / samples))
    if drawn * min(FORMED, sizes.numel()) >= positions and Windows.fit(call.op, sizes, results[0].shape[2:]):
        yield functools.partial(Windows, call.op, sizes, wide(call.source)), 0, wide, list(results)
        return
    step = max(1, LARGEST // max(drawn * each, 1))
    for source, *parts in zip(call.source.split(step), *(r.split(step) for r in results), strict=True):
        at = None
        if drawn < positions:
            at = torch.randperm(positions, generator=generator)[:drawn].to(source.device)
            parts = [part.flatten(2).index_select(2, at) for part in parts]
        yield functools.partial(drawn_rows, call, wide(source), at), len(source) * drawn * each, form, parts


def drawn_rows(call: SiteCall, source: Tensor, at: Tensor | None) -> Matrix:
    return Matrix(windows(call.op, call.weight.shape[2:], source, at))


def add_call(normal: NormalEquations, call: SiteCall, residual: Tensor) -> None:
    """Add one run of a product, whose result should have been larger by `residual`."""
    for make, _, form, (part,) in take(call, [residual], len(residual), normal.count):
        normal.add(make(), form(part))


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
        judges: the rows by which it is judged.
    """

    def __init__(self, fitted: list[Rows], unseen: list[Rows], path: Path, *, constant: bool) -> None:
        self.fitted, self.unseen, self.path, self.normal = fitted, unseen, path, NormalEquations(constant)
        self.judges = unseen or fitted
        self.size, self.start = sum(rows.size for rows in self.judges), squares(self.judges)
        self.least, self.after = math.inf, list[Tensor]()  # of the changes tried, what the best one leaves and makes

    @property
    def is_rounding(self) -> bool:
        """Whether the residuals to fit are what sums in another order leave."""
        eps = 16 * torch.finfo(self.fitted[-1].found.dtype).eps
        return relative(squares(self.fitted), sum(rows.size for rows in self.fitted)) <= eps

    def gather(self) -> bool:
        """Add up the normal equations; returns whether all is finite."""
        for rows in self.fitted:
            self.normal.add_residuals(rows.read(), rows.residual())
        for inputs in joined([rows.read() for rows in self.fitted]):
            self.normal.add_moments(inputs)
        self.change, self.shift = torch.zeros_like(self.normal.cross), torch.zeros_like(self.normal.residuals)
        self.behind = self.change, self.shift  # what the rows to fit do not show yet, where others are held out
        return math.isfinite(self.normal.squares + float(self.normal.gram.sum()) + self.start)

    def left(self, change: Tensor, shift: Tensor) -> float:
        """What a change leaves of the residuals held out."""
        after = [rows.moved(change, shift) for rows in self.unseen]
        left = squares(self.unseen, after)
        if not self.after or left < self.least:
            self.least, self.after = left, after
        return left

    def run(self, ridge: float | None, rounds: int) -> None:
        change, shift, ridge = least_squares.fit(self.normal, ridge, self.left if self.unseen else None)
        start = [rows.found for rows in self.judges]
        self.move(change, shift, self.after)
        if not self.path.is_bounded or any(rows.line is None for rows in (*self.fitted, *self.unseen)):
            return
        for rows in (*self.fitted, *self.unseen):
            rows.bound(*self.path.bounds)
        self.start, least = squares(self.judges, start), squares(self.judges)
        for _ in range(rounds):
            self.catch_up()
            self.normal.forget_residuals()
            for rows in self.fitted:
                self.normal.add_residuals(rows.read(), rows.residual())
            change, shift = (FARTHER * each for each in self.normal.solve(ridge))
            before = [rows.found for rows in self.judges]
            self.move(change, shift)
            now = squares(self.judges)
            if not now < least:
                self.move(-change, -shift, before)
                break
            if now > (1 - ENOUGH) * least:
                break
            least = now

    def move(self, change: Tensor, shift: Tensor, found: Sequence[Tensor] = ()) -> None:
        """Add a change; `found` is what the results become by which it is judged, where that is known."""
        self.change, self.shift = self.change + change, self.shift + shift
        self.behind = self.behind[0] + change, self.behind[1] + shift
        for rows, after in zip(self.judges, found or [rows.moved(change, shift) for rows in self.judges], strict=True):
            rows.found = after

    def catch_up(self) -> None:
        """Bring the rows to fit up to date, where others are those that are judged."""
        for rows in self.fitted if self.unseen else ():
            rows.found = rows.moved(*self.behind)
        self.behind = torch.zeros_like(self.change), torch.zeros_like(self.shift)

    @property
    def error(self) -> tuple[float, float]:
        """The relative error before and now, of the rows held out, or of those that were fitted where there are none."""
        return relative(self.start, self.size), relative(squares(self.judges), self.size)


def joined(inputs: Sequence[Inputs]) -> Iterator[Inputs]:
    """The same, images of one size as one."""
    for _, group in itertools.groupby(inputs, lambda x: x.x.shape[1:] if isinstance(x, Windows) else id(x)):
        first, *others = group
        if others:
            first = copy.copy(first)
            first.x = torch.cat([first.x, *(other.x for other in others)])
        yield first


def squares(rows: Sequence[Rows], found: Sequence[Tensor] = ()) -> float:
    """What is left of the residuals; `found` are results that are others than those that the rows hold."""
    return sum(sum_of_squares(part.residual(at)) for part, at in itertools.zip_longest(rows, found))
