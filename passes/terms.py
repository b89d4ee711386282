"""Terms: what is asked of a coupling, besides the model and its inputs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxprune.errors import PruneError
from fxprune.passes.tape import Ref

ONLY = "output"  # the name of the one tensor that a model returns


@dataclass(frozen=True)
class Terms:
    """What may go and what may not.

    Attributes:
        heads: whether heads of attention go whole (else the dimensions within them).
        keep: names of tensors that stay as they are, with the reason.
        release: globs over the names of outputs whose channels may go.
    """

    heads: bool = True
    keep: Mapping[str, str] = field(default_factory=dict)
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
            if not any(Terms(release=(glob,)).releases(name) for name in names):
                listed = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
                raise PruneError(
                    f"the glob {glob!r} in release matches no output of the model",
                    fix=f"one of its outputs: {listed}" if names else "the model returns no tensor",
                )


def named_outputs(returned: Any, results: Mapping[fx.Node, Any], path: str = "") -> Iterator[tuple[str, Ref]]:
    """Every tensor that a program returns, by where it stands: keys, fields and positions, with dots in between.

    Arguments:
        returned: the argument of the output node.
        results: what each node evaluated to, tensors as references.
        path: where `returned` stands itself.
    """
    if isinstance(returned, Ref):
        yield path or ONLY, returned
        return
    if isinstance(returned, fx.Node):
        fields = getattr(returned.target, "_fields", None) if returned.op == "call_function" else None
        inner = dict(zip(fields, returned.args, strict=True)) if fields else results[returned]
        yield from named_outputs(inner, results, path)
        return
    if isinstance(returned, dict):
        items = [(str(key), value) for key, value in returned.items()]
    elif isinstance(returned, tuple | list):
        names = getattr(returned, "_fields", range(len(returned)))
        items = [(str(name), value) for name, value in zip(names, returned, strict=True)]
    else:
        return
    for name, value in items:
        yield from named_outputs(value, results, f"{path}.{name}" if path else name)
