"""The table of `examples/benchmarks/latency.py`."""

import pytest
import torch
from torch import nn


def row(seed, accuracy):
    met = {
        "share": 0.48,
        "error": 0.2,
        "accuracy": accuracy,
        "branches": ["layers.1"],
        "chosen": "way=flap (depth=True), since",
    }
    ways = {"channels": {"failed": "cannot be met"} if seed else met, "channels, blocks": met}
    original = {"accuracy": 0.9, "milliseconds": 2.5}
    job = {"network": "vit", "batch": 32, "share": 0.5, "seed": seed}
    return {**job, "status": "measured", "original": original, "ways": ways, "machine": "a machine"}


@pytest.mark.usefixtures("benchmarks")
def test_ways_and_budgets_that_were_not_met():
    import latency

    page = latency.table([row(0, 0.75), row(1, 0.85), {"status": "failed"}])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| vit")]
    assert [line[4] for line in lines] == ["nothing: 2.50 ms", "channels", "channels, blocks"] * 2
    assert lines[2][5:] == ["48.0%", "20.0%", "75.0%", "flap", "layers.1"] and lines[4][5:] == ["", "", "", "", "cannot be met"]
    assert "channels met 1 of 2; channels, blocks 80.0% (unpruned 90.0%)" in page


@pytest.mark.usefixtures("benchmarks")
def test_heads_are_frozen_where_there_are_any(monkeypatch):
    import latency
    from networks import build

    assert list(latency.ways(build("vit"))) == ["channels", "channels, heads", "channels, heads, blocks"]
    assert latency.ways(build("vit"))["channels"]["freeze"] == [f"layers.{i}.attention/" for i in range(3)]
    assert list(latency.ways(build("resnet20"))) == ["channels", "channels, blocks"]
    monkeypatch.setattr(latency, "ROUNDS", 5)
    times = latency.in_turns({"": nn.Linear(4, 4), "small": nn.Linear(4, 1)}, torch.zeros(1, 4))
    assert [len(found) for found in times.values()] == [5, 5]
