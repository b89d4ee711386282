"""The report as one HTML page: a template filled with figures that are computed before, styles and a script in it."""

from __future__ import annotations

import functools
import html
import json
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fxprune.passes.coupling.families import place_of
from fxprune.reports.formatting import in_bytes, short
from fxprune.reports.scatter import HEIGHT as SVG_HEIGHT
from fxprune.reports.scatter import WIDTH as SVG_WIDTH
from fxprune.reports.scatter import draw

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = ("page.html.j2", "sweep.html.j2", "points.html.j2")
GOLDEN_ANGLE = 137.508  # degrees: hues that lie this far apart stay distinct, however many there are
SHIFTS = (0, 11, -11)  # of lightness, in per cent
FRAME = '<iframe title="{title}" srcdoc="{page}" style="width:100%;height:80vh;border:1px solid #8884"></iframe>'


def render(report: Any) -> str:
    """The page of a report (see `Report`), whole: it refers to nothing outside of it."""
    from markupsafe import Markup

    data = page_data(report)
    return (
        environment()
        .get_template(TEMPLATES[0])
        .render(
            **data,
            styles=Markup(part("page.css")),
            script=Markup(part("page.js")),
            data=Markup(embedded({name: data[name] for name in ("families", "places", "links", "ratios", "curves")})),
        )
    )


def render_sweep(sweep: Any) -> str:
    """The page of a sweep (see `Sweep`), whole."""
    from markupsafe import Markup

    return environment().get_template(TEMPLATES[1]).render(sweep=sweep_data(sweep), styles=Markup(part("page.css")))


def sweep_data(sweep: Any) -> dict[str, Any]:
    """What the template shows of a sweep."""
    from markupsafe import Markup

    fronts = {row["number"]: row["front"] for row in sweep.rows()}
    points = [sweep.original, *sweep.done]
    cells = lambda p: (str(p.number or ""), "unpruned" if not p.number else p.label, *sweep.cells(p))  # noqa: E731
    return {
        "model": sweep.model,
        "plots": [Markup(draw(scatter)) for scatter in sweep.scatters()],
        "rows": [(*cells(p), " ".join({"macs": "MACs"}.get(by, by) for by in fronts.get(p.number, ()))) for p in points],
        "failed": [f"{p.number} {p.label}: {p.failed}" for p in sweep.points if p.failed],
    }


def embedded_svg(drawn: Sequence[str]) -> str:
    """Drawings below one another as an SVG document of its own, light or dark as its reader is."""
    moved = [
        text.replace("<svg ", f'<svg x="0" y="{SVG_HEIGHT * i}" width="{SVG_WIDTH}" height="{SVG_HEIGHT}" ', 1)
        for i, text in enumerate(drawn)
    ]
    size = f'viewBox="0 0 {SVG_WIDTH} {SVG_HEIGHT * len(drawn)}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{part('plot.css')}</style>", *moved, "</svg>", ""]
    )


def in_frame(model: str, page: str) -> str:
    """The page of a model in a frame, so that its styles stay in it."""
    return FRAME.format(title=html.escape(f"fxprune: {model}"), page=html.escape(page))


@functools.cache
def part(name: str) -> str:
    return (files("fxprune.reports") / "page_files" / name).read_text(encoding="utf-8")


