"""Merge: removed units become one with the kept ones that are most like them, without any data (arXiv:2502.10216).

Of a cluster of n units, a kept one and those that are nearest to it, the mean is written, and what read them is added up. The
mean of n channels whose variances are v and whose correlations are r varies less than each: by

    sum over i, j of r_ij sqrt(v_i v_j) / n^2,    for equal v and r:    v (1 + (n - 1) r) / n

which the running variance of a batch norm becomes. Two channels of a layer on white inputs correlate as their weights do.

That is exact for equal units only where all that happens to them happens unit by unit, until a weight reads them. No op has a
rule for it. It is tried: the removed units of the original are made equal to those that they merge into, and then the merged
model must return the same.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxprune.criteria.parameter_roles import roles
from fxprune.folding.places import NotAlike, Place, places_of, signatures
from fxprune.form_programs import Names, slots
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.families import Family, families
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors, private_copy
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.quiet import own_random_state
from fxprune.passes.ir.slices import apply_slices
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import spec_of
from fxprune.passes.verification.masked_model import MaskedOriginal
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData, plan_between, shapes_of
from fxprune.repairs.repairer import RepairStep
from fxprune.verification import difference

NAME = "merge"
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5}  # relative errors of outputs that are rounding, by the precision of a trial
NOT_BY_UNIT = "equal units would not merge exactly: they meet one another before a weight reads them"
CHANGED = "merging starts from the original's weights, and the pruned model's are others"


@dataclass(frozen=True, eq=False)
class Merge:
    """How the units of one family merge.

    Attributes:
        family: of the coupling.
        places: of its units.
        into: of each unit the one that it becomes part of; of those that stay itself, shape (units,).
        writers: by running variance, the weight that makes what it normalises, if one does.
    """

    family: Family
    places: Sequence[Place]
    into: Tensor
    writers: Mapping[str, str]

    @property
    def gone(self) -> Tensor:
        return (self.into != torch.arange(len(self.into))).nonzero().flatten()

    def equalised(self, tensors: dict[str, Tensor]) -> None:
        """Make the units that go equal to those that they become part of."""
        for place in self.places:
            if not place.reads and place.name in tensors:
                place.put(tensors[place.name], place.rows(tensors[place.name])[self.into])

    def apply(self, tensors: dict[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Merge the units in tensors; those that go keep what they hold.

        Arguments:
            tensors: the model's, float64, which are changed.
            before: the same before anything was merged.
        """
        stays = self.into == torch.arange(len(self.into))
        count = torch.bincount(self.into, minlength=len(self.into)).clamp(min=1)
        for place in self.places:
            if place.name not in tensors:
                continue
            rows = place.rows(tensors[place.name])
            if place.name in self.writers:
                made = self.variances(place, before)
            else:
                made = torch.zeros_like(rows).index_add_(0, self.into.to(rows.device), rows)
                if not place.reads:
                    made /= count.to(rows.device).reshape(-1, *[1] * (rows.dim() - 1))
            keep = stays.to(rows.device).reshape(-1, *[1] * (rows.dim() - 1))
            place.put(tensors[place.name], torch.where(keep, made, rows))

    def variances(self, place: Place, before: Mapping[str, Tensor]) -> Tensor:
        """The variance of the mean of each cluster, by those of its units, shape (units, width)."""
        own = [p for p in self.places if p.name == self.writers[place.name] and not p.reads]
        holds = own or [p for p in self.places if not p.reads and p.name in before and before[p.name].dim() > 1]
        weights = [p.rows(before[p.name]).flatten(2) for p in holds if p.entries.shape == place.entries.shape]
        made = place.rows(before[place.name]).clone()
        for kept in self.into[self.gone].unique().tolist():
            cluster = (self.into == kept).nonzero().flatten().to(made.device)
            rows = torch.cat([w[cluster] for w in weights], 2) if weights else torch.ones_like(made[cluster]).unsqueeze(2)
            made[kept] = variance_of_mean(made[cluster].movedim(0, -1), correlations(rows.movedim(0, -2)))
        return made


def correlations(rows: Tensor) -> Tensor:
    """The cosine of every two rows, shape (..., rows, rows) for (..., rows, elements); zero rows are alike."""
    size = rows.norm(dim=-1, keepdim=True)
    unit, blank = rows / size.where(size > 0, torch.ones_like(size)), (size == 0).to(rows.dtype)
    return unit @ unit.mT + blank @ blank.mT


def variance_of_mean(variances: Tensor, correlations: Tensor) -> Tensor:
    """The variance of the mean of values by their variances, shape (..., n), and correlations, (..., n, n).

    >>> float(variance_of_mean(torch.tensor([4.0, 4.0]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])))
    3.0
    """
    spread = variances.clamp(min=0).sqrt()
    total = spread.unsqueeze(-2) @ correlations @ spread.unsqueeze(-1)
    return total.squeeze(-1).squeeze(-1).clamp(min=0) / spread.shape[-1] ** 2


def writers_of_statistics(captures: Sequence[CapturedProgram]) -> dict[str, str]:
    """For each running variance the weight of the product that makes what it normalises; "" where no single one does."""
    found: dict[str, str] = {}
    for trace in (capture.op_trace for capture in captures):
        for op in trace.ops:
            call = OpView(op, trace)
            statistic = call.tensor("running_var")
            if statistic is None or (name := trace.values[statistic.id].name) is None:
                continue
            maker = trace.maker(call.first.id)
            products = [] if maker is None else spec_of(maker).products_of(OpView(maker, trace))
            found[name] = next((trace.values[p.weight.id].name or "" for p in products), "")
    return found


