"""Terms: what is asked of a coupling, besides the model and its inputs."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxprune.passes.errors import PruneError


@dataclass(frozen=True)
class CouplingOptions:
    """What may go and what may not.

    Attributes:
        heads: whether heads of attention go whole (else the dimensions within them).
        frozen: names of tensors that stay as they are, with the reason.
        release: globs over the names of outputs whose channels may go.
    """

    heads: bool = True
    frozen: Mapping[str, str] = field(default_factory=dict)
    release: tuple[str, ...] = ()

    def releases(self, name: str) -> bool:
        """Whether an output, or what it lies in, is released."""
        parts = name.split(".")
        wholes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatchcase(whole, glob) for glob in self.release for whole in wholes)

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
