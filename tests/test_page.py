"""The page of a report, without a browser: that it is whole, refers to nothing outside, and says what the report says."""

import html
import itertools
import json
import math
import re
import warnings

import pytest
import torch
from clocks import SECONDS, counting_clock
from pages import MODELS, RATIOS, Page, reported
from refusals import IMAGES, net
from torch import nn

import fxprune
from fxprune import PruneError, PruneWarning
from fxprune.reports.page import embedded, render

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_the_page_refers_to_nothing_outside(name):
    text = render(reported(name)[-1])
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base") or attributes.get("href") == "data:,"
        assert "src" not in attributes and "srcset" not in attributes and "action" not in attributes
        for key, value in attributes.items():
            assert not key.startswith("on"), f"a handler in the markup: {key}"
            assert "url(" not in (value or "")
    styles, scripts = page.all("style"), [text for attributes, text in page.all("script") if "type" not in attributes]
    assert len(styles) == len(scripts) == 1
    assert "url(" not in styles[0][1] and "@import" not in styles[0][1]
    urls = set(re.findall(r"\bhttps?://[^\s\"'<]+", text))
    assert urls <= {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    for word in ("fetch(", "XMLHttpRequest", "import(", "innerHTML", "eval("):
        assert word not in scripts[0]


@every_model
def test_all_ids_are_there_once_and_resolve(name):
    page = Page(render(reported(name)[-1]))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        wanted = [attributes.get(key) for key in ("for", "list", "aria-labelledby")]
        wanted.append(attributes["href"][1:] if attributes.get("href", "").startswith("#") else None)
        assert {found for found in wanted if found} <= set(ids)
    [script] = [text for attributes, text in page.all("script") if "type" not in attributes]
    for found in re.findall(r"byId\(\"([^\"]+)\"\)", script):
        assert found in ids or found in ("ratio", "curve-chart", "curve-list")  # of sections that are left out


def named(page):
    """For each element that a user operates whether something names it."""
    labelled = {attributes["for"] for attributes, _ in page.all("label") if "for" in attributes}
    for tag in ("button", "input", "select", "summary", "a"):
        for attributes, text in page.all(tag):
            yield attributes, bool(text.strip() or attributes.get("aria-label") or attributes.get("id") in labelled)


@every_model
def test_everything_that_is_operated_has_a_name(name):
    page = Page(render(reported(name)[-1]))
    assert [attributes for attributes, has in named(page) if not has] == []
    [(attributes, _)] = page.all("html")
    assert attributes["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


@every_model
def test_the_sliders_figures_are_those_that_prune_gives(name):
    model, x, _, found = reported(name)
    page = Page(render(found))
    assert [r["ratio"] for r in page.data["ratios"]] == [f"{r:g}" for r in RATIOS]
    for ratio, said, costs in zip(RATIOS, page.data["ratios"], found.ratios, strict=True):
        small = eval(said["call"], {"fxprune": fxprune, "model": model, "example_inputs": x})
        counted = fxprune.count(small, x)
        exact = {figure["name"]: figure["exact"] for figure in said["figures"]}
        assert exact == {"Parameters": counted.parameters, "MACs": counted.macs, "Memory": counted.bytes}
        assert (costs.ratio, costs.parameters, costs.macs) == (ratio, counted.parameters, counted.macs)
        kept = {c.family.name: c.kept for c in fxprune.report(model, small, ratios=()).changes}
        assert dict(zip([f["name"] for f in page.data["families"]], said["kept"], strict=True)) == kept
    table = [int(attributes["data-value"]) for attributes, _ in page.all("td") if "data-value" in attributes]
    assert table == [figure["exact"] for said in page.data["ratios"] for figure in said["figures"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"round_to": 4}, "round_to=4"),
        ({"ranking": "global", "floor": 0.2}, "ranking='global', floor=0.2"),
        ({"criterion": "bn_scale"}, "criterion='bn_scale'"),
    ],
)
def test_other_ratios_are_chosen_as_asked(options, said):
    model, x, small, _ = reported("resnet")
    for costs in fxprune.report(model, small, x, ratios=(0.3, 0.6), **options).ratios:
        other = fxprune.prune(model, costs.ratio, x, verify=False, **options)
        assert costs.parameters == sum(p.numel() for p in other.parameters())
        assert costs.macs == fxprune.count(other, x).macs
    found = fxprune.report(model, small, x, ratios=(0.3,), **options)
    assert said in found.call


