"""Find what can be rotated, and the principal axes of what is read there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.criteria.calibration import prepare_source
from fxprune.passes.capture.recorder import Recorder
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.linear_families import linear_families
from fxprune.passes.coupling.linear_family import LinearFamily, Member, NotLinear
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.module_tree import copy_tree, named_parameters
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import find
from fxprune.passes.rewrite.basis import Basis, Step, all_tensors, bias_of, out_of


@dataclass(frozen=True, eq=False)
class Rotatable:
    """A family that can be rotated, with the steps that put out of the way what does not commute with rotations.

    Attributes:
        linear: the family.
        before: the steps before the rotation.
    """

    linear: LinearFamily
    before: tuple[Step, ...]

    @property
    def name(self) -> str:
        return self.linear.family.name

    def rotated_by(self, number: int) -> list[Step]:
        return [Step("rotate", m.name, m.dim, number=number) for m in self.linear.members]

    def narrowed_to(self, kept: int) -> list[Step]:
        """The steps by which norms over what is kept become those over all of it, with zeros for the rest.

        The mean over k squares is d / k times that over d of which the others are zero. So what is added to a stream is
        multiplied by sqrt(k / d), and what reads it by sqrt(d / k): eps and all else stay as they are.
        """
        factor = (kept / self.linear.size) ** 0.5
        members = self.linear.members if self.linear.normed and factor != 1 else ()
        made = [Step("multiply", m.name, m.dim, number=1 / factor if m.reads else factor) for m in members]
        gains: dict[Step, None] = {}
        for m in members:
            if m.reads:
                name = m.scales[-1].tensors.get("weight") if m.scales else None
                gains[Step("no gain", m.name) if name is None else Step("gain", name, number=factor)] = None
        return [*made, *gains]


def find_rotatable(model: nn.Module, solution: Solution) -> tuple[list[Rotatable], dict[str, str]]:
    """The families that can be rotated, and for those that may lose units the reason why others cannot, by name."""
    names: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, tensor in all_tensors(model):
        if tensor.is_floating_point():
            aliases.setdefault(names.setdefault(id(tensor), name), []).append(name)
    norms = frozenset(path for path, module in model.named_modules() if is_plain_norm(module))
    found = families(solution, set(named_parameters(model)))
    linear, reasons = linear_families(solution, found, aliases, norms)
    made = []
    for family in linear:
        try:
            made.append(Rotatable(family, tuple(folding(model, family))))
        except NotLinear as error:
            reasons[family.family.name] = str(error)
    return made, reasons


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm over the last dimensions, and its class does nothing else, such as moving them there."""
    if not isinstance(module, nn.LayerNorm):
        return False
    if type(module).forward is nn.LayerNorm.forward:
        return True
    x = torch.linspace(-1, 1, 2 * math.prod(module.normalized_shape)).reshape(2, *module.normalized_shape)
    parts = [None if p is None else torch.linspace(0.5, 1, p.numel()).reshape(p.shape) for p in (module.weight, module.bias)]
    stand_in = copy_tree(
        module, {id(p): nn.Parameter(v) for p, v in zip((module.weight, module.bias), parts, strict=True) if v is not None}
    )
    try:
        with torch.no_grad():
            made = stand_in(x)
    except Exception:  # it takes inputs of another shape
        return False
    wanted = F.layer_norm(x, module.normalized_shape, *parts, eps=module.eps)
    return isinstance(made, Tensor) and made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-5)


def folding(model: nn.Module, linear: LinearFamily) -> list[Step]:
    """The steps that put scales, shifts and centring into the layers; raises NotLinear where a shift has no place to go."""
    tensors = dict(all_tensors(model))
    first = [Step("untie", name) for name in linear.untied]
    batch_norms = {s.tensors["weight"].rpartition(".")[0]: s.eps for s in linear.scales if s.kind == "batch norm"}
    first += [Step("fold statistics", path, number=eps) for path, eps in batch_norms.items()]
    into: list[Step] = []
    shifted: dict[str, Step] = {}
    for member in linear.members:
        for scale in member.scales:
            bias = scale.tensors.get("bias")
            if bias is not None and member.reads:
                if tensors[member.name].shape[2:].numel() > 1:
                    raise NotLinear(f"is shifted by a norm in front of {member.name}, whose padding knows no shift")
                if bias_of(member.name) not in tensors:
                    shifted.setdefault(bias_of(member.name), with_bias(model, member))
                into.append(Step("shift", member.name, member.dim, bias))
            if "weight" in scale.tensors:
                into.append(Step("scale", member.name, member.dim, scale.tensors["weight"]))
    rotated = {member.name for member in linear.members}
    last: dict[Step, None] = {}
    for scale in linear.scales:
        for role, name in scale.tensors.items():
            if role == "weight" or (role == "bias" and name not in rotated):
                last[Step("fill", name, number=1.0 if role == "weight" else 0.0)] = None
    last |= {Step("norm by square", s.module): None for s in linear.scales if s.kind == "centred norm"}
    last |= {Step("centre", m.name, m.dim): None for m in linear.members if m.centred}
    return [*first, *shifted.values(), *into, *last]


