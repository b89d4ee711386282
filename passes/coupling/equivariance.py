"""Whether ops commute with a rotation of a family: they are run on random values, and on the same values rotated.

No op has a rule here. An op that is equivariant gives, of operands with a dimension rotated, its result with that dimension
rotated: linear maps along it (with their weights rotated too), sums, products with what does not vary along it, norms over
all of it, and whatever moves other dimensions. The rotation is a random reflection. What holds for a random one in double
precision holds for all of them, and every rotation is a product of reflections. Where a family consists of rows, as a head's
dimensions are one of attention, each row is rotated for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.passes.ir.op_trace import OpCall, OpTrace, written_by
from fxprune.passes.ir.pytree import TensorRef, collect, map_tensors

Runs = tuple[tuple[int, int], ...]
CLOSE = 1e-6
LARGE = 1 << 22  # elements, above which a value varies along the family's dimensions only


@dataclass(frozen=True, slots=True)
class Carrier:
    """Where a value carries a family.

    Attributes:
        dims: the dimensions that the family varies along, from major to minor.
        runs: in these, flattened, where a row of the family starts, and which one; a row may be there several times.
    """

    dims: tuple[int, ...]
    runs: Runs

    def change(self, x: Tensor, made: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A value in which each run has become a function of it and of what `made`, shape (rows, row), has for its row."""
        last = tuple(range(-len(self.dims), 0))
        moved = x.movedim(self.dims, last)
        flat = moved.flatten(last[0])
        if flat.shape[-1] == made.shape[1]:  # the row and nothing else
            flat = of(flat, made[self.runs[0][1]])
        else:
            flat = flat.clone()
            places = torch.tensor([start for start, _ in self.runs])[:, None] + torch.arange(made.shape[1])
            flat[..., places] = of(flat[..., places], made[[row for _, row in self.runs]])
        return flat.reshape(moved.shape).movedim(last, self.dims).contiguous()


Dims = Mapping[int, tuple[Carrier, ...]]  # by value: where it carries the family


class Trial:
    """Some calls of a trace, in order, as one function of what they read from outside.

    Arguments:
        ops: the calls.
        op_trace: the trace they belong to.
        dims: where values carry the family.
        shape: of the family: how many rows, and how many channels each has.
        used: values that are read outside of these calls.
    """

    def __init__(self, ops: Sequence[OpCall], op_trace: OpTrace, dims: Dims, shape: tuple[int, int], used: set[int]) -> None:
        self.ops, self.op_trace, self.dims, self.shape = ops, op_trace, dims, shape
        made = {r.id for op in ops for r in op.outputs}
        written = {r.id for op in ops for r in op.outputs if r in op.inputs}
        self.given = list(dict.fromkeys(r.id for op in ops for r in op.inputs if r.id not in made or r.id in written))
        self.results = [i for i in dict.fromkeys(r.id for op in ops for r in op.outputs) if i in used]
        self.random = torch.Generator().manual_seed(0)

    def rotates(self, fixed: Mapping[int, float] | None = None, *, fixing_ones: bool = False) -> bool:
        """Whether a rotation of all operands along the family rotates the results, and changes nothing else of them.

        Arguments:
            fixed: operands that are set to a number everywhere instead, and not rotated.
            fixing_ones: only try rotations that leave the vector of ones where it is, as centring does.
        """
        axis = torch.randn(self.shape, generator=self.random, dtype=torch.float64)
        axis = axis - axis.mean(1, keepdim=True) if fixing_ones else axis
        axis /= axis.norm(dim=1, keepdim=True)

        def reflect(i: int, x: Tensor) -> Tensor:
            for carrier in self.dims[i]:
                x = carrier.change(x, axis, lambda run, v: run - 2 * v * (v * run).sum(-1, keepdim=True))
            return x

        return self.agrees(reflect, fixed or {})

    def scales(self, inverse: Mapping[int, bool]) -> bool:
        """Whether a scale for each channel passes; `inverse` says of each value whether it is multiplied by one over it."""
        factor = torch.rand(self.shape, generator=self.random, dtype=torch.float64) + 0.5

        def scale(i: int, x: Tensor) -> Tensor:
            for carrier in self.dims[i]:
                x = carrier.change(x, 1 / factor if inverse.get(i, False) else factor, torch.mul)
            return x

        return self.agrees(scale, {})

    def ignores(self) -> bool:
        """Whether results are the same without the family."""

        def clear(i: int, x: Tensor) -> Tensor:
            for carrier in self.dims[i]:
                x = carrier.change(x, torch.zeros(self.shape, dtype=torch.float64), torch.mul)
            return x

        return self.agrees(clear, {})

    def agrees(self, change: Callable[[int, Tensor], Tensor], fixed: Mapping[int, float]) -> bool:
        try:
            values = {i: torch.full_like(x, fixed[i]) if i in fixed else x for i, x in self.draw().items()}
            changed = {i: change(i, x) if i in self.dims and i not in fixed else x for i, x in values.items()}
            before, after = self.run(values), self.run(changed)
        except Exception:  # on such values the op does not run
            return False
        for i in self.results:
            wanted = change(i, before[i]) if i in self.dims else before[i]
            if not (wanted.is_floating_point() or wanted.is_complex()):
                same = torch.equal(wanted, after[i])
            else:
                size = float(wanted.abs().max()) if wanted.numel() else 0.0
                same = bool(((wanted - after[i]).abs() <= CLOSE * size).all())  # False for what is not a number
            if not same:
                return False
        return True

    def draw(self) -> dict[int, Tensor]:
        found = {}
        for i in self.given:
            info = self.op_trace.values[i]
            shape, dims = info.shape, {d for carrier in self.dims.get(i, ()) for d in carrier.dims}
            if info.dtype.is_floating_point or info.dtype.is_complex:
                wide = torch.Size(shape).numel() > LARGE
                drawn = [n if d in dims or not wide else 1 for d, n in enumerate(shape)]
                found[i] = torch.randn(drawn, generator=self.random, dtype=plain(info.dtype)).expand(shape)
            elif info.data is not None:
                found[i] = info.data.cpu()
            elif info.dtype == torch.bool:
                found[i] = torch.ones(shape, dtype=torch.bool)
            else:
                found[i] = torch.zeros(shape, dtype=info.dtype)
        return found

    def run(self, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        values = dict(given)
        for op in self.ops:
            random = torch.get_rng_state()
            writes = bool(written_by(op.func))

            def value(ref: TensorRef, writes: bool = writes) -> Tensor:
                return values[ref.id].clone() if writes else values[ref.id]

            args, kwargs = map_tensors((op.args, op.kwargs), value, TensorRef)
            args, kwargs = plain((args, kwargs))
            out = op.func(*args, **kwargs)
            if not torch.equal(random, torch.get_rng_state()):  # unlike dropout with probability 0, in attention
                torch.set_rng_state(random)
                raise ValueError("it draws numbers")
            values.update(zip((r.id for r in op.outputs), collect(out, Tensor), strict=True))
        return values


def plain(argument: Any) -> Any:
    """Arguments of a call with double precision for other precisions, and the CPU for other devices."""
    if isinstance(argument, torch.dtype):
        return torch.complex128 if argument.is_complex else torch.float64 if argument.is_floating_point else argument
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    if isinstance(argument, dict):
        return {key: plain(value) for key, value in argument.items()}
    if isinstance(argument, list | tuple) and type(argument) in (list, tuple):
        return type(argument)(plain(value) for value in argument)
    return argument
