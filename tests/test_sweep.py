"""`sweep`: every point is what prune and repair give, from one scoring; it can be stopped and continued; fronts and pages."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from refusals import untouched
from torch import nn

import fxprune
from fxprune import PruneError
from fxprune.reports.sweep import Point, Sweep
from fxprune.selection import select

DATA = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


@torch.no_grad()
def size(module: nn.Module) -> float:
    """Something that every choice of units and every repair changes."""
    return float(sum(p.abs().double().sum() for p in module.parameters()))


def swept(model: nn.Module, evaluate=size, **asked):
    asked = {"budgets": {"macs": [0.6, 0.3]}, "data": [DATA], "measure": False, **asked}
    return fxprune.sweep(model, DATA[:1], evaluate, **asked)


def test_each_point_is_what_prune_gives():
    model = perceptron()
    with untouched(model):
        found = swept(
            model, budgets=[{"macs": [0.6, 0.3]}, {"ratio": 0.5}], criteria=["wanda", "magnitude"], rankings=["global", "local"]
        )
    asked = [
        {**budget, "criterion": criterion, "ranking": ranking}
        for criterion in ("wanda", "magnitude")
        for ranking in ("global", "local")
        for budget in ({"macs": 0.6}, {"macs": 0.3}, {"ratio": 0.5})
    ]
    assert [p.asked for p in found.points] == asked
    assert [p.number for p in found.points] == list(range(1, 13))
    for point, how in zip(found.points, asked, strict=True):
        alone = fxprune.prune(model, example_inputs=DATA[:1], data=[DATA], repair=True, **how)
        assert point.plan == alone.meta["plan"]
        assert point.value == size(alone) == size(point.model())
        count = fxprune.count(alone, DATA[:1])
        assert (point.parameters, point.macs, point.bytes) == (count.parameters, count.macs, count.bytes)
        assert point.error == alone.meta["repair"].error[1]
    assert found.original.value == size(model)
    assert found.original.macs == fxprune.count(model, DATA[:1]).macs


def test_the_plan_of_a_point_applies_and_is_repaired_again():
    model = perceptron()
    point = swept(model)[2]
    again = fxprune.repair(model, point.plan.apply(model), [DATA])
    assert size(again) == point.value


def test_criteria_score_once(monkeypatch):
    scored = []
    original = select.score_units
    monkeypatch.setattr(select, "score_units", lambda *args: scored.append(args[3].__class__.__name__) or original(*args))
    read = []

    def batches():
        read.append(1)
        yield DATA

    found = swept(
        perceptron(),
        criteria=["wanda", "flap"],
        rankings=["local", "global"],
        budgets={"macs": [0.6, 0.3], "ratio": 0.5},
        data=batches(),
    )
    assert len(found.done) == 12
    assert scored == ["Wanda", "FLAP"] and read == [1]


def test_depth_and_attention_are_varied():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, dropout=0.0) for _ in range(2)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 5, 16)
    found = fxprune.sweep(
        model, x, size, budgets={"params": 0.6}, depth=[False, True], attention=["heads", "dims"], measure=False
    )
    assert [p.label for p in found.points] == [
        f"params=0.6 depth={depth} attention={attention} magnitude/local"
        for depth in (False, True)
        for attention in ("heads", "dims")
    ]
    for point, (depth, attention) in zip(found.points, [(d, a) for d in (False, True) for a in ("heads", "dims")], strict=True):
        alone = fxprune.prune(model, example_inputs=x, params=0.6, depth=depth, attention=attention)
        assert point.plan == alone.meta["plan"], point


class Stream(nn.Module):
    """A residual stream behind norms."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def test_bases_are_varied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), Stream(), Stream(), nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    found = swept(model, budgets={"params": 0.5}, basis=[None, "principal"])
    for point, basis in zip(found.points, (None, "principal"), strict=True):
        alone = fxprune.prune(
            model, example_inputs=DATA[:1], params=0.5, basis=basis, attention="heads", data=[DATA], repair=True
        )
        assert point.plan == alone.meta["plan"] and (point.plan.basis is None) == (basis is None)
        assert point.value == size(alone) and size(point.model()) == pytest.approx(point.value, rel=1e-6)


