"""What a layer reads is gathered once, and its result is looked up ahead by numbers where these say all."""

from collections import Counter

import pytest
import torch
from torch import nn

import fxprune
from fxprune.repairs import rows
from fxprune.repairs.interpreter import BatchInterpreter
from fxprune.repairs.look_ahead import Path
from fxprune.repairs.rows import Rows

DOUBLE = torch.float64


def small_net(*, streams=False):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.up, self.down = (
                nn.Conv2d(3, 12, 3),
                nn.Conv2d(12, 16, 3, padding=1),
                nn.Conv2d(16, 12, 3, padding=1),
            )
            self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (12, 16, 12))
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            x = self.norms[0](self.stem(x)).relu()
            y = self.norms[2](self.down(self.norms[1](self.up(x)).relu()))
            return self.head((x + y if streams else y).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Net().double().eval()
    for norm in model.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)  # also below zero
    return model


def test_a_layer_runs_twice_and_its_inputs_are_gathered_once(monkeypatch):
    """Once before it is changed and once after, in the original once; however often its fit is repeated."""
    model, data = small_net(streams=True), list(torch.randn(48, 3, 9, 9, dtype=DOUBLE).split(12))
    pruned = fxprune.prune(model, 0.5, example_inputs=data[0], criterion="random")
    runs, gathered, rounds = Counter(), Counter(), Counter()
    run_node, windows, move = BatchInterpreter.run_node, rows.windows, rows.RowFit.move

    def counted_run(self, node):
        runs[id(self), node.name] += node.op == "call_module" and isinstance(self.fetch_attr(node.target), nn.Conv2d)
        return run_node(self, node)

    def counted_windows(call, sizes, x, at=None):
        gathered[tuple(sizes), x.data_ptr()] += 1
        return windows(call, sizes, x, at)

    def counted_move(self, *args):
        rounds[id(self)] += 1
        return move(self, *args)

    monkeypatch.setattr(BatchInterpreter, "run_node", counted_run)
    monkeypatch.setattr(rows, "windows", counted_windows)
    monkeypatch.setattr(rows.RowFit, "move", counted_move)
    better = fxprune.repair(model, pruned, data, method=("reconstruct", "recalibrate"))
    assert better.meta["repair"].error[1] < 0.8 * better.meta["repair"].error[0]
    assert max(rounds.values()) > 2, "a fit was repeated"
    assert set(runs.values()) <= {0, 1, 2}
    assert sum(gathered.values()) == 3 * 2 * len(data), "three layers, what is fitted and what is held out of each batch"


@pytest.mark.parametrize("streams", [False, True])
def test_numbers_for_each_channel_say_what_a_result_becomes(streams, monkeypatch):
    """The same repair comes of running what is behind each layer in full."""
    model, data = small_net(streams=streams), [torch.randn(40, 3, 9, 9, dtype=DOUBLE)]
    pruned = fxprune.prune(model, 0.5, example_inputs=data[0], criterion="random")
    found, line = [], Path.line
    lines = Counter()

    def noted(*args):
        made = line(*args)
        lines[made is None] += 1
        return made

    for by in (noted, lambda *_: None):
        monkeypatch.setattr(Path, "line", by)
        found.append(fxprune.repair(model, pruned, data, method=("reconstruct", "recalibrate")))
    assert lines[False] >= 4 and bool(lines[True]) == streams
    for a, b in zip(found[0].state_dict().values(), found[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(a, b) for a, b in zip(found[0].state_dict().values(), pruned.state_dict().values(), strict=True))


@pytest.mark.parametrize("bounds", [(0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0)])
def test_residuals_within_bounds_are_those_of_the_path(bounds):
    torch.manual_seed(1)
    slope, offset = 3 * torch.randn(1, 1, 8, dtype=DOUBLE), torch.randn(1, 1, 8, dtype=DOUBLE)
    aim, found = (2 * torch.randn(1, 500, 8, dtype=DOUBLE) for _ in range(2))
    part = Rows(lambda: aim, 0, aim, found, (slope, offset), 0.0)
    wanted, now = aim * slope + offset, found * slope + offset
    expected = (Path(bounds=bounds).beyond(wanted, now) - now) / slope
    part.bound(*bounds)
    torch.testing.assert_close(part.residual(), expected)
    assert 50 < int((expected == 0).sum()) < 3500
