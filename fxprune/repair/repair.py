"""Repair: what can be put right in a pruned model by looking at a little data, without training."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch import Tensor, fx, nn

from fxprune.criteria.calibration import BATCHES, Batch, parse_batch
from fxprune.entry_points import entry_point
from fxprune.inputs import device_of
from fxprune.passes.capture.patches import visible
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.quiet import unobserved, without_modes
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData, plan_between
from fxprune.repair.interpreter import ProgramRun
from fxprune.repair.methods import METHODS, Repairer, RepairStep
from fxprune.reports.formatting import Printable, counted, plain_data, table

if TYPE_CHECKING:
    from rich.console import RenderableType


SHOWN = 30


@dataclass(frozen=True)
class Repair(Printable):
    """What was repaired; printable, and found in `meta["repair"]` of what `repair` returns.

    Attributes:
        methods: in the order in which they were applied at each layer.
        error: the relative error of the model's output on the data, before and after: the root of the mean square of the
            differences from the original's, over that of the original's.
        steps: what each method did at each layer, in the order of the program.
        computed: how many products have a weight that is computed from parameters: those are left as they are.
    """

    methods: tuple[str, ...]
    error: tuple[float, float]
    steps: tuple[RepairStep, ...]
    computed: int

    @property
    def done(self) -> list[RepairStep]:
        return [s for s in self.steps if s.done]

    @property
    def skipped(self) -> list[RepairStep]:
        return [s for s in self.steps if not s.done]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return plain_data(self)

    def sentences(self) -> Iterator[str]:
        before, after = self.error
        yield f"repaired by {', '.join(self.methods)}: the error of the output on the data was {before:.1%}, is {after:.1%}"
        yield f"{counted(len(self.done), 'change')}; {counted(len(self.skipped), 'site')} not changed"
        for note, times in Counter(s.note for s in self.skipped).items():
            yield f"  {counted(times, 'site')}: {note}"
        if self.computed:
            yield f"{counted(self.computed, 'product')} not looked at: the weight is computed"

    def tables(self) -> Iterator[RenderableType]:
        """The sentences and a row for each change, as rich renders them."""
        yield from map(Text, self.sentences())
        if self.done:
            yield ""
            rows = [
                (s.layer, s.method, *(("", "") if s.error is None else (f"{e:.1%}" for e in s.error)), s.note)
                for s in self.done[:SHOWN]
            ]
            more = len(self.done) - SHOWN
            rows += [(f"and {more} more", "", "", "", "")] if more > 0 else []
            yield table(("layer", "method", "error before", "after", "note"), rows)


@without_modes()
def repair(
    model: nn.Module,
    pruned: nn.Module,
    data: Iterable[Any],
    *,
    method: str | Sequence[str] = ("reconstruct", "recalibrate"),
    ridge: float = 0.01,
) -> Any:
    """A copy of a pruned model, closer to the original on some data, without training.

    >>> import fxprune
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> images = torch.randn(200, 8)
    >>> small = fxprune.prune(net, 0.5, example_inputs=images[:1])
    >>> better = repair(net, small, [images], method="reconstruct")
    >>> before, after = better.meta["repair"].error
    >>> after < before / 2
    True

    Both models run on the data side by side, layer by layer in evaluation mode, so that each layer is repaired for what the
    repaired layers before it hand on. Layers are products in the program, whatever they are called; a weight that is used
    more than once, or computed from parameters, is left as it is, and `meta["repair"]` says so.

    Arguments:
        model: the original, with the values it was pruned with; it is not touched.
        pruned: what `prune` or `Plan.apply` made of it, trained since or not; it is not touched either.
        data: batches as for `prune`, held in memory together with what both models make of them; a few hundred samples do.
        method: one of these, or several, which are applied in turn at each layer:
            `reconstruct`: the weight is moved to the one whose result is closest to the original's, by least squares on the
            inputs that are left (as in ThiNet, arXiv:1707.06342, and OBSPA, arXiv:2403.18955);
            `compensate`: a constant makes the mean of each result the original's (FLAP, arXiv:2312.11983: what the removed
            inputs contributed in the mean);
            `fold`: what removed inputs contribute that are constant on all of the data, such as channels whose
            normalisation has scale 0, is added to the result: exactly, save at the border of a zero-padded convolution;
            `recalibrate`: the running statistics of each normalisation become those of the data.
            Constants go into the product's bias; into the running mean of the normalisation behind it where there is no
            bias; and nowhere where there is neither. No parameter is added, so a saved plan still fits.
        ridge: of `reconstruct`, the penalty on the squared change of a weight, as a share of the mean square of its inputs;
            0 for plain least squares.

    Returns: the copy, in the mode and of the class of `pruned`, with `meta["repair"]`.

    Raises: PruneError where the two models or the data do not fit together, or a method does not exist.
    """
    with entry_point(model) as model:
        methods = asked(method, ridge)
        plan = plan_between(model, pruned)
        plan.check(model)
        batches = batches_of(data, device_of(model))
        with unobserved(model), visible():
            made, program, original, prefix = programs(model, pruned, plan, batches)
            old, new = ProgramRun(original, batches, prefix), ProgramRun(program, batches, prefix)
            given = [map_tensors((b.args, b.kwargs), torch.clone) for b in batches]
            before = [program(*args, **kwargs) for args, kwargs in given]
            repairer = Repairer(old, new, plan.masks(model), float(ridge))
            repairer.run(methods)
        error = (difference(old.result, before), difference(old.result, new.result))
        made.train(pruned.training)
        modes = {path: m.training for path, m in pruned.named_modules()}
        for path, module in made.named_modules():
            if path:
                vars(module)["training"] = modes[path]
        made.meta["repair"] = Repair(methods, error, tuple(repairer.steps), new.computed)
        return made


def asked(method: Any, ridge: Any) -> tuple[str, ...]:
    """The methods by name; raises PruneError for what there is not."""
    methods = (method,) if isinstance(method, str) else tuple(method) if isinstance(method, list | tuple) else ()
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise PruneError(
            f"there is no method {(unknown[0] if unknown else method)!r}", fix=f"one or more of {', '.join(METHODS)}"
        )
    number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
    if not number or not math.isfinite(ridge) or ridge < 0:
        raise PruneError(f"ridge must be a number of 0 or more, not {ridge!r}", fix="ridge=0.01")
    return methods


def batches_of(data: Any, device: torch.device) -> list[Batch]:
    """All batches, on the model's device."""
    if not isinstance(data, Iterable) or isinstance(data, Tensor | dict | str):
        raise PruneError(f"data must be batches, not a {type(data).__name__}", fix=BATCHES)
    batches = [parse_batch(map_tensors(item, lambda t: t.to(device))) for item in data]
    if not batches:
        raise PruneError("data holds no batches", fix=f"{BATCHES}; one that was read to its end is empty")
    return batches


