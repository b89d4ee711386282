"""A change of basis: steps that make of a model's parameters those of a rotated model that computes the same."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, every_path, every_tensor

KINDS: dict[str, Callable[[Change, Step], None]] = {}


@dataclass(frozen=True)
class Step:
    """One change of one tensor, or of one module.

    Attributes:
        kind: a key of `KINDS`, whose functions say what they do.
        name: of the tensor or module that changes.
        dim: a dimension of it.
        other: the name of a tensor or module that is read.
        number: of the rotation, or a factor.
        start: where along the dimension the change starts.
    """

    kind: str
    name: str
    dim: int = 0
    other: str = ""
    number: float = 0
    start: int = 0


@dataclass(frozen=True, eq=False)
class Basis:
    """Steps that lead from a model to the same one in another basis.

    Attributes:
        steps: in their order.
        rotations: orthogonal matrices, double precision, shape (old axes, new axes).
    """

    steps: tuple[Step, ...] = ()
    rotations: tuple[Tensor, ...] = field(default=())

    def apply(self, model: nn.Module, *, whole: bool = False) -> Any:
        """A copy of a model in this basis, which shares tensors that do not change; raises PruneError where it does not fit.

        What is cut of it computes what the original computes without the removed axes. With `whole` the copy as it is computes
        what the original does, and differs from the other one by the gains of norms alone: what repair compares with.

        It is computed in double precision and rounded once. On the meta device it is made in form.
        """
        change = Change(copy_tree(model, {id(t): t for _, t in every_tensor(model)}), self.rotations)
        for step in self.steps:
            if step.kind in ONLY_WHOLE and not whole:
                continue
            try:
                KINDS[step.kind](change, step)
            except PruneError:
                raise
            except Exception as error:
                what = f"the change of basis is for another model: {type(error).__name__}: {error}"
                raise PruneError(what, where=step.name, fix="apply it to the original, unpruned architecture") from error
        return change.finished()

    def to_dict(self) -> dict[str, Any]:
        """The change of basis as JSON-ready data."""
        return {"steps": [list(vars(step).values()) for step in self.steps], "rotations": [text_of(r) for r in self.rotations]}

    @classmethod
    def from_dict(cls, data: Any) -> Basis:
        """What `to_dict` returned, where rotations may be tensors; raises PruneError for anything else."""
        steps, rotations = (data.get(name) if isinstance(data, Mapping) else None for name in ("steps", "rotations"))
        if not isinstance(steps, list) or not isinstance(rotations, list):
            raise wrong("it has no steps, or no rotations")
        matrices = tuple(matrix_of(rotation) for rotation in rotations)
        return cls(tuple(parse_step(step, len(matrices)) for step in steps), matrices)


class Change:
    """A model whose tensors are being changed.

    Arguments:
        model: a copy of the module tree.
        rotations: as in `Basis`.
    """

    def __init__(self, model: nn.Module, rotations: Sequence[Tensor]) -> None:
        self.model, self.rotations = model, rotations
        self.old = dict(every_tensor(model))
        names: dict[int, str] = {}
        self.first = {name: names.setdefault(id(tensor), name) for name, tensor in self.old.items()}
        self.own: set[str] = set()  # names of tensors that the original does not have
        self.new: dict[str, Tensor] = {}  # in double precision, by the first name

    def __getitem__(self, name: str) -> Tensor:
        first = self.first[name]
        return self.new[first] if first in self.new else self.old[first].detach().double()

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.new[self.first[name]] = value

    def vector(self, name: str, like: Tensor, dim: int) -> Tensor:
        """A tensor with one entry for each channel, along one dimension of another one."""
        found = self[name].reshape(-1)
        if len(found) != like.shape[dim]:
            raise self.misfit(name)
        return found.reshape([-1 if d == dim else 1 for d in range(like.dim())])

    def misfit(self, name: str) -> PruneError:
        what = f"the change of basis is for another model: {name} has another shape"
        return PruneError(what, fix="the original architecture")

    def hold(self, name: str, tensor: Tensor) -> None:
        """Give a name a tensor of its own."""
        self.old[name], self.first[name] = tensor, name
        self.own.add(name)

    def owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        return self.model.get_submodule(path), own

    def replace_module(self, name: str, made: nn.Module) -> None:
        """Put another module in the place of one; what it does not hold is gone."""
        old = self.model.get_submodule(name)
        held = {own for own, _ in every_tensor(made)}
        made.train(old.training)
        for path, module in list(every_path(self.model)):
            for own, child in module._modules.items():
                if child is old:
                    module._modules[own] = made
                    start = f"{path}.{own}" if path else own
                    for gone in {n for n, _ in every_tensor(old)} - held:
                        self.first.pop(f"{start}.{gone}", None)

    def finished(self) -> nn.Module:
        """The model with its new tensors, rounded to what they were."""
        made: dict[str, Tensor] = {}
        for name, first in self.first.items():
            if first not in self.new and name not in self.own:
                continue
            old = self.old[first]
            if first not in made:
                value = self.new[first].to(old.dtype).contiguous() if first in self.new else old.detach()
                made[first] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
            module, own = self.owner(name)
            held: Any = module._parameters if own in module._parameters else module._buffers
            held[own] = made[first]
        return self.model


def step_of(name: str) -> Callable[[Callable[[Change, Step], None]], Callable[[Change, Step], None]]:
    def add(function: Callable[[Change, Step], None]) -> Callable[[Change, Step], None]:
        KINDS[name] = function
        return function

    return add


@step_of("untie")
def untie(change: Change, step: Step) -> None:
    """A parameter under one of its names becomes one of its own."""
    old = change.old[step.name]
    others = [name for name, first in change.first.items() if first == change.first[step.name] and name != step.name]
    change.first.update(dict.fromkeys(others, others[0] if others else ""))
    change.hold(step.name, nn.Parameter(old.detach().clone(), old.requires_grad))


@step_of("add bias")
def add_bias(change: Change, step: Step) -> None:
    """A layer without a bias gets one of zeros, as long as its weight `other` has entries along `dim`."""
    module, own = change.owner(step.name)
    if own not in module._parameters or module._parameters[own] is not None:
        raise change.misfit(step.name)
    weight = change.old[step.other]
    bias = nn.Parameter(torch.zeros(weight.shape[step.dim], dtype=weight.dtype, device=weight.device), weight.requires_grad)
    module.register_parameter(own, bias)
    change.hold(step.name, bias)


@step_of("fold statistics")
def fold_statistics(change: Change, step: Step) -> None:
    """The running statistics of a batch norm (the module `name`, eps `number`) go into its weight and bias."""
    weight, bias, mean, var = (f"{step.name}.{own}" for own in ("weight", "bias", "running_mean", "running_var"))
    scale = change[weight] * (change[var] + step.number).rsqrt()
    change[bias] = change[bias] - change[mean] * scale
    change[weight] = scale
    change[mean], change[var] = torch.zeros_like(change[mean]), torch.full_like(change[var], 1 - step.number)


@step_of("shift")
def shift(change: Change, step: Step) -> None:
    """What a weight (`name`, summed along `dim`) makes of a shift of its inputs (`other`) goes into the layer's bias."""
    weight = change[step.name]
    made = weight * change.vector(step.other, weight, step.dim)
    kept = out_of(step.dim)
    bias = bias_of(step.name)
    change[bias] = change[bias] + made.sum([d for d in range(weight.dim()) if d != kept])


