"""The report: what pruning took from a model, what it left, and why."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxprune.arguments import checked_call
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.passes.capture.patches import visible
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.structure import find_roles
from fxprune.passes.ir.module_tree import private_copy, set_mode
from fxprune.passes.ir.quiet import unobserved, without_modes
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData, plan_between
from fxprune.reports.coupling import CoupledFamily, coupled_family
from fxprune.reports.formatting import Printable, counted, short, table
from fxprune.selection.costs import elements
from fxprune.selection.latency import FRIENDLY, Latency
from fxprune.selection.options import STREAMS_LAST
from fxprune.verification import Verification, evaluating

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


SHRUNK_SHOWN, WHOLE_SHOWN, HELD_SHOWN, UNUSED_SHOWN = 15, 10, 3, 5
# Where every family keeps half of its units a layer keeps a quarter of its weights; with the first and the
# last layer, which keep more, about a third. Above that ratio of the two, something needs an explanation.
UNREMARKABLE = 4 / 3
WORTH_NAMING = 0.02
UNEVEN = 0.25  # of the parameters that are left


@dataclass(frozen=True)
class FamilyChange:
    """What became of one family.

    Attributes:
        family: as it was.
        kept: how many of its units are left.
        left: how many elements of the pruned model's parameters would go with the rest.
        last: whether it was to lose units only after all others.
    """

    family: CoupledFamily
    kept: int
    left: int
    last: bool = False

    @property
    def reason(self) -> str:
        """Why none or fewer than usual of its units went."""
        if self.family.frozen is not None:
            return self.family.frozen
        if self.family.units == 1:
            return "has a single unit"
        if self.kept == self.family.units and self.last:
            return "is a residual stream through the whole model, which goes last"
        if self.kept == self.family.units:
            return "lost no unit: its ratio asks for fewer than can be removed at once; raise ratio or lower round_to"
        return f"keeps {self.kept:,} of {counted(self.family.units, 'unit')}"


@dataclass(frozen=True)
class Report(Printable):
    """What pruning did to a model; printable.

    Attributes:
        model: the name of its class.
        parameters: how many before and after.
        macs: multiply-accumulates of one forward before and after, if example inputs were given.
        changes: what became of each family, the one with most parameters left first.
        capture: how the model was captured.
        verification: the comparison that `prune` made, if it made one.
        latency: what `prune` measured, if its budget was one of latency.
        chosen: what `prune` chose where nothing was asked for, and why.
        unused: the modules of tensors that a run on the example inputs does not use, which stay as they are.
    """

    model: str
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    changes: tuple[FamilyChange, ...]
    capture: str
    verification: Verification | None
    latency: Latency | None = None
    chosen: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the parameters that is left."""
        return self.parameters[1] / max(self.parameters[0], 1)

    @property
    def shrunk(self) -> list[FamilyChange]:
        return [c for c in self.changes if c.kept < c.family.units]

    @property
    def whole(self) -> list[FamilyChange]:
        return [c for c in self.changes if c.kept == c.family.units]

    @property
    def usual(self) -> float:
        """The share of its units that a family that shrank keeps: the median."""
        return statistics.median(c.kept / c.family.units for c in self.shrunk) if self.shrunk else 1.0

    def held(self) -> list[FamilyChange]:
        """The families to blame where more is left than the usual share explains, else none."""
        if self.share <= UNREMARKABLE * self.usual**2:
            return []
        fuller = [c for c in self.changes if c.kept / c.family.units > self.usual + 0.05]
        large = [c for c in fuller if c.left > WORTH_NAMING * self.parameters[1]]
        return (large or fuller)[:HELD_SHOWN]

    def uneven(self) -> list[FamilyChange]:
        """The families that had a count of channels which hardware likes and have none now, if they are much of the model."""
        fits = lambda c, units: units * c.family.width % FRIENDLY == 0  # noqa: E731
        found = [c for c in self.shrunk if fits(c, c.family.units) and not fits(c, c.kept)]
        return found if sum(c.left for c in found) > UNEVEN * self.parameters[1] else []

    def speed(self) -> Iterator[str]:
        """What was measured, and what speaks against a gain."""
        if self.latency is not None:
            yield f"latency: {self.latency}"
        uneven = self.uneven()
        if uneven:
            have = "has" if len(uneven) == 1 else "have"
            yield f"{counted(len(uneven), 'family')} {have} a count of channels that is no multiple of {FRIENDLY}, for which"
            yield f"  kernels are written: the model may be no faster, or slower; round_to={FRIENDLY} keeps to multiples"

    def sentences(self) -> Iterator[str]:
        before, after = self.parameters
        yield f"{self.model}: {short(before)} parameters, {short(after)} left ({self.share:.0%})"
        if self.macs is not None:
            was, now = self.macs
            yield f"{short(was)} multiply-accumulates, {short(now)} left ({now / max(was, 1):.0%})"
        families = f"{len(self.shrunk)} of {counted(len(self.changes), 'family')}"
        yield f"{families} shrank" + (f", to {self.usual:.0%} of their units in the median" if self.shrunk else "")
        held = self.held()
        if held:
            yield f"that leaves more than usual, because of {'these' if len(held) > 1 else 'this'}:"
            yield from (f"  {short(c.left)} left with {c.family.name}, which {c.reason}" for c in held)
        if self.unused:
            more = f" and {len(self.unused) - UNUSED_SHOWN} more" if len(self.unused) > UNUSED_SHOWN else ""
            yield f"not used on the example inputs, and so left as they are: {', '.join(self.unused[:UNUSED_SHOWN])}{more}"
        yield from self.speed()
        yield from (f"chosen: {text}" for text in self.chosen)
        yield f"captured: {self.capture}"
        unknown = "not compared with the original: prune(..., verify=True) or fxprune.verify does it"
        yield str(self.verification or unknown)

    def tables(self) -> Iterator[RenderableType]:
        """The sentences, the families that shrank and those that did not, as rich renders them."""
        yield from map(Text, self.sentences())
        if self.shrunk:
            yield ""
            yield shrunk_table(self.shrunk)
        if self.whole:
            yield ""
            yield whole_table(self.whole)