def test_other_ratios_have_the_coupling_that_the_model_was_pruned_with():
    model = net()
    small = fxprune.prune(model, 0.5, IMAGES, freeze="stem", verify=False)
    found = fxprune.report(model, small, IMAGES, ratios=(0.25, 0.5))
    for costs in found.ratios:
        other = fxprune.prune(model, costs.ratio, IMAGES, freeze="stem", verify=False)
        assert costs.parameters == sum(p.numel() for p in other.parameters())
    call = found.call.replace("{ratio}", "0.5")
    again = eval(call, {"fxprune": fxprune, "model": model, "example_inputs": IMAGES})
    assert fxprune.plan_of(again).slices.keys() == fxprune.plan_of(small).slices.keys()


def test_a_ratio_that_prune_refuses_is_said_to_be():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(1, 4)
    small = fxprune.prune(model, 0.5, x)
    found = fxprune.report(model, small, x, ratios=(0.05, 0.5))
    first, second = found.ratios
    with pytest.raises(PruneError, match=re.escape(first.refused)):
        fxprune.prune(model, 0.05, x)
    assert first.parameters == 44 and dict(zip(names(found), first.kept, strict=True)) == {"0": 6, "0:1": 4, "2": 2}
    assert not second.refused and second.parameters == 23


def names(found):
    return [c.family.name for c in found.changes]


@every_model
def test_the_tree_has_every_module_with_its_numbers(name):
    model, x, small, found = reported(name)
    before, after = fxprune.count(model, x), fxprune.count(small, x)
    assert [m.path for m in found.modules] == [path for path, _ in model.named_modules()]
    for module in found.modules:
        one, other = before[module.path], after[module.path]
        assert module.parameters == (one.parameters, other.parameters)
        assert module.macs == (one.macs, other.macs) and module.bytes == (one.bytes, other.bytes)
        for tensor in module.tensors:
            held = small.get_submodule(module.path)
            assert tensor.after == tuple(getattr(held, tensor.name).shape)
    page = Page(render(found))
    shown = [attributes["data-name"] for attributes, _ in page.all("li") if "data-name" in attributes]
    assert shown == [f"{path} {type(module).__name__}".lower() for path, module in model.named_modules()]


@every_model
def test_the_graph_is_that_of_the_coupling(name):
    model, x, _, found = reported(name)
    graph = fxprune.couple(model, x).to_networkx()
    places = lambda node: f"{fxprune.passes.coupling.families.place_of(node[0])}:{node[1]}"  # noqa: E731
    expected = {frozenset([places(a), places(b)]) for a, b in graph.edges if places(a) != places(b)}
    assert {frozenset([link.a, link.b]) for link in found.links} == expected
    spans = {c.family.name: {places(member) for member in c.family.members} for c in found.changes}
    modules = dict(model.named_modules())
    for link in found.links:
        assert {link.a, link.b} <= spans[names(found)[link.family]]
        assert link.op == "shared" or link.module in modules
    tied = {(link.a, link.b): (link.op, link.module) for link in found.links}
    if name == "resnet":
        assert tied["conv1:0", "bn1:0"] == ("BatchNorm2d", "bn1")
        assert tied["layer1.0.conv1:0", "layer1.0.conv2:1"] == ("Conv2d", "layer1.0.conv2")
        assert tied["conv1:0", "layer1.0.conv2:0"] == ("iadd", "layer1.0")


HOSTILE = "</script><script>alert(1)</script>"


