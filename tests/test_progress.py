"""Progress bars: made in one place, shown after two seconds where stderr is a terminal, switched by one switch."""

import ast
import io
import sys

import pytest
import torch
from test_architecture import sources
from torch import nn

import fxprune
from fxprune.passes.ir import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def as_at_the_start(monkeypatch):
    monkeypatch.delenv("FXPRUNE_PROGRESS", raising=False)
    yield
    fxprune.progress()


def test_one_place_makes_them():
    """The package imports tqdm and rich's progress nowhere else."""
    found = set()
    for name, (_, tree) in sources().items():
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import | ast.ImportFrom) and {m.partition(".")[0] for m in modules} & {"tqdm"}:
                found.add(name)
            assert not any(m == "rich.progress" for m in modules)
    assert found == {"fxprune.passes.ir.progress"}


@pytest.mark.parametrize(
    ("switch", "environment", "terminal", "shown"),
    [
        (None, None, True, True),
        (None, None, False, False),
        (None, "0", True, False),
        (None, "1", False, True),
        (False, "1", True, False),
        (True, "0", False, True),
    ],
)
def test_the_switch(monkeypatch, switch, environment, terminal, shown):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    if environment is not None:
        monkeypatch.setenv("FXPRUNE_PROGRESS", environment)
    fxprune.progress(switch)
    assert progress.is_shown() is shown
    monkeypatch.setattr(progress, "DELAY", 0.0)
    assert list(progress.progress_bar(range(3), "counting", "number")) == [0, 1, 2]
    assert ("counting" in sys.stderr.getvalue()) is shown


def test_nothing_is_shown_of_what_is_over_soon(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress.progress_bar(range(5), "counting"):
        pass
    assert sys.stderr.getvalue().strip() == ""


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 6)


def words_shown(monkeypatch, work):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "DELAY", 0.0)
    work()
    return sys.stderr.getvalue()


def test_prune_says_what_it_does(monkeypatch):
    net, x = model()
    shown = words_shown(monkeypatch, lambda: fxprune.prune(net, 0.5, x))
    assert all(word in shown for word in ("tracing", "coupling", "scores"))
    assert shown.endswith("\r"), "a bar is gone when it is done"


def test_repair_and_sweeps_say_what_they_do(monkeypatch):
    net, x = model()
    small = fxprune.prune(net, 0.5, x)
    assert "repair" in words_shown(monkeypatch, lambda: fxprune.repair(net, small, [x]))
    assert "sensitivity" in words_shown(monkeypatch, lambda: fxprune.sensitivity(net, x, lambda m: 0.0, ratios=(0.5,)))
    assert "costs of ratios" in words_shown(monkeypatch, lambda: fxprune.report(net, small, x))


def test_the_search_for_a_latency_says_what_it_does(monkeypatch):
    from clocks import counting_clock

    monkeypatch.setattr("fxprune.selection.latency.measure_seconds", counting_clock)
    net, x = model()
    assert "latency search" in words_shown(monkeypatch, lambda: fxprune.prune(net, None, x, latency=0.6))


def test_results_do_not_depend_on_it(monkeypatch):
    net, x = model()
    silent = fxprune.plan_of(fxprune.prune(net, 0.5, x))
    words_shown(monkeypatch, lambda: None)
    assert fxprune.plan_of(fxprune.prune(net, 0.5, x)) == silent
