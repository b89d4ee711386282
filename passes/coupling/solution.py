"""What is asked of a coupling, and what comes of it: labels of every value, and the units that removal acts on."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from fxprune.passes.coupling.listed_experts import ListedExperts
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.constraints import Tie
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.module_tree import with_outer
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.slices import Slicer, TensorSlice, mask_of


@dataclass(frozen=True)
class CouplingOptions:
    """What may go and what may not.

    Attributes:
        heads: whether heads of attention go whole (else the dimensions within them); `queries`: and no KV heads.
        frozen: names of tensors that stay as they are, with the reason.
        release: globs over the names of outputs whose channels may go.
        uniform: whether families that play the same part keep the same share.
        choices: whether what is chosen by value, as experts are, may go; `only`: and nothing else.
    """

    heads: bool | str = True
    frozen: Mapping[str, str] = field(default_factory=dict)
    release: tuple[str, ...] = ()
    uniform: bool = False
    choices: bool | str = False

    @property
    def attention(self) -> str:
        """What goes of attention, in a word."""
        return "queries" if self.heads == "queries" else "heads" if self.heads else "dims"

    @classmethod
    def heads_of(cls, attention: str) -> bool | str:
        """The same as `heads`."""
        return attention == "heads" or (attention == "queries" and attention)

    def releases(self, name: str) -> bool:
        """Whether an output, or what it lies in, is released."""
        return any(fnmatch.fnmatchcase(whole, glob) for glob in self.release for whole in with_outer(name))

    def check(self, names: Sequence[str]) -> None:
        """Raise PruneError for a glob that matches none of a model's outputs, in evaluation or in training."""
        names = list(dict.fromkeys(names))
        for glob in self.release:
            if not any(CouplingOptions(release=(glob,)).releases(name) for name in names):
                listed = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
                raise PruneError(
                    f"the glob {glob!r} in release matches no output of the model",
                    fix=f"one of its outputs: {listed}" if names else "the model returns no tensor",
                )


@dataclass(slots=True)
class Solution:
    """Labels of every value and the units that removal acts on.

    Attributes:
        captures: the captured programs.
        leaves: labels of the model's own tensors, by name.
        values: for each capture, the labels of every value in its op trace.
        unit_of: the unit of each label, named by the smallest label in it.
        frozen: for each unit that is never removed the number of the reason, else -1 (indexed by label).
        reasons: clauses, each with the place in the program.
        equal_rows: matrices of units whose rows must keep equally many entries.
        regions: nodes replaced by one gather, so that what they pass through need not be a rectangle.
        ties: those that were solved, as the rules reported them.
        shapes: of the model's own tensors, by name.
        some_stay: units of which one at least must stay.
        at_least: units, each as often as it has entries, with how many of these must stay.
        experts: what goes with entries that are chosen by value, where numbers of a choice are looked for one by one.
        picks: for each capture the values that are numbers of chosen entries, with the labels of what is chosen from.
    """

    captures: list[CapturedProgram]
    leaves: dict[str, Labels]
    values: list[dict[int, Labels]]
    unit_of: Tensor
    frozen: np.ndarray
    reasons: list[str]
    equal_rows: list[np.ndarray]
    regions: list[dict[fx.Node, fx.Node]]
    ties: list[Tie]
    shapes: dict[str, tuple[int, ...]]
    some_stay: list[np.ndarray]
    at_least: list[tuple[np.ndarray, int]] = field(default_factory=list)
    picks: list[dict[int, np.ndarray]] = field(default_factory=list)
    experts: ListedExperts | None = None

    def removed_by(self, slices: Mapping[str, Sequence[TensorSlice]], shapes: Mapping[str, Sequence[int]]) -> np.ndarray:
        """For each unit whether slices of tensors take all of it, shape (labels,); one that is left in any tensor stays.

        Arguments:
            slices: by name of the tensor; those without any stay whole.
            shapes: of the tensors that count: constants that the program makes do not.
        """
        unit = self.unit_of.numpy()
        occurs, stays = np.zeros(len(unit), bool), np.zeros(len(unit), bool)
        for name, labels in self.leaves.items():
            for f in labels if name in shapes else ():
                occurs[unit[f.compressed]] = True
                cut = next((c for c in slices.get(name, ()) if f.dims <= set(c.dims)), None)
                if cut is None:
                    stays[unit[f.compressed]] = True
                    continue
                shape = [n if d in cut.dims else 1 for d, n in enumerate(shapes[name])]
                mask = mask_of([cut], shape)
                every = f.labels.expand(torch.broadcast_shapes(f.labels.shape, mask.shape))
                stays[unit[every[mask.expand(every.shape)].numpy()]] = True
        return occurs & ~stays

    def complete(self, slicer: Slicer) -> Slicer:
        """The same, with whole modules removed that go with labels that it does not keep."""
        if self.experts is not None:
            self.experts.go_with(slicer, self.unit_of.numpy())
        return slicer
