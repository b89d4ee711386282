"""Sparse training: penalties that bring whole units near zero, as what they add to the gradients.

A regulariser is a function of the units: it says how strongly each of them is pulled towards zero. What a unit is, in every
layer it spans, comes from the labels, as it does for criteria; no layer is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.arguments import checked_class, did_you_mean, shown
from fxprune.criteria.parameter_roles import roles
from fxprune.criteria.scorer import HALF_DTYPES
from fxprune.distributed.sharded import as_shard, local, part_for, whole
from fxprune.iterative.plan_mapping import narrow_labels
from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.labels import Factor, Labels
from fxprune.plan import PlanData


@dataclass(frozen=True, slots=True)
class Units:
    """What a regulariser is told of the units that may go; a number for each, on the model's device.

    Attributes:
        squares: the sum of their squared elements, over all layers they span; shape (units,).
        family: the family of each, from 0; shape (units,), int64. `families` is how many there are.
        marked: whether it goes in the next step; None unless the regulariser `foresees`.
        calls: how often `regularize` was called since the last step.
    """

    squares: Tensor
    family: Tensor
    families: int
    marked: Tensor | None = None
    calls: int = 0

    def by_family(self, how: str) -> Tensor:
        """The `amax` or `amin` of the squares of each unit's family; shape (units,)."""
        start = self.squares.new_full((self.families,), float("-inf" if how == "amax" else "inf"))
        return start.scatter_reduce(0, self.family, self.squares, how)[self.family]


Regularizer = Callable[[Units], Tensor]


@dataclass(frozen=True, kw_only=True)
class Strength:
    """What every regulariser has.

    Attributes:
        strength: the factor of the penalty in the loss, a positive number.
        places: as of a criterion: `all` elements of a unit are pulled, or those that `scale` a normalised activation.
        signs: the pull is the same whatever an element's size (L1), instead of in proportion to it.
        foresees: it is told which units go in the next step.
    """

    strength: float = 1e-4

    places: ClassVar[str] = "all"
    signs: ClassVar[bool] = False
    foresees: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, strength=self.strength)


