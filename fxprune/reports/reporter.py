"""Make a report: what pruning took from a model and what it left, and what it would leave at other ratios."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from fxprune.arguments import checked_call
from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import CriterionName
from fxprune.entry_points import entry_point, without_wrappers
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.families import families
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, private_copy, set_mode
from fxprune.passes.ir.quiet import unobserved
from fxprune.pipeline import Compilation
from fxprune.plan import plan_between
from fxprune.reports.changes import family_changes, module_changes
from fxprune.reports.count import counted_model
from fxprune.reports.coupling_graph import links_of
from fxprune.reports.module_times import measure_models, measure_modules
from fxprune.reports.ratios import RATIOS, RatioCosts, RatioSweep
from fxprune.reports.report import Report
from fxprune.reports.sensitivity import Sensitivity, checked_ratios
from fxprune.reports.sweep import Sweep
from fxprune.selection.argument_checks import check_flag
from fxprune.selection.latency import Latency
from fxprune.selection.options import STREAMS_LAST, Options, Ranking, Scopes
from fxprune.verification import evaluating

DEFAULTS = Options()
NAMED = 3  # frozen tensors that are written out in a call


@checked_call()
def report(
    model: nn.Module,
    pruned: nn.Module,
    example_inputs: Any = None,
    *,
    ratios: Sequence[float] = RATIOS,
    measure: bool = False,
    sensitivity: Sensitivity | None = None,
    sweep: Sweep | None = None,
    criterion: CriterionName | str | Criterion = "magnitude",
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    ranking: Ranking = "local",
    scopes: Scopes | None = None,
    floor: float | None = None,
    round_to: int = 1,
) -> Report:
    """What pruning took from a model and what it left, family by family, and why some stayed whole.

    >>> import torch, fxprune
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> small = fxprune.prune(net, 0.5, example_inputs=torch.randn(1, 4))
    >>> found = report(net, small)
    >>> found.parameters
    (44, 23)
    >>> [(c.family.name, c.family.units, c.kept) for c in found.shrunk]
    [('0', 6, 3)]
    >>> [(c.family.name, c.reason) for c in found.whole][-1]
    ('2', 'is an output of the model')
    >>> [str(m) for m in found.modules if m.path == "0"]
    ['Linear(in_features=4, out_features=6→3, bias=True)']

    Arguments:
        model: the original.
        pruned: what `prune` or `Plan.apply` made of it.
        example_inputs: as for `prune`; multiply-accumulates are counted if they are given.
        ratios: shares of units for which the report says what `prune` would leave, with the options below and the coupling
            that the model was pruned with.
        measure: whether to time both models, their modules, and for other ratios the products of the program one by one.
        sensitivity, sweep: what `fxprune.sensitivity` and `fxprune.sweep` (or `search`) returned, to be shown beside.
        criterion, data, loss, ranking, scopes, floor, round_to: how `prune` chooses at these ratios.

    Raises: PruneError if the two do not belong together.
    """
    check_flag("measure", measure)
    check_extras(example_inputs, sensitivity, sweep, measure=measure)
    with entry_point(model) as model:
        how: dict[str, Any] = {
            "criterion": criterion,
            "ranking": ranking,
            "scopes": scopes,
            "floor": floor,
            "round_to": round_to,
        }
        options = Options.parse(model, **how, data=data, loss=loss)
        inputs = None if example_inputs is None else ExampleInputs.parse(example_inputs, model).check(model)
        shares = checked_ratios(ratios)
        said = {name: value for name, value in how.items() if value != getattr(DEFAULTS, name)}
        found = Reporter(model, without_wrappers(pruned), inputs, options, said).report(shares, sensitivity, measure=measure)
        return found if sweep is None else dataclasses.replace(found, sweep=sweep)


def check_extras(example_inputs: Any, sensitivity: Any, sweep: Any, *, measure: bool) -> None:
    """Raise PruneError where there is nothing to run the models on, or what is to be shown beside is something else."""
    if measure and example_inputs is None:
        raise PruneError("measure=True runs both models, and there are no example inputs", fix="report(model, pruned, x)")
    if sensitivity is not None and not isinstance(sensitivity, Sensitivity):
        what = f"sensitivity must be what fxprune.sensitivity returned, not a {type(sensitivity).__name__}"
        raise PruneError(what, fix="fxprune.sensitivity(model, example_inputs, evaluate)")
    if sweep is not None and not isinstance(sweep, Sweep):
        what = f"sweep must be what fxprune.sweep or fxprune.search returned, not a {type(sweep).__name__}"
        raise PruneError(what, fix="fxprune.sweep(model, example_inputs, evaluate, budgets={'macs': [0.5, 0.25]})")


class Reporter:
    """Puts a report together.

    Arguments:
        model, pruned: before and after.
        inputs: the user's example inputs; None where there are none.
        options: how units are chosen at other ratios; `said` are those arguments that differ from what holds by default.
    """

    def __init__(
        self, model: nn.Module, pruned: nn.Module, inputs: ExampleInputs | None, options: Options, said: dict[str, Any]
    ) -> None:
        self.pruned, self.inputs, self.options, self.said = pruned, inputs, options, said
        model, self.plan = plan_between(model, pruned).in_basis(model)
        self.meta: dict[str, Any] = getattr(pruned, "meta", {})
        given = None if inputs is None else inputs.kwargs or inputs.args
        self.compilation = Compilation.of_plan(model, self.plan, given, self.meta.get("frozen_modules"))
        self.model = model

    def report(self, ratios: Sequence[float], sensitivity: Sensitivity | None, *, measure: bool) -> Report:
        compilation = self.compilation
        choice = compilation.choice_of(self.plan)
        found = families(choice.solution, set(named_parameters(compilation.model)))
        last = STREAMS_LAST in self.meta.get("chosen", ())
        changes = family_changes(compilation, choice, found, streams_last=last, branches=bool(self.meta.get("branches")))
        before, after = counted_model(self.model, self.inputs), counted_model(self.pruned, self.inputs)
        latency, times = self.measured() if measure else (self.meta.get("latency"), {})
        names = [change.family.name for change in changes]
        return Report(
            type(self.model).__name__,
            (before.parameters, after.parameters),
            None if before.macs is None or after.macs is None else (before.macs, after.macs),
            changes,
            self.meta.get("capture", "unknown"),
            self.meta.get("verification"),
            latency,
            (before.bytes, after.bytes),
            module_changes(self.model, self.pruned, self.plan, (before, after), times),
            self.other_ratios(ratios, names, latency.original if measure and latency else None),
            self.call(),
            links_of(choice.solution, found, names),
            sensitivity,
            self.meta.get("chosen", ()),
            self.unused(),
            self.meta.get("branches", ()),
            next(self.meta["repair"].sentences()) if "repair" in self.meta else "",
        )

    def unused(self) -> tuple[str, ...]:
        """The modules of tensors that the example does not use, but for single numbers, such as a norm's count of batches."""
        tensors = self.compilation.tensors
        names = (name for name in self.meta.get("unused", ()) if tensors[name].dim())
        return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in names))

    def other_ratios(self, ratios: Sequence[float], names: Sequence[str], total: float | None) -> tuple[RatioCosts, ...]:
        """What other ratios leave; `total` are the measured seconds of the original, where times are to be estimated."""
        compilation = self.compilation
        if not ratios:
            return ()
        sweep = RatioSweep(Compilation(compilation.model, self.inputs or compilation.inputs, compilation.options), self.options)
        return tuple(sweep.costs(ratios, names, macs=self.inputs is not None, seconds=total))

    def measured(self) -> tuple[Latency, dict[str, tuple[float, float]]]:
        """Seconds of both models, and of their modules by path."""
        assert self.inputs is not None
        model = set_mode(private_copy(self.model), False)
        with unobserved(self.model), evaluating(self.pruned):
            return measure_models(model, self.pruned, self.inputs), measure_modules(model, self.pruned, self.inputs)

    def call(self) -> str:
        """The call of `prune` that gives the figures at a ratio, which is left open in it."""
        plan, said = self.plan, {**self.said}
        if plan.attention != "heads":
            said["attention"] = plan.attention
        if plan.release:
            said["release"] = list(plan.release)
        words = [f"{name}={value!r}" for name, value in said.items()]
        if plan.freeze:
            words.append(f"freeze={list(plan.freeze)!r}" if len(plan.freeze) <= NAMED else "freeze=[...]")
        return ", ".join(["fxprune.prune(model, {ratio}, example_inputs", *words]) + ")"
