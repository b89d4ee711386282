"""Criteria: one score for each unit; the units with the lowest scores are removed.

A criterion is a function of a parameter that returns the importance of each of its elements, a tensor of the parameter's
shape. The elements of a unit are summed in every layer that the unit spans, and the layers are combined, as tensor
reductions on the parameter's own device. Any callable is a criterion:

>>> import torch
>>> def eighth_power(weight):
...     return weight.abs() ** 8
>>> import fxprune
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
>>> fxprune.prune(net, 0.5, example_inputs=torch.randn(1, 4), criterion=eighth_power).get_submodule("0").out_features
3

The rest of the protocol is optional. Attributes:
    needs: what is passed as a second argument, a tensor that broadcasts to the parameter; a key of
        `fxprune.criteria.calibration.GATHER`. Default: nothing.
    places: which parameters of a unit count: `all` of them (the default), only those that `reads` it from an activation, or
        only those that `scales` a normalised activation.
    elementwise: whether the importance of an element depends on that element alone. Large parameters are then scored in
        blocks of rows, and small ones together. Default: False.
    reduce: how the layers of a unit are combined, a key of `fxprune.criteria.aggregation.REDUCE`. Default: `sum`.
    normalise: how the scores of a family are normalised before families compete, a key of
        `fxprune.criteria.aggregation.NORMALISE`. Default: `none`. What is normalised by `mean`, `max` or `sum` counts for more
        the less of its family is left; `share` is `mean` for scores of units that go one after the other, where it does not.

Methods, in place of a score for each element:
    score_dims(weight, evidence, dims): the score of each index along some dimensions, of size 1 along the others; None where
        the parameter has no score along these. `evidence` is None where the criterion needs nothing.
    score_units(count): a float64 array of `count` scores, one for each unit; no parameter is read.
    score_families(source, families): the scores of all units, float64, and whether each has one, both of shape (labels,): for a
        criterion that scores units by which others go. `source` is a `fxprune.criteria.calibration.Source`.
    finish_layer(scores): the scores of the units of one layer, computed from the sums over its elements.
"""

from fxprune.criteria.activation import FLAP, REAP, Wanda
from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import CRITERIA, find
from fxprune.criteria.gates import Gates
from fxprune.criteria.gradient import OBDC, SNIP, Fisher, GraSP, Hessian, Taylor, TokenTaylor
from fxprune.criteria.osscar import OSSCAR
from fxprune.criteria.scorer import Scorer
from fxprune.criteria.weight import FPGM, LAMP, BNScale, Folding, Magnitude, Random

__all__ = [
    "CRITERIA",
    "FLAP",
    "FPGM",
    "LAMP",
    "OBDC",
    "OSSCAR",
    "REAP",
    "SNIP",
    "BNScale",
    "Criterion",
    "Fisher",
    "Folding",
    "Gates",
    "GraSP",
    "Hessian",
    "Magnitude",
    "Random",
    "Scorer",
    "Taylor",
    "TokenTaylor",
    "Wanda",
    "find",
]
