"""What holds for all tests: an error of the compiler's own is an error, not the next rung of its ladder."""

import os
import sys
from pathlib import Path

import pytest

os.environ["FXPRUNE_STRICT"] = "1"


@pytest.fixture
def benchmarks(monkeypatch):
    """Scripts of the benchmarks import each other by name, as when one of them is run."""
    folder = str(Path(__file__).parents[1] / "examples" / "benchmarks")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(folder)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]
