"""Criteria that read the parameters alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxprune.arguments import shown
from fxprune.criteria.base import Criterion, CriterionOptions
from fxprune.criteria.calibration import Source
from fxprune.criteria.parameter_roles import roles
from fxprune.folding.clusters import merge_errors
from fxprune.folding.places import NotAlike, places_of, signatures
from fxprune.passes.coupling.families import Family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.progress import progress_bar


@dataclass(frozen=True)
class Magnitude(CriterionOptions):
    """The sum of |w|^p over a unit (Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710).

    >>> Magnitude()(torch.tensor([3.0, -4.0])).tolist(), Magnitude(p=1)(torch.tensor([3.0, -4.0])).tolist()
    ([9.0, 16.0], [3.0, 4.0])

    Arguments:
        p: the exponent of the norm, a positive number; its root is not taken, which does not change the order.
    """

    p: float = 2
    _: KW_ONLY
    normalise: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.p, int | float) and 0 < self.p < float("inf")):
            raise PruneError(f"p must be a positive number, not {self.p!r}", where="criterion Magnitude", fix="p=1 or p=2")

    def __call__(self, weight: Tensor) -> Tensor:
        if self.p == 2:
            return weight.square()
        return weight.abs() if self.p == 1 else weight.abs().pow(self.p)


@dataclass(frozen=True, kw_only=True)
class LAMP(CriterionOptions):
    """Squared magnitude over the sum of what is not smaller in the family (Lee et al., arXiv:2010.07611), times its units.

    Within a family the order is that of `magnitude`; it is made for families that compete (`ranking="global"`).
    """

    normalise: str = "lamp"

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.square()


@dataclass(frozen=True, kw_only=True)
class BNScale(CriterionOptions):
    """The magnitude of the scales of normalised activations (network slimming, Liu et al., arXiv:1708.06519).

    A scale is a parameter that multiplies a normalised activation, whatever the layer is called. Families without one
    stay whole.
    """

    places: ClassVar[str] = "scales"

    def __call__(self, weight: Tensor) -> Tensor:
        return weight.abs()


@dataclass(frozen=True, kw_only=True)
class FPGM(CriterionOptions):
    """The sum of distances from a unit's weights to those of the others in its layer (He et al., CVPR 2019, arXiv:1811.00250).

    The filters nearest to the geometric median of the layer, which the others can stand in for, score lowest. Vectors of
    one number a unit (biases, scales) are no filters and do not count.
    """

    normalise: str = "mean"

    def __call__(self, weight: Tensor) -> Tensor | None:
        return self.score_dims(weight, None, (0,))

    def score_dims(self, weight: Tensor, evidence: Tensor | None, dims: Sequence[int]) -> Tensor | None:
        """The score of each index along some dimensions of a weight; the others become of size 1."""
        rest = [d for d in range(weight.dim()) if d not in dims]
        if not rest or weight.dim() < 2:
            return None
        count = 1
        for d in dims:
            count *= weight.shape[d]
        rows = max(1, TABLE // count)
        sums = [self.distances(weight, [*dims], rest, range(i, min(i + rows, count)), count) for i in range(0, count, rows)]
        shape = [weight.shape[d] if d in dims else 1 for d in range(weight.dim())]
        return torch.cat(sums).reshape([weight.shape[d] for d in dims]).permute(order(dims)).reshape(shape)

    def distances(self, weight: Tensor, dims: list[int], rest: list[int], rows: range, count: int) -> Tensor:
        """The sum of distances to all `count` vectors, for some of them; shape (len(rows),).

        From products of the vectors, in double precision, block by block: the weight is never copied as a whole.
        """
        gram = torch.zeros(len(rows), count, dtype=torch.float64, device=weight.device)
        norms = torch.zeros(count, dtype=torch.float64, device=weight.device)
        axis = max(rest, key=lambda d: weight.shape[d])
        step = max(1, BLOCK * weight.shape[axis] // weight.numel())
        for block in weight.split(step, axis):
            vectors = block.permute(*dims, *rest).reshape(count, -1).double()
            gram.addmm_(vectors[rows.start : rows.stop], vectors.t())
            norms += vectors.square().sum(1)
        squares = norms[rows.start : rows.stop, None] + norms - 2 * gram
        squares[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 0
        return squares.clamp_(min=0).sqrt_().sum(1)


BLOCK = 1 << 20  # elements taken to double precision at a time
TABLE = 1 << 22  # pairs of filters compared at a time


def order(dims: Sequence[int]) -> list[int]:
    """How a tensor over `dims` is permuted into ascending dimensions."""
    return sorted(range(len(dims)), key=lambda i: dims[i])


@dataclass(frozen=True)
class Random(CriterionOptions):
    """A random number for each unit, the same for the same seed; the floor under every other criterion.

    Arguments:
        seed: of the numbers; torch's own random state is left alone.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer) or self.seed < 0:
            what = f"seed must be an integer of 0 or more, not {shown(self.seed)}"
            raise PruneError(what, where="criterion Random", fix="seed=0")
        super().__post_init__()

    def __call__(self, weight: Tensor) -> Tensor:
        return torch.from_numpy(self.score_units(weight.numel())).reshape(weight.shape)

    def score_units(self, count: int) -> np.ndarray:
        """A score for each unit."""
        return np.random.default_rng(self.seed).random(count)


@dataclass(frozen=True)
class Folding(CriterionOptions):
    """The error of merging a unit with those that are most like it (model folding: Wang et al., arXiv:2502.10216).

    Units are compared by everything that writes them: rows of weights, biases, parameters and statistics of norms, each tensor
    over its root mean square. A cluster's error is the sum of squared distances to its mean, what the paper's k-means makes
    small; here clusters are nested (Ward), so that one order serves every budget. The score is what the merge in which a unit
    goes adds, as a share of the sum of squares of its family. `fxprune.repair(..., method="merge")` then merges.

    A square matrix of the units of a family is held at a time, in double precision.
    """

    normalise: str = "share"

    def __call__(self, weight: Tensor) -> Tensor:
        raise PruneError("Folding scores the units of a family together, and no parameter alone", fix="criterion='magnitude'")

    def score_families(self, source: Source, families: Sequence[Family]) -> tuple[np.ndarray, np.ndarray]:
        """The score of each unit of some families, and whether it has one; shape (labels,)."""
        assert source.solution is not None
        reads, tensors = roles(source.captures).reads, dict(named_tensors(source.model))
        score = np.zeros(len(source.solution.unit_of))
        seen = np.zeros(len(score), bool)
        for family in progress_bar(families, "folding", "family"):
            try:
                rows = signatures(places_of(source.solution, family, reads, holds_only=True), tensors)
            except NotAlike:
                continue
            score[family.units], seen[family.units] = merge_errors(rows), True
        if not seen.any():
            raise PruneError("the criterion Folding scores nothing in this model", fix="criterion='magnitude'")
        return score, seen


CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "bn_scale": BNScale(),
    "lamp": LAMP(),
    "fpgm": FPGM(),
    "folding": Folding(),
    "random": Random(),
}
