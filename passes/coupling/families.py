"""Families: units that live in the same dimensions of the same parameters."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError

# what a layer holds for each of its channels: written as the layer and the dimension
OWN = frozenset({"weight", "bias", "running_mean", "running_var"})
KERNEL = "is a kernel's spatial dimension"
WORD = 1 << 64
NAMED = 3  # places in a sentence


@dataclass(frozen=True, slots=True)
class Family:
    """Coupled layers: what a user prunes together.

    Attributes:
        name: the layer of the first parameter it spans; of a dimension other than the first one `layer:dimension`; of several
            families in one place `layer#1`, `layer#2` and so on.
        units: the units it consists of, ascending.
        members: (parameter or buffer, dimension) for everything it spans.
        width: how many indices of its first member one unit takes up.
        frozen: the reason it is kept whole, or None.
    """

    name: str
    units: np.ndarray
    members: tuple[tuple[str, int], ...]
    width: int
    frozen: str | None

    @property
    def kept_whole(self) -> str | None:
        """Why it loses no unit, as what "it" does; None where it may."""
        return self.frozen or ("has a single unit" if len(self.units) == 1 else None)

    def answers(self, text: str) -> bool:
        """Whether a text names it: its name with or without number, a tensor that it cuts along the first dimension, or a glob
        over the dimensions that it spans, as `tensor:dim` or `layer:dim`."""
        if text in (self.name, self.name.partition("#")[0]):
            return True
        if ":" not in text and "#" not in text:
            return (text, 0) in self.members
        return fnmatch.fnmatchcase(self.name, text) or any(spells(text, name, dim) for name, dim in self.members)

    def lies_in(self, path: str, parameters: set[str]) -> bool:
        """Whether all parameters that it spans are those of one module."""
        return all(name.startswith(f"{path}.") for name, _ in self.members if name in parameters)


def spells(text: str, tensor: str, dim: int) -> bool:
    """Whether a glob matches a dimension of a tensor, as `tensor:dim` or `layer:dim`."""
    return any(fnmatch.fnmatchcase(f"{place}:{dim}", text) for place in (tensor, place_of(tensor)))


def names_family(text: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a text may name families of a model with these shapes: a tensor, `layer:dim`, `layer#2`, or `module/`."""
    if text.endswith("/"):
        return any(name.startswith(f"{text[:-1]}.") for name in shapes)
    bare = re.sub(r"#\d+$", "", text)
    if bare == text and ":" not in text:
        return text in shapes
    every = ((name, range(len(shape))) for name, shape in shapes.items())
    return any(bare in (name, place_of(name)) or any(spells(bare, name, d) for d in dims) for name, dims in every)


def place_of(tensor: str) -> str:
    """The layer a tensor belongs to, or the tensor's own name if it is not one of a layer's usual ones."""
    layer, _, name = tensor.rpartition(".")
    return layer if layer and name in OWN else tensor


def family_of_labels(solution: Solution, found: Sequence[Family]) -> np.ndarray:
    """For each label the position in `found` of its family, -1 if it has none; shape (labels,)."""
    of_unit = np.full(len(solution.unit_of), -1, np.int64)
    for i, family in enumerate(found):
        of_unit[family.units] = i
    return of_unit[solution.unit_of.numpy()]


def listed(places: Sequence[str]) -> str:
    """The first few of some places, and how many more there are."""
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED + 1 else ""
    return f"{', '.join(places[:NAMED] if more else places)}{more}"


def freeze_families(solution: Solution, wanted: Mapping[str, str], parameters: set[str]) -> None:
    """Freeze the families that some texts name, for the reasons that go with them; `module/` names those within the module.

    Raises: PruneError for a family by number of which there is none.
    """
    found = families(solution, parameters) if wanted else []
    for text, why in wanted.items():
        within = text.removesuffix("/")
        held = [f for f in found if (f.answers(text) if within == text else f.lies_in(within, parameters))]
        if not held and "#" in text:
            near = [f.name for f in found if f.name.partition("#")[0] == text.partition("#")[0]]
            fix = f"one of {', '.join(near)}" if near else "a name that print(fxprune.couple(model, example_inputs)) shows"
            raise PruneError(f"{text!r} in freeze names no family of the model", fix=fix)
        for family in held:
            if solution.frozen[family.units[0]] < 0:
                solution.frozen[family.units] = len(solution.reasons)
        solution.reasons.append(why)


