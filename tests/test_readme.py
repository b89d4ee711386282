"""Every Python block of the documentation runs as printed.

The blocks of one document run in order and share their names, as a reader would type them. One that needs an optional
package stands below a comment, `<!-- needs: PACKAGE -->`. The extra `test` has every such package, so none is skipped.
"""

import importlib.util
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib
import torch
from clocks import counting_clock

import fxprune
from fxprune.cli.main import main
from fxprune.criteria.catalog import CRITERIA
from fxprune.passes.capture.patching import PATCHES
from fxprune.passes.ops import registry
from fxprune.repairs.methods import METHODS
from fxprune.selection import latency
from fxprune.selection.budgets import KINDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"^(?:<!-- needs: (.*?) -->\n+)?```python[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block, padded with the lines above it so that a traceback names the document's own line."""

    code: str
    needs: tuple[str, ...] = ()

    @property
    def line(self) -> int:
        return len(self.code) - len(self.code.lstrip("\n")) + 1


def code_blocks(text):
    for match in FENCE.finditer(text):
        needs = tuple(name.strip() for name in (match[1] or "").split(",") if name.strip())
        yield Block("\n" * text.count("\n", 0, match.start(2)) + match[2], needs)


def blocks_of(name):
    return list(code_blocks((ROOT / name).read_text()))


NEEDING = [(name, needs) for name in DOCUMENTS for needs in dict.fromkeys(b.needs for b in blocks_of(name)) if needs]


def test_the_pictures_are_drawn_by_the_tool():
    """What docs/images/draw.py draws from what fxprune finds is what the pages show."""
    folder = ROOT / "docs" / "images"
    spec = importlib.util.spec_from_file_location("draw_pictures", folder / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = module.main()
    assert drawn == {path.name: path.read_text() for path in folder.glob("*.svg")}
    assert all(f"images/{name}" in (ROOT / "docs" / "concepts.md").read_text() for name in drawn)


def test_blocks_are_found_with_their_line_numbers():
    text = "one\n```python\nx = 1\n```\n```text\nskip\n```\n```sh\nls\n```\n"
    text += "<!-- needs: a, b -->\n```python\n1 / 0\n```\n"
    assert [block.code.strip() for block in code_blocks(text)] == ["x = 1", "1 / 0"]
    assert [block.line for block in code_blocks(text)] == [3, 13]
    assert [block.needs for block in code_blocks(text)] == [(), ("a", "b")]


@pytest.fixture
def tables():
    """The tables that blocks add to, restored afterwards."""
    touched = (CRITERIA, KINDS, METHODS, registry.SPECS, registry.FUNCTIONS)
    before, patches = [(table, dict(table)) for table in touched], list(PATCHES)
    yield
    PATCHES[:] = patches
    for table, entries in before:
        table.clear()
        table.update(entries)
    registry.forget()


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("name", [name for name in DOCUMENTS if any(not b.needs for b in blocks_of(name))])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks may save files
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)  # to measure takes minutes on a busy machine
    run(name, [block for block in blocks_of(name) if not block.needs])


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(("name", "needs"), NEEDING, ids=[f"{name}:{','.join(needs)}" for name, needs in NEEDING])
def test_blocks_that_need_a_package_run(name, needs, tmp_path, monkeypatch):
    """In order, with all blocks before them that need nothing. None is skipped: the extra `test` has what they need."""
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    assert not missing, f"{name} needs {', '.join(missing)}: pip install -e '.[test]'"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    # which torch.testing takes from all tests, and trainers change
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    blocks = [block for block in blocks_of(name) if block.needs in ((), needs)]
    while not blocks[-1].needs:
        blocks.pop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' own
        run(name, blocks)


def run(name, blocks):
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block.code, str(ROOT / name), "exec"), names)


def test_notebook_runs(tmp_path, monkeypatch):
    """The code of examples/first_model.ipynb, cell by cell; it holds no outputs."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "first_model.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not any(cell["outputs"] for cell in code)
    run("examples/first_model.ipynb", [Block("".join(cell["source"])) for cell in code])


SHELL = re.compile(r"^```sh[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_commands_run(tmp_path, monkeypatch, capsys):
    """Every line of docs/command-line.md that a reader would type, after the block that writes the model."""
    monkeypatch.chdir(tmp_path)
    page = "docs/command-line.md"
    run(page, blocks_of(page))
    lines = [line for block in SHELL.findall((ROOT / page).read_text()) for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert (program, main(arguments), capsys.readouterr().err) == ("fxprune", 0, ""), line
    assert {path.name for path in tmp_path.iterdir()} >= {"small.safetensors", "report.html"}


def packages_of_extra(extra):
    """The packages that an extra of pyproject.toml names, those of other extras included."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = set()
    for requirement in extras[extra]:
        if inner := re.fullmatch(r"fxprune\[(\w+)\]", requirement):
            found |= packages_of_extra(inner[1])
        else:
            found.add(re.match(r"[\w-]+", requirement)[0])
    return found


def test_no_block_needs_what_the_tests_do_not_install():
    installed = packages_of_extra("test")
    needing = [f"{name}:{b.line}" for name in DOCUMENTS for b in blocks_of(name) if not installed.issuperset(b.needs)]
    assert needing == []
    assert {"diffusers", "onnx", "ultralytics"} <= {package for _, needs in NEEDING for package in needs} <= installed


def test_every_block_runs():
    """None is fenced in another way, which would not be found."""
    fences = {line for name in DOCUMENTS for line in (ROOT / name).read_text().splitlines() if line.startswith("```py")}
    assert fences == {"```python"}


def test_every_public_name_is_in_the_reference():
    pages = "".join((ROOT / page).read_text() for page in PAGES if page.startswith("docs/api/"))
    entries = {entry.rpartition(".")[2] for entry in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    listed = {name for names in re.findall(r"members: \[(.*)\]", pages) for name in names.split(", ")}
    assert set(fxprune.__all__) - entries - listed == set()
    assert {type(criterion).__name__ for criterion in CRITERIA.values()} <= listed


LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name):
    """Of what is no page of the site, which `make docs` checks."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    assert [link for link in LINK.findall(text) if link and not (ROOT / link).exists()] == []


def test_the_readme_shows_code():
    assert blocks_of("README.md")
