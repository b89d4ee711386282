"""Sensitivity: what a model's accuracy or loss does when one family loses its units and all others stay whole."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text
from torch import Tensor, nn

from fxprune.arguments import checked_call, checked_class, is_number, number, shown
from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import CriterionName
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.choices import require_experts
from fxprune.passes.coupling.families import Family, place_of
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.quiet import unobserved
from fxprune.pipeline import Compilation
from fxprune.reports.files import as_path, replacing
from fxprune.reports.formatting import Printable, as_text, plain_data, table
from fxprune.selection.candidates import form_groups, remove_share
from fxprune.selection.choice import Choice
from fxprune.selection.options import Attention, Experts, Freeze, Options
from fxprune.selection.rectangles import find_nonempty_sets, restore_rectangles
from fxprune.selection.select import score_families

if TYPE_CHECKING:
    from rich.console import RenderableType


TENTHS = tuple(i / 10 for i in range(1, 10))
EVALUATE = "a function of a module that returns a number, such as its accuracy"


class Raised(BaseException):
    """Carries an error of `evaluate` past what would take it for one of the compiler's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True)
class Curve:
    """One family, or several that can only be pruned together.

    Attributes:
        family: its name, as in `couple`; several are joined by " & ".
        layers: the layers it spans.
        units: how many units it has.
        removed: for each ratio, how many of them went.
        values: for each ratio, what `evaluate` returned.
    """

    family: str
    layers: tuple[str, ...]
    units: int
    removed: tuple[int, ...]
    values: tuple[float, ...]


@checked_class
@dataclass(frozen=True)
class Sensitivity(Printable):
    """What `evaluate` returns for each family at each ratio; printable.

    Attributes:
        model: the name of its class.
        whole: what it returns for the unpruned model.
        ratios: shares of a family's units, ascending.
        curves: in the order of the model's parameters.
    """

    model: str
    whole: float
    ratios: tuple[float, ...]
    curves: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return plain_data(self)

    def plot(self, path: str | Path) -> None:
        """Write the curves to an SVG file that needs nothing else."""
        curves = {c.family: c.values for c in self.curves}
        title = f"{self.model}: one family pruned at a time"
        with replacing(as_path(path)) as unfinished:
            unfinished.write_text(draw_curves(title, self.whole, self.ratios, curves), encoding="utf-8")

    def tables(self) -> Iterator[RenderableType]:
        """A headline and a row for each curve, as rich renders them."""
        yield Text(f"{self.model}: {self.whole:.4g} unpruned; below, with one family at a time pruned by a ratio")
        yield ""
        titles = ("family", "units", *(f"{r:g}" for r in self.ratios), "layers")
        rows = [(c.family, f"{c.units:,}", *(f"{v:.4g}" for v in c.values), named(c.layers)) for c in self.curves]
        yield table(titles, rows)

    def __str__(self) -> str:
        return as_text(self, width=max(110, 60 + 8 * len(self.ratios)))


@checked_call()
def sensitivity(
    model: nn.Module,
    example_inputs: Any = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    *,
    ratios: Sequence[float] = TENTHS,
    criterion: CriterionName | str | Criterion | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    only: Freeze = (),
    freeze: Freeze = (),
    freeze_outputs: Freeze = (),
    release: str | Sequence[str] = (),
    round_to: int = 1,
    attention: Attention = "heads",
    experts: Experts = False,
) -> Sensitivity:
    """What becomes of a model when each family in turn loses a share of its units, lowest scores first, and no other does.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> x = torch.randn(50, 4)
    >>> found = sensitivity(net, x, lambda m: (m(x) - net(x)).square().mean(), ratios=(0.3, 0.6))
    >>> [(c.family, c.units, c.removed) for c in found.curves]
    [('0', 6, (1, 3)), ('2', 6, (1, 3))]

    Arguments:
        model: it is not touched.
        example_inputs: as for `prune`.
        evaluate: a function of a pruned model, in evaluation mode, that returns a number: an accuracy, a loss.
        ratios: shares of units, each in (0, 1).
        criterion, data, loss, only, freeze, freeze_outputs, release, round_to, attention, experts: as for `prune`.

    Returns: a table that can be printed, `to_dict()`, and `plot(path)`.

    Raises: PruneError for anything that cannot be done; what `evaluate` raises passes through.
    """
    shares = checked(ratios, evaluate)
    try:
        with entry_point(model) as model:
            options = Options.parse(
                model,
                criterion=criterion,
                data=data,
                loss=loss,
                only=only,
                freeze=freeze,
                freeze_outputs=freeze_outputs,
                release=release,
                round_to=round_to,
                attention=attention,
                experts=experts,
            )
            compilation = Compilation(model, ExampleInputs.parse(example_inputs, model).check(model), options.coupling)
            return measured(compilation, options, shares, evaluate)
    except Raised as raised:
        raise raised.error from None


