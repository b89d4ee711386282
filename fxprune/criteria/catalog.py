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
    needs: what it is given as a second argument; see `fxprune.criteria.evidence.GATHER` for what there is to ask for.
    elementwise: it looks at elements one by one, so that a large parameter may be given to it in blocks.
    into: a method: the same scores, written into a tensor that is given as a second argument, and returned (fresh memory costs
        more than the arithmetic).
    places: `all` parameters count, only those that `read` the units from an activation, or only those that `scale` a
        normalised activation.
    reduce: how the layers of a family are put together; see `fxprune.criteria.combine.REDUCE`.
    normalise: how families are made comparable where they compete; see `fxprune.criteria.combine.NORMALISE`.
"""

from __future__ import annotations

from fxprune.criteria.activation import FLAP, Wanda
from fxprune.criteria.base import Criterion
from fxprune.criteria.gradient import OBDC, SNIP, Fisher, GraSP, Hessian, Taylor
from fxprune.criteria.weight import FPGM, LAMP, BNScale, Magnitude, Random
from fxprune.passes.errors import PruneError

CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "bn_scale": BNScale(),
    "lamp": LAMP(),
    "fpgm": FPGM(),
    "taylor": Taylor(),
    "hessian": Hessian(),
    "obdc": OBDC(),
    "fisher": Fisher(),
    "wanda": Wanda(),
    "flap": FLAP(),
    "snip": SNIP(),
    "grasp": GraSP(),
    "random": Random(),
}


def find(criterion: str | Criterion) -> Criterion:
    """The criterion of a given name, or the callable itself; raises PruneError for anything else."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise PruneError(f"there is no criterion {criterion!r}", fix=f"one of {', '.join(sorted(CRITERIA))}")
        return CRITERIA[criterion]
    if isinstance(criterion, type) or not callable(criterion):
        what = f"criterion must be a name or a callable, not {criterion!r}"
        raise PruneError(what, fix="criterion='magnitude', or a function of a parameter")
    return criterion
