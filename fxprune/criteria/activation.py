"""Criteria that read the activations which a weight multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxprune.criteria.base import Criterion, CriterionOptions


@dataclass(frozen=True, kw_only=True)
class Wanda(CriterionOptions):
    """The sum of |w| times the L2 norm of the activation it multiplies (Sun et al., arXiv:2306.11695).

    Summed over the weights that read a unit, as FLAP's authors do in their structured Wanda-sp.
    """

    normalise: str = "mean"
    needs: ClassVar[str] = "norm of inputs"
    places: ClassVar[str] = "reads"

    def __call__(self, weight: Tensor, norm: Tensor) -> Tensor:
        return weight.abs() * norm


@dataclass(frozen=True, kw_only=True)
class FLAP(CriterionOptions):
    """The fluctuation of an activation times the squared norm of the weights that read it (An et al., arXiv:2312.11983).

    The fluctuation is the sample variance over all samples and positions: what a constant cannot stand in for.
    """

    normalise: str = "standardise"
    needs: ClassVar[str] = "variance of inputs"
    places: ClassVar[str] = "reads"

    def __call__(self, weight: Tensor, variance: Tensor) -> Tensor:
        return weight.square() * variance


@dataclass(frozen=True, kw_only=True)
class REAP(CriterionOptions):
    """The mean over an expert's tokens of its gate times the norm of its output (Lasby et al., arXiv:2510.13999).

    It scores experts, and nothing else. An expert that no token chose has the score 0.
    """

    normalise: str = "mean"
    needs: ClassVar[str] = "contributions of experts"

    def __call__(self, weight: Tensor, contribution: Tensor) -> Tensor:
        return (contribution / weight[0].numel()).expand_as(weight)


CRITERIA: dict[str, Criterion] = {"wanda": Wanda(), "flap": FLAP(), "reap": REAP()}
