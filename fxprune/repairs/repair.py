"""Repair: what can be put right in a pruned model by looking at a little data, without training."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.text import Text
from torch import Tensor, nn

from fxprune.arguments import checked_call, checked_class, is_number, shown
from fxprune.criteria.calibration import BATCHES, Batch, check_source, held_batches
from fxprune.entry_points import check_values, entry_point, without_wrappers
from fxprune.inputs import device_of
from fxprune.module_state import take_modes
from fxprune.passes.capture.patches import visible
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.passes.ir.pytree import collect
from fxprune.passes.ir.quiet import unobserved
from fxprune.pipeline import AnyModule
from fxprune.plan import plan_between
from fxprune.repairs.block_tuning import NAME as BLOCK
from fxprune.repairs.block_tuning import BlockInputs, BlockTuning, Tuning
from fxprune.repairs.both_models import BothModels, Loss
from fxprune.repairs.held_out import Outcome, choose_share, split
from fxprune.repairs.merge import NAME as MERGE
from fxprune.repairs.merge import Merging
from fxprune.repairs.methods import METHODS
from fxprune.repairs.refit import NAME as REFIT
from fxprune.repairs.refit import Refit
from fxprune.repairs.repairer import Repairer, RepairStep
from fxprune.repairs.side_by_side import Programs
from fxprune.reports.formatting import Printable, counted, plain_data, table
from fxprune.selection.argument_checks import check_word

if TYPE_CHECKING:
    from rich.console import RenderableType


Method = Literal["refit", "block", "merge", "fold", "reconstruct", "compensate", "recalibrate"]
SHOWN = 30
ALONE = (REFIT, BLOCK, MERGE)  # methods that go with no other


@checked_class
@dataclass(frozen=True)
class Repair(Printable):
    """What was repaired; printable, and found in `meta["repair"]` of what `repair` returns.

    Attributes:
        methods: in the order in which they were applied at each layer.
        error: the relative error of the model's output, before and after: the root of the mean square of the differences from
            the original's, over that of the original's; on the samples held out, if any are. None without data.
        steps: what each method did at each layer, in the order of the program.
        computed: how many products have a weight that is computed from parameters: those are left as they are.
        samples: how many were fitted, and how many were held out.
        share: of all changes, how much of the way was gone: the largest of 1, 1/2, 1/4 and 1/8 at which the output on
            the samples held out surely came closer to the original's (a t-test at 95 %); 0 if it did at none.
    """

    methods: tuple[str, ...]
    error: tuple[float, float] | None
    steps: tuple[RepairStep, ...]
    computed: int
    samples: tuple[int, int]
    share: float

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
        held = self.samples[1]
        data = f"{counted(held, 'sample')} held out" if held else "the data"
        gain = "no data, so no error is known"
        if self.error is not None:
            gain = f"the error of the output on {data} was {self.error[0]:.1%}, is {self.error[1]:.1%}"
        yield f"repaired by {', '.join(self.methods)}: {gain}"
        if 0 < self.share < 1:
            yield f"the changes were gone {self.share:.1%} of the way: farther on, that error was not surely smaller"
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


@checked_call()
def repair(
    model: nn.Module,
    pruned: AnyModule,
    data: Iterable[Any] | None = None,
    *,
    method: Method | str | Sequence[Method | str] | None = None,
    ridge: float | None = None,
    held_out: float = 0.25,
    loss: Loss | None = None,
    steps: int = 200,
    block_inputs: BlockInputs = "pruned",
    seed: int = 0,
) -> AnyModule:
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

    A part of the samples is held out: a layer keeps its values where the repaired ones do not bring its result closer to the
    original's there; and so does the whole model, as far as the output does not come closer. Then it is no worse on other
    inputs of the same kind, either, which a fit to a few samples alone can be by any factor.

    Arguments:
        model: the original, with the values it was pruned with; it is not touched.
        pruned: what `prune` or `Plan.apply` made of it, trained since or not; it is not touched either.
        data: batches as for `prune`, held in memory together with what both models make of them; a few hundred samples do.
            Keywords and sizes may be others than those of the example inputs, and differ from batch to batch: both models
            are then captured for each form. `merge` needs none.
        method: one of these, or several, which are applied in turn at each layer; by default `refit` where
            all inputs are integers, as tokens are, and else `reconstruct` with `recalibrate`:
            `reconstruct`: the weight is moved to the one whose result is closest to the original's, by least squares on the
            inputs that are left (as in ThiNet, arXiv:1707.06342, and OBSPA, arXiv:2403.18955). Where it is added to a stream
            the sum counts, with the errors that the stream has by then; before a ReLU or a ReLU6 what these tell apart
            (as in arXiv:1505.06798);
            `compensate`: a constant makes the mean of each result the original's (FLAP, arXiv:2312.11983: what the removed
            inputs contributed in the mean);
            `fold`: what removed inputs contribute that are constant on all of the data, such as channels whose
            normalisation has scale 0, is added to the result: exactly, save at the border of a zero-padded convolution;
            `recalibrate`: the running statistics of each normalisation become those of the data, save where `reconstruct`
            fitted the layer in front of it to what the normalisation returns;
            `refit`, by itself: each weight that lost inputs is fitted to what these contributed, by least squares on the
            original's own activations. The original runs once, batch by batch; no layer follows the errors of another one.
            It is the one for language models.
            `block`, by itself: each block (modules of one class in a `ModuleList` or a `Sequential`) is trained to return what
            the original's does, one block in memory at a time, without labels (arXiv:2510.14444). It takes longest, and comes
            closest; repair by `refit` first.
            `merge`, by itself, and without data: each unit that went becomes part of the kept one whose weights are nearest.
            The mean of their weights writes it, the sum of what read them reads it, and running variances become those of
            the mean (model folding, arXiv:2502.10216). Units that meet one another before a weight reads them, as in a
            LayerNorm, are left. Prune by `criterion="folding"` before. Where data are given, they judge it.
            Constants go into the product's bias; into the running mean of the normalisation behind it where there is no
            bias; and nowhere where there is neither. No parameter is added, so a saved plan still fits.
        ridge: of `reconstruct`, the penalty on the squared change of a weight, as a share of the mean square of its inputs;
            0 for plain least squares. By default each layer's is chosen by its error on the samples held out.
        held_out: the share of the samples that is held out, two of them at least: rows of each batch, or whole batches where
            there are eight or more. With fewer than four samples nothing is changed. 0: all are fitted, nothing is checked.
        loss: of `refit` and `block`: a function of the output and the target, as for `prune`; by default the `loss` that the
            output holds, if it does. The changes are undone where it rises on the samples held out.
        steps: of `block`, how many steps each block is trained for, of one batch each.
        block_inputs: of `block`, what each block is trained on: what the pruned blocks before it make (`pruned`), or what goes
            into it in the original (`dense`).
        seed: of the order of the batches of `block`.

    Returns: the copy, in the mode and of the class of `pruned`, with `meta["repair"]`.

    Raises: PruneError where the two models or the data do not fit together, or a method does not exist.
    """
    with entry_point(model) as model:
        methods = asked(REFIT if method is None else method, ridge, held_out)
        pruned = without_wrappers(pruned)
        original, plan = model, plan_between(model, pruned)
        check_values(model, pruned)
        model, plan = plan.in_basis(model, whole=True)
        plan.check(model)
        made: Any = copy.deepcopy(pruned)
        if data is None and loss is None and methods == (MERGE,):
            check_tuning(methods, loss, steps, block_inputs, seed)
            with unobserved(model), visible():
                done, _ = Merging(original, made).run()
            return finished(pruned, made, methods, Outcome(1.0, None), done, 0, (0, 0))
        if data is None:
            raise PruneError("repair looks at data, and there are none", fix=f"{BATCHES}; method={MERGE!r} does without")
        given = held_batches(data, device_of(model))
        methods = default_methods(given[0])[0] if method is None else methods
        check_tuning(methods, loss, steps, block_inputs, seed)
        parts = split(given, held_out)
        refused = refusal(parts, held_out)
        if methods[0] in ALONE:
            with unobserved(model), visible():
                both = BothModels(model, made, plan, parts, loss, refused)
                if methods == (REFIT,):
                    done, result = Refit(both).run(ridge)
                elif methods == (MERGE,):
                    done, start = Merging(original, made).run(refused)
                    result = both.choose_share(start)
                else:
                    done, result = BlockTuning(both, Tuning(steps, block_inputs, seed)).run()
                return finished(pruned, made, methods, result, done, 0, count_samples(parts))
        with unobserved(model), visible():
            programs = Programs(model, made, plan, parts)
            samples = count_samples(parts)
            repairer = Repairer(programs.runs, plan.masks(model), None if ridge is None else float(ridge))
            repairer.refusal = refused
            repairer.run([METHODS[name] for name in methods])
            result = choose_share(programs, dict(named_tensors(pruned)), dict(named_tensors(made)), check=bool(samples[1]))
        computed = max(run.new.computed for run in programs.runs)
        return finished(pruned, made, methods, result, repairer.steps, computed, samples)


