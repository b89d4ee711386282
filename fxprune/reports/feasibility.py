"""Feasibility: the least that pruning can bring a model to, before anything is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from torch import nn

from fxprune.arguments import checked_call, checked_class
from fxprune.criteria.calibration import read
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.pipeline import Compilation
from fxprune.reports.formatting import Printable, short, table
from fxprune.selection.budgets import KINDS
from fxprune.selection.choice import spent
from fxprune.selection.costs import Costs
from fxprune.selection.latency import Latency
from fxprune.selection.options import ASKED, Asked, Options, Ratio
from fxprune.selection.select import select_least

if TYPE_CHECKING:
    from rich.console import RenderableType
    from typing_extensions import Unpack


COMPUTED = ("params", "macs", "memory")


@checked_class
@dataclass(frozen=True)
class Feasibility(Printable):
    """What pruning can bring a model to.

    >>> import torch, fxprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 10), torch.nn.ReLU(), torch.nn.Linear(10, 2))
    >>> fxprune.feasible(net, torch.randn(1, 4)).params
    (9, 37, 72)

    Attributes:
        model: the name of its class.
        params: number of parameters: the least, at the budget, and of the original.
        macs: multiply-accumulates of one forward of the example inputs, likewise.
        memory: bytes of parameters and buffers, likewise.
        at: the budget, as it was asked for.
        latency: what was measured, if that is the budget; its least is not looked for.
    """

    model: str
    params: tuple[int, int, int]
    macs: tuple[int, int, int]
    memory: tuple[int, int, int]
    at: str
    latency: Latency | None = None

    def tables(self) -> Iterator[RenderableType]:
        """A headline and a row for each kind of cost, as rich renders them."""
        yield Text(f"{self.model}: what pruning can bring it to")
        yield ""
        rows = []
        for kind in COMPUTED:
            least, now, most = getattr(self, kind)
            cells = [f"{short(n)} ({n / most:.1%})" if most else "0" for n in (least, now)]
            rows.append((KINDS[kind].unit, *cells, short(most)))
        if self.latency is not None:
            now = f"{KINDS['latency'].format(self.latency.pruned)} ({self.latency.share:.1%})"
            rows.append(("latency", "", now, KINDS["latency"].format(self.latency.original)))
        yield table(("", "least", f"at {self.at}", "original"), rows)


@checked_call(ASKED)
def feasible(
    model: nn.Module, example_inputs: Any = None, *, ratio: Ratio | None = None, **asked: Unpack[Asked]
) -> Feasibility:
    """What a request would leave of a model, and the least that any could.

    Arguments: as for `prune` (but `verify` and `same_class`); the `ratio` counts if no budget is given. Raises: PruneError, as
    `prune` would.
    """
    with entry_point(model) as model:
        options = Options.parse(model, ratio=ratio, **asked)
        if options.data is not None:
            options = dataclasses.replace(options, data=list(read(options.data)))  # it is read twice
        compilation = Compilation(model, ExampleInputs.parse(example_inputs, model).check(model), options.coupling)
        choice = compilation.choose(options)
        # what fails once most of it is cut must not change the choice, so it is frozen elsewhere
        apart = Compilation(model, compilation.inputs, options.coupling, compilation.frozen_modules)
        least = apart.choose_by(
            lambda solution: select_least(model, solution, options), None if spent(choice.solution) else choice.solution
        )
        costs = Costs(choice.solution, compilation.tensors)
        now, smaller = choice.slicer, Costs(least.solution, compilation.tensors)
        params_, macs_, memory_ = ((smaller.of(least.slicer, k), costs.of(now, k), costs.original(k)) for k in COMPUTED)
        at = f"{options.budget.kind}={options.budget.amount}" if options.budget else f"ratio={options.ratio}"
        return Feasibility(type(model).__name__, params_, macs_, memory_, at, choice.latency)
