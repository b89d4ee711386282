"""Where the zeroed original is no reference: what is kept depends on what was removed.

Zeroing leaves the removed channels there: a mean, a norm or a softmax counts them, and a constant such as `sigmoid(0)` may
reach what is kept. To find out, the zeroed model is run once more, and every operator that reads removed entries is tried on
random values. No operator has a rule here. Entries of a result are

- *removed* if they change with the removed entries of the operands and with nothing else: they are as constant as those;
- *mixed* if they change with the removed entries of one operand, those of the others staying what they are, and with kept
  entries too. Then something that is kept depends on what was removed, and the zeroed model says nothing. So are they if they
  change with removed entries of all operands, and what they have of kept ones is only added to that.

An activation of a removed channel that meets weights of zero is not mixed, nor is a product of two removed entries. A sum over
channels mixes, but zeros add nothing to it: `ADDITIVE` names the operators of which that is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.passes.capture.patches import visible
from fxprune.passes.capture.recorder import by_ops
from fxprune.passes.ir.op_trace import arguments_written
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.slices import TensorSlice, mask_of
from fxprune.passes.verification.random_values import differ, far, uniform, wide
from fxprune.passes.verification.zeroed_model import ZeroedOriginal

SUMS = "sum nansum norm linalg_vector_norm".split()
PRODUCTS = "mm bmm addmm baddbmm mv addmv dot linear matmul convolution _convolution _trilinear".split()
ADDITIVE = frozenset(f"aten::{name}" for name in (*SUMS, *PRODUCTS))
# what only moves entries of its floating operand, as it would move notes on them
MOVING = frozenset(f"aten::{name}" for name in "embedding index_select gather".split())


class Mixed(Exception):
    """The zeroed model is no reference; the message completes "it does not apply: ..."."""


def why_zeroed_does_not_apply(zeroed: ZeroedOriginal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What makes the zeroed original no reference on these inputs; empty where it is one."""
    flow = ZeroFlow(zeroed)
    args, kwargs = map_tensors((args, kwargs), torch.clone)
    try:
        with torch.random.fork_rng(devices=[]), visible(), flow:
            zeroed(args, kwargs)
    except Exception as error:
        return flow.reason or f"it raises {type(error).__name__}"
    return flow.reason


