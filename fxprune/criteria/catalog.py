"""The criteria by name, and the one where none is asked for: the one that knows most of what there is to look at."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from fxprune.arguments import checked_call, checked_class, did_you_mean, shown
from fxprune.criteria import activation, gradient, weight
from fxprune.criteria.base import Criterion, CriterionSpec, check_name, describe
from fxprune.criteria.calibration import GATHER, SAMPLES, check_batches, loss_in, prepare_source, read
from fxprune.criteria.gates import Gates
from fxprune.criteria.osscar import OSSCAR
from fxprune.passes.errors import PruneError

CriterionName = Literal[
    "magnitude",
    "bn_scale",
    "lamp",
    "fpgm",
    "folding",
    "random",
    "taylor",
    "token_taylor",
    "hessian",
    "obdc",
    "fisher",
    "snip",
    "grasp",
    "wanda",
    "flap",
    "reap",
    "osscar",
    "gates",
]
CRITERIA: dict[str, Criterion] = {
    **weight.CRITERIA,
    **gradient.CRITERIA,
    **activation.CRITERIA,
    "osscar": OSSCAR(),
    "gates": Gates(),
}
for kind in {type(criterion) for criterion in CRITERIA.values()}:
    checked_class(kind)
OTHER_NAMES = {  # what the field calls some of them
    **dict.fromkeys(["l1", "l1_norm", "l1norm"], "fxprune.Magnitude(p=1)"),
    **dict.fromkeys(["l2", "l2_norm", "l2norm", "norm", "weight", "lp", "group_norm", "groupnorm"], "'magnitude'"),
    **dict.fromkeys(["bn", "batchnorm", "slimming", "network_slimming", "bnscale", "group_bn_scale"], "'bn_scale'"),
    **dict.fromkeys(["gradient", "first_order", "group_taylor", "tfo", "taylorfo"], "'taylor'"),
    **dict.fromkeys(["obd", "obs", "second_order", "group_hessian"], "'hessian'"),
}


@checked_call()
def find(criterion: str | Criterion) -> Criterion:
    """The criterion of a given name, or the callable itself; raises PruneError for anything else."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            other = OTHER_NAMES.get(criterion.lower())
            near = f"did you mean {other}? " if other else did_you_mean(criterion, CRITERIA)
            raise PruneError(f"there is no criterion {shown(criterion)}", fix=f"{near}one of {', '.join(sorted(CRITERIA))}")
        return CRITERIA[criterion]
    if isinstance(criterion, type) or not callable(criterion):
        what = f"criterion must be a name or a callable, not {shown(criterion)}"
        made = f"criterion={criterion.__name__}()" if isinstance(criterion, type) else "criterion='magnitude'"
        raise PruneError(what, fix=f"{made}, or a function of a parameter")
    return criterion


def resolve(criterion: str | Criterion) -> CriterionSpec:
    """The description of a criterion; raises PruneError for a name or an attribute that does not exist."""
    spec = describe(find(criterion))
    check_name("needs", spec.needs, ("", *GATHER, SAMPLES), spec.name)
    return spec


def choose_criterion(model: nn.Module, data: Any, loss: Any) -> tuple[str, Any, str]:
    """A criterion by name, the data to read, and the reason.

    With data and a loss, which the output of the model may hold, the gradient of the loss tells what a unit is worth; with data
    alone, what an activation varies by; else the weights alone are known.

    Raises: PruneError for what cannot be batches, or that the model does not take.
    """
    if data is None:
        return "magnitude", None, "weights alone are there to look at"
    if loss is not None:
        return "token_taylor", data, "there are data and a loss"
    check_batches(data)
    whole, first = peek(data)
    with prepare_source(model, first, None, "", None) as source, torch.no_grad(), contextlib.suppress(StopIteration):
        if loss_in(source.run(next(source.batches()))) is not None:
            return "token_taylor", whole, "the outputs of the model hold a loss"
    return "flap", whole, "there are data and no loss"


def peek(data: Iterable[Any]) -> tuple[Iterable[Any], list[Any]]:
    """The same batches, and the first of them in a list, which is empty where there are none."""
    found: Iterator[Any] = read(data)
    first = list(itertools.islice(found, 1))
    return (itertools.chain(first, found) if isinstance(data, Iterator) else data), first
