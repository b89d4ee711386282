"""Find what can be rotated, and the principal axes of what is read there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, every_tensor, named_modules, named_parameters
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import spec_of
from fxprune.passes.rewrite.basis import Basis, Step, bias_of, out_of


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
        """The steps that rotate it, where the rotations of its rows have numbers from `number` on."""
        if self.linear.whole:
            return [Step("rotate", m.name, m.dim, number=number) for m in self.linear.members]
        runs = [(m, start, row) for m in self.linear.members for start, row in m.runs]
        return [Step("rotate run", m.name, m.dim, number=number + row, start=start) for m, start, row in runs]

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
    for name, tensor in every_tensor(model):
        if tensor.is_floating_point():
            aliases.setdefault(names.setdefault(id(tensor), name), []).append(name)
    norms = frozenset(path for path, module in named_modules(model) if is_plain_norm(module))
    found = families(solution, set(named_parameters(model)))
    linear, reasons = linear_families(solution, found, aliases, norms)
    made = []
    for family in linear:
        try:
            family = with_biases(model, family)
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
    shape = list(module.normalized_shape)
    x = torch.linspace(-1, 1, 2 * math.prod(shape)).reshape(2, *shape)
    held = {name: torch.linspace(0.5, 1, p.numel()).reshape(p.shape) for name, p in module.named_parameters(recurse=False)}
    swap: dict[int, Tensor] = {id(module.get_parameter(name)): nn.Parameter(value) for name, value in held.items()}
    try:
        with torch.no_grad():
            made = copy_tree(module, swap)(x)
    except Exception:  # it takes inputs of another shape
        return False
    wanted = F.layer_norm(x, shape, held.get("weight"), held.get("bias"), module.eps)
    return isinstance(made, Tensor) and made.shape == wanted.shape and torch.allclose(made, wanted, atol=1e-5)


def with_biases(model: nn.Module, linear: LinearFamily) -> LinearFamily:
    """The family with a bias for each layer that a batch norm goes into; raises NotLinear where there is no place for it."""
    members = list(linear.members)
    for scale in linear.scales:
        if scale.kind != "batch norm":
            continue
        path = scale.name.rpartition(".")[0]
        if not isinstance(model.get_submodule(path), nn.modules.batchnorm._BatchNorm):
            raise NotLinear(f"is scaled by {path}, which is no layer of torch's")
        writers = [m for m in members if not m.reads and m.scales[:1] == (scale,) and m.name.endswith("weight")]
        if len(writers) > 1 or (not writers and not any(m.reads and scale in m.scales for m in members)):
            raise NotLinear(f"is scaled by {path}, which normalises what several layers write")
        for m in writers:
            if not any(other.name == bias_of(m.name) for other in members):
                with_bias(model, m, out_of=m.dim)
                members.append(replace(m, name=bias_of(m.name), dim=0))
    return replace(linear, members=tuple(members))


def folding(model: nn.Module, linear: LinearFamily) -> list[Step]:
    """The steps that put scales, shifts and centring into the layers; raises NotLinear where a shift has no place to go."""
    tensors = dict(every_tensor(model))
    first = [Step("untie", name) for name in linear.untied]
    batch_norms = {s.tensors["weight"].rpartition(".")[0]: s.eps for s in linear.scales if s.kind == "batch norm"}
    first += [Step("fold statistics", path, number=eps) for path, eps in batch_norms.items()]
    into: list[Step] = []
    shifted: dict[str, Step] = {}
    for member in linear.members:
        if member.name not in tensors and member.name not in linear.untied:
            weight = next(m for m in linear.members if bias_of(m.name) == member.name)
            shifted[member.name] = with_bias(model, weight, out_of=weight.dim)
        for scale in member.scales:
            bias = scale.tensors.get("bias")
            if bias is not None and member.reads:
                if tensors[member.name].shape[2:].numel() > 1:
                    raise NotLinear(f"is shifted by a norm in front of {member.name}, whose padding knows no shift")
                if bias_of(member.name) not in tensors:
                    shifted.setdefault(bias_of(member.name), with_bias(model, member, out_of(member.dim)))
                into.append(Step("shift", member.name, member.dim, bias))
            if "weight" in scale.tensors:
                into.append(Step("scale", member.name, member.dim, scale.tensors["weight"]))
            if scale.kind == "batch norm" and not member.reads and member.name.endswith("bias"):
                into.append(Step("add", member.name, other=scale.tensors["bias"]))
    last: dict[Step, None] = {Step("identity", path): None for path in batch_norms}
    for scale in linear.scales:
        if "weight" in scale.tensors and scale.kind != "batch norm":
            last[Step("fill", scale.tensors["weight"], number=1.0)] = None
    last |= {Step("norm by square", s.module): None for s in linear.scales if s.kind == "centred norm"}
    last |= {Step("centre", m.name, m.dim): None for m in linear.members if m.centred}
    return [*first, *shifted.values(), *into, *last]


def with_bias(model: nn.Module, member: Member, out_of: int) -> Step:
    """The step that gives the layer of a weight a bias; raises NotLinear where it has no place for one."""
    name = bias_of(member.name)
    path, _, own = name.rpartition(".")
    if name == member.name or model.get_submodule(path)._parameters.get(own, member) is not None:
        raise NotLinear(f"is shifted by a norm, and the layer of {member.name} can have no bias")
    return Step("add bias", name, out_of, member.name)


class MomentObserver(Recorder):
    """Runs a model and sums the second moments of what some of its weights read.

    Each value that is read counts once, however many weights read it one after another, by its mean over positions.

    Arguments:
        readers: by the address of a weight's memory: the numbers of families that it reads, each with where these are.
        moments: to add to, one for each family: float64, shape (rows, channels, channels).
    """

    def __init__(self, readers: Mapping[int, Sequence[tuple[int, Member, int]]], moments: Sequence[Tensor]) -> None:
        super().__init__({})
        self.readers, self.moments = readers, moments
        self.last: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.op_trace.ops)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for op in self.op_trace.ops[before:]:
            call = OpView(op, self.op_trace)
            tensors = {self.ref(t).id: t for t in collect((args, kwargs or {}), Tensor)}
            for found in spec_of(op).products_of(call):
                weight, source = tensors.get(found.weight.id), tensors.get(found.source.id)
                if weight is not None and source is not None and weight.numel():
                    for number, member, length in self.readers.get(weight.untyped_storage().data_ptr(), ()):
                        if source.shape[found.along] == length:
                            self.add_moment(number, member, source.detach(), found.along)
        del self.op_trace.ops[before:]
        return out

    def add_moment(self, number: int, member: Member, source: Tensor, along: int) -> None:
        last = self.last.get(number)
        if last is not None and last.data_ptr() == source.data_ptr() and last.numel() == source.numel():
            return
        self.last[number] = source
        read = source.movedim(along, -1).reshape(-1, source.shape[along]).double()
        size = self.moments[number].shape[-1]
        for start, row in member.runs:
            run = read[:, start : start + size]
            self.moments[number][row].add_((run.T @ run).cpu(), alpha=1 / max(1, len(read)))


def principal_axes(
    folded: nn.Module,
    found: Sequence[Rotatable],
    data: Iterable[Any],
    combine: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """For each family the axes of what is read of it, by falling energy, as columns, and the share of the energy of each.

    Shapes: (rows, channels, channels) and (rows, channels), with one row except for families within heads and the like.

    Arguments:
        folded: the model after the steps that come before the rotation.
        found: the families.
        data: batches, as for `prune`.
        combine: makes one of what several processes have.
    """
    moments = [torch.zeros(f.linear.rows, f.linear.size, f.linear.size, dtype=torch.float64) for f in found]
    with prepare_source(folded, data, None, "basis", None) as source, torch.no_grad():
        tensors = dict(every_tensor(source.model))
        readers: dict[int, list[tuple[int, Member, int]]] = {}
        for number, f in enumerate(found):
            for member in f.linear.members:
                if member.reads:
                    weight = tensors[member.name]
                    known = readers.setdefault(weight.untyped_storage().data_ptr(), [])
                    known.append((number, member, weight.shape[member.dim]))
        for batch in source.batches():
            with MomentObserver(readers, moments):
                source.run(batch)
    axes, energies = [], []
    for f, moment in zip(found, moments, strict=True):
        if combine is not None:
            moment = torch.from_numpy(combine(moment.numpy()))
        if not bool(moment.isfinite().all()):
            raise PruneError(
                "basis='principal' finds NaN or infinity in what is read of a family on the data",
                where=f.name,
                fix="look for NaN in the data, and for values that are too large",
            )
        values, vectors = torch.linalg.eigh(moment)
        energy = values.flip(-1).clamp(min=0)
        axes.append(vectors.flip(-1).contiguous())
        energies.append(energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny))
    return tuple(axes), tuple(energies)


def rotated_basis(found: Sequence[Rotatable], axes: Sequence[Tensor], kept: Mapping[str, int] | None = None) -> Basis:
    """The change to these axes, for models in which so many of each family, by name, are kept (by default all).

    Axes are one matrix for each row of a family, or one for all of its rows.
    """
    steps = [step for f in found for step in f.before]
    rotations: list[Tensor] = []
    for f, own in zip(found, axes, strict=True):
        steps += f.rotated_by(len(rotations))
        rotations += own.expand(f.linear.rows, -1, -1)
    steps += [step for f in found for step in f.narrowed_to((kept or {}).get(f.name, f.linear.size))]
    return Basis(tuple(steps), tuple(rotations))