class ZeroFlow(TorchDispatchMode):
    """Runs a zeroed model and keeps track of which entries of which tensors are removed.

    What is removed is noted by storage, byte by byte, so that views and in-place operators need no care.

    Attributes:
        reason: the first operator that mixes removed with kept entries; empty if none does.
    """

    supports_higher_order_operators = True

    def __init__(self, zeroed: ZeroedOriginal) -> None:
        super().__init__()
        self.reason = ""
        self.constants: list[Tensor] = []
        self.notes: dict[int, tuple[StorageWeakRef, Tensor]] = {}
        self.unread: dict[int, list[tuple[Tensor, Sequence[TensorSlice]]]] = {}  # of the model's own tensors, by storage
        for tensor, slices in zeroed.cut():
            self.unread.setdefault(tensor.untyped_storage()._cdata, []).append((tensor, slices))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return by_ops(self, func, args, kwargs)
        if self.reason:  # the model caught the exception
            raise Mixed(self.reason)
        tensors = collect((args, kwargs), Tensor)
        masks = [self.removed(t) for t in tensors]
        if all(mask is None for mask in masks):
            out = func(*args, **kwargs)
            if func._schema.name == "aten::lift_fresh":  # a constant of Python's becomes a tensor
                self.constants.append(out)
            return out
        written = written_slots(func, args, kwargs, tensors)
        probe = None if is_view(func) else Probe(func, args, kwargs, tensors, masks, written, self.constants)
        try:
            found = None if probe is None else probe.removed_results()
        except Exception as error:
            self.reason = str(error) if isinstance(error, Mixed) else f"{func._schema.name} fails on other values"
            raise Mixed(self.reason) from error
        out = func(*args, **kwargs)
        if found is not None:
            results = with_written([tensors[i] for i in written], out)
            for result, gone in zip(results, found, strict=True):
                self.note(result, gone)
        return out

    def bytes_of(self, tensor: Tensor, flat: Tensor) -> Tensor:
        """The notes on a tensor's entries, one more dimension for the bytes of an entry."""
        size = tensor.element_size()
        strides = [s * size for s in tensor.stride()]
        return flat.as_strided([*tensor.shape, size], [*strides, 1], tensor.storage_offset() * size)

    def removed(self, tensor: Tensor) -> Tensor | None:
        """Which entries of a tensor are removed; None where none is."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        storage = tensor.untyped_storage()
        for own, slices in self.unread.pop(storage._cdata, ()):
            self.note(own, ~mask_of(slices, own.shape).to(own.device))
        reference, flat = self.notes.get(storage._cdata, (None, None))
        if reference is None or flat is None or reference.expired():
            return None
        mask = self.bytes_of(tensor, flat)[..., 0]
        return mask if bool(mask.any()) else None

    def note(self, tensor: Tensor, gone: Tensor) -> None:
        if tensor.layout is not torch.strided or not tensor.numel():
            return
        storage = tensor.untyped_storage()
        reference, flat = self.notes.get(storage._cdata, (None, None))
        if reference is None or flat is None or reference.expired():
            if not bool(gone.any()):
                return
            self.notes = {key: found for key, found in self.notes.items() if not found[0].expired()}
            flat = torch.zeros(storage.nbytes(), dtype=torch.bool, device=tensor.device)
            self.notes[storage._cdata] = StorageWeakRef(storage), flat
        self.bytes_of(tensor, flat).copy_(gone.unsqueeze(-1))


class Probe:
    """One operator on random values: which entries of its results are removed, and whether it mixes any with what is kept.

    Arguments:
        func, args, kwargs: the call, whose operands are as in the zeroed model.
        tensors: its operands in order; `masks` says which of their entries are removed.
        written: which of them it writes to; their new values are results, and come first.
        constants: tensors whose values are always the same.
    """

    def __init__(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        tensors: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        written: Sequence[int],
        constants: Sequence[Tensor] = (),
    ) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.constants = {id(t) for t in constants}
        self.tensors, self.masks, self.written = tensors, masks, written

    def removed_results(self) -> list[Tensor]:
        """Which entries of each result are removed; raises Mixed."""
        marked = [i for i, mask in enumerate(self.masks) if mask is not None]
        if self.name in MOVING and not self.written and all(self.tensors[i].is_floating_point() for i in marked):
            return self.moved()
        if not all(is_drawn(self.tensors[i], self.masks[i]) for i in marked):
            raise Mixed(f"{self.name} reads indices that are computed from removed entries")
        base = self.drawn(uniform)
        results = self.run(base)
        if not results:
            raise Mixed(f"{self.name} gives Python the value of a removed entry")
        if any(bool((r != r).any()) for r in results):
            raise Mixed(f"{self.name} is not a number on other values")
        others = [self.run(self.drawn(draw)) for draw in (uniform, wide)]
        varies = [differ(r, a) | differ(r, b) for r, a, b in zip(results, *others, strict=True)]
        for i in marked:
            reached = [d & v for d, v in zip(self.depends(base, results, [i]), varies, strict=True)]
            if any(bool(r.any()) for r in reached):
                self.check_additive(i)
                if any(bool((r & ~k).any()) for r, k in zip(reached, self.depends_on_kept(base, results, i), strict=True)):
                    raise Mixed(f"{self.name} adds up removed entries alone, and keeps what it makes of them")
        together = self.depends(base, results, marked)
        self.check_alone(base, results, marked, [d & v for d, v in zip(together, varies, strict=True)])
        found = [d & ~v for d, v in zip(together, varies, strict=True)]
        self.check_absorbed(base, marked, found)
        for at, slot in enumerate(self.written):  # a constant written over a removed entry is gone with it
            mask = self.masks[slot]
            if mask is not None:
                found[at] |= mask & ~varies[at]
        return found

    def check_alone(
        self, base: Sequence[Tensor], results: Sequence[Tensor], marked: Sequence[int], reached: Sequence[Tensor]
    ) -> None:
        """Raises Mixed where something kept is added to products of removed entries alone, as a mask to scores of a head."""
        for i in marked:
            if not any(bool(r.any()) for r in reached):
                return
            reached = [r & ~k for r, k in zip(reached, self.depends_on_kept(base, results, i), strict=True)]
        if any(bool(r.any()) for r in reached):
            raise Mixed(f"{self.name} adds what is kept to removed entries alone")

    def check_absorbed(self, base: Sequence[Tensor], marked: Sequence[int], found: Sequence[Tensor]) -> None:
        """Raises Mixed where a result is constant since a removed entry absorbs kept ones of its operand, as in a product."""
        if self.is_additive or torch.Tag.pointwise in self.func.tags or not any(bool(f.any()) for f in found):
            return
        for i in marked:
            mask = self.masks[i]
            assert mask is not None
            lifted = torch.where(mask, far(base[i], 1), base[i])
            runs = []
            for value in (lifted, torch.where(mask, lifted, uniform(lifted))):
                runs.append(self.run([value if n == i else v for n, v in enumerate(base)]))
            if any(bool((differ(a, b) & f).any()) for a, b, f in zip(*runs, found, strict=True)):
                raise Mixed(f"{self.name} multiplies removed with kept entries of one tensor")

    def moved(self) -> list[Tensor]:
        """The notes on the operand, moved as the operator moves its entries; a table of embeddings is not drawn for them."""
        return self.run([t if mask is None else mask for t, mask in zip(self.tensors, self.masks, strict=True)])

    @property
    def name(self) -> str:
        return str(self.func._schema.name)

    @property
    def is_additive(self) -> bool:
        """Whether zeros add nothing; to a norm of a negative order they do."""
        order = self.args[1] if self.name.endswith("norm") and len(self.args) > 1 else None
        return self.name in ADDITIVE and (order is None or order > 0)

    def check_additive(self, slot: int) -> None:
        mask = self.masks[slot]
        if not self.is_additive or bool(self.tensors[slot][mask].any()):
            shape = tuple(self.tensors[slot].shape)
            raise Mixed(f"{self.name} computes what is kept from removed entries of a tensor of shape {shape}")

    def drawn(self, draw: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Operands whose kept entries are random; indices, and masks that know nothing of channels, stay what they are."""
        return [
            t
            if not is_drawn(t, mask) or id(t) in self.constants
            else draw(t)
            if mask is None
            else torch.where(mask, t, draw(t))
            for t, mask in zip(self.tensors, self.masks, strict=True)
        ]

    def depends(self, base: Sequence[Tensor], results: Sequence[Tensor], slots: Sequence[int]) -> list[Tensor]:
        """Which entries of the results change with the removed entries of some operands."""
        found = [torch.zeros_like(r, dtype=torch.bool) for r in results]
        for sign in (1, -1):
            values = list(base)
            for i in slots:
                mask = self.masks[i]
                values[i] = values[i] if mask is None else torch.where(mask, far(values[i], sign), values[i])
            found = [f | differ(a, b) for f, a, b in zip(found, results, self.run(values), strict=True)]
        return found

    def depends_on_kept(self, base: Sequence[Tensor], results: Sequence[Tensor], slot: int) -> list[Tensor]:
        """Which entries of the results change with the kept entries of an operand."""
        mask = self.masks[slot]
        assert mask is not None
        values = list(base)
        values[slot] = torch.where(mask, values[slot], far(values[slot], 1))
        return [differ(a, b) for a, b in zip(results, self.run(values), strict=True)]

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        own = [v.clone() if i in self.written else v for i, v in enumerate(values)]
        each: Iterator[Tensor] = iter(own)
        args, kwargs = map_tensors((self.args, self.kwargs), lambda _: next(each))
        if torch.Tag.nondeterministic_seeded in self.func.tags:
            torch.manual_seed(0)
        out = self.func(*args, **kwargs)
        return with_written([own[i] for i in self.written], out)


def with_written(written: Sequence[Tensor], out: Any) -> list[Tensor]:
    """The results of a call: the operands that it writes to, and what it returns besides them."""
    return [*written, *(t for t in collect(out, Tensor) if not any(t is w for w in written))]


def is_drawn(tensor: Tensor, mask: Tensor | None) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and mask is not None)


def is_view(func: Any) -> bool:
    """Whether the results of an operator are views of its operands and nothing else."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def written_slots(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> list[int]:
    """Which of the operands an operator writes to, as places in the list of all of them."""
    found = []
    for value in arguments_written(func, args, kwargs):
        found += [n for t in collect(value, Tensor) for n, other in enumerate(tensors) if other is t][:1]
    return found