@checked_call()
@without_modes()
def report(model: nn.Module, pruned: nn.Module, example_inputs: Any = None) -> Report:
    """What pruning took from a model and what it left, family by family, and why some stayed whole.

    >>> import torch, fxprune
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> small = fxprune.prune(net, 0.5, example_inputs=torch.randn(1, 4))
    >>> found = report(net, small)
    >>> found.parameters
    (44, 23)
    >>> [(c.family.name, c.family.units, c.kept) for c in found.shrunk]
    [('0', 6, 3)]
    >>> [(c.family.name, c.reason) for c in found.whole][-1]
    ('2', 'is an output of the model')

    Arguments:
        model: the original.
        pruned: what `prune` or `Plan.apply` made of it.
        example_inputs: as for `prune`; multiply-accumulates are counted if they are given.

    Raises: PruneError if the two do not belong together.
    """
    with entry_point(model) as model:
        plan = plan_between(model, pruned)
        meta: dict[str, Any] = getattr(pruned, "meta", {})
        compilation = Compilation.of_plan(model, plan, example_inputs, meta.get("frozen_modules"))
        macs: tuple[int, int] | None = None
        if example_inputs is not None:
            inputs = ExampleInputs.parse(example_inputs, model)
            with evaluating(pruned):
                macs = (count_macs(set_mode(private_copy(model), False), inputs), count_macs(pruned, inputs))
        return Report(
            type(model).__name__,
            (count_parameters(model), count_parameters(pruned)),
            macs,
            changes(compilation, plan, streams_last=STREAMS_LAST in meta.get("chosen", ())),
            meta.get("capture", "unknown"),
            meta.get("verification"),
            meta.get("latency"),
            meta.get("chosen", ()),
            tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in meta.get("unused", ()))),
        )


def changes(compilation: Compilation, plan: PlanData, *, streams_last: bool = False) -> tuple[FamilyChange, ...]:
    """What a plan makes of each family of a model; `streams_last`: a stream through all of it was to go after all else."""
    choice = compilation.choice_of(plan)
    solution, kept = choice.solution, choice.kept.numpy()
    found = families(solution, {name for name, _ in compilation.model.named_parameters()})
    before = elements(solution, found, compilation.tensors)
    after = elements(solution, found, compilation.tensors, kept)
    shown = [
        (coupled_family(family, size, compilation.options.frozen, role.name), role.crosses and streams_last)
        for family, size, role in zip(found, before, find_roles(solution, found), strict=True)
    ]
    made = [
        FamilyChange(read, int(kept[family.units].sum()), left, last)
        for (read, last), family, left in zip(shown, found, after, strict=True)
    ]
    return tuple(sorted(made, key=lambda c: -c.left))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, inputs: ExampleInputs) -> int:
    """Multiply-accumulates of one forward; the counter counts both operations of each."""
    # a fused kernel hides its products from the counter; the planner counts them
    with unobserved(model), visible(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        inputs.call(model)
    return int(counter.get_total_flops()) // 2


def shrunk_table(shrunk: Sequence[FamilyChange]) -> Table:
    rows = [
        (c.family.name, c.family.role, f"{c.family.units:,}", f"{c.kept:,}", short(c.left), c.family.spans(2))
        for c in shrunk[:SHRUNK_SHOWN]
    ]
    rest = shrunk[SHRUNK_SHOWN:]
    if rest:
        units, kept = sum(c.family.units for c in rest), sum(c.kept for c in rest)
        rows.append((f"and {len(rest)} more", "", f"{units:,}", f"{kept:,}", "", ""))
    return table(("shrank", "role", "units", "left", "parameters left", "spans"), rows)


def whole_table(whole: Sequence[FamilyChange]) -> Table:
    rows = [(c.family.name, c.family.role, f"{c.family.units:,}", short(c.left), c.reason) for c in whole[:WHOLE_SHOWN]]
    if len(whole) > WHOLE_SHOWN:
        rows.append((f"and {len(whole) - WHOLE_SHOWN} more", "", "", "", ""))
    return table(("stayed whole", "role", "units", "parameters left", "because it"), rows)
