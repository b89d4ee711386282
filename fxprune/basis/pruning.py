"""prune(basis="principal"): rotate what can be rotated, prune the rotated model as any other, and note how in the plan."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.basis.principal import Rotatable, find_rotatable, principal_axes, rotated_basis
from fxprune.criteria.calibration import read
from fxprune.errors import PruneWarning
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.families import names_family
from fxprune.passes.coupling.solution import CouplingOptions, Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors, private_copy
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.quiet import unobserved
from fxprune.passes.rewrite.basis import Basis
from fxprune.passes.verification.masked_model import relative_error
from fxprune.pipeline import Compilation
from fxprune.selection.budgets import Budget
from fxprune.selection.choice import Choice
from fxprune.selection.costs import Costs
from fxprune.selection.options import Options

# how far a rotated model may be from the original, by precision: rounding of its parameters, and of sums in another order
EXACT = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclasses.dataclass(frozen=True)
class RotatedFamily:
    """A family that was rotated: how many axes it has in all rows, how many are kept, and the share of the energy of these."""

    name: str
    axes: int
    kept: int
    energy: float

    def __str__(self) -> str:
        return f"{self.name} keeps {self.kept} of {self.axes} principal axes, with {self.energy:.1%} of the energy"


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What `prune` did for `basis="principal"`, in `meta["basis"]`.

    Attributes:
        families: those that were rotated.
        others: names of other families that may lose channels, each with the reason why it was not rotated.
        error: the relative error of the rotated model on the example inputs, before anything was cut.
    """

    families: tuple[RotatedFamily, ...]
    others: tuple[tuple[str, str], ...]
    error: float

    def __str__(self) -> str:
        lines = [f"rotated: {family}" for family in self.families]
        return "\n".join([*lines, *(f"not rotated: {name} {why}" for name, why in self.others)])


def prune_in_basis(model: nn.Module, inputs: ExampleInputs, options: Options, *, same_class: bool, inplace: bool) -> Any:
    """What `fxprune.prune` returns for these options, which ask for a change of basis."""
    if inplace:
        what = "basis and inplace are both given, and a rotated model is a copy"
        raise PruneError(what, fix="basis='principal' without inplace")
    assert options.data is not None
    options = dataclasses.replace(options, data=list(read(options.data)))
    first = Compilation(model, inputs, options.coupling)
    solution, budget = first.couple(), options.budget
    if budget is not None and budget.relative and not budget.measured:  # a share of the original, not of what is rotated
        allowed = budget.of(budget.cost(Costs(solution, first.tensors)))
        options = dataclasses.replace(options, budget=Budget(budget.kind, math.floor(allowed)))  # a float up to 1 is a share
    found, reasons = find_exact(model, inputs, solution, options.coupling)
    if not found:
        why = next((f": {name} {why}" for name, why in reasons.items()), "")
        warnings.warn(f"no family can be rotated{why}; channels are cut as they are", PruneWarning, stacklevel=4)
    axes, energies = axes_of(model, found, options)
    whole = rotated_basis(found, axes)
    rotated = whole.apply(model)
    error = distance(model, rotated, inputs)
    coupling = coupling_of(rotated, options.coupling)
    rescore = Energies(found, energies)
    options = dataclasses.replace(options, coupling=coupling, rescore=rescore)
    choice = Compilation(rotated, inputs, coupling).choose(options, timed=model)
    stay = [choice.kept[rescore.labels(choice.solution, f)] for f in found]
    kept = {f.name: int(some.sum()) for f, some in zip(found, stay, strict=True)}
    basis = rotated_basis(found, axes, kept)
    pruned = pruned_by(basis, model, inputs, options, choice, same_class=same_class)
    pruned.meta["plan"] = dataclasses.replace(pruned.meta["plan"], basis=basis)
    families = tuple(
        RotatedFamily(f.name, some.numel(), kept[f.name], float(e.numpy()[some].sum()))
        for f, e, some in zip(found, energies, stay, strict=True)
    )
    pruned.meta["basis"] = Rotation(families, tuple(reasons.items()), error)
    pruned.meta["chosen"] = (*pruned.meta.get("chosen", ()), *map(str, families))
    return pruned


