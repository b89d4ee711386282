"""Criteria: one number for each unit; the units with the lowest are removed.

A criterion is a function of a parameter that gives the importance of each of its elements; `score` adds them up over each
unit, in every layer the unit spans, as tensor reductions on the parameter's own device.

>>> import torch
>>> def largest(weight):  # any callable will do: the importance of each element
...     return weight.abs() ** 8
>>> import fxprune
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
>>> fxprune.prune(net, 0.5, example_inputs=torch.randn(1, 4), criterion=largest).get_submodule("0").out_features
3

What else a criterion may say, as attributes:
    needs: what it is given as a second argument; see `fxprune.criteria.calibration.GATHER` for what there is to ask for.
    elementwise: it looks at elements one by one, so that a large parameter may be given to it in blocks.
    into: a method: the same scores, written into a tensor that is given as a second argument, and returned (fresh memory costs
        more than the arithmetic).
    places: `all` parameters count, only those that `read` the units from an activation, or only those that `scale` a
        normalised activation.
    reduce: how the layers of a family are put together; see `fxprune.criteria.aggregation.REDUCE`.
    normalise: how families are made comparable where they compete; see `fxprune.criteria.aggregation.NORMALISE`.
"""

from fxprune.criteria.activation import FLAP, Wanda
from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import CRITERIA, find
from fxprune.criteria.gradient import OBDC, SNIP, Fisher, GraSP, Hessian, Taylor
from fxprune.criteria.scorer import Scorer, score
from fxprune.criteria.weight import FPGM, LAMP, BNScale, Magnitude, Random

__all__ = [
    "CRITERIA",
    "FLAP",
    "FPGM",
    "LAMP",
    "OBDC",
    "SNIP",
    "BNScale",
    "Criterion",
    "Fisher",
    "GraSP",
    "Hessian",
    "Magnitude",
    "Random",
    "Scorer",
    "Taylor",
    "Wanda",
    "find",
    "score",
]
