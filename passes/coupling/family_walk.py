"""What the calls of a program do to a family: which commute with rotations, and which scale its channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from fxprune.passes.coupling.equivariance import Carrier, Runs, Trial
from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.leaf_labels import is_constant
from fxprune.passes.coupling.linear_family import Key, NotLinear, Scale, Spaces
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.ir.labels import Factor, factor
from fxprune.passes.ir.op_trace import name_of, writes
from fxprune.passes.ir.program import CapturedProgram
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.ops.call import OpView
from fxprune.passes.ops.registry import spec_of

LONGEST = 6  # calls that are tried as one function
MOVES = frozenset("view _unsafe_view reshape unsqueeze squeeze expand alias detach clone _to_copy contiguous".split())


class TracedUses:
    """The evaluation program of a coupling, and what was tried of it.

    Arguments:
        solution: the coupling.
        aliases: for each of the model's own tensors that may be rotated, all of its names.
        norms: paths of the modules whose centring can be taken away.
    """

    def __init__(self, solution: Solution, aliases: Mapping[str, Sequence[str]], norms: frozenset[str]) -> None:
        self.solution, self.aliases, self.norms = solution, aliases, norms
        self.capture: CapturedProgram = solution.captures[0]
        self.trace, self.labels = self.capture.op_trace, solution.values[0]
        self.unit = solution.unit_of.numpy()
        self.tried: dict[object, bool] = {}
        self.readers: dict[int, list[int]] = {}
        for number, op in enumerate(self.trace.ops):
            for ref in op.inputs:
                self.readers.setdefault(ref.id, []).append(number)
        self.returned = {ref.id for _, ref in self.capture.outputs}

    def place(self, number: int) -> str:
        op = self.trace.ops[number]
        node = self.capture.node_at(op.node)
        inside = f" in {node.target}" if node is not None and node.op == "call_module" else f" at %{node}"
        return f"{name_of(op.func).removeprefix('aten::')}{inside}"


class FamilyWalk:
    """One family on its way through the program."""

    def __init__(self, program: TracedUses, family: Family) -> None:
        self.program, self.family = program, family
        self.trace = program.trace
        self.size = len(family.units)
        self.rows = np.zeros((0, 0), np.int64)  # the units of each row, in their order
        self.whole = True  # whether the family is one row, and there is nothing else in any of its dimensions
        self.dims = self.carriers()
        self.spaces, self.scales = Spaces(), list[Scale]()
        self.gains: set[Key] = set()
        self.exits: list[tuple[Key, str, bool]] = []
        self.norms = False  # whether any call is not linear along the family

    def carriers(self) -> dict[int, tuple[Carrier, ...]]:
        """Where values carry the family: all of it, or whole rows of it, in one order."""
        mine = np.zeros(len(self.program.unit), bool)
        mine[self.family.units] = True
        held: list[tuple[int, tuple[int, ...], np.ndarray]] = []
        for i, labels in self.program.labels.items():
            for f in labels:
                if mine[f.lookup(self.program.unit)].any():
                    dims, units = self.units_of(f)
                    held.append((i, dims, np.where(mine[units], units, -1)))
        self.rows = self.find_rows(held)
        row_of = np.full(len(mine), -1)
        row_of[self.rows] = np.arange(len(self.rows))[:, None]
        found: dict[int, tuple[Carrier, ...]] = {}
        for i, dims, units in held:
            carrier = Carrier(dims, self.runs(units.reshape(-1), row_of))
            self.whole &= units.shape == (1, self.size) and len(self.rows) == 1
            found[i] = (*found.get(i, ()), carrier)
        return found

    def units_of(self, f: Factor) -> tuple[tuple[int, ...], np.ndarray]:
        """The dimensions that the units of a factor vary along, and these units, a row for each index of the major ones."""
        if len(f.major_to_minor) > 1:  # labels may differ where units do not
            f = factor(torch.from_numpy(self.program.unit)[f.labels], f.major_to_minor)
            return f.major_to_minor, f.rows().numpy()
        return f.major_to_minor, f.lookup(self.program.unit)[None]

    def find_rows(self, held: Sequence[tuple[int, tuple[int, ...], np.ndarray]]) -> np.ndarray:
        """The rows that the family is taken apart into, each with its units in order: no value takes one of them apart."""
        row: dict[int, tuple[int, ...]] = dict.fromkeys(self.family.units.tolist(), ())
        order: dict[int, None] = {}
        for number, units in enumerate({(u.shape, u.tobytes()): u for _, _, u in held}.values()):
            for some in np.unique(units, axis=0) if len(units) > 1 else units:
                mine = dict.fromkeys(some[some >= 0].tolist())
                order |= mine
                for u in mine if len(mine) < self.size else ():
                    row[u] = (*row[u], number, next(iter(mine)))
        rows: dict[tuple[int, ...], list[int]] = {}
        for u in order:
            rows.setdefault(row[u], []).append(u)
        if len({len(some) for some in rows.values()}) != 1 or min(map(len, rows.values())) < 2:
            raise NotLinear("is taken apart into rows that differ in size, or have one channel each")
        return np.array(list(rows.values()))

    def runs(self, units: np.ndarray, row_of: np.ndarray) -> Runs:
        """Where rows of the family are among some units."""
        places = np.flatnonzero(units >= 0)
        length = self.rows.shape[1]
        starts = places[::length]
        wanted = self.rows[row_of[units[starts]]].reshape(-1)
        run = (starts[:, None] + np.arange(length)).reshape(-1)
        if not np.array_equal(run, places) or not np.array_equal(units[places], wanted):
            raise NotLinear("is split up, or in another order in one place than in another")
        return tuple((int(start), int(row_of[units[start]])) for start in starts)

    # -- what each call does ----------------------------------------------------------------------------------------------

    def follow_all(self) -> None:
        """Note what every call does that touches the family; raises NotLinear."""
        self.check_places()
        done: set[int] = set()
        for number, op in enumerate(self.trace.ops):
            if number not in done and any(r.id in self.dims for r in (*op.inputs, *op.outputs)):
                done |= self.follow(number)
        if self.whole:
            return
        if met := [where for _, where, by_weight in self.exits if not by_weight]:
            raise NotLinear(f"is read by {met[0]}, and of channels in rows or beside others only layers may do that")
        if self.norms or self.scales:
            raise NotLinear("is normalised or scaled, and has rows, or others beside it: there only linear maps may be")

    def check_places(self) -> None:
        program, capture = self.program, self.program.capture
        for i in self.dims:
            info = self.trace.values[i]
            if info.name is None and self.trace.maker(i) is None:
                raise NotLinear("meets a tensor of unknown origin")
            if info.name is not None and (is_constant(info.name) or info.name not in program.aliases):
                raise NotLinear(f"meets the constant {info.name}")
            if i in program.returned:
                raise NotLinear("is an output of the model")
        for node in capture.untracked:
            refs = collect([capture.results[n] for n in (*node.all_input_nodes, node)], TensorRef)
            if any(r.id in self.dims for r in refs):
                raise NotLinear(f"goes through %{node}, which is not made of known ops")

    def key(self, ref: TensorRef, number: int) -> Key:
        return ref.id, number if self.trace.values[ref.id].name is not None else -1

    def follow(self, number: int) -> set[int]:
        """Note what a call does, or one that goes on in later calls; returns the numbers of all of them."""
        op = self.trace.ops[number]
        if any(self.trace.values[r.id].name is not None for r in writes(op)):
            raise NotLinear(f"is written to a tensor of the model by {self.program.place(number)}")
        if self.rotates([number]):
            self.note([number])
            return {number}
        scale = self.scale_of(number)
        if scale is not None:
            self.scales.append(scale)
            return {number}
        group = [number]
        while len(group) < LONGEST:
            made = {r.id for n in group for r in self.trace.ops[n].outputs}
            later = sorted({n for i in made for n in self.program.readers.get(i, ()) if n not in group})
            if not later or len(group) + len(later) > LONGEST:
                break
            group = sorted([*group, *later])
            if self.rotates(group):
                self.note(group)
                return set(group)
        raise NotLinear(f"goes through {self.program.place(number)}, which does not commute with rotations")

    def trial(self, numbers: Sequence[int]) -> Trial:
        ops = [self.trace.ops[n] for n in numbers]
        used = {r.id for op in ops for r in op.outputs if self.used(r.id, numbers)}
        return Trial(ops, self.trace, self.dims, (len(self.rows), self.rows.shape[1]), used)

    def used(self, value: int, numbers: Sequence[int]) -> bool:
        readers = self.program.readers.get(value, ())
        return value in self.program.returned or any(n not in numbers for n in readers)

    def rotates(self, numbers: Sequence[int]) -> bool:
        """Whether calls commute with rotations; those that do the same are tried once."""
        return self.once(("rotates", self.form(numbers)), lambda: self.trial(numbers).rotates())

    def once(self, form: object, trial: Callable[[], bool]) -> bool:
        tried = self.program.tried
        if form not in tried:
            tried[form] = trial()
        return tried[form]

    def form(self, numbers: Sequence[int]) -> object:
        """What some calls do, and where the family is in it, for comparison."""
        local: dict[int, int] = {}
        parts: list[object] = [self.rows.shape]
        for n in numbers:
            op = self.trace.ops[n]
            parts.append((str(op.func), repr([self.mapped(a, local) for a in (*op.args, *sorted(op.kwargs.items()))])))
            parts.append(repr([self.value_form(r, local) for r in (*op.inputs, *op.outputs)]))
            parts.append(tuple(self.used(r.id, numbers) for r in op.outputs))
        return tuple(parts)

    def mapped(self, argument: object, local: dict[int, int]) -> str:
        found = [local.setdefault(r.id, len(local)) for r in collect(argument, TensorRef)]
        return f"{found}" if found else repr(argument)

    def value_form(self, ref: TensorRef, local: dict[int, int]) -> object:
        info = self.trace.values[ref.id]
        data = None if info.data is None else info.data.tolist()
        return local.setdefault(ref.id, len(local)), info.shape, str(info.dtype), self.dims.get(ref.id, ()), data

    def note(self, numbers: Sequence[int]) -> None:
        """Put the values together that calls rotate together, with their signs."""
        trial = self.trial(numbers)
        at = {r.id: self.key(r, n) for n in numbers for r in self.trace.ops[n].inputs if r.id in self.dims}
        inputs = [at[i] for i in trial.given if i in self.dims]
        outputs = [(i, -1) for i in trial.results if i in self.dims]
        where = self.program.place(numbers[0])
        if not outputs and self.once(("ignores", self.form(numbers)), trial.ignores):  # it takes out what is beside the family
            return
        first, *rest = [*inputs, *outputs]
        inverse = {} if outputs else {key[0]: True for key in rest}
        linear = bool(outputs) or len(inputs) == 2
        linear = linear and self.once(("scales", self.form(numbers)), lambda: trial.scales(inverse))
        for key in rest:
            linear = self.spaces.join(first, key, -1 if inverse else 1) and linear
        self.norms |= not linear
        by_weight = sum(self.trace.values[key[0]].from_input for key in inputs) == 1
        if not outputs or not linear:
            self.exits.append((first, where, linear and by_weight))

    def scale_of(self, number: int) -> Scale | None:
        """The scale that a call multiplies its channels by, if that is all it does beside what commutes with rotations."""
        op = self.trace.ops[number]
        view = OpView(op, self.trace)
        values = self.trace.values
        live = [r for r in op.inputs if r.id in self.dims and values[r.id].from_input]
        own = [r for r in op.inputs if r.id in self.dims and not values[r.id].from_input]
        result = op.outputs[0]
        if len(live) != 1 or result.id not in self.dims or self.dims[live[0].id] != self.dims[result.id]:
            return None
        tensors: dict[str, str] = {}
        normalizes = spec_of(op).normalizes
        for ref in own:
            name = self.plain_name(ref)
            role = next((n for n, v in view.named.items() if v is ref), "") if normalizes else "weight"
            if name is None or not role or role in tensors:
                return None
            tensors[role] = name
        source, made = self.key(live[0], number), self.key(result, number)
        if "running_mean" in tensors:
            if not tensors.keys() >= {"running_var", "weight", "bias"} or view.get("training", False):
                return None
            return self.kept(Scale(source, made, number, "batch norm", tensors, eps=float(view["eps"])), own)
        fixed = {r.id: 0.0 if normalizes and view.get("bias") is r else 1.0 for r in own}
        if own and self.trial([number]).rotates(fixed):
            return self.kept(Scale(source, made, number, "norm" if normalizes else "product", tensors), own)
        if normalizes and self.trial([number]).rotates(fixed, fixing_ones=True):
            module = self.module_of(number, tensors)
            if module in self.program.norms:
                return self.kept(Scale(source, made, number, "centred norm", tensors, module), own)
        return None

    def kept(self, scale: Scale, own: Sequence[TensorRef]) -> Scale:
        self.gains |= {(r.id, scale.number if self.trace.values[r.id].name is not None else -1) for r in own}
        return scale

    def plain_name(self, ref: TensorRef) -> str | None:
        """The name of the model's tensor that a value is, perhaps in another shape; it holds the family and nothing else."""
        at = ref
        while self.trace.values[at.id].name is None:
            maker = self.trace.maker(at.id)
            if maker is None or name_of(maker.func).removeprefix("aten::") not in MOVES:
                return None
            at = maker.inputs[0]
        info = self.trace.values[at.id]
        name = info.name
        return name if name in self.program.aliases and np.prod(info.shape) == self.size else None

    def module_of(self, number: int, tensors: Mapping[str, str]) -> str:
        owners = {name.rpartition(".")[0] for name in tensors.values()}
        node = self.program.capture.node_at(self.trace.ops[number].node)
        if len(owners) == 1:
            return owners.pop()
        return str(node.target) if not owners and node is not None and node.op == "call_module" else ""
