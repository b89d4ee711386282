"""Score units: from the importance of elements to one number for each unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fxprune.arguments import shown
from fxprune.criteria.aggregation import REDUCE
from fxprune.criteria.base import CriterionSpec
from fxprune.passes.coupling.families import Family
from fxprune.passes.errors import PruneError, told
from fxprune.passes.ir.labels import Factor, Labels
from fxprune.passes.ir.progress import progress_bar

Places = Callable[[str, Factor], bool]
Read = Callable[[str], Tensor]
HALF_DTYPES = (torch.float16, torch.bfloat16)
BLOCK = 1 << 20  # elements scored at a time, at most, so that no second array of a parameter's size is made
CACHED = 1 << 18  # elements per thread: their scores stay in its cache until they are summed
SMALL = 1 << 13  # elements of a parameter that is scored together with others


class ScoredParameter(NamedTuple):
    """A parameter to score: its name, its values, and the factors along which it counts, each with the units of its labels."""

    name: str
    weight: Tensor
    places: list[tuple[Factor, np.ndarray]]


@dataclass(slots=True)
class Scorer:
    """Scores all units of a model by one criterion.

    Attributes:
        parameters: the model's parameters by name, on any device.
        leaves: their labels.
        unit_of: the unit of each label, shape (labels,).
        criterion: its description.
        families: those that may lose units; elements of no family are not scored. By default all are.
        counts: whether a parameter counts along one of its factors; by default all do.
        read: finds the values of a parameter by its name, one at a time; by default they are those of `parameters`.
        seen: after a call, whether the criterion scored a unit, shape (labels,).
    """

    parameters: Mapping[str, Tensor]
    leaves: Mapping[str, Labels]
    unit_of: np.ndarray
    criterion: CriterionSpec
    families: Sequence[Family] = ()
    counts: Places | None = None
    read: Read | None = None
    seen: np.ndarray = field(init=False)
    free: np.ndarray | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.seen = np.zeros(len(self.unit_of), bool)
        if self.families:
            self.free = np.zeros(len(self.unit_of), bool)
            self.free[np.concatenate([f.units for f in self.families])] = True

    def __call__(self, evidence: Mapping[str, Tensor] | None = None) -> np.ndarray:
        """The score of every unit, float64, indexed by unit, shape (labels,); 0 where no parameter belongs to a unit.

        Arguments:
            evidence: what the criterion `needs`, by name of parameter and broadcastable to it; others do not count.
        """
        size = len(self.unit_of)
        if self.criterion.score_units is not None:
            self.seen[:] = True
            return self.numbers("score_units", size, (size,))
        units, values, lengths = self.score_places(evidence)
        self.seen[units] = True
        if self.criterion.reduce == "sum" and self.criterion.finish_layer is None:
            return np.bincount(units, values, size)
        return REDUCE[self.criterion.reduce](self.split_layers(units, values, lengths), size)

    def value(self, name: str, weight: Tensor) -> Tensor:
        return weight if self.read is None else self.read(name).detach()

    def find_places(self, name: str) -> list[tuple[Factor, np.ndarray]]:
        """The factors of a parameter along which it counts, each with the units of its labels."""
        labels = self.leaves.get(name, ())
        if self.counts is not None:
            labels = tuple(f for f in labels if self.counts(name, f))
        spans = [(f, f.lookup(self.unit_of)) for f in labels]
        return spans if self.free is None else [(f, span) for f, span in spans if self.free[span].any()]

    def score_places(self, evidence: Mapping[str, Tensor] | None) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Units and scores of every index of every place, concatenated, and the number of indices of each place."""
        units: list[np.ndarray] = []
        parts: list[Tensor | np.ndarray] = []
        with torch.no_grad():
            found = [(n, p, self.find_places(n)) for n, p in self.parameters.items() if evidence is None or n in evidence]
            scored = [
                ScoredParameter(name, parameter.detach(), places)
                for name, parameter, places in found
                if places and self.can_score(parameter) and parameter.numel()
            ]
            together = self.score_together(scored) if evidence is None else {}
            for name, weight, places in progress_bar(scored, "scores", "parameter"):
                sums: Sequence[Tensor | np.ndarray | None]
                if name in together:
                    sums = [sum_over_others(together[name], f.dims) for f, _ in places]
                else:
                    sums = self.score_parameter(
                        name, self.value(name, weight), None if evidence is None else evidence[name], places
                    )
                for (f, span), part in zip(places, sums, strict=True):
                    if part is not None:
                        mine, flat = match_labels(f, span, part)
                        units.append(mine)
                        parts.append(flat)
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0), []
        return np.concatenate(units), concatenate(parts), [len(c) for c in units]

    def can_score(self, parameter: Tensor) -> bool:
        """Whether a parameter holds fractions; elements of complex ones count as two each."""
        return parameter.is_floating_point() or (parameter.is_complex() and self.criterion.score_dims is None)

    def score_together(self, scored: Sequence[ScoredParameter]) -> dict[str, np.ndarray]:
        """The scores of the elements of small parameters, float64: one call for many of them.

        Biases, scales and narrow layers are many, and a numpy call on a few numbers is faster than a torch call.
        """
        batches: dict[object, list[list[ScoredParameter]]] = {}
        if self.criterion.elementwise and self.criterion.score_dims is None:
            for parameter in scored:
                weight = parameter.weight
                if weight.numel() <= SMALL:
                    runs = batches.setdefault((weight.dtype, weight.device), [[]])
                    if len(runs[-1]) * SMALL >= BLOCK:
                        runs.append([])
                    runs[-1].append(parameter)
        found: dict[str, np.ndarray] = {}
        for batch in (run for runs in batches.values() for run in runs):
            scores = self.score_elements(
                batch[0].name, torch.cat([self.value(p.name, p.weight).reshape(-1) for p in batch]), None
            )
            values = np.split(scores.double().cpu().numpy(), np.cumsum([p.weight.numel() for p in batch])[:-1])
            found.update({p.name: v.reshape(p.weight.shape) for p, v in zip(batch, values, strict=True)})
        return found

    def split_layers(
        self, every: np.ndarray, values: np.ndarray, lengths: list[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each place its units, each once, and their scores; `every` has the unit of each value."""
        start = 0
        for length in lengths:
            units, inverse = np.unique(every[start : start + length], return_inverse=True)
            layer = np.bincount(inverse.reshape(-1), values[start : start + length], len(units))
            yield units, layer if self.criterion.finish_layer is None else self.numbers("finish_layer", layer, layer.shape)
            start += length

    def score_parameter(
        self, name: str, weight: Tensor, evidence: Tensor | None, places: Sequence[tuple[Factor, np.ndarray]]
    ) -> Sequence[Tensor | None]:
        """For each place the scores along its dimensions, of size 1 along the others; None where there are none."""
        if self.criterion.score_dims is not None:
            return [self.score_place(name, weight, evidence, f) for f, _ in places]
        if weight.dim() == 1:
            scores = self.score_elements(name, weight, evidence)
            return [scores for _ in places]
        rows = len(weight)
        if weight.is_cpu and self.criterion.elementwise:
            rows = max(1, min(BLOCK, CACHED * torch.get_num_threads()) * rows // weight.numel())
        wide = torch.float32 if weight.dtype in HALF_DTYPES else weight.dtype
        shapes = [[n if d in f.dims else 1 for d, n in enumerate(weight.shape)] for f, _ in places]
        # made before the blocks are: small tensors that stay between large ones leave holes in the heap
        sums = [torch.empty(shape, dtype=wide, device=weight.device) for shape in shapes]
        for start in range(0, len(weight), rows):
            split = evidence is not None and len(evidence) == len(weight) > 1
            given = evidence[start : start + rows] if split and evidence is not None else evidence
            block = self.score_elements(name, weight[start : start + rows], given)
            for i, (f, _) in enumerate(places):
                sums[i] = sums[i] if sums[i].dtype == block.dtype else sums[i].to(block.dtype)
                add_block(sums[i], block, f.dims, start)
        return sums

    def score_elements(self, name: str, weight: Tensor, evidence: Tensor | None) -> Tensor:
        """The importance of each element of a parameter, or of some of its rows; raises PruneError for anything else."""
        if weight.is_complex():
            given_parts = None if evidence is None else torch.view_as_real(evidence.resolve_conj())
            return self.score_elements(name, torch.view_as_real(weight.resolve_conj()), given_parts).sum(-1)
        weight = weight.float() if weight.dtype in HALF_DTYPES else weight
        given = () if evidence is None else (evidence.to(weight.dtype),)
        looked_at = weight if self.criterion.elementwise else weight.clone()  # a function of somebody's may write to it
        try:
            scores = self.criterion.score_elements(looked_at, *given)
        except PruneError:
            raise
        except Exception as error:
            raise self.error(f"raises {told(error)}", name) from error
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise self.error(f"returns {got} for a parameter of shape {tuple(weight.shape)}", name)
        if scores.is_meta or scores.is_complex():
            raise self.error(f"returns {'a tensor without values' if scores.is_meta else 'complex numbers'}", name)
        scores = scores if scores.layout is torch.strided else scores.to_dense()
        return scores.to(weight.device)

    def score_place(self, name: str, weight: Tensor, evidence: Tensor | None, place: Factor) -> Tensor | None:
        """What `score_dims` of the criterion gives; raises PruneError for anything but scores, or None."""
        looked_at = weight if self.criterion.elementwise else weight.clone()  # as below
        scores = self.asked("score_dims", looked_at, evidence, place.major_to_minor, where=name)
        if scores is not None and not isinstance(scores, Tensor):
            raise self.error(f"returns a {type(scores).__name__}, not a tensor", name)
        wanted = [n if d in place.dims else 1 for d, n in enumerate(weight.shape)]
        if scores is not None and list(scores.shape) != wanted:
            what = f"returns shape {tuple(scores.shape)} for dimensions {place.major_to_minor} of shape {tuple(weight.shape)}"
            raise self.error(what, name)
        return scores

    def numbers(self, method: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
        """What a method of the criterion gives for all units, or those of a layer, of this shape."""
        found = self.asked(method, given)
        try:
            numbers = np.asarray(found, np.float64)
        except (TypeError, ValueError):
            numbers = np.zeros(())
        if numbers.shape != shape:
            what = f"the criterion {self.criterion.name} returns {shown(found)} for {shape[0]} units"
            raise PruneError(what, where=method, fix="return one number for each unit, as an array")
        return numbers

    def asked(self, method: str, *given: Any, where: str | None = None) -> Any:
        """What a method of the criterion returns; raises PruneError for what it raises."""
        try:
            return getattr(self.criterion, method)(*given)
        except PruneError:
            raise
        except Exception as error:
            what = f"the criterion {self.criterion.name} raises {told(error)}"
            fix = "fxprune.criteria says what its methods are given, and what they return"
            raise PruneError(what, where=f"{method}({where})" if where else method, fix=fix) from error

    def error(self, why: str, parameter: str) -> PruneError:
        family = next((f.name for f in self.families if any(member == parameter for member, _ in f.members)), "no family")
        return PruneError(
            f"the criterion {self.criterion.name} {why}",
            where=f"{parameter} (family {family})",
            fix="return the importance of each element, as a tensor of the parameter's shape",
        )


def match_labels(f: Factor, span: np.ndarray, part: Tensor | np.ndarray) -> tuple[np.ndarray, Tensor | np.ndarray]:
    """Units and scores of a place, flat and of one length: repeated rows are summed, missing dimensions broadcast."""
    flat = part.reshape(-1)
    if f.repeats > 1:
        major = torch.as_tensor(part).movedim(f.major_to_minor[0], 0)
        flat = major.reshape(len(major) // f.repeats, f.repeats, -1).sum(1).reshape(-1)
    elif len(span) != len(flat):
        span = np.broadcast_to(span.reshape(f.labels.shape), tuple(part.shape)).reshape(-1)
    return span, flat


def sum_over_others(values: np.ndarray, dims: frozenset[int]) -> np.ndarray:
    """The sum over all but some dimensions; the others become of size 1."""
    if 0 not in dims:
        values = np.add.reduce(values, 0, keepdims=True)
    rest = tuple([d for d in range(1, values.ndim) if d not in dims and values.shape[d] > 1])
    return np.add.reduce(values, rest, keepdims=True) if rest else values


def add_block(total: Tensor, block: Tensor, dims: frozenset[int], start: int) -> None:
    """Add the scores of the block of rows from `start` on, summed over all but `dims`, to those of the blocks before it.

    Where rows are among `dims` each block has a sum of its own, else there is one sum.
    """
    part = block
    if 0 not in dims:  # first over the dimension with the largest stride: whole rows are added
        part = part.sum(0, keepdim=True)
    rest = [d for d in range(1, block.dim()) if d not in dims and block.shape[d] > 1]
    part = part.sum(rest, keepdim=True) if rest else part
    if 0 in dims:
        total[start : start + len(block)] = part
    else:
        total.copy_(part) if start == 0 else total.add_(part)


def concatenate(parts: Sequence[Tensor | np.ndarray]) -> np.ndarray:
    """All scores in their order, float64, with one transfer from each device."""
    found: list[np.ndarray | None] = [p if isinstance(p, np.ndarray) else None for p in parts]
    tensors = {i: p for i, p in enumerate(parts) if isinstance(p, Tensor)}
    for device in {p.device for p in tensors.values()}:
        mine = {i: p for i, p in tensors.items() if p.device == device}
        alike = len({p.dtype for p in mine.values()}) == 1
        values = torch.cat([p if alike else p.double() for p in mine.values()]).double().cpu().numpy()
        pieces = np.split(values, np.cumsum([len(p) for p in mine.values()])[:-1])
        for i, piece in zip(mine, pieces, strict=True):
            found[i] = piece
    return np.concatenate([piece for piece in found if piece is not None])
