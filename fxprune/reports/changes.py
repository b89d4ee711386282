"""What became of the families and of the modules of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.structure import find_roles
from fxprune.passes.ir.module_tree import every_path, walk
from fxprune.passes.rewrite.changes import describe, with_changes
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData
from fxprune.reports.count import Count
from fxprune.reports.coupling import CoupledFamily, coupled_family
from fxprune.reports.formatting import counted
from fxprune.selection.choice import Choice
from fxprune.selection.costs import elements

Pair = tuple[int, int]
STREAM = "is a residual stream through the whole model, which goes last"
BRANCHES = "stays, as nothing but residual branches was removed"


@dataclass(frozen=True)
class FamilyChange:
    """What became of one family.

    Attributes:
        family: as it was.
        kept: how many of its units are left.
        left: how many elements of the pruned model's parameters would go with the rest.
        spared: why it was to lose no unit, or only after all others; empty where it was not spared.
    """

    family: CoupledFamily
    kept: int
    left: int
    spared: str = ""

    @property
    def reason(self) -> str:
        """Why none or fewer than usual of its units went."""
        if self.family.frozen is not None:
            return self.family.frozen
        if self.kept == self.family.units and self.spared:
            return self.spared
        if self.kept == self.family.units:
            return "lost no unit: its ratio asks for fewer than can be removed at once; raise ratio or lower round_to"
        return f"keeps {self.kept:,} of {counted(self.family.units, 'unit')}"


@dataclass(frozen=True)
class TensorChange:
    """A parameter or buffer of a module: its name there, and its shape before and after."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ModuleChange:
    """What became of one module; numbers include what is inside it.

    Attributes:
        path: its name in the model; that of the model itself is empty.
        before, after: its class and attributes, as it prints itself.
        tensors: those of its own.
        parameters, bytes: before and after.
        macs: multiply-accumulates of one forward, if example inputs were given.
        seconds: of one forward, if they were measured and it is called.
    """

    path: str
    before: str
    after: str
    tensors: tuple[TensorChange, ...]
    parameters: Pair
    bytes: Pair
    macs: Pair | None = None
    seconds: tuple[float, float] | None = None

    def __str__(self) -> str:
        return with_changes(self.before, self.after)


def family_changes(
    compilation: Compilation, choice: Choice, found: list[Family], *, streams_last: bool = False, branches: bool = False
) -> tuple[FamilyChange, ...]:
    """What a choice makes of each family of a model, the one with most parameters left first.

    Arguments:
        compilation, choice, found: of the model; its families.
        streams_last: whether a residual stream through the whole model was to go after all else.
        branches: whether residual branches were removed.
    """
    solution, kept = choice.solution, choice.kept.numpy()
    before = elements(solution, found, compilation.tensors)
    after = elements(solution, found, compilation.tensors, kept)
    made = []
    for family, size, left, role in zip(found, before, after, find_roles(solution, found), strict=True):
        read = coupled_family(family, size, compilation.options.frozen, role.name)
        spared = STREAM if role.crosses and streams_last else BRANCHES if branches and bool(kept.all()) else ""
        made.append(FamilyChange(read, int(kept[family.units].sum()), left, spared))
    return tuple(sorted(made, key=lambda c: -c.left))


def module_changes(
    model: nn.Module, pruned: nn.Module, plan: PlanData, counts: tuple[Count, Count], times: dict[str, tuple[float, float]]
) -> tuple[ModuleChange, ...]:
    """What became of every module of a model, in its order.

    Arguments:
        model, pruned: before and after.
        plan: which indices of every tensor stayed.
        counts: of both; without multiply-accumulates where there were no example inputs.
        times: seconds of modules before and after, by path, as far as they were measured.
    """
    after = dict(every_path(pruned))
    rows = [count.by_module for count in counts]
    tensors: dict[str, list[TensorChange]] = {}
    for name, shape in plan.shapes.items():
        path, _, last = name.rpartition(".")
        tensors.setdefault(path, []).append(TensorChange(last, tuple(shape), tuple(plan.kept_shape(name))))
    made = []
    for module, path in walk(model).items():
        one, other = rows[0][path], rows[1].get(path)
        if other is None:  # what nothing calls may be missing
            continue
        macs = None if one.macs is None or other.macs is None else (one.macs, other.macs)
        made.append(
            ModuleChange(
                path,
                describe(module),
                describe(after[path]) if path else describe(module),
                tuple(tensors.get(path, ())),
                (one.parameters, other.parameters),
                (one.bytes, other.bytes),
                macs,
                times.get(path),
            )
        )
    return tuple(made)
