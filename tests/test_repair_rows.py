"""What a layer reads is gathered once, and its result is looked up ahead by numbers where these say all."""

from collections import Counter

import pytest
import torch
from torch import nn

import fxprune
from fxprune.criteria.windows import windows
from fxprune.repairs import rows
from fxprune.repairs.interpreter import BatchInterpreter
from fxprune.repairs.least_squares import NormalEquations
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
    run_node, windows, move = BatchInterpreter.run_node, rows.Windows.__init__, rows.RowFit.move

    def counted_run(self, node):
        runs[id(self), node.name] += node.op == "call_module" and isinstance(self.fetch_attr(node.target), nn.Conv2d)
        return run_node(self, node)

    def counted_windows(self, call, sizes, x):
        gathered[tuple(sizes), x.data_ptr()] += 1
        windows(self, call, sizes, x)

    def counted_move(self, *args):
        rounds[id(self)] += 1
        return move(self, *args)

    monkeypatch.setattr(BatchInterpreter, "run_node", counted_run)
    monkeypatch.setattr(rows.Windows, "__init__", counted_windows)
    monkeypatch.setattr(rows.RowFit, "move", counted_move)
    better = fxprune.repair(model, pruned, data, method=("reconstruct", "recalibrate"))
    assert better.meta["repair"].error[1] < 0.8 * better.meta["repair"].error[0]
    assert max(rounds.values()) > 2, "a fit was repeated"
    assert set(runs.values()) <= {0, 1, 2}
    assert sum(gathered.values()) == 2 * 2 * len(data), (
        "two layers that lost inputs, what is fitted and what is held out of each batch"
    )


class Call(dict):
    """A convolution's settings, by name."""


@pytest.mark.parametrize("sizes", [(5,), (9, 8), (5, 5), (5, 6, 4)], ids=str)
@pytest.mark.parametrize(
    "kernel, padding, dilation", [(3, 0, 1), (3, 1, 1), (1, 0, 1), (1, 1, 1), (2, 1, 2), (3, 4, 1), (2, 0, 1)]
)
def test_images_are_to_least_squares_what_their_windows_are(sizes, kernel, padding, dilation):
    torch.manual_seed(2)
    call = Call(stride=[1], padding=[padding], dilation=[dilation], groups=1)
    kernels = [kernel] * (len(sizes) - 1) + [max(1, kernel - 1)]
    x = torch.randn(5, 3, *sizes, dtype=DOUBLE)
    matrix = rows.Matrix(windows(call, kernels, x))
    images, inputs = rows.Windows(call, kernels, x), matrix.x
    assert rows.Windows.fit(call, kernels, images.places) and images.shape == matrix.shape
    gram = x.new_zeros(1, inputs.shape[2], inputs.shape[2])
    images.add_moments(gram)
    torch.testing.assert_close(gram, inputs.mT @ inputs)
    torch.testing.assert_close(images.sums(), matrix.sums())
    change, shift = torch.randn(1, inputs.shape[2], 4, dtype=DOUBLE), torch.randn(1, 4, dtype=DOUBLE)
    made, wanted = images.times(change, shift), matrix.times(change, shift)
    torch.testing.assert_close(made.flatten(2).mT.reshape(1, -1, 4), wanted)
    torch.testing.assert_close(images.cross(made), matrix.cross(wanted))
    torch.testing.assert_close(images.sums_of(made), matrix.sums_of(wanted))


def test_images_with_a_stride_or_groups_or_few_places_are_windows():
    settings = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    assert rows.Windows.fit(Call(settings), (3, 3), (3, 3))
    for other in ({"stride": [1, 2]}, {"groups": 2}, {"transposed": True}, {"dilation": [2, 1]}):
        assert not rows.Windows.fit(Call({**settings, **other}), (3, 3), (3, 3))


@pytest.mark.parametrize("constant", [False, True])
def test_equations_in_single_precision_are_solved_as_well(constant):
    """But for what single precision does not tell apart; where it has no factor, they are solved in double."""
    torch.manual_seed(3)
    x, left = torch.randn(1, 400, 60, dtype=DOUBLE) * torch.logspace(0, -4, 60) + 3, []
    normal = NormalEquations(constant)
    normal.add(rows.Matrix(x), x @ torch.randn(60, 4, dtype=DOUBLE) + 0.1 * torch.randn(1, 400, 4))
    for normal.is_single in (False, True):
        normal.factors.clear()
        left.append([normal.left(*normal.solve(ridge)) for ridge in (10.0, 0.01, 1e-3)])
        assert normal.factors[0.01][0].dtype == (torch.float32 if normal.is_single else DOUBLE)
    assert left[1] == pytest.approx(left[0], rel=1e-4) and left[0][0] > 2 * left[0][2]
    normal.factors.clear()
    normal.gram = normal.gram - 1e-2 * torch.eye(60, dtype=DOUBLE) * normal.gram.diagonal(dim1=1, dim2=2).mean()
    assert normal.factor(1e-3)[0].dtype == DOUBLE, "no Cholesky factor at all"


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