def programs(
    model: nn.Module, pruned: nn.Module, plan: PlanData, batches: Sequence[Batch]
) -> tuple[Any, fx.GraphModule, fx.GraphModule, str]:
    """The copy to repair, its program and that of the original, in evaluation mode, and the prefix of their tensors' names.

    A pruned model of the original's class has no program of its own: one is made that shares its tensors.
    """
    try:
        compilation = Compilation.of_plan(model, plan)
    except PruneError:  # its description of example inputs is not enough
        compilation = Compilation.of_plan(model, plan, batches[0].kwargs or batches[0].args)
    whole = compilation.unpruned()
    prefix = whole.solution.captures[0].prefix
    original = compilation.emit(whole)
    made = copy.deepcopy(pruned)
    if isinstance(made, fx.GraphModule):
        return made, made.eval(), original.eval(), prefix
    return made, sharing(made, compilation.apply(plan), prefix).eval(), original.eval(), prefix


def sharing(made: nn.Module, program: fx.GraphModule, prefix: str) -> fx.GraphModule:
    """A pruned program on the tensors of a pruned model of the original's class."""
    tensors = dict(named_tensors(made))
    for name, tensor in named_tensors(program):
        own = tensors.get(name.removeprefix(prefix))
        if own is not None:
            tensor.data = own.data
    return program


def difference(wanted: Sequence[Any], found: Sequence[Any]) -> float:
    """The root of the squared differences over that of the squares, over all floating tensors."""
    squares = size = 0.0
    for a, b in zip(collect(list(wanted), Tensor), collect(list(found), Tensor), strict=True):
        if a.is_floating_point():
            squares += float((a.double() - b.double()).square().sum())
            size += float(a.double().square().sum())
    return math.sqrt(squares / size) if size else math.inf