class Shy(nn.Module):
    """Reads the contents of a tensor, so that its module stays one node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x):
        x = self.second(self.first(x).relu())
        return x if float(x.abs().max()) < 1e6 else x / 2


def test_modules_that_are_not_captured_are_tried_for_each_point():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), Shy(), nn.Linear(12, 3)).eval()
    found = swept(model)
    for point, macs in zip(found.points, (0.6, 0.3), strict=True):
        try:
            alone = fxprune.prune(model, example_inputs=DATA[:1], macs=macs, attention="heads", data=[DATA], repair=True)
        except PruneError as error:
            assert point.failed == error.what
        else:
            assert point.plan == alone.meta["plan"] and point.value == size(alone)


def test_results_of_the_models_class():
    model = perceptron()
    seen = []
    found = swept(model, lambda m: seen.append(type(m)) or size(m), same_class=True)
    assert seen == [nn.Sequential] * 3 and type(found[1].model()) is nn.Sequential


def test_a_point_that_fails_is_a_row():
    def evaluate(module):
        if fxprune.count(module).parameters < 150:
            raise RuntimeError("too small to live")
        return 1.0

    found = swept(perceptron(), evaluate, budgets={"macs": [0.6, 0.01, 0.3]})
    assert [p.value for p in found.points] == [1.0, None, None]
    assert found.points[1].failed.startswith("macs=0.01 cannot be met")
    assert found.points[2].failed == "RuntimeError: too small to live"
    assert "3 macs=0.3 flap/global failed: RuntimeError: too small to live" in str(found)
    assert [p.number for p in found.front()] == [1]
    with pytest.raises(PruneError, match="point 2 is no pruned model"):
        found[2].model()
    nothing = swept(perceptron(), lambda m: 1.0 if fxprune.count(m).parameters > 400 else float("nan"))
    assert {p.failed for p in nothing.points} == {"evaluate returned nan"} and nothing.front() == ()


def test_what_evaluate_raises_for_the_original_passes_through():
    def evaluate(module):
        raise KeyError("no such image")

    with pytest.raises(KeyError, match="no such image"):
        swept(perceptron(), evaluate)


class Stopped(BaseException):
    pass


def test_a_sweep_is_continued(tmp_path):
    seen = []

    def evaluate(module):
        if len(seen) == 3:
            raise Stopped
        seen.append(module)
        return size(module)

    asked = {"criteria": ["wanda", "flap"], "folder": tmp_path / "sweep"}
    with pytest.raises(Stopped):
        swept(perceptron(), evaluate, **asked)
    seen[:] = [None] * 4  # from here on nothing stops it
    found = swept(perceptron(), evaluate, **asked)
    assert len(seen) == 6  # two of four points were there
    whole = swept(perceptron(), **{**asked, "folder": None})
    assert found == whole
    assert [p.plan for p in found.points] == [p.plan for p in whole.points]
    assert size(found[1].model()) == found[1].value
    again = swept(perceptron(), lambda module: 1 / 0, **asked)
    assert again == whole
    files = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    assert files == ["0000.json", *(f"000{i}.{kind}" for i in range(1, 5) for kind in ("json", "plan.json")), "request.json"]


def test_points_that_failed_or_are_damaged_are_tried_again(tmp_path):
    asked = {"folder": tmp_path / "sweep"}
    broken = swept(perceptron(), lambda m: size(m) if fxprune.count(m).parameters > 200 else 1 / 0, **asked)
    assert [bool(p.failed) for p in broken.points] == [False, True]
    (tmp_path / "sweep" / "0001.plan.json").write_text("{")
    seen = []
    found = swept(perceptron(), lambda m: seen.append(m) or size(m), **asked)
    assert len(seen) == 2 and found == swept(perceptron())


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"budgets": {"macs": [0.6, 0.2]}}, "of point 2 budget is"),
        ({"budgets": {"macs": 0.6}}, "it has 2 points, and here 1 are asked for"),
        ({"criteria": "wanda"}, 'of point 1 criterion is "flap" there and "wanda" here'),
        ({"repair": "compensate"}, 'repair is {} there and {"method": "compensate"} here'),
        ({"freeze": "0"}, "of point 1 frozen is {} there and"),
        ({"model": nn.Sequential(*perceptron()).requires_grad_(False)}, None),
        ({"model": nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 3))}, "the values of the model differ"),
    ],
)
def test_another_sweep_is_refused(tmp_path, other, what):
    folder = tmp_path / "sweep"
    swept(perceptron(), folder=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = other.pop("model", perceptron())
    if what is None:
        assert len(swept(model, folder=folder, **other)) == 2
        return
    with pytest.raises(PruneError, match=re.escape(f"{folder} holds another sweep: {what}")):
        swept(model, folder=folder, **other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PruneError, match=r"holds no sweep, but thesis\.tex"):
        swept(perceptron(), folder=tmp_path)
    with pytest.raises(PruneError, match="cannot be written"):
        swept(perceptron(), folder=tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"budgets": None}, "budgets are missing"),
        ({"budgets": [0.5, 0.25]}, "budgets must say what kind and how much"),
        ({"budgets": {"mac": 0.5}}, "there is no budget of 'mac'"),
        ({"budgets": {"macs": []}}, "macs holds no alternatives"),
        ({"budgets": {"macs": 0}}, "macs must be a positive number, not 0"),
        ({"criteria": ["magnitud"]}, "magnitud"),
        ({"rankings": ["all"]}, "ranking must be one of local, global, isomorphic, not 'all'"),
        ({"evaluate": 3}, "evaluate must be a function, not 3"),
        ({"evaluate": lambda m: "good"}, "evaluate must return a number, not str"),
        ({"repair": "mend"}, "there is no method 'mend'"),
        ({"data": None, "repair": True}, "repair looks at data, and there are none"),
        ({"widths": 3}, "sweep has no argument 'widths'"),
        ({"depth": ["deep"]}, "depth must be True, False, 'only' or 'blocks', not 'deep'"),
    ],
)
def test_what_is_refused(asked, what):
    model = perceptron()
    evaluate = asked.pop("evaluate", size)
    with untouched(model), pytest.raises(PruneError, match=re.escape(what)):
        swept(model, evaluate, **asked)


def made_up() -> Sweep:
    figures = [(0.9, 50, 0.6), (0.8, 50, 0.5), (0.7, 20, 0.7), (0.9, 60, 0.4), (0.6, 20, 0.3)]
    points = [
        Point(i, {"macs": 0.5, "criterion": "a<b", "ranking": "local"}, v, 10 * m, m, 40 * m, t * 0.01, t)
        for i, (v, m, t) in enumerate(figures, 1)
    ]
    return Sweep("Net", Point(0, {}, 0.95, 1000, 100, 4000, 0.01, 1.0), (*points, Point(6, {"macs": 0.1}, failed="<no>")))


def test_fronts():
    """Point 1 beats 2 and 4 by multiply-accumulates, and 3 beats 5; by latency 4 beats 1, 2 and 3."""
    found = made_up()
    assert [p.number for p in found.front()] == [3, 1]
    assert [p.number for p in found.front("latency")] == [5, 4]
    assert [row["front"] for row in found.to_dict()["points"]] == [
        ["macs", "parameters", "bytes"], [], ["macs", "parameters", "bytes"], ["latency"], ["latency"], []
    ]  # fmt: skip
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(PruneError, match="by must be one of macs, latency, parameters, bytes"):
        found.front("speed")


def test_the_table_fits():
    lines = repr(made_up()).splitlines()
    assert lines[0] == "Net: 6 points, 1 of which failed"
    assert max(map(len, lines)) <= 80
    assert lines[4].split() == ["unpruned", "0.95", "1.00", "k", "100", "10"]
    assert lines[5].split() == ["1", "macs=0.5", "a<b/local", "0.9", "500", "50", "6", "MACs"]
    assert lines[8].split()[-2:] == ["4", "latency"]
    assert lines[-1] == "6 macs=0.1 failed: <no>"


def test_pages_and_plots(tmp_path):
    found = made_up()
    found.plot(tmp_path / "plot.svg")
    drawn = ET.parse(tmp_path / "plot.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    charts = drawn.findall(f"{name}svg")
    assert len(charts) == 2
    assert [[len(c.findall(f"{name}circle")), len(c.find(f"{name}polyline").get("points").split())] for c in charts] == [
        [6, 2]
    ] * 2
    spots = {c.find(f"{name}title").text: (float(c.get("cx")), float(c.get("cy"))) for c in charts[0].findall(f"{name}circle")}
    x = lambda text: next(at[0] for told, at in spots.items() if told.startswith(text))  # noqa: E731
    assert x("unpruned") - x("1:") == pytest.approx((x("1:") - x("3:")) * 5 / 3, abs=0.3)
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a&lt;b" in page and "a<b" not in page and "&lt;no&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "url(" not in page and "prefers-color-scheme: dark" in page
    assert found._repr_html_().startswith("<iframe")


def test_the_report_shows_it(tmp_path):
    model = perceptron()
    found = swept(model)
    shown = fxprune.report(model, found[1].model(), DATA[:1], sweep=found)
    shown.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<section id="sweep"' in page and '<a href="#sweep">' in page and page.count("<circle class=") >= 3
    assert shown.to_dict()["sweep"] == found.to_dict()
    assert '<section id="sweep"' not in fxprune.report(model, found[1].model())._repr_html_()
    with pytest.raises(PruneError, match=r"sweep must be what fxprune\.sweep or"):
        fxprune.report(model, found[1].model(), sweep=3)


def test_results_are_timed():
    found = swept(perceptron(), measure=True)
    for point in (found.original, *found.points):
        assert point.seconds > 0 and point.latency > 0
    assert found.original.latency == 1
    assert {p.number for p in found.front("latency")} <= {1, 2}


def test_it_is_gone_through_point_by_point():
    found = swept(perceptron())
    assert [p.number for p in found] == [1, 2] and found.points[1] in found


def test_a_model_that_is_trained_to_be_evaluated_is_not_the_original():
    def tuned(module):
        with torch.enable_grad():
            optimizer = torch.optim.SGD(module.parameters(), 0.1)
            module(DATA).square().mean().backward()
            optimizer.step()
        return size(module)

    model = perceptron()
    with untouched(model):
        found = swept(model, tuned, budgets={"macs": 0.5}, criteria="magnitude", repair=False)
    assert found.original.value != size(model)
    alone = fxprune.prune(model, example_inputs=DATA[:1], macs=0.5, criterion="magnitude", ranking="local")
    assert size(found.points[0].model()) == size(alone)


def test_criteria_without_names_are_told_apart():
    criteria = [lambda weight: weight.abs(), lambda weight: -weight.abs()]
    first, second = swept(perceptron(), budgets={"ratio": 0.5}, criteria=criteria, repair=False).points
    assert first.plan != second.plan


@pytest.mark.parametrize("flag", ["measure", "same_class"])
def test_flags_are_flags(flag):
    with pytest.raises(PruneError, match=f"{flag} must be True or False, not 'no'"):
        swept(perceptron(), **{flag: "no"})
