"""The masked original: the reference for the pruned model.

The original runs under a dispatcher mode that carries labels along at any input size and calls the masked form of each op.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

from fxprune.passes.capture.patches import visible
from fxprune.passes.capture.recorder import Recorder, by_ops, decomposition
from fxprune.passes.capture.rollback import ParameterWrites
from fxprune.passes.coupling.propagation import apply_rule
from fxprune.passes.ir.branches import NOTHING, Removed
from fxprune.passes.ir.constraints import ConstraintBuilder
from fxprune.passes.ir.index_contents import storage_of, version_of
from fxprune.passes.ir.labels import Labels, along, fill_removed, keeps_all, kept_mask
from fxprune.passes.ir.meta_kernels import VIEWS
from fxprune.passes.ir.module_tree import copy_tree, named_tensors, set_mode
from fxprune.passes.ir.op_trace import OpCall, arguments_written
from fxprune.passes.ir.propagation_state import PropagationState
from fxprune.passes.ir.pytree import TensorRef, collect, map_tensors
from fxprune.passes.ir.quiet import random_state, set_random_state
from fxprune.passes.ir.slices import Slicer, TensorSlice
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.registry import find
from fxprune.passes.verification.index_order import draws_numbers, in_index_order
from fxprune.passes.verification.kept_labels import KeptLabels
from fxprune.passes.verification.masked_branches import MaskedBranches


def same_state(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether generators of torch's are in the same state (see `random_state`)."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, Tensor))


FLOATING = frozenset([torch.bfloat16, torch.float16, torch.float32])


@dataclass(frozen=True, slots=True)
class Removal:
    """What is removed of a model.

    Attributes:
        leaves: the labels of its tensors, by name.
        kept: which labels are kept, shape (labels,).
        heads: whether batch dimensions of products are heads, as in coupling; `choices` likewise.
        branches: residual branches, with all that goes with them.
    """

    leaves: Mapping[str, Labels]
    kept: Tensor
    heads: bool | str
    choices: bool = False
    branches: Removed = NOTHING


class MaskedRun(Recorder):
    """Runs the original with removed elements masked.

    Arguments:
        names: the model's tensors by identity.
        removal: what is masked.
        fates: from an earlier run, which labels are kept, those made on the way included.
        devices: numbers of the GPUs that it runs on.
    """

    def __init__(
        self, names: dict[int, str], removal: Removal, fates: Tensor | None = None, devices: Sequence[int] = ()
    ) -> None:
        super().__init__(names)
        self.devices, self.stream = devices, random_state(devices)
        self.leaf_labels = removal.leaves
        self.branches = MaskedBranches([b.parameters for b in removal.branches.branches])
        self.kept_labels, self.given = KeptLabels(removal.kept, fates), len(removal.kept)
        self.labels: dict[int, Labels] = {}
        self.zeroed: set[int] = set()  # the model's tensors, and views of them: zero where they are removed
        self.memory: set[int] = set()  # where the model's tensors lie
        self.dtypes: set[torch.dtype] = set()  # see `MaskedOriginal`
        self.summed: set[int] = set()  # what depends on sums over what is kept: in another order in a pruned model
        self.draws = self.redrawn = False  # whether it draws random numbers, and some in the place of what is removed
        made = ConstraintBuilder(self.given)
        self.state = PropagationState(self.op_trace, self.labels, made, removal.heads, choices=removal.choices)

    @property
    def kept(self) -> Tensor:
        """Which labels are kept, those made on the way included."""
        return self.kept_labels.table

    def add(self, tensor: Tensor, *, from_input: bool, name: str | None = None) -> TensorRef:
        ref = super().add(tensor, from_input=from_input, name=name)
        if name is not None and name in self.leaf_labels:
            self.labels[ref.id] = self.leaf_labels[name]
            if tensor.layout is torch.strided:
                self.zeroed.add(ref.id)
                self.memory.add(storage_of(tensor))
        return ref

    def ref(self, tensor: Tensor) -> TensorRef:
        """The number of a tensor; a constant of the forward's gets labels, which share the fate of what it meets."""
        seen = self.find(tensor) is not None
        ref = super().ref(tensor)
        value = self.op_trace.values[ref.id]
        if not seen and value.name is None and not value.from_input:
            constraints, ndim = self.state.constraints, len(value.shape)
            lines = [along(constraints.fresh(n), d, ndim) for d, n in enumerate(value.shape) if n > 1]
            self.labels[ref.id] = tuple(lines)
            self.kept_labels.grow(constraints.size)  # the masked form of the op asks before the rule has said anything
        return ref

    def kept_of(self, value: Tensor) -> Tensor:
        """What stays of a value that the masked original computed."""
        return Slicer(self.kept).take(self.labels.get(self.ref(value).id, ()), value)

    def removed_from(self, ref: TensorRef) -> bool:
        """Whether anything of a value is removed."""
        return not keeps_all(self.labels.get(ref.id, ()), self.kept.numpy())

    def is_zeroed(self, ref: TensorRef) -> bool:
        """Whether removed elements of a value are known to be zero."""
        if ref.id not in self.zeroed:
            return False
        made_here = [f for f in self.labels.get(ref.id, ()) if int(f.flat.max()) >= self.given]  # which say more of a view
        return keeps_all(made_here, self.kept.numpy())

    def mask(self, ref: TensorRef) -> Tensor | None:
        """A boolean tensor broadcastable to the value, True where kept; None where all of it is."""
        labels = self.labels.get(ref.id)
        if not labels:
            return None
        mask = kept_mask(labels, self.op_trace.shape(ref), self.kept)
        return None if bool(mask.all()) else mask

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return by_ops(self, func, args, kwargs)
        if (parts := decomposition(func)) is not None:
            with self:
                return parts(*args, **kwargs)
        before, start = len(self.op_trace.ops), random_state(self.devices) if draws_numbers(func, args, kwargs) else None
        refs = [self.ref(tensor) for tensor in collect((args, kwargs), Tensor)]
        form, draws = find(func).masked, start is not None
        self.draws |= draws
        if form is not None and not any(map(self.removed_from, refs)):
            form = None
        form = self.branches.sum_without if self.branches.ends(func, refs, self.op_trace) else form
        if form is not None or draws:
            in_args, in_kwargs = map_tensors(args, self.ref), map_tensors(kwargs, self.ref)
            if form is None:
                out = in_index_order(func, args, kwargs)
            else:
                out = form(self, OpView(OpCall(func, in_args, in_kwargs, (), -1), self.op_trace), args, kwargs)
                if func._schema.name.endswith("_"):  # it writes to its first argument
                    out = args[0].copy_(out)
            produced = super().__torch_dispatch__(lambda *a, **k: out, types, args, kwargs)
            self.op_trace.ops[-1] = OpCall(func, in_args, in_kwargs, self.op_trace.ops[-1].outs, -1)
        else:
            produced = super().__torch_dispatch__(func, types, args, kwargs)
        op = self.op_trace.ops[-1]
        self.branches.follow(op, self.op_trace)
        if form is not None or not self.summed.isdisjoint(ref.id for ref in refs):
            self.summed.update(ref.id for ref in op.outputs)
            self.dtypes.update(FLOATING.intersection([self.op_trace.values[ref.id].dtype for ref in op.outputs]))
        apply_rule(RuleContext(op, self.state))
        constraints = self.state.constraints
        self.kept_labels.add(constraints.clear(), constraints.size)
        self.note_zeros(op, args, kwargs)
        if start is not None:
            # what a forward draws after a seed of its own are numbers that it knows: those of what is kept stay what they are
            if same_state(start, self.stream) and any(map(self.removed_from, op.outputs)):
                self.redrawn = True
                set_random_state(start, self.devices)
                self.draw_kept(op, args, kwargs, produced)
            self.stream = random_state(self.devices)
        del self.op_trace.ops[before:]
        return produced

    def draw_kept(self, op: OpCall, args: Any, kwargs: Any, produced: Any) -> None:
        """Put the numbers that a model without what is removed draws where they are kept."""
        whole = {tuple(t.shape): list(self.kept_of(t).shape) for t in collect(produced, Tensor)}
        sized = lambda v: whole.get(tuple(v), v) if isinstance(v, list | torch.Size) else v  # noqa: E731
        given, named = map_tensors((args, kwargs), self.kept_of)
        drawn = in_index_order(op.func, [sized(v) for v in given], {name: sized(v) for name, v in named.items()})
        for ref, out, kept in zip(op.outputs, collect(produced, Tensor), collect(drawn, Tensor), strict=True):
            mask = self.mask(ref)
            out.copy_(kept) if mask is None else out.masked_scatter_(mask.to(out.device).expand(out.shape), kept)

    def note_zeros(self, op: OpCall, args: Any, kwargs: Any) -> None:
        """A view of what is zero where it is removed is so too, by the labels that it took along."""
        if op.func in VIEWS and op.inputs[0].id in self.zeroed:
            self.zeroed.add(op.outs.id)
        for tensor in arguments_written(op.func, args, kwargs):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and storage_of(tensor) in self.memory:
                self.zeroed.clear()