def pruned_by(
    basis: Basis, model: nn.Module, inputs: ExampleInputs, options: Options, choice: Choice, *, same_class: bool
) -> Any:
    """The pruned module of a choice that was made of the rotated model, from one whose norms are made for what is kept."""
    last = Compilation(basis.apply(model), inputs, options.coupling)
    made = last.keep(choice.kept, choice.slicer.removed.tensors)
    made = dataclasses.replace(made, latency=choice.latency)
    return last.prune(dataclasses.replace(options, rescore=None), same_class=same_class, choice=made)


def find_exact(
    model: nn.Module, inputs: ExampleInputs, solution: Solution, coupling: CouplingOptions
) -> tuple[list[Rotatable], dict[str, str]]:
    """The families that can be rotated, each tried by a random rotation, and the reasons of the others."""
    found, reasons = find_rotatable(model, solution)

    def error_of(some: Sequence[Rotatable]) -> float:
        rotated = rotated_basis(some, [random_rotation(f.linear.size, f.linear.rows) for f in some]).apply(model)
        try:
            return distance(model, rotated, inputs)
        except Exception:  # what it is made of is not what it seems: then it is not rotated
            return math.inf

    if found and error_of(found) > limit_of(model):
        for f in list(found):
            if (error := error_of([f])) > limit_of(model):
                found.remove(f)
                reasons[f.name] = f"changes the outputs when it is rotated, by {error:.0e}"
    return found, reasons


def axes_of(model: nn.Module, found: Sequence[Rotatable], options: Options) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The principal axes of each family, and their shares of the energy."""
    if not found:
        return (), ()
    folded = rotated_basis(found, [torch.eye(f.linear.size, dtype=torch.float64) for f in found]).apply(model)
    assert options.data is not None
    return principal_axes(folded, found, options.data, options.combine)


def random_rotation(size: int, rows: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(rows, size, size, generator=random, dtype=torch.float64))[0]


def limit_of(model: nn.Module) -> float:
    dtypes = {p.dtype for p in named_parameters(model).values() if p.is_floating_point()}
    return max((EXACT.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)


def distance(model: nn.Module, rotated: nn.Module, inputs: ExampleInputs) -> float:
    """The largest relative error of an output, in evaluation mode."""
    outs = []
    for module in (model, rotated):
        copy = private_copy(module).eval()
        with torch.no_grad(), unobserved(copy):
            outs.append(collect(copy(*inputs.args, **inputs.kwargs), Tensor))
    return max((relative_error(a, b) for a, b in zip(*outs, strict=True)), default=0.0)


def coupling_of(rotated: nn.Module, asked: CouplingOptions) -> CouplingOptions:
    """What is asked of the rotated model's coupling: without the tensors that it no longer has."""
    shapes = {name: tuple(t.shape) for name, t in named_tensors(rotated)}
    frozen = {n: why for n, why in asked.frozen.items() if n in shapes or names_family(n, shapes)}
    return dataclasses.replace(asked, frozen=frozen)


class Energies:
    """Scores of the axes of rotated families: their energy, on the scale that the criterion gives the whole family.

    Arguments:
        found: the families.
        energies: the share of the energy of each axis.
    """

    def __init__(self, found: Sequence[Rotatable], energies: Sequence[Tensor]) -> None:
        self.found, self.energies = found, energies

    def __call__(self, solution: Solution, score: np.ndarray) -> np.ndarray:
        score = score.copy()
        unit = solution.unit_of.numpy()
        for f, energy in zip(self.found, self.energies, strict=True):
            units = unit[self.labels(solution, f)]
            score[units] = energy.numpy() * float(score[units].sum())
        return score

    def labels(self, solution: Solution, f: Rotatable) -> np.ndarray:
        """The label of each axis, shape (rows, axes of a row), in a coupling of the rotated model."""
        for member in f.linear.members:
            start = {row: start for start, row in reversed(member.runs)}
            if len(start) < f.linear.rows:
                continue
            places = np.array([start[row] for row in range(f.linear.rows)])[:, None] + np.arange(f.linear.size)
            for factor in solution.leaves.get(member.name, ()):
                if factor.major_to_minor == (member.dim,) and factor.flat[places].all():
                    return np.asarray(factor.flat[places])
        raise RuntimeError(f"the rotated model has no channels of {f.name}")
