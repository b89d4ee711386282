"""The plan: which indices stay in every parameter and buffer, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import NotARectangle, PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.options import CouplingOptions
from fxprune.passes.ir.program import Waiver
from fxprune.passes.ir.slices import TensorSlice, cut_shape
from fxprune.passes.rewrite.rewrite import tensor_cuts

FORMAT = "fxprune.plan/1"


@dataclass(frozen=True, eq=False)
class Plan:
    """Which indices of every tensor stay.

    Attributes:
        shapes: the original shape of every tensor of the model, by name.
        keep: for each tensor that shrinks, its cuts: dimensions, kept indices (flattened over those), sizes.
        attention: the granularity it was made with, `heads` or `dims`.
        freeze: names of tensors that were kept by request.
        inputs: what the example inputs looked like, so that the plan can be applied without them.
        release: globs over names of outputs that were allowed to shrink.
        waiver: guards of the pruned program that were tried at another batch than that of `inputs`, where they do not hold.
    """

    shapes: dict[str, tuple[int, ...]]
    keep: dict[str, list[TensorSlice]]
    attention: str = "heads"
    freeze: tuple[str, ...] = ()
    inputs: Any = field(default=None)
    release: tuple[str, ...] = ()
    waiver: Waiver | None = None

    def __repr__(self) -> str:
        elements = sum(math.prod(shape) for shape in self.shapes.values())
        sizes = {name: math.prod(self.kept_shape(name)) for name in self.keep}
        left = elements - sum(math.prod(self.shapes[name]) - n for name, n in sizes.items())
        cut = f"{len(self.keep)} of {len(self.shapes)} tensors"
        return f"Plan({cut} cut, {left:,} of {elements:,} elements left)"

    def __str__(self) -> str:
        lines = [f"  {name}: {self.shapes[name]} -> {self.kept_shape(name)}" for name in self.keep]
        return "\n".join([repr(self), *lines])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def coupling_options(self) -> CouplingOptions:
        """What it was asked of a coupling to make the plan."""
        return CouplingOptions(self.attention == "heads", dict.fromkeys(self.freeze, "is frozen by request"), self.release)

    def kept_shape(self, name: str) -> tuple[int, ...]:
        """What is left of a tensor's shape."""
        return cut_shape(self.shapes[name], self.keep.get(name, ()))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        cuts = {
            name: [{"dims": list(c.dims), "keep": c.keep.tolist(), "sizes": list(c.sizes)} for c in made]
            for name, made in self.keep.items()
        }
        return {
            "format": FORMAT,
            "attention": self.attention,
            "freeze": list(self.freeze),
            "release": list(self.release),
            "inputs": self.inputs,
            "waiver": None if self.waiver is None else asdict(self.waiver),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "keep": cuts,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """A plan from `to_dict`; raises PruneError for anything else."""
        if data.get("format") != FORMAT:
            what = f"this is no plan: its format is {data.get('format')!r}"
            raise PruneError(what, fix=f"a file of format {FORMAT}")
        try:
            shapes = {name: tuple(int(n) for n in shape) for name, shape in data["shapes"].items()}
            keep = {name: [cut_from(c, shapes[name]) for c in made] for name, made in data["keep"].items()}
            release = tuple(data.get("release", ()))  # older plans have none
            waived = data.get("waiver")
            waiver = Waiver(waived["input"], int(waived["size"]), tuple(waived["guards"])) if waived else None
            return cls(shapes, keep, data["attention"], tuple(data["freeze"]), data["inputs"], release, waiver)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise PruneError(f"this is no plan: {why}", fix="what Plan.to_dict() returned") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from `to_json`; raises PruneError for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PruneError(f"this is no plan: {error}", fix="the text that Plan.to_json() returned") from error
        if not isinstance(data, dict):
            raise PruneError("this is no plan: not a JSON object", fix="the text that Plan.to_json() returned")
        return cls.from_dict(data)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """For every parameter and buffer a boolean tensor of its shape, True where it is kept."""
        self.check(model)
        result = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            mask = torch.ones(tensor.shape, dtype=torch.bool)
            for cut in self.keep.get(self.alias(model, name), ()):
                part = torch.zeros([tensor.shape[d] for d in cut.dims], dtype=torch.bool)
                part.view(-1)[cut.keep] = True
                order = sorted(range(len(cut.dims)), key=lambda i: cut.dims[i])
                shape = [tensor.shape[d] if d in cut.dims else 1 for d in range(tensor.dim())]
                mask &= part.permute(order).reshape(shape)
            result[name] = mask
        return result

    def alias(self, model: nn.Module, name: str) -> str:
        """The name under which a (tied) tensor stands in the plan."""
        if name in self.shapes:
            return name
        from fxprune.passes.ir.module_tree import fetch

        tensor = fetch(model, name)
        return next((n for n, t in named_tensors(model) if t is tensor), name)

    def check(self, model: Any) -> None:
        """Raise PruneError unless the model's tensors have the names and shapes the plan was made for."""
        if not isinstance(model, nn.Module):
            what = f"model is of type {type(model).__name__}, not a torch.nn.Module"
            raise PruneError(what, fix="pass the module itself")
        have = {name: tuple(t.shape) for name, t in named_tensors(model)}
        for name, shape in self.shapes.items():
            if name not in have:
                raise PruneError(
                    f"the plan is for another model: this one has no {name}",
                    fix="apply it to the original architecture",
                )
            if have[name] != shape:
                raise PruneError(
                    f"the plan is for another model: {name} has shape {have[name]}, not {shape}",
                    fix="apply it to the original, unpruned architecture",
                )
        extra = sorted(set(have) - set(self.shapes))
        if extra:
            raise PruneError(
                f"the plan is for another model: it knows nothing of {extra[0]}",
                fix="apply it to the original architecture",
            )

    def apply(self, model: nn.Module, example_inputs: Any = None) -> torch.fx.GraphModule:
        """Prune a fresh copy of the architecture by this plan, with the values the copy holds.

        Arguments:
            model: a model whose tensors have the names and shapes the plan was made for; it is not touched.
            example_inputs: as for `prune`; by default random ones like those the plan was made with.

        Raises: PruneError if the plan does not fit the model.
        """
        from fxprune.pipeline import apply_plan

        return apply_plan(self, model, example_inputs)


def cut_from(data: Mapping[str, Any], shape: tuple[int, ...]) -> TensorSlice:
    """A cut of a tensor of a given shape; raises ValueError where its numbers make no sense for that."""
    dims, sizes = tuple(data["dims"]), tuple(data["sizes"])
    keep = torch.tensor(data["keep"], dtype=torch.int64)
    if not all(isinstance(d, int) and 0 <= d < len(shape) for d in dims):
        raise ValueError(f"a tensor of shape {shape} has no dimensions {dims}")
    whole = math.prod(shape[d] for d in dims)
    if len(keep) != math.prod(sizes) or len(sizes) != len(dims):
        raise ValueError(f"{len(keep)} kept indices do not fill {sizes}")
    if len(keep) and not 0 <= int(keep.min()) <= int(keep.max()) < whole:
        raise ValueError(f"kept indices of a tensor of shape {shape} reach from {keep.min()} to {keep.max()}")
    return TensorSlice(dims, keep, sizes)


def kept_by(plan: Plan, solution: Solution) -> Tensor:
    """Which labels a plan keeps; raises PruneError where it does not fit the model's coupling."""
    unit = solution.unit_of.numpy()
    occurs, stays = np.zeros(len(unit), bool), np.zeros(len(unit), bool)  # a class that is left in any tensor stays
    for name, labels in solution.leaves.items():
        shape = solution.shapes.get(name, plan.shapes.get(name, ()))
        for f in labels:
            occurs[unit[f.compressed]] = True
            cut = next((c for c in plan.keep.get(name, ()) if f.dims <= set(c.dims)), None)
            if cut is None:
                stays[unit[f.compressed]] = True
                continue
            mask = torch.zeros([shape[d] for d in cut.dims], dtype=torch.bool)
            mask.view(-1)[cut.keep] = True
            order = sorted(range(len(cut.dims)), key=lambda i, c=cut: c.dims[i])  # type: ignore[misc]
            full = mask.permute(order).reshape([n if d in cut.dims else 1 for d, n in enumerate(shape)])
            spread = f.labels.expand(torch.broadcast_shapes(f.labels.shape, full.shape))
            stays[unit[spread[full.expand(spread.shape)].numpy()]] = True
    removed = occurs & ~stays
    kept = torch.from_numpy(~removed[unit])
    try:
        made_now = {name: c for name, c in tensor_cuts(solution, kept).items() if c}
    except NotARectangle as error:
        raise PruneError("the plan does not fit the model: rows would differ in length", fix="make a new plan") from error
    for name in sorted({*plan.keep, *made_now}):
        if not same_cuts(plan.keep.get(name, []), made_now.get(name, [])):
            raise PruneError(
                f"the plan does not fit the model: it cuts {name} in another way than the model's coupling allows",
                where=name,
                fix="apply it to the architecture it was made for, unchanged",
            )
    return kept


def same_cuts(a: Sequence[Any], b: Sequence[Any]) -> bool:
    left, right = ({c.dims: c.keep for c in cuts} for cuts in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[d], right[d]) for d in left)


def plan_of(pruned: nn.Module) -> Plan:
    """The plan that a pruned model was made by; raises PruneError for a model that was not."""
    plan = getattr(pruned, "meta", {}).get("plan")
    if not isinstance(plan, Plan):
        raise PruneError("this module carries no plan", where=type(pruned).__name__, fix="pass what fxprune.prune returned")
    return plan
