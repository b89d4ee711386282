"""The clock of `examples/benchmarks/phases.py`."""

import itertools

import pytest


@pytest.mark.usefixtures("benchmarks")
def test_what_is_inside_of_a_step_counts_once(monkeypatch):
    import phases

    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
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