def test_texts_from_the_model_are_escaped():
    class Hostile(nn.Linear):
        def extra_repr(self):
            return '<img src=x onerror="alert(2)">'

    Hostile.__name__ = Hostile.__qualname__ = HOSTILE
    model = nn.Sequential()
    for i, layer in enumerate([Hostile(4, 6), nn.ReLU(), nn.Linear(6, 2)]):
        model.add_module(f"{HOSTILE.replace('.', '')}{i}", layer)
    x = torch.randn(1, 4)
    page = Page(render(fxprune.report(model, fxprune.prune(model, 0.5, x), x)))
    assert len(page.all("script")) == 2 and not page.all("img")
    assert f"{HOSTILE}0" in [f["name"] for f in page.data["families"]]
    assert any(HOSTILE in text for _, text in page.all("summary"))


def test_data_in_an_element_is_the_data():
    data = {"a": "</script><!-- & \u2028 '\"", "b": [1, None, 0.5]}
    text = embedded(data)
    assert json.loads(text) == data and not set("<>&") & set(text)


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found = reported("llama")[-1]
    path = tmp_path / "page.html"
    found.to_html(path)
    assert path.read_text(encoding="utf-8") == render(found)
    found.to_html(str(path))
    with pytest.raises(PruneError, match="cannot be written"):
        found.to_html(tmp_path / "none" / "page.html")

    with pytest.raises(PruneError, match="'None' is no path"):
        found.to_html(None)

    def broken(report):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxprune.reports.report.render", broken)
    with pytest.raises(PruneError, match="No space left"):
        found.to_html(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>") and [p.name for p in tmp_path.iterdir()] == [
        "page.html"
    ]


def test_a_notebook_shows_the_page_in_a_frame():
    found = reported("llama")[-1]
    [(attributes, _)] = Page(found._repr_html_()).all("iframe")
    assert attributes["srcdoc"] == render(found) and html.unescape(attributes["title"]) == "fxprune: LlamaForCausalLM"


def test_what_is_measured_is_shown(monkeypatch):
    monkeypatch.setattr("fxprune.reports.ratios.measure_seconds", counting_clock)
    monkeypatch.setattr("fxprune.selection.latency.measure_seconds", counting_clock)
    model, x, small, _ = reported("resnet")
    found = fxprune.report(model, small, x, measure=True, ratios=(0.5,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert found.latency.pruned > 0 and str(found.latency) in str(found)
    called = {m.path for m in found.modules if m.seconds}
    assert called == {path for path, _ in model.named_modules()}
    of = {m.path: m.seconds for m in found.modules}
    assert of[""][0] > of["layer1"][0] > of["layer1.0"][0] > of["layer1.0.conv1"][0] > 0
    assert found.ratios[0].seconds > 0
    names = [figure["name"] for figure in Page(render(found)).data["ratios"][0]["figures"]]
    assert names == ["Parameters", "MACs", "Memory", "Estimated latency"]


def test_modules_that_are_not_called_have_an_empty_time(monkeypatch):
    """So that each figure stands below its title: the list of layers of a Llama is not called, and has no time."""
    monkeypatch.setattr("fxprune.selection.latency.measure_seconds", counting_clock)
    model, x, small, _ = reported("llama")
    found = fxprune.report(model, small, x, measure=True, ratios=())
    assert next(m for m in found.modules if m.path == "model.layers").seconds is None
    figures = [text for _, text in Page(render(found)).all("summary") if "Llama" in text or "layers" in text]
    assert all(all(title in text for title in ("parameters", "MACs", "time")) for text in figures)
    assert len(figures) > 3


def test_the_estimated_latency_is_that_of_the_products(monkeypatch):
    """By a clock that counts what products compute, in a model of nothing else: two operations for each multiply-accumulate."""
    for place in ("reports.ratios", "reports.module_times", "selection.latency"):
        monkeypatch.setattr(f"fxprune.{place}.measure_seconds", counting_clock)
    model, x = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 32), nn.Linear(32, 8)), torch.randn(2, 8)
    small = fxprune.prune(model, 0.5, x)
    found = fxprune.report(model, small, x, measure=True, ratios=(0.25, 0.5))
    assert (found.latency.original, found.latency.pruned) == pytest.approx([2 * SECONDS * n for n in found.macs])
    assert [r.seconds for r in found.ratios] == pytest.approx([2 * SECONDS * r.macs for r in found.ratios])


