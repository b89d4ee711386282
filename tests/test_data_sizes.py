"""Sizes that data make (how many scores pass a threshold) are decided upon anew for each input, not guarded."""

import pytest
import torch
from oracle import plain_masked, relative_error
from torch import nn

import fxprune
from fxprune.passes.ir.data_sizes import DataSizes
from fxprune.passes.ir.op_trace import OpCall, OpTrace, TensorInfo
from fxprune.passes.ir.pytree import TensorRef


class Detects(nn.Module):
    """Returns the best of the scores that pass, at most eight of them, and their places."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.scores = nn.Linear(6, 16), nn.Linear(16, 4)

    def passing(self, x):
        scores = self.scores(self.stem(x).relu()).flatten()
        if self.how == "nonzero":
            places = torch.nonzero(scores > 0).squeeze(1)
            return scores[places], places
        if self.how == "mask":
            return scores[scores > 0], torch.where(scores > 0)[0]
        return torch.masked_select(scores, scores > 0), torch.cat([(scores > 0).nonzero()[:, 0]])

    def forward(self, x):
        kept, places = self.passing(x)
        if kept.numel() == 0:
            return kept, places
        best, order = kept.topk(min(8, kept.shape[0]))
        return best, places[order]


@pytest.mark.parametrize("how", ["nonzero", "mask", "select"])
def test_more_or_less_may_pass(how):
    torch.manual_seed(0)
    model, x = Detects(how).eval(), torch.randn(1, 6)
    with torch.no_grad():
        model.scores.weight.abs_(), model.scores.bias.zero_()
    small = fxprune.prune(model, 0.5, example_inputs=x, verify=True)
    assert small.verification.ok and small.get_parameter("stem.weight").shape == (8, 6)
    reference = plain_masked(model, fxprune.plan_of(small))
    numbers = set()
    for rows in (1, 2, 5):
        for value in (torch.randn(rows, 6), torch.rand(rows, 6) - 9.0):  # no two scores are equal
            wanted, got = reference(value), small(value)
            numbers.add(len(got[0]))
            assert len(wanted[0]) == len(got[0]) and (not len(got[0]) or relative_error(wanted, got) < 1e-5)
    assert len(numbers) > 1
    with torch.no_grad():
        small.get_parameter("scores.bias").fill_(-1e9), model.scores.bias.fill_(-1e9)
    assert len(small(x)[0]) == len(model(x)[0]) == 0


class Splits(nn.Module):
    """One result for each image, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return [row[row > 0] if len(row[row > 0]) < 99 else row for row in y]


def test_a_list_may_be_longer_for_other_batches():
    torch.manual_seed(0)
    model = Splits().eval()
    small = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 6), verify=True)
    assert small.verification.compared == ("the example inputs", "another batch")
    reference, x = plain_masked(model, fxprune.plan_of(small)), torch.randn(5, 6)
    for wanted, got in zip(reference(x), small(x), strict=True):
        torch.testing.assert_close(wanted, got)


def test_sizes_of_images_are_not_made_by_data():
    """A program that compares them is still captured, and guarded."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x):
            y = self.b(self.a(x).relu()) if x.shape[0] < 9 else x
            y = y * (y > 0)
            return y[torch.tensor([True, False, True])[: y.shape[0]]] if y.shape[1] == 4 else y

    small = fxprune.prune(Asks().eval(), 0.5, example_inputs=torch.randn(3, 6))
    assert small.meta["capture"] == "symbolic"


def trace_of(*shapes, **dtypes) -> OpTrace:
    return OpTrace([TensorInfo(s, dtypes.get(f"v{i}", torch.float32), i == 0) for i, s in enumerate(shapes)])


def test_which_dimensions_data_make():
    """A mask picks three of five rows of four; they are joined with two others, and flattened."""
    aten, refs = torch.ops.aten, [TensorRef(i) for i in range(6)]
    trace = trace_of((5, 4), (5,), (3, 4), (2, 4), (5, 4), (20,), v1=torch.bool)
    trace.values[1].from_input = True
    sizes = DataSizes(trace)
    trace.ops.append(OpCall(aten.index.Tensor, (refs[0], [refs[1]]), {}, refs[2], 0))
    sizes.update()
    assert sizes.dims == {2: {0}}
    trace.ops += [
        OpCall(aten.cat.default, ([refs[2], refs[3]], 0), {}, refs[4], 1),
        OpCall(aten.view.default, (refs[4], [20]), {}, refs[5], 2),
    ]
    sizes.update()
    assert sizes.dims == {2: {0}, 4: {0}, 5: {0}}
    del trace.ops[1:]  # an attempt that was given up
    sizes.update()
    assert sizes.dims == {2: {0}}