def measured(compilation: Compilation, options: Options, shares: tuple[float, ...], evaluate: Any) -> Sensitivity:
    """What `evaluate` says of each family at each share."""
    model, round_to = compilation.model, options.round_to
    solution = compilation.couple_for_good()
    if options.experts:
        require_experts(solution, type(model).__name__)
    free, score = score_families(model, solution, options)
    spans = find_nonempty_sets(solution)
    groups = form_groups([f.units for f in free], [1.0] * len(free), solution.equal_rows, len(score))
    whole = value(compilation, compilation.unpruned(), evaluate)
    curves = []
    for group in progress_bar(groups, "sensitivity", "family"):
        removed, values = [], []
        for share in shares:
            gone = np.zeros(len(score), bool)
            gone[remove_share(group, score, [f.width for f in free], round_to, share)] = True
            kept, slicer = restore_rectangles(solution, gone, score, spans)
            if slicer.keeps_all:
                values.append(whole)
            elif compilation.freeze_broken(choice := compilation.keep(kept)):
                break  # a module that is not captured fails without these units: they stay
            else:
                values.append(value(compilation, choice, evaluate))
            removed.append(int(gone.sum()))
        else:
            mine = [free[i] for i in group.families]
            curves.append(curve(mine, removed, values))
    return Sensitivity(type(model).__name__, whole, shares, tuple(curves))


def curve(families: Sequence[Family], removed: Sequence[int], values: Sequence[float]) -> Curve:
    layers = dict.fromkeys(place_of(name) for f in families for name, _ in f.members)
    units = sum(len(f.units) for f in families)
    return Curve(" & ".join(f.name for f in families), tuple(layers), units, tuple(removed), tuple(values))


def value(compilation: Compilation, choice: Choice, evaluate: Any) -> float:
    """What `evaluate` says of a pruned model; raises PruneError where that is no number."""
    pruned = compilation.emit(choice).eval()
    with unobserved(compilation.model):
        try:
            found = evaluate(pruned)
        except Exception as error:
            raise Raised(error) from error
    return number_of(found)


def number_of(found: Any) -> float:
    """What `evaluate` returned as a number; raises PruneError where it is none."""
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PruneError(f"evaluate must return a number, not {type(found).__name__}", fix=EVALUATE) from error


def checked(ratios: Any, evaluate: Any) -> tuple[float, ...]:
    """The ratios in ascending order; raises PruneError for what means nothing."""
    if not callable(evaluate):
        raise PruneError(f"evaluate must be a function, not {shown(evaluate)}", fix=EVALUATE)
    found = checked_ratios(ratios)
    if not found:
        raise PruneError("ratios holds none", fix="ratios=(0.25, 0.5, 0.75)")
    return found


def checked_ratios(ratios: Any) -> tuple[float, ...]:
    """Shares of units in ascending order; raises PruneError for what is none."""
    listed = [number(r) for r in ratios] if isinstance(ratios, Iterable) and not isinstance(ratios, str) else [number(ratios)]
    for r in listed:
        if not is_number(r) or not 0 < r < 1:
            raise PruneError(f"ratios must lie between 0 and 1, and {shown(r)} does not", fix="ratios=(0.25, 0.5, 0.75)")
    return tuple(sorted({float(r) for r in listed}))


def named(layers: Sequence[str]) -> str:
    shown = len(layers) if len(layers) <= 3 else 2
    return ", ".join(layers[:shown]) + (f" and {len(layers) - shown} more" if len(layers) > shown else "")


WIDTH, HEIGHT, LEFT, TOP, LINE = 560, 360, 64, 40, 18


def draw_curves(title: str, whole: float, ratios: Sequence[float], curves: Mapping[str, Sequence[float]]) -> str:
    """Curves as an SVG document: the ratio to the right, the value upwards, a name for each at the side.

    Arguments:
        title: above the plot.
        whole: the value of every curve at ratio 0.
        ratios: ascending, without 0.
        curves: the values at these ratios, by name.
    """
    values = [v for values in curves.values() for v in (whole, *values) if math.isfinite(v)] or [0.0]
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    right = max(ratios)

    def spot(r: float, v: float) -> str:
        return f"{LEFT + WIDTH * r / right:.1f},{TOP + HEIGHT * (high - v) / (high - low):.1f}"

    lines = []
    for v in (low + (high - low) * k / 4 for k in range(5)):
        y = TOP + HEIGHT * (high - v) / (high - low)
        lines.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(text(LEFT - 8, y + 4, f"{v:.3g}", anchor="end"))
    for r in (0.0, *ratios):
        lines.append(text(LEFT + WIDTH * r / right, TOP + HEIGHT + 20, f"{r:g}", anchor="middle"))
    for i, (label, its) in enumerate(curves.items()):
        colour = f"hsl({360 * i // max(len(curves), 1)},65%,42%)"
        known = zip((0.0, *ratios), (whole, *its), strict=True)
        points = " ".join(spot(r, v) for r, v in known if math.isfinite(v))
        name = html.escape(label)
        line = f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="{points}">'
        lines.append(f"{line}<title>{name}</title></polyline>")
        lines.append(text(LEFT + WIDTH + 16, TOP + LINE * i + 8, name, fill=colour))
    lines.append(text(LEFT, 22, html.escape(title)))
    lines.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 42, "share of the family's units removed", anchor="middle"))
    size = (LEFT + WIDTH + 300, max(TOP + HEIGHT + 56, TOP + LINE * len(curves) + 16))
    form = f'width="{size[0]}" height="{size[1]}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {form}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""])


def text(x: float, y: float, content: str, *, anchor: str = "start", fill: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{content}</text>'