def test_the_sensitivity_is_shown_where_it_is_given():
    *_, found = reported("swin")
    page = Page(render(found))
    lines = page.data["curves"]["lines"]
    assert [line["name"] for line in lines] == [curve.family for curve in found.sensitivity.curves]
    assert [line["values"] for line in lines] == [[found.sensitivity.whole, *c.values] for c in found.sensitivity.curves]
    families = page.data["families"]
    assert all(families[line["family"]]["name"] == line["name"].partition(" & ")[0] for line in lines)
    assert Page(render(reported("resnet")[-1])).data["curves"] is None


def test_values_that_are_no_numbers_are_left_out_of_the_plot():
    model, x = net(), IMAGES
    values = iter([1.0, math.nan, math.inf, 0.5, 0.25])
    sensitivity = fxprune.sensitivity(model, x, lambda m: next(values), ratios=(0.25, 0.5))
    found = fxprune.report(model, fxprune.prune(model, 0.5, x, verify=False), x, sensitivity=sensitivity)
    assert [line["values"] for line in Page(render(found)).data["curves"]["lines"]] == [[1.0, None, None], [1.0, 0.5, 0.25]]


def test_the_repr_is_a_summary_and_the_text_has_the_tables():
    found = reported("resnet")[-1]
    assert repr(found).splitlines() == list(found.sentences()) and len(repr(found).splitlines()) < 8
    assert str(found).startswith(repr(found).splitlines()[0]) and "stayed whole" in str(found)


def test_it_is_data():
    model, _, _, found = reported("llama")
    data = json.loads(json.dumps(found.to_dict()))
    assert data["model"] == "LlamaForCausalLM" and data["parameters"] == list(found.parameters)
    assert [c["reason"] for c in data["changes"]] == [c.reason for c in found.changes]
    assert len(data["modules"]) == len(list(model.modules()))


def test_without_inputs_there_are_no_multiply_accumulates():
    model, _, small, _ = reported("resnet")
    found = fxprune.report(model, small, ratios=(0.5,))
    assert found.macs is None and found.ratios[0].macs is None and found.modules[0].macs is None
    text = render(found)
    assert "MACs" not in text.partition('<script type="application/json"')[0].replace("MACs, ", "")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"measure": True}, "there are no example inputs"),
        ({"sensitivity": 3}, "not a int"),
        ({"ratios": (0.5, 1)}, "ratios must lie between 0 and 1"),
        ({"ratios": "half"}, "ratios must lie between 0 and 1"),
        ({"criterion": "magnitud"}, "magnitud"),
    ],
)
def test_what_cannot_be_reported(options, what):
    model, _, small, _ = reported("resnet")
    with pytest.raises(PruneError, match=what):
        fxprune.report(model, small, **options)


def test_warnings_of_other_ratios_are_left_to_prune():
    model = net()
    small = fxprune.prune(model, 0.5, IMAGES, verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PruneWarning)
        fxprune.report(model, small, IMAGES, ratios=(0.5,), scopes={"none": ["head"]})


class Asks(nn.Module):
    """Python reads what is in a tensor: the module stays one node, and is tried with what each ratio leaves."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(self.second(x) * (2.0 if float(x.sum()) > 0 else 1.0))


def test_other_ratios_of_a_model_that_is_not_captured_are_those_that_prune_gives():
    torch.manual_seed(0)
    model, x = Asks().eval(), torch.randn(2, 6)
    small = fxprune.prune(model, 0.5, x)
    assert small.meta["capture"].startswith("opaque")
    for costs in fxprune.report(model, small, x, ratios=(0.25, 0.5)).ratios:
        other = fxprune.prune(model, costs.ratio, x)
        assert costs.parameters == sum(p.numel() for p in other.parameters()) < 279
        assert costs.macs == fxprune.count(other, x).macs