def count_samples(parts: Sequence[tuple[Batch, bool]]) -> tuple[int, int]:
    """How many are fitted, and how many held out."""
    fitted, held = (sum(batch.size for batch, other in parts if other == part) for part in (False, True))
    return fitted, held


def refusal(parts: Sequence[tuple[Batch, bool]], held_out: float) -> str:
    """Why nothing is changed, where some are to be held out and there are too few; else ""."""
    fitted, held = count_samples(parts)
    if held or not held_out:
        return ""
    return f"{counted(fitted, 'sample')}: too few to hold some out; four are needed, or held_out=0"


def finished(
    pruned: nn.Module,
    made: Any,
    methods: tuple[str, ...],
    result: Outcome,
    steps: Sequence[RepairStep],
    computed: int,
    samples: tuple[int, int],
) -> Any:
    """The copy in the modes of the pruned model, with a record of what was done."""
    undone = "on the samples held out the output of the model would be no closer to the original's"
    steps = [replace(s, done=False, note=undone) if s.done and not result.share else s for s in steps]
    made.train(pruned.training)
    take_modes(made, pruned)
    made.meta["repair"] = Repair(methods, result.errors, tuple(steps), computed, samples, result.share)
    return made


def asked(method: Any, ridge: Any, held_out: Any) -> tuple[str, ...]:
    """The methods by name; raises PruneError for what there is not."""
    methods = (method,) if isinstance(method, str) else tuple(method) if isinstance(method, list | tuple) else ()
    alone = [m for m in methods if m in ALONE]
    if alone and len(methods) > 1:
        raise PruneError(f"{alone[0]} goes with no other method", fix=f"method={alone[0]!r}, on what another repair returned")
    unknown = [m for m in methods if m not in METHODS and m not in ALONE]
    if unknown or not methods:
        fix = f"{', '.join(ALONE)}, or one or more of {', '.join(METHODS)}"
        raise PruneError(f"there is no method {(unknown[0] if unknown else method)!r}", fix=fix)
    if ridge is not None and not (is_number(ridge) and 0 <= ridge < math.inf):
        raise PruneError(f"ridge must be a number of 0 or more, or None, not {shown(ridge)}", fix="ridge=0.01")
    if not (is_number(held_out) and 0 <= held_out <= 0.5):
        raise PruneError(f"held_out must be a share from 0 to 0.5, not {shown(held_out)}", fix="held_out=0.25")
    return methods


def default_methods(first: Batch) -> tuple[tuple[str, ...], str]:
    """The methods where none is asked for, by a batch of the data, and the reason."""
    tensors = [t for t in collect((first.args, first.kwargs), Tensor) if t.dtype != torch.bool]
    if tensors and not any(t.is_floating_point() or t.is_complex() for t in tensors):
        return (REFIT,), "the inputs are tokens"
    return ("reconstruct", "recalibrate"), "the inputs are no tokens"


def check_tuning(methods: Sequence[str], loss: Any, steps: Any, block_inputs: Any, seed: Any) -> None:
    """Raise PruneError for what means nothing, or nothing to these methods."""
    if not (type(steps) is int and steps > 0):
        raise PruneError(f"steps must be a positive integer, not {shown(steps)}", fix="steps=200")
    if type(seed) is not int:
        raise PruneError(f"seed must be an integer, not {shown(seed)}", fix="seed=0")
    check_word("block_inputs", block_inputs, ("pruned", "dense"))
    check_source(None, loss)
    if loss is not None and methods[0] not in ALONE:
        raise PruneError("loss is given to a method that does not look at it", fix=f"method={REFIT!r}, or {BLOCK!r}")
