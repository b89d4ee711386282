"""The processes of a model that is wrapped in `DistributedDataParallel` or sharded, which make one plan and fail together.

Every exchange carries what went wrong, if anything did: a process that fails takes part in the one that the others are waiting
in, so that none of them waits for ever, and all raise the same error.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from fxprune.entry_points import WRAPPERS, is_a
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import PLAIN_TENSORS, named_tensors


class Ranks:
    """The processes of a group. Each calls the same methods in the same order, until one of them fails."""

    def __init__(self, group: Any) -> None:
        self.group, self.failed = group, False

    def exchange(self, kind: str, value: Any, error: str = "") -> list[Any]:
        """The values of all processes, by rank; raises PruneError on each of them if one failed or does something else."""
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, (kind, value, error), group=self.group)
        failed = [(rank, text) for rank, (_, _, text) in enumerate(found) if text]
        if failed or {name for name, _, _ in found} != {kind}:
            self.failed = True
            what = [f"rank {rank}: {text}" for rank, text in failed[:1]] or [
                "the processes are not at the same point of pruning"
            ]
            if not error:  # a process that failed raises its own
                raise PruneError(what[0], fix="the same model and arguments in every process; data may differ")
        return [value for _, value, _ in found]

    def mean(self, scores: np.ndarray) -> np.ndarray:
        """The mean over processes, the same to the last bit in each."""
        found = self.exchange("scores", scores)
        if len({some.shape for some in found}) > 1:
            raise PruneError("the processes prune models of different architectures", fix="the same model in every process")
        return np.asarray(sum(found[1:], found[0]) / len(found))

    def check_same(self, plan: bytes) -> None:
        """Raise PruneError on all processes where one of them has another plan."""
        found = self.exchange("plan", hashlib.sha256(plan).hexdigest())
        if len(set(found)) > 1:
            other = next(rank for rank, digest in enumerate(found) if digest != found[0])
            what = f"rank {other} makes another plan than rank 0"
            raise PruneError(what, fix="the same model and arguments in every process, and no budget of latency")


def is_dtensor(value: Any) -> bool:
    return is_a(value, "torch.distributed.tensor", "DTensor")


def dtensors(model: nn.Module) -> list[Any]:
    """The sharded tensors of a model."""
    if "torch.distributed.tensor" not in sys.modules or not dist.is_initialized():  # without processes there is no mesh
        return []
    return [t for _, t in named_tensors(model) if type(t) not in PLAIN_TENSORS and is_dtensor(t)]


def taken_off(model: nn.Module) -> nn.Module:
    """What wrappers hold, but for `DistributedDataParallel`, which knows its processes."""
    while not is_a(model, "torch.nn.parallel", "DistributedDataParallel"):
        held = next((attribute for module, name, attribute in WRAPPERS if is_a(model, module, name)), None)
        if held is None:
            break
        model = getattr(model, held)
    return model


def group_of(model: nn.Module) -> Any:
    """The group of the processes that hold a model together; None for a model of one process."""
    if is_a(model, "torch.nn.parallel", "DistributedDataParallel"):
        group: Any = model.process_group
        return group if dist.get_world_size(group) > 1 else None
    meshes = [t.device_mesh for t in dtensors(model)]
    if not meshes:
        return None
    mesh = max(meshes, key=lambda m: m.size())
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim > 1:
        what = f"the model is sharded over {mesh.size()} of {dist.get_world_size()} processes, in {mesh.ndim} dimensions"
        raise PruneError(what, fix="a mesh of all processes, or prune the plain model before it is sharded")
    return mesh.get_group()


@contextlib.contextmanager
def ranks_of(model: Any, before: Ranks | None = None) -> Iterator[Ranks | None]:
    """The processes of a model, if they are several that hold it or copies of it; they fail together.

    Arguments:
        model: wrapped or sharded, or a plain one.
        before: those of the model that a plain one was made of.
    """
    group = group_of(taken_off(model)) if isinstance(model, nn.Module) and dist.is_available() else None
    if group is None and before is None:
        yield None
        return
    ranks = Ranks(before.group if group is None and before is not None else group)
    try:
        yield ranks
    except Exception as error:
        if not ranks.failed:
            ranks.exchange("failure", None, f"{error}" or type(error).__name__)
        raise