@step_of("scale")
def scale(change: Change, step: Step) -> None:
    """A tensor is multiplied along a dimension by the entries of another one."""
    change[step.name] = change[step.name] * change.vector(step.other, change[step.name], step.dim)


@step_of("fill")
def fill(change: Change, step: Step) -> None:
    """All entries of a tensor become one number."""
    change[step.name] = torch.full_like(change[step.name], step.number)


@step_of("add")
def add(change: Change, step: Step) -> None:
    """Another tensor is added to a bias."""
    change[step.name] = change[step.name] + change.vector(step.other, change[step.name], 0)


@step_of("identity")
def identity(change: Change, step: Step) -> None:
    """A batch norm that went into the layers around it becomes the identity, in training too."""
    if not isinstance(change.model.get_submodule(step.name), nn.modules.batchnorm._BatchNorm):
        raise change.misfit(step.name)
    change.replace_module(step.name, nn.Identity())


@step_of("norm by square")
def norm_by_square(change: Change, step: Step) -> None:
    """A LayerNorm, whose inputs have mean zero by now, becomes an RMSNorm with the same eps and weight."""
    old = change.model.get_submodule(step.name)
    if not isinstance(old, nn.LayerNorm):
        raise change.misfit(step.name)
    made = nn.RMSNorm(list(old.normalized_shape), old.eps, elementwise_affine=False)
    made.elementwise_affine = old.elementwise_affine
    made.weight = old.weight
    change.replace_module(step.name, made)


