"""`examples/benchmarks/held_out.py`."""

import pytest
import torch


@pytest.mark.usefixtures("benchmarks")
def test_a_row_has_the_error_on_other_samples():
    import held_out

    model, inputs = held_out.build("bert")
    assert not torch.equal(inputs("train", 8), inputs("t10k", 8))
    assert held_out.error(model, model, inputs("t10k", 4)) == 0
    row = held_out.measure("bert", 8)
    assert 0 < row["after"] <= row["before"] < 2
    text = held_out.table([{"network": "bert", "samples": 8, **row, "before": 0.5, "after": 0.75}])
    assert "1 pairs of network and number of samples: worse than before in 1" in text and "| bert | 8 | 0.500 | 0.750 |" in text
