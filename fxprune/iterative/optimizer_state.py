"""Remap the state of an optimizer, and moving averages of weights, after a pruning step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxprune.arguments import shown
from fxprune.distributed.ranks import is_dtensor
from fxprune.distributed.sharded import distributed, whole
from fxprune.iterative.plan_mapping import undo_slices
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.quiet import without_modes
from fxprune.passes.ir.slices import apply_slices, in_format_of
from fxprune.plan import PlanData


class Move:
    """The map from a model to the one that a step made of it, tensor by tensor.

    Arguments:
        last, model: the two models.
        old, new: their tensors by the names in the original.
        before, after: the plans that leave of the original what each of them is.
        kept: for each tensor which elements are not masked, if elements are masked instead of removed.
    """

    def __init__(
        self,
        last: nn.Module,
        model: nn.Module,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        before: PlanData,
        after: PlanData,
        kept: Mapping[str, Tensor],
    ) -> None:
        self.model, self.new, self.before, self.after, self.kept = model, new, before, after, kept
        self.last = last  # its tensors are known by identity, so it must live on
        self.old = {id(t): name for name, t in old.items()}
        state = last.state_dict(keep_vars=True)
        self.keys = {key: self.old[id(t)] for key, t in state.items() if id(t) in self.old}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the shape that one of the model's tensors had before, in the shape that it has now."""
        if is_dtensor(tensor):
            there: Any = self.new[name]
            return distributed(self(name, whole(tensor)), there.device_mesh, there.placements)
        made = moved(tensor, name, self.before, self.after)
        return made.masked_fill(~self.kept[name].to(made.device), 0) if name in self.kept else made

    def state(self, name: str, key: str, value: Any, owner: str) -> Any:
        """An entry of an optimizer's state; raises PruneError where it cannot be told what belongs to which element."""
        if not isinstance(value, Tensor):
            inside = [t for t in collect(value, Tensor) if t.dim()] if isinstance(value, list | tuple | dict) else []
            if inside:
                raise refused(name, key, f"holds tensors in a {type(value).__name__}", owner)
            return value
        shape = self.before.kept_shape(name)
        if value.dim() == 0 or value.shape == shape:
            return value if value.dim() == 0 else self(name, value)
        if is_dtensor(value) or value.dim() != len(shape) or any(n not in (1, m) for n, m in zip(value.shape, shape)):
            raise refused(name, key, f"has shape {tuple(value.shape)}, its parameter {shape}", owner)
        made = self(name, value.expand(shape))
        for d, n in enumerate(value.shape):
            if n == 1:  # one number for a whole row: so it must be after the cut
                first = made.narrow(d, 0, 1)
                if not bool((made == first).all()):
                    raise refused(name, key, f"has shape {tuple(value.shape)}, and rows keep different columns", owner)
                made = first
        return made.clone()


def moved(tensor: Tensor, name: str, before: PlanData, after: PlanData) -> Tensor:
    """A tensor of the shape that one plan leaves of one of the original's, in the shape that another one does."""
    into = torch.zeros(before.shapes[name], dtype=tensor.dtype, device=tensor.device)
    widened = undo_slices(before.slices.get(name, ()), tensor, into)
    return in_format_of(tensor, apply_slices(after.slices.get(name, ()), widened))


def refused(name: str, key: str, why: str, owner: str) -> PruneError:
    return PruneError(
        f"the state {key!r} of {name} cannot be cut: it {why}",
        where=owner,
        fix="a new optimizer for the parameters of the model that step() returned",
    )


@without_modes()
def remap(optimizer: Any, move: Move) -> None:
    """Give an optimizer the parameters of the next model, and its state as they are cut. All or nothing."""
    if not isinstance(optimizer, Optimizer):
        what = f"optimizer is of type {type(optimizer).__name__}, not a torch.optim.Optimizer"
        raise PruneError(what, fix="the optimizer itself; a scheduler keeps it")
    owner = type(optimizer).__name__
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in move.old for p in held):
        raise PruneError(
            "the optimizer holds no parameter of the model that the last step was given",
            where=owner,
            fix="call remap_optimizer once after every step, before anything else is done with the optimizer",
        )
    groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or [""] * len(group["params"])
        pairs = [(move.new.get(move.old[id(p)]) if id(p) in move.old else p, n) for p, n in zip(group["params"], names)]
        groups.append([(p, n) for p, n in pairs if p is not None])
    state: dict[Tensor, Any] = {}
    for p, entry in optimizer.state.items():
        name = move.old.get(id(p))
        if name is None:
            state[p] = entry
        elif name in move.new:
            state[move.new[name]] = {key: move.state(name, key, value, owner) for key, value in entry.items()}
    for group, pairs in zip(optimizer.param_groups, groups):
        group["params"] = [p for p, _ in pairs]
        if "param_names" in group:
            group["param_names"] = [n for _, n in pairs]
    optimizer.state.clear()
    optimizer.state.update(state)


@without_modes()
def remap_state(state: Mapping[str, Any], move: Move) -> dict[str, Any]:
    """A state dict of the model before (or of a wrapper that calls it `module`), in the shapes of the next one."""
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        what = f"average must be a state dict or a module, not {shown(state)}"
        raise PruneError(what, fix="an AveragedModel, or the state dict of one")
    made: dict[str, Any] = {}
    for key, value in state.items():
        name = move.keys.get(key, move.keys.get(key.removeprefix("module.")))
        if not isinstance(value, Tensor) or (name is None and value.dim() == 0):
            made[key] = value
            continue
        if name is None or tuple(value.shape) != move.before.kept_shape(name):
            why = "has no such tensor" if name is None else f"has shape {move.before.kept_shape(name)} there"
            raise PruneError(
                f"{key} of shape {tuple(value.shape)} is not of the model that the last step was given, which {why}",
                fix="call remap_average once after every step, with averages of that model",
            )
        made[key] = move(name, value)
    return made


@without_modes()
def remap_module(average: nn.Module, move: Move) -> nn.Module:
    """A module that holds averaged values, or a wrapper that calls it `module`, as one of the next model's kind."""
    held = getattr(average, "module", None)
    inner = held if isinstance(held, nn.Module) else average
    state = remap_state(inner.state_dict(), move)
    fresh = copy.deepcopy(move.model)
    fresh.load_state_dict({k: v for k, v in state.items() if k in fresh.state_dict()})
    fresh.train(inner.training)
    if inner is average:
        return fresh
    average.module = fresh
    return average


def taken(move: Move | None) -> Move:
    """The move of the last step; raises PruneError where there was none."""
    if move is None:
        raise PruneError("no step was taken yet", fix="call it after pruner.step()")
    return move