class MaskedOriginal:
    """The model, in evaluation mode, with removed elements masked; the model itself is left as it is.

    Arguments:
        shifts: what is added to tensors of the model before, by name.
    """

    def __init__(self, model: Any, removal: Removal, shifts: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self.model, self.removal, self.shifts = model, removal, shifts
        self.parameters: dict[int, nn.Parameter] = {}  # zero where removed, by the identity of the original's
        self.writes = False  # whether a forward writes to parameters
        self.dtypes: set[torch.dtype] = set()  # narrower than double, of results that depend on sums over what is kept
        self.draws = self.redrawn = False  # as `MaskedRun` has them

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Labels] = (), *, whole: bool = True
    ) -> Any:
        """What it returns.

        Arguments:
            given: the labels of the tensors among its arguments, if they have any.
            whole: with what was removed of it as zeros or whatever else it came to (else without).
        """
        devices = sorted({t.device.index or 0 for _, t in named_tensors(self.model) if t.is_cuda})
        drawn = random_state(devices)
        fates: Tensor | None = None
        repeated = False
        while True:  # a label made on the way may learn its fate only after a statistic has seen it: then it runs once more
            set_random_state(drawn, devices)
            reference = self.copied()
            names = {id(t): n for n, t in named_tensors(reference)}
            masker = MaskedRun(names, self.removal, fates, devices)
            written = ParameterWrites(reference)
            masker.before_write = written.before_write
            a, k = map_tensors((args, kwargs), torch.clone)
            with torch.no_grad(), visible():
                refs = [masker.add(tensor, from_input=True) for tensor in collect((a, k), Tensor)]
                masker.labels.update({r.id: labels for r, labels in zip(refs, given, strict=False)})
                with masker:
                    out = reference(*a, **k)
            self.dtypes |= masker.dtypes
            self.draws, self.redrawn = self.draws or masker.draws, self.redrawn or masker.redrawn
            if written.found or any(version_of(p) for p in self.parameters.values()):
                self.writes = True
                self.parameters.clear()
            if fates is not None and len(masker.kept) != len(fates) and not repeated:
                fates, repeated = None, True  # it remembers what the first run computed, and so creates other labels now
                continue
            if fates is not None or not masker.kept_labels.late:
                return out if whole else map_tensors(out, masker.kept_of)
            fates = masker.kept

    def share(self, zeroed: Mapping[str, Tensor], slices: Mapping[str, Sequence[TensorSlice]]) -> None:
        """Use parameters that were zeroed by slices, where labels come to the same slices, in place of copies."""
        slicer = Slicer(self.removal.kept)
        for name, tensor in named_tensors(self.model):
            cuts, mine = slices.get(name, ()), slicer(self.removal.leaves.get(name, ()), tensor.shape)
            alike = len(cuts) == len(mine) and all(a.dims == b.dims and torch.equal(a.keep, b.keep) for a, b in zip(cuts, mine))
            if alike and isinstance(tensor, nn.Parameter):
                self.parameters[id(tensor)] = nn.Parameter(zeroed[name].data, tensor.requires_grad)

    def copied(self) -> Any:
        """A copy of the model whose removed parameter and buffer elements are zero; copies share their parameters."""
        swap: dict[int, Tensor] = {}
        with torch.no_grad():
            for name, tensor in named_tensors(self.model):
                if not isinstance(tensor, nn.Parameter):
                    swap[id(tensor)] = self.zeroed(name, tensor)
                elif id(tensor) not in self.parameters:
                    made = self.zeroed(name, tensor).data  # which starts to count what is written to it
                    self.parameters[id(tensor)] = nn.Parameter(made, tensor.requires_grad)  # which `matmul` decomposes by
        return set_mode(copy_tree(self.model, swap | self.parameters), False)

    def zeroed(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of one of the model's tensors, zero where it is removed."""
        given = tensor.detach() + self.shifts[name] if name in self.shifts else tensor.detach()
        fractions = given.is_floating_point() or given.is_complex()
        made = fill_removed(given, self.removal.leaves.get(name, ()), self.removal.kept, 0.0) if fractions else given
        return made.clone() if made is given else made


def relative_error(reference: Tensor, result: Tensor) -> float:
    """The largest difference, relative to the largest reference value; infinite where shapes or NaNs differ."""
    if reference.shape != result.shape:
        return math.inf
    if not reference.numel():
        return 0.0
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, result) else math.inf
    a, b = reference.detach(), result.detach()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(a.isnan().all()):
        return math.inf  # nothing was compared
    if bool(same.all()):
        return 0.0
    worst = float((a - b).abs().masked_fill(same, 0).max())
    finite = a.abs()[a.isfinite()]
    scale = float(finite.max()) if finite.numel() else 1.0
    return worst / max(scale, 1e-30) if math.isfinite(worst) else math.inf