class Merging:
    """Merges what a pruned model lost into what it kept.

    Arguments:
        model: the original.
        made: the pruned model, which is changed.

    Raises: PruneError where the values of the pruned model are not those that were left of the original.
    """

    def __init__(self, model: nn.Module, made: nn.Module) -> None:
        model, plan = plan_between(model, made).in_basis(model)
        self.model, self.made = model, made
        self.plan: PlanData = plan.fitted(shapes_of(model))
        self.compilation = Compilation.of_plan(model, plan)
        self.choice = self.compilation.choice_of(plan)
        self.tensors = {n: t for n, t in named_tensors(model) if t.is_floating_point() or t.is_complex()}
        name = Names(model)
        self.own = {name(path): tensor for path, tensor, _, _ in slots(made)}
        self.values = self.plan.shapes.keys() & self.tensors.keys() & self.own.keys() - set(self.plan.derived)
        for key in sorted(self.values):
            left, own = self.cut(key, self.tensors[key]), self.own[key].detach()
            if left.shape != own.shape or not torch.equal(left.to(own), own):
                raise PruneError(CHANGED, where=key, fix="merge first; then repair by other methods, or train")

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """What the plan leaves of a tensor."""
        return apply_slices(self.plan.slices.get(name, ()), tensor)

    def run(self, refused: str = "") -> tuple[list[RepairStep], dict[str, Tensor]]:
        """Merge every family that lost units and whose units may merge; what was done, and the values before by name.

        `refused`: why nothing is to be changed, if so.
        """
        merges, steps = self.find()
        if refused:
            return [*steps, *(RepairStep(m.family.name, NAME, None, False, refused) for m in merges)], {}
        good = merges if self.exact(merges) else [m for m in merges if self.exact([m])]
        good = good if good == merges or self.exact(good) else []
        for merge in merges:
            note = f"{len(merge.gone)} of {len(merge.into)} units are part of others now" if merge in good else NOT_BY_UNIT
            steps.append(RepairStep(merge.family.name, NAME, None, merge in good, note))
        start = {}
        for name, value in self.merged(good, self.tensors).items():
            if name in self.values:
                start[name] = self.own[name].detach().clone()
                self.own[name].data.copy_(self.cut(name, value))
        return steps, start

    def find(self) -> tuple[list[Merge], list[RepairStep]]:
        """The merges of families that lost some of their units, and a step for each that cannot be compared."""
        solution = self.choice.solution
        reads, writers = roles(solution.captures).reads, writers_of_statistics(solution.captures)
        merges, steps = [], []
        for family in families(solution, set(named_parameters(self.model))):
            kept = self.choice.kept[torch.from_numpy(family.units)]
            if bool(kept.all()) or not bool(kept.any()):
                continue
            try:
                places = places_of(solution, family, reads)
                rows, into = signatures(places, self.tensors), torch.arange(len(kept))
                if not bool(rows.isfinite().all()):
                    raise NotAlike("have weights that are not finite")
                stays = kept.nonzero().flatten()
                into[~kept] = stays[torch.cdist(rows[~kept], rows[kept]).argmin(1)]
                merges.append(Merge(family, places, into, writers))
            except NotAlike as why:
                steps.append(RepairStep(family.name, NAME, None, False, f"its units {why}"))
        return merges, steps

    def merged(self, merges: Iterable[Merge], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that merges change, whole and in double precision."""
        merges = list(merges)
        names = {p.name for m in merges for p in m.places} & tensors.keys()
        before = {name: wide(tensors[name]) for name in names}
        made = {name: tensor.clone() for name, tensor in before.items()}
        for merge in merges:
            merge.apply(made, before)
        return made

    def exact(self, merges: Sequence[Merge]) -> bool:
        """Whether merges change nothing where the units that merge are equal: tried on inputs like those of the plan."""
        if not merges:
            return True
        return any(self.error(merges, dtype) <= close for dtype, close in CLOSE.items())

    def error(self, merges: Sequence[Merge], dtype: torch.dtype) -> float:
        """The largest relative error of an output, in this precision; infinite where the model insists on another one.

        The reference is the original with equal units, all of them, and without what goes of other families.
        """
        equal = {n: nonzero(t) for n, t in self.tensors.items()}
        for merge in merges:
            merge.equalised(equal)
        names = {id(t): name for name, t in named_tensors(self.model)}

        def stand_in(tensor: Tensor) -> Tensor:
            value = equal[names[id(tensor)]].to(dtype)
            return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value

        whole = private_copy(self.model, stand_in)
        small = copy.deepcopy(self.made).to(dtype).eval()
        merged, name = equal | self.merged(merges, equal), Names(self.model)
        for path, tensor, _, _ in slots(small):
            if name(path) in self.values:
                tensor.data = self.cut(name(path), merged[name(path)]).to(tensor.dtype)
        removal = self.choice.removal(self.compilation.options.heads)
        back = torch.isin(self.choice.solution.unit_of, torch.cat([torch.from_numpy(m.family.units) for m in merges]))
        reference = MaskedOriginal(whole, dataclasses.replace(removal, kept=removal.kept | back))
        inputs: ExampleInputs = self.compilation.inputs.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        try:
            with torch.no_grad(), own_random_state():
                return difference(reference(inputs.args, inputs.kwargs, whole=False), inputs.map(torch.clone).call(small))
        except Exception:
            return math.inf


def nonzero(tensor: Tensor) -> Tensor:
    """A copy of a tensor to try merges with. A parameter that is zero, as some gains are before training, would hide others."""
    if not isinstance(tensor, nn.Parameter) or bool(tensor.any()):
        return wide(tensor).clone()
    random = torch.Generator().manual_seed(0)
    return torch.randn(tensor.shape, generator=random).to(tensor.device, wide(tensor).dtype) / 8


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
