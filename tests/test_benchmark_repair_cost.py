"""The table of `examples/benchmarks/repair_cost.py`."""

import pytest


@pytest.mark.usefixtures("benchmarks")
def test_parts_of_a_repair_add_up(monkeypatch, tmp_path, capsys):
    import repair_cost

    monkeypatch.setattr(repair_cost, "TABLE", tmp_path / "REPAIR_COST.md")
    repair_cost.main(["--models", "timm:test_resnet", "--images", "4", "--rounds", "1"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| timm:test_resnet"))
    _, _, whole, *parts = (cell.strip() for cell in row.strip("|").split("|"))
    assert len(parts) == 4 and sum(map(float, parts)) == pytest.approx(float(whole), abs=0.25)
    assert float(parts[0]) > 1, "the original runs once at least"
