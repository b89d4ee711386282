"""Criteria that read gradients of a loss over data.

Most of them add up squares of first-order terms of the loss, g w: over the elements of a unit, or over samples. Where families
compete, the root is taken, which is a change of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fxprune.criteria.base import Criterion, CriterionOptions


@dataclass(frozen=True)
class Taylor(CriterionOptions):
    """First-order change of the loss: the sum of (g w)^2 over a unit (Molchanov et al., arXiv:1611.06440, 1906.10771).

    Every parameter of the unit counts, biases and the scales of normalisations included.

    Arguments:
        joint: the square of the sum of g w in each layer instead: the change when all of a unit's weights there go at once
            (equation 8 of 1906.10771).
    """

    joint: bool = False
    _: KW_ONLY
    normalise: str = "squared loss"
    needs: ClassVar[str] = "gradient"

    def __call__(self, weight: Tensor, gradient: Tensor) -> Tensor:
        product = weight * gradient
        return product if self.joint else product.square()

    def finish_layer(self, layer: np.ndarray) -> np.ndarray:
        """From the sums of one layer to its scores."""
        return layer**2 if self.joint else layer


@dataclass(frozen=True, kw_only=True)
class SNIP(CriterionOptions):
    """Connection sensitivity: the sum of |g w| over a unit (Lee et al., arXiv:1810.02340).

    Made for a network at initialisation. The paper's division by the total changes no order.
    """

    normalise: str = "loss"
    needs: ClassVar[str] = "gradient"

    def __call__(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).abs()


@dataclass(frozen=True, kw_only=True)
class Hessian(CriterionOptions):
    """Second-order change of the loss by the diagonal of its Hessian: w^2 h / 2 (LeCun et al., Optimal Brain Damage, 1989).

    The diagonal is that of the empirical Fisher matrix, the mean of squared gradients of single samples.
    """

    normalise: str = "squared loss"
    needs: ClassVar[str] = "squared gradient"

    def __call__(self, weight: Tensor, curvature: Tensor) -> Tensor:
        return weight.square() * curvature / 2


@dataclass(frozen=True, kw_only=True)
class GraSP(CriterionOptions):
    """How much gradient flow a unit carries: the sum of w (H g) (Wang et al., arXiv:2002.07376).

    The paper removes the weights with the largest -w (H g), whose removal takes least from the gradient's norm; here the
    sign is turned, so that the lowest go first. Made for a network at initialisation. `data` is read twice.
    """

    needs: ClassVar[str] = "curvature"

    def __call__(self, weight: Tensor, curvature: Tensor) -> Tensor:
        return weight * curvature


@dataclass(frozen=True, kw_only=True)
class Fisher(CriterionOptions):
    """Fisher information of a mask on each unit: the mean over samples of (dL/dm)^2 (Liu et al., arXiv:2108.00708).

    The gradient of the mask is the sum of g w over everything that reads the unit, all coupled layers together, before it
    is squared.
    """

    normalise: str = "squared loss"
    needs: ClassVar[str] = "gradients of samples"
    places: ClassVar[str] = "reads"

    def __call__(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return weight * gradient


@dataclass(frozen=True, kw_only=True)
class OBDC(CriterionOptions):
    """Curvature of the loss along a whole filter: S_ii (w_i A w_i) / 2 (EigenDamage, Wang et al., arXiv:1905.05934).

    With the Kronecker-factored Fisher matrix S x A of each product with a weight: A is the second moment of its inputs,
    so that w_i A w_i is that of its output before the bias, and S the second moment of the gradient there. Positions are
    summed in A and averaged in S, as KFC does.
    """

    normalise: str = "squared loss"
    needs: ClassVar[str] = "filter curvature"

    def __call__(self, weight: Tensor, evidence: Tensor) -> Tensor:
        return evidence.expand_as(weight)

    def score_dims(self, weight: Tensor, evidence: Tensor | None, dims: Sequence[int]) -> Tensor | None:
        """The score of each filter; dimensions that do not count filters have none."""
        if evidence is None or any((evidence.shape[d] > 1) != (d in dims) for d in range(weight.dim())):
            return None
        return evidence


@dataclass(frozen=True, kw_only=True)
class TokenTaylor(CriterionOptions):
    """First-order change of the loss at each position: the sum over samples and positions of (sum of x dL/dx)^2 over a unit.

    The sum within runs over the channels of the unit, where a layer reads them, and over all places of an image; the one
    outside over samples and, in sequences, tokens. It is `fisher` with tokens as samples, from one backward pass for each
    batch. All layers are on one scale: that of the squared loss.
    """

    normalise: str = "squared loss"
    needs: ClassVar[str] = "loss terms"
    places: ClassVar[str] = "reads"

    def __call__(self, weight: Tensor, evidence: Tensor) -> Tensor:
        return evidence.expand_as(weight)

    def score_dims(self, weight: Tensor, evidence: Tensor | None, dims: Sequence[int]) -> Tensor | None:
        """The score of each channel that a layer reads; other dimensions have none."""
        if evidence is None:
            return None
        shape = [weight.shape[d] if d in dims else 1 for d in range(weight.dim())]
        return evidence if list(evidence.shape) == shape else None


CRITERIA: dict[str, Criterion] = {
    "taylor": Taylor(),
    "token_taylor": TokenTaylor(),
    "hessian": Hessian(),
    "obdc": OBDC(),
    "fisher": Fisher(),
    "snip": SNIP(),
    "grasp": GraSP(),
}
