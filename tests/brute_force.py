"""What is left of a call once channels are removed, found out by running the call itself: no label, no rule, no masked form.

The judge is given which entries of the tensors go and which entries of the results stay. It runs the call on other values and
on fewer entries. What stays of a result must be

- what it was, if it does not change with what is removed;
- else what it is with zeros for what is removed, or what the call computes of the kept entries alone.

And what goes of a result must not be computed from kept entries alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxprune.passes.ir.slices import TensorSlice, apply_slices, mask_of

TOLERANCE = 1e-8
TRIALS = 3  # with other values for what is removed
KEPT_TRIALS = 2  # likewise for what is kept
LOSS_TRIALS = 100  # until an entry counts as computed from kept entries alone
MOST_GROUPS = 6  # of dimensions, some of which are cut and the others zero
MOST_SIZES = 400  # combinations of sizes that a call on fewer entries is tried with

Values = Mapping[str, Tensor]


class Judge:
    """One call and what is removed of it.

    Arguments:
        compute: the call: from the values of its tensors, by name, to its results.
        alone: the call on fewer entries: from the values, which entries are kept, and what its integers become, to its results.
        integers: those arguments of the call that may be sizes.
        values: the tensors.
        slices: what stays of them, by name.
        outputs: the slices of each result.
    """

    def __init__(
        self,
        compute: Callable[[Values], list[Tensor]],
        alone: Callable[[Values, Values, Sequence[int]], list[Tensor]],
        integers: Sequence[int],
        values: Values,
        slices: Mapping[str, Sequence[TensorSlice]],
        outputs: Sequence[Sequence[TensorSlice]],
    ) -> None:
        self.compute, self.alone, self.integers = compute, alone, integers
        self.values, self.slices, self.outputs = values, slices, outputs
        self.kept = {name: mask_of(slices.get(name, ()), value.shape) for name, value in values.items()}
        self.whole = compute(values)
        self.random = torch.Generator().manual_seed(0)

    def references(self, found: Sequence[Tensor]) -> list[str]:
        """For each result what it was found to equal: `entries`, `zeros` or `alone`; empty where it equals nothing."""
        changes = self.changes()
        named: list[str] = []
        for at, result in enumerate(found):
            if not changes[at]:
                candidates = [("entries", self.stay(self.whole))]
            else:
                zeros = self.zeroed()
                candidates = [
                    ("zeros", zeros and self.stay(zeros)),
                    ("alone", self.attempt(lambda: self.alone(self.values, self.kept, self.integers))),
                ]
            named.append(next((name for name, want in candidates if want is not None and agree(want[at], result)), ""))
            if changes[at] and not named[-1]:
                others = itertools.chain(self.of_other_sizes(), self.in_part())
                named[-1] = "alone" if any(agree(want[at], result) for want in others) else ""
        return named

    def changes(self) -> list[bool]:
        """For each result whether what stays of it changes with what is removed; also where that cannot be tried."""
        found = [False] * len(self.whole)
        before = self.stay(self.whole)
        for after in (self.zeroed(), *(self.moved(removed=True) for _ in range(TRIALS))):
            after = None if after is None else self.stay(after)
            if after is None:
                return [True] * len(found)
            found = [known or not agree(a, b) for known, a, b in zip(found, before, after, strict=True)]
        return found

    def zeroed(self) -> list[Tensor] | None:
        zeros = {name: v.masked_fill(~self.kept[name], 0) if v.is_floating_point() else v for name, v in self.values.items()}
        return self.attempt(lambda: self.compute(zeros))

    def of_other_sizes(self) -> Iterator[list[Tensor]]:
        """The call on kept entries, with any smaller sizes that it takes."""
        sizes = itertools.product(*[range(n, 0, -1) if n > 1 else [n] for n in self.integers])
        for integers in itertools.islice(sizes, 1, MOST_SIZES):
            out = self.attempt(lambda integers=integers: self.alone(self.values, self.kept, integers))
            if out is not None:
                yield out

    def in_part(self) -> Iterator[list[Tensor]]:
        """The call on kept entries along some dimensions, with zeros for what is removed along the others.

        Dimensions of one size that keep the same entries stay together.
        """
        found = {(cut.sizes, tuple(cut.keep.tolist())) for slices in self.slices.values() for cut in slices}
        for count in range(1, min(len(found), MOST_GROUPS)):
            for chosen in itertools.combinations(sorted(found), count):
                kept, values = {}, {}
                for name, value in self.values.items():
                    slices = self.slices.get(name, ())
                    away = [(cut.sizes, tuple(cut.keep.tolist())) in chosen for cut in slices]
                    kept[name] = mask_of([cut for cut, gone in zip(slices, away, strict=True) if gone], value.shape)
                    rest = mask_of([cut for cut, gone in zip(slices, away, strict=True) if not gone], value.shape)
                    values[name] = value.masked_fill(~rest, 0) if value.is_floating_point() else value
                out = self.attempt(lambda values=values, kept=kept: self.alone(values, kept, self.integers))
                if out is not None:
                    yield out

    def lost(self) -> str:
        """Where a result loses what is computed from kept entries alone; empty where none does.

        A tensor whose values change nothing gives the call its shape: then no value tells what goes with it.
        """
        if any(not (mask.numel() and bool(mask.all())) and self.is_inert(name) for name, mask in self.kept.items()):
            return ""
        gone = [[~cut.kept(out.shape).reshape(-1) for cut in cuts] for out, cuts in zip(self.whole, self.outputs, strict=True)]
        wrong = self.lines(gone, KEPT_TRIALS, removed=False) or []  # what goes and depends on what is kept
        for _ in range(LOSS_TRIALS):
            if not any(bool(line.any()) for lines in wrong for line in lines):
                return ""
            seen = self.lines(wrong, 1, removed=True)
            if seen is None:
                return ""
            wrong = [[a & ~b for a, b in zip(lines, now, strict=True)] for lines, now in zip(wrong, seen, strict=True)]
        at = next(i for i, lines in enumerate(wrong) if any(bool(line.any()) for line in lines))
        return f"result {at} loses entries that do not depend on what is removed"

    def is_inert(self, name: str) -> bool:
        """Whether the values of a tensor change no result."""
        outs = [self.moved(removed=None, wide=wide, names=[name]) for wide in (False, True) * KEPT_TRIALS]
        return all(out is None or all(map(agree, self.whole, out)) for out in outs)

    def lines(self, among: list[list[Tensor]], trials: int, *, removed: bool) -> list[list[Tensor]] | None:
        """Which indices into the dimensions of each slice of each result change with what is removed, or with what is kept.

        None where the call takes no other values.
        """
        ran = False
        found = [[torch.zeros_like(line) for line in lines] for lines in among]
        for trial in range(2 * trials):
            out = self.moved(removed=removed, wide=trial % 2 == 1)
            if out is None or [o.shape for o in out] != [o.shape for o in self.whole]:
                continue
            ran = True
            for before, after, cuts, lines in zip(self.whole, out, self.outputs, found, strict=True):
                changed = (before != after) & ~((before != before) & (after != after))
                for line, cut in zip(lines, cuts, strict=True):
                    line |= lines_of(changed, cut)
        return [[a & b for a, b in zip(*pair, strict=True)] for pair in zip(among, found, strict=True)] if ran else None

    # -- other values -----------------------------------------------------------------------------------------------------

    def moved(self, *, removed: bool | None, wide: bool = False, names: Iterable[str] = ()) -> list[Tensor] | None:
        """The call with other values for what is removed, for what is kept, or (None) for all; None where it takes none such.

        They lie in the range of those that a tensor has, so that the call takes them, or far beyond it.
        """
        values = dict(self.values)
        for name in names or values:
            where = torch.ones_like(self.kept[name]) if removed is None else self.kept[name] != removed
            values[name] = torch.where(where, self.drawn(values[name], wide), values[name])
        return self.attempt(lambda: self.compute(values))

    def drawn(self, value: Tensor, wide: bool) -> Tensor:
        if not value.numel():
            return value
        picked = value.reshape(-1)[torch.randint(value.numel(), value.shape, generator=self.random)]
        if not value.is_floating_point():
            return picked
        noise = torch.rand(value.shape, generator=self.random, dtype=torch.float64).to(value.dtype)
        if wide:
            return (noise - 0.5) * 10 * value.abs().max()
        return torch.where(picked == 0, 0.1 * noise, picked * (0.5 + noise))

    def stay(self, outs: Sequence[Tensor]) -> list[Tensor]:
        return [apply_slices(slices, out) for slices, out in zip(self.outputs, outs, strict=True)]

    def attempt(self, run: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        """The results of a call; None where it takes no such values or sizes."""
        try:
            out = run()
        except Exception:
            return None
        return out if len(out) == len(self.whole) else None


def lines_of(mask: Tensor, cut: TensorSlice) -> Tensor:
    """For every index into the dimensions of a slice, flattened, whether a mask is set anywhere there."""
    rest = [d for d in range(mask.dim()) if d not in cut.dims]
    return mask.permute([*cut.dims, *rest]).reshape(len(cut.kept(mask.shape).reshape(-1)), -1).any(1)


def agree(want: Tensor, got: Tensor) -> bool:
    """Whether two results are equal to rounding, relative to the largest entry of either."""
    if want.shape != got.shape or (want.dtype != got.dtype and want.numel()):
        return False
    same = (want == got) | ((want != want) & (got != got))
    if not (want.is_floating_point() or want.is_complex()) or bool(same.all()):
        return bool(same.all())
    sizes = torch.cat([want.abs().reshape(-1), got.abs().reshape(-1)])
    worst = (want - got).abs().masked_fill(same, 0).max()
    return bool(worst <= TOLERANCE * sizes[sizes.isfinite()].max()) if bool(worst.isfinite()) else False


def packed(value: Tensor, kept: Tensor) -> Tensor:
    """The kept entries of a tensor, row by row; raises where rows keep unequally many."""
    if value.dim() == 0:
        return value
    return torch.stack([packed(v, k) for v, k in zip(value, kept, strict=True) if bool(k.any())])
