"""The state of a module: every tensor it holds and what a copy must have beside them to go on as it does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import PLAIN, named_tensors, walk

NO_STATE = "the file that fxprune.save wrote, or what state_dict() returned"


@dataclass(frozen=True)
class ModuleState:
    """What is to be known of a module beside its tensors.

    Attributes:
        training: its mode.
        apart: paths of the submodules that are in the other mode.
        flipped: names of the parameters that ask for no gradient, and of other tensors that do.
        aliases: further names of tensors that are held under several, each with the first one.
        orders: for dense tensors that are not contiguous their dimensions in the order of memory (channels_last: 0, 2, 3, 1).
    """

    training: bool
    apart: tuple[str, ...] = ()
    flipped: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    orders: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> ModuleState:
        tensors = dict(named_tensors(module))
        orders = {name: memory_order(t) for name, t in tensors.items()}
        return cls(
            module.training,
            tuple(path for m, path in walk(module).items() if path and m.training != module.training),
            tuple(name for name, t in tensors.items() if t.requires_grad != isinstance(t, nn.Parameter)),
            tuple(sorted(aliases(module).items())),
            tuple((name, order) for name, order in orders.items() if order != tuple(range(len(order)))),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Any) -> ModuleState:
        """The state from `to_dict`; raises PruneError for anything else."""
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or sorted(data) != sorted(names) or type(data["training"]) is not bool:
            raise PruneError("this is no state of a module", fix=NO_STATE)
        for name in ("apart", "flipped"):
            if not is_list(data[name]) or not all(isinstance(text, str) for text in data[name]):
                raise PruneError(f"this is no state of a module: {name} must be a list of names", fix=NO_STATE)
        for name in ("aliases", "orders"):
            if not is_list(data[name]) or not all(is_list(p) and len(p) == 2 and isinstance(p[0], str) for p in data[name]):
                raise PruneError(f"this is no state of a module: {name} must be pairs by name", fix=NO_STATE)
        if not all(isinstance(first, str) for _, first in data["aliases"]):
            raise PruneError("this is no state of a module: aliases must be pairs of names", fix=NO_STATE)
        for name, order in data["orders"]:
            if not is_list(order) or any(type(d) is not int for d in order) or sorted(order) != list(range(len(order))):
                raise PruneError(f"this is no state of a module: {name} has no such order of dimensions", fix=NO_STATE)
        return cls(
            data["training"],
            tuple(data["apart"]),
            tuple(data["flipped"]),
            tuple((name, first) for name, first in data["aliases"]),
            tuple((name, tuple(order)) for name, order in data["orders"]),
        )

    def renamed(self, names: Mapping[str, str]) -> ModuleState:
        """The same where some tensors have other names."""
        flipped = tuple(names.get(name, name) for name in self.flipped)
        return replace(self, flipped=flipped, orders=tuple((names.get(name, name), order) for name, order in self.orders))

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor], free: Collection[str] = ()) -> None:
        """Give a module the values of these tensors, and the modes and all else of this state.

        Arguments:
            module: of the form of the module whose state this is.
            tensors: its values by name; they are copied.
            free: names that the module may have and the tensors not, or the other way round.

        Raises: PruneError where the module has another form; nothing has changed then.
        """
        held = dict(named_tensors(module))
        self.check(module, held, tensors, free)
        orders = dict(self.orders)
        with torch.no_grad():
            for name in [name for name in held if name in tensors]:
                source, target = tensors[name], held[name]
                order = orders.get(name, tuple(range(source.dim())))
                if not target.is_meta and memory_order(target) == order:
                    target.copy_(source)  # no more memory than there is
                    continue
                made = torch.empty([source.shape[d] for d in order], dtype=source.dtype, device=target.device)
                made = made.permute([order.index(d) for d in range(source.dim())])
                target.data = made.copy_(source)
        flipped = set(self.flipped)
        for name, tensor in held.items():
            if name in tensors and tensor.is_leaf:
                tensor.requires_grad_((name in flipped) != isinstance(tensor, nn.Parameter))
        module.train(self.training)
        apart = set(self.apart)
        for inner, path in walk(module).items():
            inner.training = self.training != (path in apart)

    def check(
        self, module: nn.Module, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor], free: Collection[str]
    ) -> None:
        """Raise PruneError where a module has other tensors than this state; arguments as for `fill`."""
        for name, tensor in tensors.items():
            mine = held.get(name)
            if mine is None:
                if name not in free:
                    raise differs(module, f"{name} is stored, and the model has no such tensor")
            elif mine.shape != tensor.shape:
                raise differs(module, f"{name} is stored with shape {tuple(tensor.shape)}, not {tuple(mine.shape)}")
            elif mine.dtype != tensor.dtype:
                raise differs(module, f"{name} is stored as {tensor.dtype}, not {mine.dtype}")
        missing = next((name for name, t in held.items() if name not in tensors and (name not in free or t.is_meta)), None)
        if missing is not None:
            raise differs(module, f"nothing is stored for {missing}")
        ties, stored = aliases(module), dict(self.aliases)
        for name in sorted(ties.keys() ^ stored.keys()) if not free else ():
            one, first = ("the model", ties[name]) if name in ties else ("what is stored", stored[name])
            raise differs(module, f"{name} and {first} are one tensor in {one} alone")
        wrong = next((n for n, order in self.orders if n in tensors and len(order) != tensors[n].dim()), None)
        if wrong is not None:
            raise differs(module, f"{wrong} has {tensors[wrong].dim()} dimensions, and another number of them in memory")


def differs(module: nn.Module, what: str) -> PruneError:
    return PruneError(
        f"what is stored is of another model: {what}",
        where=type(module).__name__,
        fix="the architecture that it was saved from",
    )


def take_modes(module: nn.Module, model: nn.Module) -> None:
    """Bring each module of a tree into the mode of that of `model` at its path, and those that `model` lacks into its own."""
    modes = {path: m.training for m, path in walk(model).items()}
    for inner, path in walk(module).items():
        vars(inner)["training"] = modes.get(path, model.training)


def is_list(data: Any) -> bool:
    return isinstance(data, list | tuple)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a dense tensor from the one with the largest stride on; in their own order where it is not dense."""
    own = tuple(range(tensor.dim()))
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return own
    strides = tensor.stride()
    order = tuple(sorted(own, key=lambda d: (-strides[d], d)))
    return order if tensor.permute(order).is_contiguous() else own


def aliases(module: nn.Module) -> dict[str, str]:
    """Every further name of a tensor that modules of a tree hold under several names, with the first of them."""
    first: dict[int, str] = {id(t): name for name, t in named_tensors(module)}
    found: dict[str, str] = {}
    for inner, path in walk(module).items():
        start = f"{path}." if path else ""
        plain = {} if PLAIN.issuperset(map(type, vars(inner).values())) else vars(inner)
        for held in (inner._parameters, inner._buffers, plain):
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and first.get(id(tensor), start + name) != start + name:
                    found[start + name] = first[id(tensor)]
    return found
