"""Methods of pruning side by side: what each leaves of a model, how fast it is, and how good."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from torch import nn

from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs, device_of
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import private_copy, set_mode
from fxprune.passes.ir.quiet import unobserved
from fxprune.pipeline import Compilation
from fxprune.reports.count import counted_model
from fxprune.reports.formatting import Printable, in_bytes, plain_data, short, table
from fxprune.reports.profile import peak_memory
from fxprune.selection.latency import measure_seconds
from fxprune.selection.options import Options
from fxprune.verification import evaluating

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Measured:
    """One model of a comparison.

    Attributes:
        method: how it was pruned; `original` for the model itself.
        parameters, macs: elements, and multiply-accumulates of one forward.
        memory: the most bytes at once in one forward, as `profile` counts them.
        seconds: the median of forwards, all models in turns.
        score: what the user's function returns for it, if there is one.
        failed: why the method could not be applied, or None.
    """

    method: str
    parameters: int = 0
    macs: int = 0
    memory: int = 0
    seconds: float = 0.0
    score: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Comparison(Printable):
    """Methods of pruning on one model; printable. `rows` begins with the original."""

    model: str
    rows: tuple[Measured, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return plain_data(self)

    def tables(self) -> Iterator[RenderableType]:
        """A row for each method, as rich renders it, and below what could not be applied."""
        yield Text(f"{self.model}: methods of pruning side by side")
        yield ""
        scored = any(row.score is not None for row in self.rows)
        made = [row for row in self.rows if row.failed is None]
        rated = ["" if r.score is None else f"{r.score:.4g}" for r in made]
        sized = [(r.method, short(r.parameters), short(r.macs), in_bytes(r.memory), f"{r.seconds * 1e3:.2f}") for r in made]
        cells = [(*size, score) for size, score in zip(sized, rated, strict=True)]
        yield table(("method", "parameters", "MACs", "memory", "ms", "score" if scored else ""), cells)
        for row in self.rows:
            if row.failed is not None:
                yield Text(f"{row.method} failed: {row.failed}")


def compare_methods(
    model: nn.Module,
    example_inputs: Any,
    methods: Mapping[str, Mapping[str, Any]],
    evaluate: Callable[[nn.Module], Any] | None = None,
) -> Comparison:
    """Prune a model by several methods, and measure what comes of each.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> methods = {"half": {"ratio": 0.5}, "third": {"ratio": 0.34, "criterion": "random"}}
    >>> [(r.method, r.parameters) for r in compare_methods(net, torch.randn(1, 4), methods).rows]
    [('original', 44), ('half', 23), ('third', 30)]

    Arguments:
        methods: for each name the keyword arguments of `prune`.
        evaluate: a function of a model in evaluation mode that returns a number, such as its accuracy.

    Raises: PruneError where none of the methods can be applied; one that cannot is among the rows, with the reason.
    """
    with entry_point(model) as model:
        inputs = ExampleInputs.parse(example_inputs, model).check(model)
        original = set_mode(private_copy(model), False)
        models: dict[str, nn.Module] = {"original": original}
        failed: dict[str, PruneError] = {}
        for name, asked in methods.items():
            try:
                options = Options.parse(original, **asked)
                models[name] = Compilation(original, inputs, options.coupling).prune(options)
            except PruneError as error:
                failed[name] = error
        if failed and len(failed) == len(methods):
            raise next(iter(failed.values()))
        with unobserved(model):
            for one in models.values():
                one.eval()
            times = measure_seconds([functools.partial(inputs.call, one) for one in models.values()], device_of(model))
            median = {name: statistics.median(taken) for name, taken in zip(models, times, strict=True)}
        rows = [Measured("original", *sizes(original, inputs), median["original"], score_of(original, evaluate))]
        for name in methods:
            if name in failed:
                rows.append(Measured(name, failed=failed[name].what))
            else:
                rows.append(Measured(name, *sizes(models[name], inputs), median[name], score_of(models[name], evaluate)))
        return Comparison(type(model).__name__, tuple(rows))


def sizes(model: nn.Module, inputs: ExampleInputs) -> tuple[int, int, int]:
    """Parameters, multiply-accumulates and peak memory of one forward."""
    found = counted_model(model, inputs)
    with evaluating(model), unobserved(model):
        return found.parameters, found.macs or 0, peak_memory(model, inputs)


def score_of(model: nn.Module, evaluate: Callable[[nn.Module], Any] | None) -> float | None:
    """What a user's function says of a model."""
    if evaluate is None:
        return None
    with evaluating(model), unobserved(model):
        found = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        kind = type(found).__name__
        raise PruneError(f"the function that scores a model returns a {kind}, not a number", fix="return accuracy") from None


def named_methods(criteria: Sequence[str], **asked: Any) -> dict[str, dict[str, Any]]:
    """Methods of criteria, each perhaps with a ranking: `magnitude`, `taylor/global`; `asked` is the same for all."""
    return {name: {**asked, **method_of(name)} for name in criteria}


def method_of(name: str) -> dict[str, Any]:
    criterion, slash, ranking = name.partition("/")
    return {"criterion": criterion, "ranking": ranking} if slash else {"criterion": criterion}
