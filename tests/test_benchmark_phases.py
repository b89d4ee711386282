"""The clock of `examples/benchmarks/phases.py`."""

import itertools
import json
from pathlib import Path

import pytest


@pytest.mark.usefixtures("benchmarks")
def test_what_is_inside_of_a_step_counts_once(monkeypatch):
    import phases

    ticks = itertools.count()
    monkeypatch.setattr("time.process_time", lambda: float(next(ticks)))
    clock = phases.Clock()
    inner = clock.timed("inner", lambda: None)
    outer = clock.timed("outer", lambda: (inner(), inner()))
    outer()
    assert clock.spent == {"inner": 2.0, "outer": 3.0}  # readings 0 to 5: the whole takes 5


@pytest.mark.usefixtures("benchmarks")
def test_every_step_is_met(capsys):
    import phases

    phases.main(["--models", "squeezenet1_1", "--rounds", "1"])
    row = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "squeezenet1_1"
    shares = [int(cell.rstrip("%")) for cell in cells[2:]]
    assert 97 <= sum(shares) <= 103 and shares[-1] < 50


@pytest.mark.usefixtures("benchmarks")
def test_another_checkout_is_timed_in_turns(tmp_path, monkeypatch, capsys):
    """A checkout against itself: both sides run, and the table gives the median of the ratios."""
    import compare
    import phases

    monkeypatch.setattr(compare, "ROWS", tmp_path / "phases.jsonl")
    monkeypatch.setattr(compare, "TABLE", tmp_path / "PHASES.md")
    root = str(Path(__file__).parents[1])
    phases.main(["--against", root, "--models", "timm:test_resnet", "--rounds", "1"])
    [row] = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    assert all(len(row["seconds"][mode][side]) == 1 for mode in compare.MODES for side in compare.SIDES)
    assert "| timm:test_resnet |" in capsys.readouterr().out


@pytest.mark.usefixtures("benchmarks")
def test_the_ratio_is_the_median_of_rounds():
    import compare

    row = {"seconds": {"by default": {"before": [1.0, 2.0, 4.0], "after": [1.5, 2.0, 2.0]}}}
    assert compare.ratio(row, "by default") == 1.0
