"""Score: from the importance of elements to one number for each unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxprune.criteria.aggregation import REDUCE
from fxprune.criteria.base import Criterion, check_options, label
from fxprune.passes.coupling.families import Family
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.labels import Factor, Labels

Places = Callable[[str, Factor], bool]
HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Scorer:
    """What scoring needs to know of a model, whatever the criterion.

    Attributes:
        parameters: the model's parameters by name, on any device.
        leaves: their labels.
        unit_of: the unit of each label, shape (labels,).
        criterion: the importance of each element of a parameter.
        families: those that may lose units; what belongs to none of them is not looked at. All count if there are none.
        counts: whether a parameter counts along one of its factors.
    """

    parameters: Mapping[str, Tensor]
    leaves: Mapping[str, Labels]
    unit_of: np.ndarray
    criterion: Criterion
    families: Sequence[Family] = ()
    counts: Places | None = None
    seen: np.ndarray = field(init=False)
    free: np.ndarray | None = field(init=False, default=None)
    room: dict[torch.dtype, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self.criterion)
        self.seen = np.zeros(len(self.unit_of), bool)
        if self.families:
            self.free = np.zeros(len(self.unit_of), bool)
            self.free[np.concatenate([f.units for f in self.families])] = True

    def __call__(self, evidence: Mapping[str, Tensor] | None = None) -> np.ndarray:
        """The importance of every unit, indexed by class, shape (labels,); 0 for what no parameter belongs to.

        `seen` then says which classes anything was said of.

        Arguments:
            evidence: what the criterion `needs`, by name of parameter and broadcastable to it; others do not count.
        """
        size = len(self.unit_of)
        if hasattr(self.criterion, "units"):
            self.seen[:] = True
            return np.asarray(self.criterion.units(size), np.float64)
        classes, values, lengths = self.rows(evidence)
        self.seen[classes] = True
        reduce = getattr(self.criterion, "reduce", "sum")
        if reduce == "sum" and not hasattr(self.criterion, "finish"):
            return np.bincount(classes, values, size)
        return REDUCE[reduce](self.layers(classes, values, lengths), size)

    def places(self, name: str) -> list[tuple[Factor, np.ndarray]]:
        """The factors of a parameter along which it counts, each with the classes of its labels."""
        labels = self.leaves.get(name, ())
        if self.counts is not None:
            labels = tuple(f for f in labels if self.counts(name, f))
        spans = [(f, f.lookup(self.unit_of)) for f in labels]
        return spans if self.free is None else [(f, span) for f, span in spans if self.free[span].any()]

    def rows(self, evidence: Mapping[str, Tensor] | None) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Classes and scores of every index of every place, one place after the other, and how many each has."""
        classes: list[np.ndarray] = []
        parts: list[Tensor | np.ndarray] = []
        with torch.no_grad():
            looked_at = []
            for name, parameter in self.parameters.items():
                places = self.places(name)
                if places and parameter.is_floating_point() and parameter.numel() and (evidence is None or name in evidence):
                    looked_at.append((name, parameter.detach(), places))
            known = self.small(looked_at) if evidence is None else {}
            for name, weight, places in looked_at:
                given = None if evidence is None else evidence[name]
                scored: Sequence[Tensor | np.ndarray | None]
                if name in known:
                    scored = [added_up(known[name], f.dims) for f, _ in places]
                else:
                    scored = self.scored(name, weight, given, [f.major_to_minor for f, _ in places])
                for (f, span), part in zip(places, scored, strict=True):
                    if part is None:
                        continue
                    flat = part.reshape(-1)
                    if f.repeats > 1:
                        major = torch.as_tensor(part).movedim(f.major_to_minor[0], 0)
                        flat = major.reshape(len(major) // f.repeats, f.repeats, -1).sum(1).reshape(-1)
                    elif len(span) != len(flat):
                        span = np.broadcast_to(span.reshape(f.labels.shape), tuple(part.shape)).reshape(-1)
                    classes.append(span)
                    parts.append(flat)
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0), []
        return np.concatenate(classes), fetched(parts), [len(c) for c in classes]

    def small(self, looked_at: Sequence[tuple[str, Tensor, Any]]) -> dict[str, np.ndarray]:
        """The scores of the elements of small parameters (biases, scales, narrow layers), which are many: many in one go.

        They are double precision arrays, since a call of numpy's on a few numbers takes a fraction of one of torch's.
        """
        alike: dict[object, list[list[tuple[str, Tensor]]]] = {}
        if getattr(self.criterion, "elementwise", False) and not hasattr(self.criterion, "along"):
            for name, weight, _ in looked_at:
                if weight.numel() <= SMALL:
                    runs = alike.setdefault((weight.dtype, weight.device), [[]])
                    if len(runs[-1]) * SMALL >= BLOCK:
                        runs.append([])
                    runs[-1].append((name, weight))
        found: dict[str, np.ndarray] = {}
        for several in (run for runs in alike.values() for run in runs):
            scores = self.elements(several[0][0], torch.cat([w.reshape(-1) for _, w in several]), None)
            values, start = scores.double().cpu().numpy(), 0
            for name, w in several:
                end = start + w.numel()
                found[name] = values[start:end].reshape(w.shape)
                start = end
        return found

    def layers(self, classes: np.ndarray, values: np.ndarray, lengths: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each place its units and their scores."""
        finish = getattr(self.criterion, "finish", lambda layer: layer)
        start = 0
        for length in lengths:
            units, inverse = np.unique(classes[start : start + length], return_inverse=True)
            yield units, finish(np.bincount(inverse.reshape(-1), values[start : start + length], len(units)))
            start += length

    def scored(
        self, name: str, weight: Tensor, evidence: Tensor | None, nests: Sequence[tuple[int, ...]]
    ) -> Sequence[Tensor | None]:
        """For each nest of dimensions, scores that keep size 1 along the others; None where there are none."""
        of = self.criterion
        if hasattr(of, "along"):
            return [self.checked(of.along(weight, evidence, dims), name) for dims in nests]
        spans = [frozenset(nest) for nest in nests]
        if weight.dim() == 1:
            scores = self.elements(name, weight, evidence)
            return [scores for _ in spans]
        block = min(BLOCK, CACHED * torch.get_num_threads())
        rows = max(1, block * len(weight) // weight.numel()) if self.in_blocks(weight) else len(weight)
        parts: list[list[Tensor]] = [[] for _ in spans]
        for start in range(0, len(weight), rows):
            some = weight[start : start + rows]
            split = evidence is not None and len(evidence) == len(weight) > 1
            beside = evidence[start : start + rows] if split and evidence is not None else evidence
            reduced(self.elements(name, some, beside), spans, parts)
        return [torch.cat(found) if len(found) > 1 else found[0] for found in parts]

    def in_blocks(self, weight: Tensor) -> bool:
        """Whether a parameter is scored a few rows at a time, each block gone before the next comes."""
        return weight.dim() > 1 and weight.is_cpu and getattr(self.criterion, "elementwise", False)

    def elements(self, name: str, weight: Tensor, evidence: Tensor | None) -> Tensor:
        """The criterion's word on each element of a (part of a) parameter."""
        weight = weight.float() if weight.dtype in HALF_DTYPES else weight
        given = () if evidence is None else (evidence.to(weight.dtype),)
        score = self.criterion
        if hasattr(score, "into") and evidence is None and self.in_blocks(weight) and weight.numel() <= BLOCK:
            if weight.dtype not in self.room:
                self.room[weight.dtype] = torch.empty(BLOCK, dtype=weight.dtype, device=weight.device)
            score, given = score.into, (self.room[weight.dtype][: weight.numel()].view(weight.shape),)
        try:
            scores = score(weight, *given)
        except PruneError:
            raise
        except Exception as error:
            raise self.refused(f"raises {type(error).__name__}: {error}", name) from error
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise self.refused(f"returns {got} for a parameter of shape {tuple(weight.shape)}", name)
        return scores

    def checked(self, scores: Any, name: str) -> Tensor | None:
        if scores is not None and not isinstance(scores, Tensor):
            raise self.refused(f"returns a {type(scores).__name__}, not a tensor", name)
        return scores

    def refused(self, why: str, parameter: str) -> PruneError:
        family = next((f.name for f in self.families if any(member == parameter for member, _ in f.members)), "no family")
        return PruneError(
            f"the criterion {label(self.criterion)} {why}",
            where=f"{parameter} (family {family})",
            fix="return the importance of each element, as a tensor of the parameter's shape",
        )


BLOCK = 1 << 20  # elements scored at a time, at most: no large arrays are made
CACHED = 1 << 18  # elements a thread: their scores stay in its own cache until they are added up
SMALL = 1 << 13  # elements of a parameter that is scored together with others


def added_up(values: np.ndarray, dims: frozenset[int]) -> np.ndarray:
    """The scores of elements summed over all but some dimensions, which become of size 1."""
    if 0 not in dims:
        values = np.add.reduce(values, 0, keepdims=True)
    rest = tuple([d for d in range(1, values.ndim) if d not in dims and values.shape[d] > 1])
    return np.add.reduce(values, rest, keepdims=True) if rest else values


def reduced(values: Tensor, spans: Sequence[frozenset[int]], parts: list[list[Tensor]]) -> None:
    """Add the scores of one block of rows to what was found for each set of dimensions, summed over all others.

    A tensor is scored block by block, so that no second array of its size is made.
    """
    for found, dims in zip(parts, spans, strict=True):
        part = values
        if 0 not in dims:  # first over what lies furthest apart: whole rows are added
            part = part.sum(0, keepdim=True)
        rest = [d for d in range(1, values.dim()) if d not in dims and values.shape[d] > 1]
        part = part.sum(rest, keepdim=True) if rest else part
        part = part.clone() if part is values else part  # whose memory is used again
        if 0 in dims or not found:
            found.append(part)
        else:
            found[0] = found[0] + part


def fetched(parts: Sequence[Tensor | np.ndarray]) -> np.ndarray:
    """All scores in their order, in double precision: one transfer from each device."""
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


def score(parameters: Mapping[str, Tensor], leaves: Mapping[str, Labels], unit: Tensor, criterion: str | Criterion) -> Tensor:
    """The importance of every unit by a criterion that needs no data.

    Arguments:
        parameters: the model's parameters by name, on any device.
        leaves: their labels.
        unit_of: the unit of each label, shape (labels,).
        criterion: a name or a callable.

    Returns: float64 scores indexed by class, shape (labels,); 0 for what no parameter belongs to.
    """
    from fxprune.criteria.catalog import find

    return torch.from_numpy(Scorer(parameters, leaves, unit.numpy(), find(criterion))())
