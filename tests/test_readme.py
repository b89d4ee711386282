"""Every Python block of the documents a newcomer reads first runs as printed.

The blocks of one document run in order and share their names, as a reader would type them. One that cannot
run here (it needs a download, say) is fenced as `python no-run`.
"""

import re
from pathlib import Path

import pytest

from fxprune.criteria.catalog import CRITERIA
from fxprune.passes.capture.patching import PATCHES
from fxprune.repair.methods import METHODS
from fxprune.selection.budgets import KINDS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
FENCE = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


def code_blocks(text):
    """Each block, padded with the lines above it so that a traceback names the document's own line."""
    for match in FENCE.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match.group(1)


def test_blocks_are_found_with_their_line_numbers():
    text = "one\n```python\nx = 1\n```\n```python no-run\nskip\n```\n```sh\nls\n```\n```python\n1 / 0\n```\n"
    assert [block.strip() for block in code_blocks(text)] == ["x = 1", "1 / 0"]
    assert [block.count("\n") for block in code_blocks(text)] == [3, 12]


@pytest.fixture
def tables():
    """The tables that blocks add to, restored afterwards."""
    before, patches = [(table, dict(table)) for table in (CRITERIA, KINDS, METHODS)], list(PATCHES)
    yield
    PATCHES[:] = patches
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks may save files
    names = {"__name__": "__main__"}
    for block in code_blocks((ROOT / name).read_text()):
        exec(compile(block, str(ROOT / name), "exec"), names)


def test_the_readme_shows_code():
    assert list(code_blocks((ROOT / "README.md").read_text()))
