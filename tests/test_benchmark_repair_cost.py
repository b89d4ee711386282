"""The table of `examples/benchmarks/repair_cost.py`."""

import pytest


@pytest.mark.usefixtures("benchmarks")
def test_parts_of_a_repair_add_up(monkeypatch, tmp_path, capsys):
    import repair_cost

    monkeypatch.setattr(repair_cost, "TABLE", tmp_path / "REPAIR_COST.md")
    repair_cost.main(["--models", "mobilenet_v2", "--images", "4", "--rounds", "1"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| mobilenet_v2"))
    _, _, whole, moments, solves, rest = (cell.strip() for cell in row.strip("|").split("|"))
    assert float(moments) + float(solves) + float(rest) == pytest.approx(float(whole), abs=0.2)
