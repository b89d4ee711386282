"""A criterion with what it has seen of data, to score by at any budget, in another process, or without the model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxprune.arguments import broadcasts, checked_class, shown
from fxprune.criteria.base import Criterion, describe
from fxprune.criteria.catalog import CRITERIA, find, resolve
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.branches import Branch

KEY, FORMAT = "fxprune", "fxprune.calibration/1"
FIX = "a file that Calibration.save wrote"


@checked_class
class Calibration:
    """What a criterion gathered from data, as a criterion that needs none: `fxprune.calibrate` returns it.

    Attributes:
        criterion: the one that was calibrated.
        evidence: what it needs for each parameter, by name, broadcastable to the parameter: norms of the activations that a
            weight multiplies, a gradient, and so on.
        attention: the granularity that it was gathered for, if that is known: losses of a head count for the whole head.
        branches: the score of each residual branch, if those were asked for, by the first of the tensors that it has alone, and
            of each whole block, by its module.
    """

    needs = ""

    def __init__(
        self,
        criterion: str | Criterion,
        evidence: Mapping[str, Tensor],
        attention: str | None = None,
        branches: Mapping[str, float] | None = None,
    ) -> None:
        inner: Any = find(criterion)
        spec = describe(inner)
        self.criterion, self.evidence, self.attention = criterion, dict(evidence), attention
        self.branches = None if branches is None else dict(branches)
        self.elementwise, self.places, self.reduce, self.normalise = spec.elementwise, spec.places, spec.reduce, spec.normalise
        self.inner: Callable[..., Any] = inner
        for method in ("score_dims", "finish_layer"):
            setattr(self, method, getattr(inner, method, None))
        self.__name__ = spec.name

    def __call__(self, weight: Tensor, evidence: Tensor) -> Any:
        return self.inner(weight, evidence)

    def __repr__(self) -> str:
        return f"Calibration({self.criterion!r}, {len(self.evidence)} parameters)"

    def save(self, path: os.PathLike[str] | str) -> None:
        """Write it to a `.safetensors` file. Raises PruneError for a criterion without a name, which nothing could load."""
        check_path(path)
        if Path(path).exists() and not Path(path).is_file():
            raise PruneError(f"{path} cannot be written: it is no file", fix="the name of a file")
        if not isinstance(self.criterion, str):
            raise PruneError(f"{self.__name__} has no name to be saved under", fix=f"one of {', '.join(sorted(CRITERIA))}")
        held = {"criterion": self.criterion, "attention": self.attention, "branches": self.branches}
        text = json.dumps({"format": FORMAT, **held})
        try:
            save_file({n: t.detach().cpu().contiguous() for n, t in self.evidence.items()}, str(path), {KEY: text})
        except (SafetensorError, OSError) as error:
            raise PruneError(f"{path} cannot be written: {error}", fix="a path in a folder that is there") from error

    @classmethod
    def load(cls, path: os.PathLike[str] | str) -> Calibration:
        """Read what `save` wrote; raises PruneError for anything else."""
        check_path(path)
        try:
            with safe_open(str(path), "pt") as file:
                text = (file.metadata() or {}).get(KEY, "{}")
                evidence = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            data = json.loads(text)
        except (SafetensorError, OSError, ValueError) as error:
            raise PruneError(f"{path} cannot be read: {error}", fix=FIX) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("criterion"), str):
            raise PruneError(f"{path} is no calibration", fix=FIX)
        resolve(data["criterion"])
        branches = data.get("branches")
        if not (branches is None or (isinstance(branches, dict) and all(type(v) is float for v in branches.values()))):
            raise PruneError(f"{path} is no calibration: its scores of branches are no numbers", fix=FIX)
        return cls(data["criterion"], evidence, data.get("attention"), branches)

    def of(self, criterion: Criterion) -> Calibration:
        """The same evidence, for a variant of its criterion."""
        return Calibration(criterion, self.evidence, self.attention, self.branches)

    def scores_of(self, branches: Sequence[Branch]) -> np.ndarray:
        """The scores of these residual branches, shape (branches,); raises PruneError for one that it has not seen."""
        held, keys = self.branches or {}, list(map(key_of, branches))
        unseen = next((key for key in keys if key not in held), None)
        if unseen is not None:
            raise PruneError(
                "the calibration has no score of a residual branch",
                where=unseen,
                fix="fxprune.calibrate with this model and depth_criterion='influence'",
            )
        return np.array([held[key] for key in keys])

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise PruneError unless it was gathered from a model with parameters of these shapes."""
        for name, tensor in self.evidence.items():
            whole = shapes.get(name)
            if whole is None or not broadcasts(tensor.shape, whole):
                what = f"the calibration is of another model: {name} has evidence of shape {tuple(tensor.shape)}"
                raise PruneError(what, where=name, fix="fxprune.calibrate with this model")


def key_of(branch: Branch) -> str:
    """What tells a residual branch from all others: two in one module have one name, and no tensor in common.

    A block has the tensors of its branches; no two blocks are one module.
    """
    return branch.name if branch.parts else min(branch.tensors, default=branch.name)


def check_path(path: Any) -> None:
    """Raise PruneError for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise PruneError(f"{shown(path)} is no path", fix="the name of a file")
