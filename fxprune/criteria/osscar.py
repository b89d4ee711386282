"""OSSCAR: the units whose removal costs least once what is left of each layer is fitted again (Meng et al., arXiv:2403.12983).

A layer with inputs X, of shape (rows, columns), and weight W, (columns, outputs), that loses the columns S and is fitted again
by least squares makes the error tr(W_S' (G_SS)^-1 W_S), where G is the inverse of X'X. So units are taken one after the other,
each time the one with the least error; then G and W are those of the fitted layer, by a Schur complement:

    W <- W - G_S (G_SS)^-1 W_S        G <- G - G_S (G_SS)^-1 G_S'

For a single column this is the rule of Optimal Brain Surgeon, w^2 / (2 G_ss), but for a factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.criteria.activation_stats import ActivationObserver, observe_activations, units_of_labels, wide
from fxprune.criteria.base import CriterionOptions
from fxprune.criteria.calibration import Source
from fxprune.criteria.windows import windows
from fxprune.passes.coupling.families import Family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import Product

LARGEST = 1 << 24  # elements of a matrix of inputs: windows are taken from a part of the samples at a time
PARTS = 64  # of what is left of a family one part goes at a time; one by one where it has fewer than twice as many units


@dataclass(frozen=True, kw_only=True)
class OSSCAR(CriterionOptions):
    """The error of the layers that read a unit, after refitting them, when it goes after those that go before it.

    The error of each layer is a share of the sum of squares of its result, and those of all layers that read the unit are
    added. Units are eliminated greedily, without the paper's swaps, which would leave no order for a budget to follow. Units
    that no layer reads by a weight (dimensions of queries and keys) score by their share of what is written in their family.

    A square matrix of the inputs is held for each layer, in double precision.

    Arguments:
        ridge: added to the diagonal of X'X, as a share of its mean.
    """

    ridge: float = 0.01
    normalise: str = "share"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.ridge, int | float) and 0 <= self.ridge < float("inf")):
            raise PruneError(
                f"ridge must be a number of 0 or more, not {self.ridge!r}", where="criterion OSSCAR", fix="ridge=0.01"
            )

    def __call__(self, weight: Tensor) -> Tensor:
        raise PruneError("OSSCAR scores the units of a family together, and no parameter alone", fix="criterion='magnitude'")

    def score_families(self, source: Source, families: Sequence[Family]) -> tuple[np.ndarray, np.ndarray]:
        """The score of each unit of some families, and whether it has one; shape (labels,)."""
        assert source.solution is not None
        units = units_of_labels(source.solution)
        with torch.no_grad():
            observer = observe_activations(
                source.model, source.parameters, source.captures, source.batches(), source.run, by=InputObserver
            )
        assert isinstance(observer, InputObserver)
        size = len(source.solution.unit_of)
        score, seen = np.zeros(size), np.zeros(size, bool)
        written = np.bincount(units.clamp(max=size).numpy(), observer.written.numpy(), size + 1)[:size]
        for family in progress_bar(families, "OSSCAR", "family"):
            mine = [e for r in observer.readers.values() for e in r.eliminations(units, family.units, self.ridge)]
            if mine:
                score[family.units] = eliminate(mine, len(family.units))
            elif written[family.units].any():
                score[family.units] = written[family.units] / written[family.units].sum()
            seen[family.units] = bool(mine) or bool(written[family.units].any())
        return score, seen


@dataclass(slots=True)
class Reader:
    """The inputs of one product with a weight.

    Attributes:
        labels: of its columns, (groups, columns); -1 where a column has none.
        weight: (groups, columns, outputs).
        gram: the sum over rows of products of inputs, (groups, columns, columns).
    """

    labels: Tensor
    weight: Tensor
    gram: Tensor = field(default_factory=lambda: torch.zeros(()))

    def eliminations(self, unit_of: Tensor, units: np.ndarray, ridge: float) -> list[Elimination]:
        """For each group that reads units of a family what is needed to eliminate them; none where nothing is read at all."""
        energy = float((self.weight * (self.gram @ self.weight)).sum())
        if not energy > 0:
            return []
        found = []
        for labels, gram, weight in zip(self.labels, self.gram, self.weight, strict=True):
            unit = torch.where(labels < 0, -1, unit_of[labels]).numpy()
            if np.isin(unit, units).any():
                damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                found.append(Elimination(damped, weight, unit, units, energy))
        return found


class Elimination:
    """One group of a product, some of whose inputs are eliminated.

    Arguments:
        gram: of all inputs, (columns, columns).
        weight: (columns, outputs).
        unit: of each column.
        units: of the family, ascending.
        energy: what errors are a share of.
    """

    def __init__(self, gram: Tensor, weight: Tensor, unit: np.ndarray, units: np.ndarray, energy: float) -> None:
        columns = np.flatnonzero(np.isin(unit, units))
        at = torch.from_numpy(columns).to(gram.device)
        self.inverse = torch.linalg.pinv(gram, hermitian=True)[at][:, at]
        self.weight, self.energy = weight[at].clone(), energy
        place = np.searchsorted(units, unit[columns])
        self.columns = {int(p): np.flatnonzero(place == p) for p in np.unique(place)}

    def errors(self, left: np.ndarray) -> np.ndarray:
        """The error that each unit alone would add, 0 for those that have gone; `left` and the result: shape (units,)."""
        found = np.zeros(len(left))
        widths: dict[int, list[int]] = {}
        for place, columns in self.columns.items():
            if left[place]:
                widths.setdefault(len(columns), []).append(place)
        for places in widths.values():
            at = torch.from_numpy(np.stack([self.columns[p] for p in places])).to(self.inverse.device)
            blocks, weight = self.inverse[at.unsqueeze(2), at.unsqueeze(1)], self.weight[at]
            found[places] = (weight * solved(blocks, weight)).sum((1, 2)).cpu().numpy() / self.energy
        return found

    def remove(self, places: Sequence[int]) -> None:
        """Fit the rest again without some units."""
        mine = [self.columns[p] for p in places if p in self.columns]
        if mine:
            at = torch.from_numpy(np.concatenate(mine)).to(self.inverse.device)
            rows = self.inverse[at]
            gain = solved(rows[:, at].unsqueeze(0), rows.unsqueeze(0))[0].mT
            self.weight -= gain @ self.weight[at]
            self.inverse -= gain @ rows


def solved(blocks: Tensor, right: Tensor) -> Tensor:
    """Solutions of symmetric systems; of singular ones the smallest."""
    factor, failed = torch.linalg.cholesky_ex(blocks)
    if bool((failed == 0).all()):
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(blocks, hermitian=True) @ right


def eliminate(readers: Sequence[Elimination], count: int) -> np.ndarray:
    """The error that each of `count` units adds when its turn comes, made to rise from turn to turn; shape (count,)."""
    score, left, last = np.zeros(count), np.ones(count, bool), -np.inf
    while left.any():
        errors = np.sum([reader.errors(left) for reader in readers], 0)
        places = np.flatnonzero(left)
        places = places[np.argsort(errors[places], kind="stable")][: max(1, len(places) // PARTS)]
        for place in places.tolist():
            last = score[place] = max(float(errors[place]), np.nextafter(last, np.inf), 0.0)
        for reader in readers:
            reader.remove(places.tolist())
        left[places] = False
    return score


class InputObserver(ActivationObserver):
    """Runs a model and adds up the products of what each weight reads.

    Attributes:
        readers: of each product with a weight, by the labels of the weight.
        written: by label the sum of squares of what is written there.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.readers: dict[object, Reader] = {}
        self.written = torch.zeros(self.size, dtype=torch.float64)

    def look(self, product: Product, tensors: Mapping[int, Tensor], call: OpView, out: Tensor) -> None:
        shape = call.shape(product.weight)
        met, made = (self.origins.vector(product, shape, dim) for dim in (product.summed, product.kept))
        if made is not None:
            squares = wide(out).double().square().sum([d for d in range(out.dim()) if d != product.out % out.dim()]).cpu()
            self.written.index_add_(0, made[0], squares[made[1]])
        if met is None or (len(shape) > 3 and "dilation" not in call.named):
            return
        source, weight = wide(tensors[product.source.id]), wide(tensors[product.weight.id]).double()
        channels = source.shape[product.along]
        if "dilation" in call.named:
            groups = int(call.get("groups", 1))
            labels = spread_labels(*met, channels).reshape(groups, -1).repeat_interleave(weight[0, 0].numel(), 1)
            inputs = split_windows(call, weight, source)
            if call.get("transposed"):
                weight = weight.reshape(groups, -1, *weight.shape[1:]).flip(list(range(3, weight.dim() + 1))).movedim(2, -1)
            else:
                weight = weight.reshape(groups, len(weight) // groups, -1).mT
        else:
            batched = weight.dim() == 3 and source.dim() == 3
            groups = len(weight) if weight.dim() == 3 else 1
            every = met[0].reshape(groups, channels) if len(met[0]) == groups * channels else None
            labels = spread_labels(*met, channels).expand(groups, -1) if every is None else every
            inputs = [source.movedim(product.along, -1).reshape(groups if batched else 1, -1, channels)]
            weight = weight.movedim(product.summed, 1 if groups > 1 or weight.dim() == 3 else 0)
        weight = weight.reshape(groups, labels.shape[1], -1)
        key = (met[0].numpy().tobytes(), None if made is None else made[0].numpy().tobytes())
        reader = self.readers.setdefault(key, Reader(labels, weight))
        for x in inputs:
            reader.gram = reader.gram.to(x.device) + (x.mT @ x).double()


def spread_labels(labels: Tensor, index: Tensor, channels: int) -> Tensor:
    """The label of each channel, -1 for those without."""
    found = torch.full((channels,), -1)
    found[index] = labels
    return found


def split_windows(call: OpView, weight: Tensor, source: Tensor) -> list[Tensor]:
    """The windows of a convolution, a part of the samples at a time."""
    each = source[0].numel() * weight[0, 0].numel()
    return [windows(call, weight.shape[2:], part) for part in source.split(max(1, LARGEST // max(each, 1)))]