def families(solution: Solution, parameters: set[str]) -> list[Family]:
    """Every family of a solution, in the order of the model's parameters; `parameters` are the names that are learned.

    What only buffers and constants carry is left out, and so are the spatial dimensions of kernels.
    """
    unit = solution.unit_of.numpy()
    places: list[tuple[str, int]] = []
    spans: list[np.ndarray] = []
    for name, labels in solution.leaves.items():
        for f in labels:
            places.append((name, f.major_to_minor[-1]))
            spans.append(f.lookup(unit))
    if not places:
        return []
    # units with equal signatures (a sum of random numbers, one for each place) live in the same places
    marks: list[int] = np.random.default_rng(0).integers(1, 1 << 62, size=len(places)).tolist()
    signature = np.zeros(len(unit), np.uint64)
    learned = np.zeros(len(unit), bool)
    blocks_of = occurrences(spans, len(unit))
    for some, where in blocks_of:
        signature[some] += np.uint64(sum([marks[i] for i in where]) % WORD)
        if any(places[i][0] in parameters for i in where):
            learned[some] = True
    units = np.flatnonzero(learned)
    # frozen units of one signature may have different reasons: they are told apart
    told = signature[units] + (solution.frozen[units].astype(np.int64) + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    _, first, group = np.unique(told, return_index=True, return_inverse=True)
    group_of = np.full(len(unit), -1)
    group_of[units] = group
    leader = np.zeros(len(unit), bool)
    leader[units[first]] = True
    members: list[list[int]] = [[] for _ in first]
    for some, where in blocks_of:
        for g in group_of[some][leader[some]].tolist():
            members[g] += where
    members = [sorted(m) for m in members]
    order = np.argsort(group, kind="stable")
    blocks = np.split(units[order], np.cumsum(np.bincount(group, minlength=len(first)))[:-1])
    found: list[tuple[int, Family]] = []
    for g, block in enumerate(blocks):
        if not len(block):
            continue
        reason = int(solution.frozen[block[0]])
        why = solution.reasons[reason] if reason >= 0 else None
        if why is not None and why.startswith(KERNEL):
            continue
        spanned = [places[i] for i in members[g]]
        width = int((group_of[spans[members[g][0]]] == g).sum()) // len(block)
        named = next((m for m in spanned if m[0] in parameters), spanned[0])
        name = place_of(named[0]) + (f":{named[1]}" if named[1] else "")
        found.append((members[g][0], Family(name, block, tuple(spanned), max(1, width), why)))
    return numbered([family for _, family in sorted(found, key=lambda item: (item[0], int(item[1].units[0])))])


def numbered(found: list[Family]) -> list[Family]:
    """Families of one name are told apart by number."""
    total, seen = Counter(f.name for f in found), Counter[str]()
    for i, family in enumerate(found):
        if total[family.name] > 1:
            seen[family.name] += 1
            found[i] = replace(family, name=f"{family.name}#{seen[family.name]}")
    return found


def occurrences(spans: list[np.ndarray], count: int) -> list[tuple[slice | np.ndarray, list[int]]]:
    """Which of `count` units occur where: sets of units, each with the numbers of the places that hold just these.

    A unit may be in several sets.
    """
    found: dict[object, tuple[slice | np.ndarray, list[int]]] = {}
    mark = np.zeros(count, bool)
    every = np.arange(count)
    for i, span in enumerate(spans):
        if not len(span):
            continue
        start, end = int(span[0]), int(span[-1]) + 1
        if end - start == len(span) and span.tobytes() == every[start:end].tobytes():
            found.setdefault((start, end), (slice(start, end), []))[1].append(i)
        else:
            if not bool((span[1:] > span[:-1]).all()):
                mark[span] = True
                span = np.flatnonzero(mark)
                mark[span] = False
            found[i] = span, [i]
    return list(found.values())