@functools.cache
def environment() -> Environment:
    from jinja2 import DictLoader, Environment, StrictUndefined

    return Environment(
        loader=DictLoader({name: part(name) for name in TEMPLATES}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def embedded(data: Any) -> str:
    """Data as JSON that can stand in an element of HTML, whatever its texts hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_data(report: Any) -> dict[str, Any]:
    """What the template shows, with every number as the text that is shown."""
    pruned = bool(report.shrunk) or report.parameters[0] != report.parameters[1]
    families = [family_data(i, change, pruned=pruned) for i, change in enumerate(report.changes)]
    return {
        "model": report.model,
        "pruned": pruned,
        "totals": list(totals(report)),
        "sentences": list(report.sentences()),
        "families": families,
        "tree": tree_data(report),
        "places": places(report),
        "links": [[link.a, link.b, link.family, link.op, link.module] for link in report.links],
        "ratios": [ratio_data(report, r) for r in report.ratios],
        "curves": curves(report),
        "sweep": None if report.sweep is None else sweep_data(report.sweep),
        "exact": exactness(report.verification),
    }


def exactness(verification: Any) -> str:
    """Whether the result is exact, in a sentence."""
    if verification is None:
        return "The result was not compared with the original."
    if not verification.ok:
        return f"The result is not exact: {verification}."
    return f"The result is exact: its largest relative error is {verification.error:.1e}."


def totals(report: Any) -> Iterator[dict[str, Any]]:
    """The totals before and after, with the share that is left."""
    for name, pair, form in (
        ("Parameters", report.parameters, short),
        ("MACs", report.macs, short),
        ("Memory", report.bytes, in_bytes),
    ):
        if pair is not None:
            yield {"name": name, **change_data(pair, form)}
    if report.latency is not None:
        figures = change_data((report.latency.original, report.latency.pruned), seconds)
        yield {"name": "Latency", **figures, "left": percent(report.latency.share, 1)}


def change_data(pair: Sequence[float] | None, form: Any) -> dict[str, Any]:
    """A number before and after, as texts, and the share that is left in per cent."""
    if pair is None:
        return {"before": "", "after": "", "left": None}
    return {"before": form(pair[0]), "after": form(pair[1]), "left": percent(pair[1], pair[0])}


def percent(part: float, whole: float) -> float | None:
    """A share in per cent, with one decimal; None of nothing."""
    return round(100 * part / whole, 1) if whole else None


def seconds(value: float) -> str:
    """A time in three digits.

    >>> seconds(0.0000478), seconds(0.017), seconds(1.5)
    ('47.8 µs', '17.0 ms', '1.50 s')
    """
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if value >= 0.9995 * s), ("µs", 1e-6))
    number = value / size
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {unit}"


def family_data(number: int, change: Any, *, pruned: bool) -> dict[str, Any]:
    family = change.family
    whole = change.kept == family.units and (pruned or family.frozen is not None or family.units == 1)
    return {
        "name": family.name,
        "units": family.units,
        "kept": change.kept,
        "width": family.width,
        "left": short(change.left),
        "parameters": short(family.parameters),
        "share": percent(change.kept, family.units),
        "reason": change.reason if whole else "",
        "frozen": family.frozen is not None,
        "hue": round(number * GOLDEN_ANGLE % 360),
        "shift": SHIFTS[number % len(SHIFTS)],
        "places": list(dict.fromkeys(f"{place_of(name)}:{dim}" for name, dim in family.members)),
        "spans": family.spans(6).split(", "),
    }


def tree_data(report: Any) -> dict[str, Any] | None:
    """The modules as a tree, the model itself first; None where there are none."""
    owners: dict[tuple[str, int], list[int]] = {}
    for number, change in enumerate(report.changes):
        for member in change.family.members:
            owners.setdefault(member, []).append(number)
    nodes: dict[str, dict[str, Any]] = {}
    for module in report.modules:
        node = nodes[module.path] = module_data(module, owners)
        if module.path:
            above = module.path.rpartition(".")[0]
            while above not in nodes:  # of a module that is not in the result
                above = above.rpartition(".")[0]
            node["name"] = module.path[len(above) + 1 :] if above else module.path
            nodes[above]["children"].append(node)
    return nodes.get("")


def module_data(module: Any, owners: dict[tuple[str, int], list[int]]) -> dict[str, Any]:
    tensors, met = [], dict[int, None]()
    for tensor in module.tensors:
        name = f"{module.path}.{tensor.name}" if module.path else tensor.name
        dims = [owners.get((name, dim), []) for dim in range(len(tensor.before))]
        met.update(dict.fromkeys(i for dim in dims for i in dim))
        sizes = [str(a) if a == b else f"{a}→{b}" for a, b in zip(tensor.before, tensor.after, strict=True)]
        tensors.append({"name": tensor.name, "dims": list(zip(sizes, dims, strict=True))})
    kind, _, attributes = str(module).partition("(")
    return {
        "name": module.path or kind,
        "path": module.path,
        "kind": kind if module.path else "",
        "attributes": attributes.removesuffix(")"),
        "tensors": tensors,
        "families": list(met),
        "parameters": change_data(module.parameters, short),
        "macs": change_data(module.macs, short),
        "seconds": change_data(module.seconds, seconds),
        "changed": module.before != module.after or module.parameters[0] != module.parameters[1],
        "children": [],
    }


def places(report: Any) -> dict[str, str]:
    """For each layer that a family spans how it prints, with what changed; empty for a tensor that is none of a layer's."""
    printed = {module.path: str(module) for module in report.modules}
    names = dict.fromkeys(place_of(name) for change in report.changes for name, _ in change.family.members)
    order = {path: i for i, path in enumerate(printed)}
    known = sorted(names, key=lambda name: order.get(name, order.get(name.rpartition(".")[0], -1)))
    return {name: printed.get(name, "") for name in known}


def ratio_data(report: Any, found: Any) -> dict[str, Any]:
    pairs = [("Parameters", report.parameters[0], found.parameters, short), ("Memory", report.bytes[0], found.bytes, in_bytes)]
    if found.macs is not None:
        pairs.insert(1, ("MACs", report.macs[0], found.macs, short))
    if found.seconds is not None:
        pairs.append(("Estimated latency", report.latency.original, found.seconds, seconds))
    figures = [
        {"name": name, "exact": value if isinstance(value, int) else None, **change_data((whole, value), form)}
        for name, whole, value, form in pairs
    ]
    call = report.call.replace("{ratio}", f"{found.ratio:g}")
    return {"ratio": f"{found.ratio:g}", "figures": figures, "kept": list(found.kept), "call": call, "refused": found.refused}


def curves(report: Any) -> dict[str, Any] | None:
    """The curves of a sensitivity, with the number of the family of each; values that are none are left out."""
    found = report.sensitivity
    if found is None:
        return None
    numbers = {change.family.name: i for i, change in enumerate(report.changes)}
    finite = lambda v: v if math.isfinite(v) else None  # noqa: E731
    lines = [
        {
            "name": curve.family,
            "family": numbers.get(curve.family.partition(" & ")[0]),
            "values": [finite(found.whole), *map(finite, curve.values)],
            "texts": [f"{v:.4g}" for v in (found.whole, *curve.values)],
        }
        for curve in found.curves
    ]
    return {"ratios": [0.0, *found.ratios], "lines": lines}
