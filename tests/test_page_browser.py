"""The page of a report in a real browser: it fits, it is silent, and it works by keyboard.

Chromium is that of the system, driven by playwright; without either the tests are skipped.
"""

import shutil

import pytest
from pages import MODELS, RATIOS, reported, swept

import fxprune
from fxprune.cli.inspect import whole_report

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'fxprune[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: apt-get install chromium")

WIDTHS = (360, 800, 1400)
every_model = pytest.mark.parametrize("name", MODELS)
TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width && box.right > document.documentElement.clientWidth + 1 && !element.closest('.scroll, nav, .arcs, .skip');
}).map((element) => element.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name in MODELS:
        reported(name)[-1].to_html(folder / f"{name}.html")
    swept().to_html(folder / "sweep.html")
    model, x, *_ = reported("resnet")
    whole_report(model, x, {}).to_html(folder / "inspected.html")
    return folder


@pytest.fixture
def visit(browser, pages):
    """Open a page; at the end it must have asked for nothing and complained of nothing."""
    said, contexts = [], []

    def open_page(name, width=1400, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
        page.goto((pages / f"{name}.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("name", [*MODELS, "inspected"])
def test_it_fits_at_every_width_in_light_and_dark(visit, name):
    grounds = set()
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page = visit(name, width, scheme)
            assert page.evaluate(TOO_WIDE) == []
            page.get_by_role("button", name="Open all").click()
            page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
            page.locator("#members li").nth(1).click()
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(TOO_WIDE) == []
            grounds.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert len(grounds) == 2, "one ground for light, another one for dark"


def test_charts_and_names_can_be_read_on_a_phone(visit):
    """Labels of charts keep their size, a value stays on its line, and no name of a layer is cut off."""
    page = visit("swin", 360)
    for chart in ("#ratio-chart", "#curve-chart"):
        heights = page.locator(f"{chart} text").evaluate_all("texts => texts.map((t) => t.getBoundingClientRect().height)")
        assert min(heights) >= 11, chart
    lines = page.locator("#curve-list .value").evaluate_all("values => values.map((v) => v.getClientRects().length)")
    assert set(lines) == {1}
    for name in page.locator("#members .name").all():
        assert name.evaluate("n => n.scrollWidth <= n.clientWidth && n.getBoundingClientRect().height <= 32")
    spans = page.locator(".spans").all_text_contents()
    assert spans and not any("," in text for text in spans)


def test_the_page_of_a_sweep_fits_and_has_every_point(visit):
    grounds = set()
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page = visit("sweep", width, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(TOO_WIDE) == []
            grounds.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert len(grounds) == 2, "one ground for light, another one for dark"
    plots = page.locator("svg[role=img]")
    assert plots.count() > 0
    for plot in plots.all():
        assert plot.locator("circle:not(.whole)").count() == len(swept().points) == 4
        assert plot.bounding_box()["width"] > 200


@every_model
def test_the_sliders_figures_are_those_that_prune_gives(visit, name):
    model, x, *_ = reported(name)
    page = visit(name)
    slider = page.locator("#ratio")
    slider.focus()
    page.keyboard.press("Home")
    for ratio in RATIOS:
        assert page.locator("#ratio-value").text_content() == slider.get_attribute("aria-valuetext").split()[1] == f"{ratio:g}"
        counted = fxprune.count(fxprune.prune(model, ratio, x, verify=False), x)
        shown = {
            item.get_attribute("data-figure"): int(item.locator(".big").get_attribute("data-value"))
            for item in page.locator("#ratio-figures li").all()
        }
        assert shown == {"Parameters": counted.parameters, "MACs": counted.macs, "Memory": counted.bytes}
        assert f"prune(model, {ratio:g}, " in page.locator("#ratio-call").text_content()
        page.keyboard.press("ArrowRight")


def test_the_coupling_is_walked_by_keyboard(visit):
    page = visit("resnet")
    names = [change.family.name for change in reported("resnet")[-1].changes]
    page.get_by_label("Family", exact=True).focus()
    page.get_by_label("Family", exact=True).select_option(label="conv1")
    page.locator("#members li").first.focus()
    assert page.evaluate("document.activeElement.dataset.place") == "conv1:0"
    keys = {"ArrowDown": "bn1:0", "End": "layer2.0.downsample.0:1", "ArrowUp": "layer2.0.conv1:1", "Home": "conv1:0"}
    for key, place in keys.items():
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.place") == place
    page.keyboard.press("Enter")
    assert page.locator("#panel h3").text_content() == "conv1"
    tied = page.locator("#members li:has(.by)")
    found = {row.get_attribute("data-place"): row.locator(".by").get_attribute("title") for row in tied.all()}
    links = reported("resnet")[-1].links
    ends = [(link.b if link.a == "conv1:0" else link.a, link) for link in links if "conv1:0" in (link.a, link.b)]
    assert found == {place: f"{link.op} in {link.module}" for place, link in ends}
    assert found["layer1.0.conv2:0"] == "iadd in layer1.0"
    assert page.locator("#arcs path.on").count() == len(ends)
    page.locator("#panel .ties button", has_text="layer1.0.conv1:1").press("Enter")
    assert page.locator("#panel h3").text_content() == "layer1.0.conv1"
    page.locator("#panel button[data-family]", has_text="layer1.0.conv1").press("Enter")
    assert page.locator("#walk-family").input_value() == str(names.index("layer1.0.conv1"))


def test_a_layer_is_found_by_name(visit):
    page = visit("llama")
    page.get_by_label("Layer", exact=True).fill("model.layers.1.mlp.down_proj")
    page.keyboard.press("Tab")
    assert page.locator("#panel h3").text_content() == "model.layers.1.mlp.down_proj"
    assert "in_features=48→24" in page.locator("#panel code").text_content()


def test_a_family_is_opened_from_the_tree_by_keyboard(visit):
    page = visit("resnet")
    layer = page.locator(".tree li[data-name='conv1 conv2d'] > details")
    layer.locator("> summary").focus()
    page.keyboard.press("Enter")
    assert layer.evaluate("d => d.open")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#walk-family option:checked").text_content() == "conv1"


def test_modules_are_filtered(visit):
    page = visit("swin")
    page.get_by_label("Filter", exact=True).fill("layernorm")
    shown = {item.get_attribute("data-name") for item in page.locator(".tree li[data-name]:visible").all()}
    assert "norm layernorm" in shown and not any(name.endswith(" linear") for name in shown)
    page.get_by_label("Filter", exact=True).fill("")
    assert page.locator(".tree li[data-name='head linear']").is_visible()


def test_light_and_dark_are_switched_and_remembered(visit):
    page = visit("resnet", scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Switch between light and dark").press("Enter")
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Switch between light and dark").press("Enter")
    assert page.evaluate(ground) == dark


def test_curves_of_a_sensitivity_are_chosen(visit):
    page = visit("swin")
    assert page.locator("#curve-chart path").count() == len(reported("swin")[-1].sensitivity.curves)
    page.locator("#curve-list button").first.press("Enter")
    assert page.locator("#curve-chart path.on").count() == 1


INKS, GROUNDS = ("--ink", "--soft", "--accent", "--warn"), ("--card", "--paper", "--accent-soft")
COLOURS = """(names) => Object.fromEntries(names.map((name) => {
    const probe = document.createElement('i');
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    return [name, getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number)];
}))"""


def test_text_can_be_read(visit):
    """The contrast of text with its ground is at least 4.5 (WCAG 2.1, 1.4.3), in light and dark."""
    for scheme in ("light", "dark"):
        page = visit("resnet", scheme=scheme)
        colours = page.evaluate(COLOURS, [*INKS, *GROUNDS])
        pairs = [(colours[a], colours[b]) for a in INKS for b in GROUNDS]
        for ink, ground in pairs:
            assert contrast(ink, ground) >= 4.5, (scheme, ink, ground)


def contrast(a, b):
    """The ratio of the relative luminances of two colours of sRGB, by the definition of WCAG 2.1."""

    def luminance(colour):
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)