@step_of("centre")
def centre(change: Change, step: Step) -> None:
    """A tensor loses its mean along a dimension."""
    change[step.name] = change[step.name] - change[step.name].mean(step.dim, keepdim=True)


@step_of("rotate")
def rotate(change: Change, step: Step) -> None:
    """A dimension of a tensor goes over to the axes of a rotation."""
    if len(change.rotations[int(step.number)]) != change[step.name].shape[step.dim]:
        raise change.misfit(step.name)
    rotate_run(change, step)


@step_of("rotate run")
def rotate_run(change: Change, step: Step) -> None:
    """Some entries along a dimension of a tensor, from `start` on, go over to the axes of a rotation."""
    rotation, made = change.rotations[int(step.number)].to(change[step.name]), change[step.name].clone()
    if step.start + len(rotation) > made.shape[step.dim]:
        raise change.misfit(step.name)
    run = made.movedim(step.dim, -1)[..., step.start : step.start + len(rotation)]
    run.copy_(run @ rotation)
    change[step.name] = made


@step_of("multiply")
def multiply(change: Change, step: Step) -> None:
    """A tensor is multiplied by a number."""
    change[step.name] = change[step.name] * step.number


@step_of("gain")
def gain(change: Change, step: Step) -> None:
    """The gain of a norm over all axes becomes a number: what is read there is then what is read of a norm over those kept."""
    change[step.name] = torch.full_like(change[step.name], step.number)
    module, _ = change.owner(step.name)
    if isinstance(module, nn.RMSNorm) and module.eps is not None:
        module.eps *= step.number**2  # its inputs are multiplied by the number too


@step_of("no gain")
def no_gain(change: Change, step: Step) -> None:
    """There is no gain at a norm that a weight reads."""
    what = f"what {step.name} reads is normalised without a gain: over all axes it is another number than over those kept"
    raise PruneError(what, where=step.name, fix="repair needs norms with a weight, or a model that was not rotated")


ONLY_WHOLE = frozenset(["gain", "no gain"])


def bias_of(weight: str) -> str:
    """The name of the bias that goes with a weight."""
    path, dot, own = weight.rpartition(".")
    return f"{path}{dot}{own.removesuffix('weight')}bias"


def out_of(dim: int) -> int:
    """The dimension of a weight that becomes one of its results, where another one is summed."""
    return 0 if dim else 1


def text_of(rotation: Tensor) -> str:
    """A matrix in double precision as text."""
    return base64.b64encode(rotation.cpu().numpy().astype("<f8").tobytes()).decode()


def matrix_of(data: Any) -> Tensor:
    """What `text_of` was given, or that itself; raises PruneError for what is no square matrix."""
    if isinstance(data, str):
        try:
            entries = np.frombuffer(base64.b64decode(data, validate=True), "<f8").astype(np.float64)
        except ValueError as error:
            raise wrong("a rotation is no matrix") from error
        size = math.isqrt(len(entries))
        data = torch.from_numpy(entries.reshape(size, size)) if size * size == len(entries) else None
    square = isinstance(data, Tensor) and data.dim() == 2 and data.shape[0] == data.shape[1] and data.dtype == torch.float64
    if not square or not bool(data.isfinite().all()):
        raise wrong("a rotation is no square matrix in double precision")
    return data.clone()


def parse_step(data: Any, rotations: int) -> Step:
    """A step from plain data; raises PruneError for what is none."""
    if not isinstance(data, list) or [type(entry) for entry in data[:4]] != [str, str, int, str] or len(data) not in (5, 6):
        raise wrong("a step is none")
    step = Step(*data)
    finite = type(step.number) in (int, float) and math.isfinite(step.number)
    if step.kind not in KINDS or not finite or not 0 <= step.dim < 8 or type(step.start) is not int or step.start < 0:
        raise wrong(f"there is no such step as {str(data)[:80]}")
    if step.kind in ("rotate", "rotate run") and step.number not in range(rotations):
        raise wrong(f"it has no rotation {step.number}")
    return step


def wrong(what: str) -> PruneError:
    return PruneError(f"this is no change of basis: {what}", fix="what fxprune.save or Plan.to_json wrote")