def with_bias(model: nn.Module, member: Member) -> Step:
    """The step that gives the layer of a weight a bias; raises NotLinear where it has no place for one."""
    name = bias_of(member.name)
    path, _, own = name.rpartition(".")
    if name == member.name or model.get_submodule(path)._parameters.get(own, member) is not None:
        raise NotLinear(f"is shifted by a norm, and the layer of {member.name}, which reads it, can have no bias")
    return Step("add bias", name, out_of(member.dim), member.name)


def names_of(model: nn.Module, members: Iterable[str]) -> dict[int, str]:
    """Names of parameters by the address of their memory."""
    found = dict(all_tensors(model))
    return {found[name].untyped_storage().data_ptr(): name for name in members}


class MomentObserver(Recorder):
    """Runs a model and sums the second moments of what some of its weights read.

    Each value that is read counts once, however many weights read it one after another, by its mean over positions.

    Arguments:
        dims: by the address of a weight's memory: the number of its family, and how many channels that has.
        moments: to add to, one for each family: float64, shape (channels, channels).
    """

    def __init__(self, dims: Mapping[int, tuple[int, int]], moments: Sequence[Tensor]) -> None:
        super().__init__({})
        self.dims, self.moments = dims, moments
        self.last: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.op_trace.ops)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for op in self.op_trace.ops[before:]:
            call = OpView(op, self.op_trace)
            tensors = {self.ref(t).id: t for t in collect((args, kwargs or {}), Tensor)}
            for found in find(op.func).products_of(call):
                weight, source = tensors.get(found.weight.id), tensors.get(found.source.id)
                if weight is not None and source is not None and weight.numel():
                    known = self.dims.get(weight.untyped_storage().data_ptr())
                    if known is not None and source.shape[found.along] == known[1]:
                        self.add_moment(known[0], source.detach(), found.along)
        del self.op_trace.ops[before:]
        return out

    def add_moment(self, number: int, source: Tensor, along: int) -> None:
        last = self.last.get(number)
        if last is not None and last.data_ptr() == source.data_ptr() and last.numel() == source.numel():
            return
        self.last[number] = source
        rows = source.movedim(along, -1).reshape(-1, source.shape[along]).double()
        self.moments[number].add_((rows.T @ rows).cpu(), alpha=1 / max(1, len(rows)))


def principal_axes(
    folded: nn.Module,
    found: Sequence[Rotatable],
    data: Iterable[Any],
    combine: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """For each family the axes of what is read of it, by falling energy, as columns, and the share of the energy of each.

    Arguments:
        folded: the model after the steps that come before the rotation.
        found: the families.
        data: batches, as for `prune`.
        combine: makes one of what several processes have.
    """
    moments = [torch.zeros(f.linear.size, f.linear.size, dtype=torch.float64) for f in found]
    with prepare_source(folded, data, None, "basis", None) as source, torch.no_grad():
        tensors = dict(all_tensors(source.model))
        readers: dict[int, tuple[int, int]] = {}
        for number, f in enumerate(found):
            for member in f.linear.members:
                if member.reads:
                    readers[tensors[member.name].untyped_storage().data_ptr()] = (number, f.linear.size)
        for batch in source.batches():
            with MomentObserver(readers, moments):
                source.run(batch)
    axes, energies = [], []
    for moment in moments:
        if combine is not None:
            moment = torch.from_numpy(combine(moment.numpy()))
        values, vectors = torch.linalg.eigh(moment)
        energy = values.flip(0).clamp(min=0)
        axes.append(vectors.flip(1).float())
        energies.append(energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny))
    return tuple(axes), tuple(energies)


def rotated_basis(found: Sequence[Rotatable], axes: Sequence[Tensor], kept: Mapping[str, int] | None = None) -> Basis:
    """The change to these axes, for models in which so many of each family, by name, are kept (by default all)."""
    steps = [step for f in found for step in f.before]
    steps += [step for number, f in enumerate(found) for step in f.rotated_by(number)]
    steps += [step for f in found for step in f.narrowed_to((kept or {}).get(f.name, f.linear.size))]
    return Basis(tuple(steps), tuple(axes))
