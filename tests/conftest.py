"""What holds for all tests: an error of the compiler's own is an error, not the next rung of its ladder."""

import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxprune.passes.ops import registry

os.environ["FXPRUNE_STRICT"] = os.environ["FXPRUNE_TRACEBACK"] = "1"
os.environ.setdefault("FUZZ_SEED", str(random.SystemRandom().randrange(10**9)))  # workers of a parallel run inherit it


def pytest_collection_finish(session):
    """Garbage collection looked through what torch and the tests are made of, again and again: a twelfth of the CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2000, 10, 50)


def pytest_terminal_summary(terminalreporter):
    """Also where nothing fails and the header is not shown."""
    terminalreporter.write_line(f"random programs: FUZZ_SEED={os.environ['FUZZ_SEED']}")


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


@pytest.fixture
def own_ops() -> Iterator[None]:
    """What a test registers is known in that test alone."""
    tables = (registry.SPECS, registry.FUNCTIONS)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    registry.forget()
