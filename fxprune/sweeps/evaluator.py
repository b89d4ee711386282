"""Make the points of a sweep: prune, repair, count, time and evaluate; what fails is a point with the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxprune.basis.pruning import prune_in_basis
from fxprune.inputs import ExampleInputs
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, named_tensors, own_copy, private_copy, set_mode
from fxprune.passes.ir.quiet import own_random_state, unobserved
from fxprune.pipeline import Choice, Compilation
from fxprune.plan import PlanData, plan_carried
from fxprune.repairs.request import RepairRequest
from fxprune.reports.count import counted_model
from fxprune.reports.module_times import measure_models
from fxprune.reports.ratios import Chooser
from fxprune.reports.sensitivity import Raised, number_of
from fxprune.reports.sweep import Point
from fxprune.selection.options import Options


@dataclass(frozen=True)
class Request:
    """One point that is asked for.

    Attributes:
        asked: what is shown of it.
        how: the keyword arguments of `prune`.
        options: what these are parsed to.
    """

    asked: dict[str, Any]
    how: Mapping[str, Any]
    options: Options


class Evaluator:
    """Makes points of one model.

    Arguments:
        model: the original; it is not touched.
        inputs: the example inputs.
        evaluate: a function of a module, in evaluation mode, that returns a number; higher is better. What it is given is its
            own: it may train it.
        mending: how candidates are repaired, if they are.
        same_class: as for `prune`.
        measure: whether to time each candidate, in turns with the original.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: ExampleInputs,
        evaluate: Callable[[nn.Module], Any],
        mending: RepairRequest | None,
        *,
        same_class: bool = False,
        measure: bool = True,
    ) -> None:
        self.model, self.inputs, self.evaluate, self.mending = model, inputs, evaluate, mending
        self.same_class, self.measure = same_class, measure
        self.whole = set_mode(private_copy(model), False)
        self.choosers: list[Chooser] = []

    def chooser(self, options: Options) -> Chooser:
        """The one that knows the coupling which options ask for: each is coupled once."""
        for known in self.choosers:
            if known.compilation.options == options.coupling:
                return known
        self.choosers.append(Chooser(Compilation(self.model, self.inputs, options.coupling)))
        return self.choosers[-1]

    def original(self) -> Point:
        """The unpruned model as a point; what `evaluate` raises comes out as `Raised`."""
        with self.alone():
            try:
                value = finite(self.evaluate(copy_tree(self.whole, {id(t): own_copy(t) for _, t in named_tensors(self.whole)})))
            except PruneError:
                raise
            except Exception as error:
                raise Raised(error) from error
            count = counted_model(self.whole, self.inputs)
            seconds = measure_models(self.whole, self.whole, self.inputs).original if self.measure else None
            latency = None if seconds is None else 1.0
        return Point(0, {}, value, count.parameters, count.macs or 0, count.bytes, seconds, latency)

    def point(
        self,
        number: int,
        request: Request,
        speeds: Mapping[str, float] | None = None,
        wanted: Callable[[PlanData], bool] = lambda plan: True,
    ) -> Any:
        """A point; None where its plan is not `wanted`. `speeds` are as for `Options`."""
        options = dataclasses.replace(request.options, speeds=speeds)

        def make() -> Any:
            if options.basis is not None:  # the rotated model is one of its own
                how = {"same_class": self.same_class, "inplace": False}
                pruned = prune_in_basis(self.model, self.inputs, options, **how)
                return self.repaired(pruned) if wanted(plan_carried(pruned)) else None
            compilation, choice = self.chooser(options).choose(options)
            return self.made(compilation, choice, options) if wanted(compilation.plan(choice)) else None

        return self.attempt(number, request, make)

    def known(self, number: int, request: Request, plan: Any) -> Any:
        """The point of a plan."""
        return self.attempt(number, request, lambda: self.applied(plan))

    def attempt(self, number: int, request: Request, make: Callable[[], Any]) -> Any:
        """The point of a model that is made here, None if none is, or the reason why it fails."""
        empty = Point(number, dict(request.asked), how=request.how)
        try:
            with self.alone():
                made = make()
                return None if made is None else self.measured(empty, made)
        except PruneError as error:
            return dataclasses.replace(empty, failed=error.what)
        except Exception as error:
            return dataclasses.replace(empty, failed=f"{type(error).__name__}: {error}")

    def made(self, compilation: Compilation, choice: Choice, options: Options) -> Any:
        """The pruned and repaired model of a choice, whose coupling stays as it is for the next one."""
        if compilation in [c.compilation for c in self.choosers]:
            own = compilation.keep(choice.kept, choice.slicer.removed.tensors)
            choice = dataclasses.replace(own, latency=choice.latency)
        pruned = compilation.prune(options, same_class=self.same_class, choice=choice)
        return self.repaired(pruned)

    def repaired(self, pruned: Any) -> Any:
        return (pruned if self.mending is None else self.mending.apply(self.model, pruned)).eval()

    def again(self, point: Point) -> Any:
        """The model of a point."""
        with self.alone():
            return self.applied(point.plan)

    def applied(self, plan: Any) -> Any:
        """The model of a plan, repaired."""
        given = self.inputs.kwargs or self.inputs.args
        return self.repaired(plan.apply(self.model, given, same_class=self.same_class))

    def measured(self, point: Point, made: Any) -> Point:
        """The point that a model is."""
        count = counted_model(made, self.inputs)
        latency = made.meta.get("latency")
        if latency is None and self.measure:
            latency = measure_models(self.whole, made, self.inputs)
        repair = made.meta.get("repair")
        return dataclasses.replace(
            point,
            value=finite(self.evaluate(made)),
            parameters=count.parameters,
            macs=count.macs or 0,
            bytes=count.bytes,
            seconds=None if latency is None else latency.pruned,
            latency=None if latency is None else latency.share,
            error=None if repair is None or repair.error is None else repair.error[1],
            plan=plan_carried(made),
            make=self.again,
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Each point begins with the same random state, whatever was drawn for others."""
        with unobserved(self.model), own_random_state():
            yield


def finite(found: Any) -> float:
    """What `evaluate` returned as a number; raises PruneError where it is none, or not finite."""
    value = number_of(found)
    if not math.isfinite(value):
        raise PruneError(f"evaluate returned {value}", fix="a finite number for every model")
    return value