def check_positive(of: object, **numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise PruneError(f"{name} must be a positive number, not {shown(value)}", where=f"regularizer {type(of).__name__}")


@checked_class
@dataclass(frozen=True, kw_only=True)
class BNL1(Strength):
    """strength * sum |s| over the scales s of normalised activations (network slimming, Liu et al., arXiv:1708.06519)."""

    places: ClassVar[str] = "scales"
    signs: ClassVar[bool] = True

    def __call__(self, units: Units) -> Tensor:
        return torch.full_like(units.squares, self.strength)


@checked_class
@dataclass(frozen=True, kw_only=True)
class GroupLasso(Strength):
    """strength * sum over units of the L2 norm of all that belongs to one (Wen et al., arXiv:1608.03665).

    The norm is taken over all layers that a unit spans. A unit that is zero is left alone.
    """

    def __call__(self, units: Units) -> Tensor:
        norm = units.squares.sqrt()
        return torch.where(norm > 0, self.strength / norm, 0.0)


@checked_class
@dataclass(frozen=True, kw_only=True)
class DepGraph(Strength):
    """strength * sum over units of g * (squared norm), with g larger for less important units (Fang et al., arXiv:2301.12900).

    g is 2 ** (alpha * (most - own) / (most - least)) with squared norms as importance, over each family (equation 4); it
    counts as a constant. In a family where all are alike it is 1.
    """

    alpha: float = 4.0

    def __post_init__(self) -> None:
        check_positive(self, strength=self.strength, alpha=self.alpha)

    def __call__(self, units: Units) -> Tensor:
        most, least = units.by_family("amax"), units.by_family("amin")
        share = torch.where(most > least, (most - units.squares) / (most - least), 0.0)
        return 2 * self.strength * 2 ** (self.alpha * share)


@checked_class
@dataclass(frozen=True, kw_only=True)
class Growing(Strength):
    """growth / 2 * sum of squared norms of the units that go in the next step (GReg-1, Wang et al., arXiv:2012.09243).

    The growth begins at `strength` and rises by it after every `every` calls, up to `ceiling`. The units are chosen once, at
    the first call after a step, as the next step would choose them then.
    """

    every: int = 10
    ceiling: float = 1.0
    foresees: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, strength=self.strength, every=self.every, ceiling=self.ceiling)

    def __call__(self, units: Units) -> Tensor:
        growth = min(self.ceiling, self.strength * (1 + units.calls // self.every))
        marked = torch.zeros_like(units.squares) if units.marked is None else units.marked.to(units.squares.dtype)
        return growth * marked


REGULARIZERS: dict[str, Regularizer] = {
    "bn_l1": BNL1(),
    "group_lasso": GroupLasso(),
    "depgraph": DepGraph(),
    "growing": Growing(),
}


def find(regularizer: str | Regularizer) -> Regularizer:
    """The regulariser of a given name, or the callable itself; raises PruneError for anything else."""
    if isinstance(regularizer, str):
        if regularizer not in REGULARIZERS:
            near = did_you_mean(regularizer, REGULARIZERS)
            raise PruneError(f"there is no regularizer {shown(regularizer)}", fix=f"{near}one of {', '.join(REGULARIZERS)}")
        return REGULARIZERS[regularizer]
    if isinstance(regularizer, type) or not callable(regularizer):
        what = f"regularizer must be a name or a callable, not {shown(regularizer)}"
        raise PruneError(what, fix="regularizer='group_lasso', or a function of the units")
    return regularizer


class Spans:
    """Which elements of which parameters belong to which unit.

    Arguments:
        parameters: names, in the order in which they are looked at.
        leaves: labels by name.
        unit_of: the unit of each label, shape (labels,).
        families: the units of each family that may go.
        counts: whether a parameter counts along one of its factors.
    """

    def __init__(
        self,
        parameters: Sequence[str],
        leaves: Mapping[str, Labels],
        unit_of: np.ndarray,
        families: Sequence[np.ndarray],
        counts: Callable[[str, Factor], bool],
    ) -> None:
        self.units = np.concatenate(families)
        self.families = len(families)
        self.family = torch.from_numpy(np.repeat(np.arange(len(families)), [len(f) for f in families]))
        number = np.full(len(unit_of), len(self.units), np.int64)  # the last number is that of all the rest
        number[self.units] = np.arange(len(self.units))
        self.rows: list[tuple[str, tuple[int, ...], Tensor]] = []
        for name in parameters:
            for f in leaves.get(name, ()):
                index = torch.from_numpy(number[unit_of[f.flat]]).reshape(f.labels.shape)
                if counts(name, f) and bool((index < len(self.units)).any()):
                    rest = tuple(d for d in range(f.labels.dim()) if d not in f.major_to_minor)
                    self.rows.append((name, rest, index))

    def add(self, parameters: Mapping[str, Tensor], of: Regularizer, marked: np.ndarray | None, calls: int) -> None:
        """Add the gradient of a penalty to those of the parameters that learn; sharded ones are gathered one at a time."""
        device = next(p.device for p in parameters.values())
        self.rows = [(name, rest, index.to(device)) for name, rest, index in self.rows]  # copied once
        wide = torch.float64 if any(p.dtype is torch.float64 for p in parameters.values()) else torch.float32
        squares = torch.zeros(len(self.units) + 1, dtype=wide, device=device)
        for name, rest, index in self.rows:
            if name in parameters:
                squares.index_add_(0, index.reshape(-1), squares_of(parameters[name], rest).reshape(-1).to(device, wide))
        going = None if marked is None else torch.from_numpy(marked[self.units]).to(device)
        pull = of(Units(squares[:-1], self.family.to(device), self.families, going, calls))
        checked(pull, squares[:-1], of)
        pull = torch.cat([pull, pull.new_zeros(1)])
        for name, _, index in self.rows:
            p = parameters.get(name)
            if p is None or not p.requires_grad:
                continue
            w = floating(local(p))
            towards = w.sign() if getattr(of, "signs", False) else w
            extra = (towards * part_for(pull[index], p).to(w.device, w.dtype)).to(p.dtype)
            if p.grad is None:
                p.grad = as_shard(extra, p)
            else:
                local(p.grad).add_(extra)


def spans_of(solution: Solution, free: Sequence[Family], gone: np.ndarray, plan: PlanData, of: Regularizer) -> Spans:
    """What a regulariser pulls at in a model that a plan has left; raises PruneError where that is nothing.

    Arguments:
        solution: the coupling of the original, and `free` its families that may go.
        gone: units that are removed, shape (labels,).
        plan: what the model was cut by.
        of: the regulariser.
    """
    owned = ((n, labels) for n, labels in solution.leaves.items() if n in plan.shapes)
    leaves = {n: narrow_labels(labels, plan.slices.get(n, ()), plan.shapes[n]) for n, labels in owned}
    scales = getattr(of, "places", "all") == "scales"
    named = roles(solution.captures).scales if scales else set(leaves)
    alive = [f.units[~gone[f.units]] for f in free]
    spans = Spans(list(leaves), leaves, solution.unit_of.numpy(), alive, lambda name, f: name in named)
    if not spans.rows:
        what = "the regularizer pulls at nothing in this model: no parameter scales a normalised activation"
        raise PruneError(what, fix="regularizer='group_lasso'")
    return spans


def squares_of(parameter: Tensor, rest: tuple[int, ...]) -> Tensor:
    """The sums of the squares of a parameter's elements along some dimensions."""
    w = floating(whole(parameter).detach())
    return w.square().sum(rest, keepdim=True) if rest else w.square()


def floating(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in HALF_DTYPES else weight


def checked(pull: Any, squares: Tensor, of: Regularizer) -> None:
    name = getattr(of, "__name__", type(of).__name__)
    if not isinstance(pull, Tensor) or pull.shape != squares.shape:
        got = f"shape {tuple(pull.shape)}" if isinstance(pull, Tensor) else f"a {type(pull).__name__}"
        fix = "return one number for each unit: what its elements are multiplied by to give the gradient"
        raise PruneError(f"the regularizer {name} returns {got} for {len(squares):,} units", fix=fix)
    if not bool(pull.isfinite().all()):
        raise PruneError(f"the regularizer {name} gives numbers that are not finite", fix="look for NaN among the parameters")


def with_gradients(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Those of a model's tensors that are trained; raises PruneError where none has a gradient."""
    learned = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
    if all(p.grad is None for p in learned.values()):
        raise PruneError("no parameter has a gradient", where=type(model).__name__, fix="loss.backward() first")
    return learned
