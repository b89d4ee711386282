"""The algebra of sizes: what each number in a graph becomes, held against the sizes of the pruned program."""

import operator
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from fxprune.passes.ir.labels import along
from fxprune.passes.ir.op_trace import OpTrace, TensorInfo
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.rewrite.graph_editor import GraphEditor
from fxprune.passes.rewrite.size_expressions import PrunedShapes, SizeExpressions

BATCH, CHANNELS, KEPT = 4, 12, 9


class Sizes:
    """A graph with one input of shape (batch, channels), nine of whose twelve channels stay."""

    def __init__(self) -> None:
        self.graph, self.results = fx.Graph(), {}
        trace = OpTrace([TensorInfo((BATCH, CHANNELS), torch.float32, True)])
        kept = torch.arange(CHANNELS + 1) <= KEPT
        shapes = PrunedShapes(trace, {0: (along(torch.arange(1, CHANNELS + 1), 1, 2),)}, Slicer(kept))
        self.x = self.graph.placeholder("x")
        self.ref = self.results[self.x] = TensorRef(0)
        self.end = self.graph.output(())
        editor = GraphEditor(self.graph, {})
        self.graph.inserting_before(self.end)
        self.sizes = SizeExpressions(SimpleNamespace(results=self.results), shapes, lambda ref, dim: dim == 1, editor)

    def read(self, dim: int) -> fx.Node:
        return self.put(self.graph.call_method("size", (self.x, dim)), (BATCH, CHANNELS)[dim])

    def compute(self, op, *args) -> fx.Node:
        values = [self.results[a] if isinstance(a, fx.Node) else a for a in args]
        return self.put(self.graph.call_function(op, args), op(*values))

    def put(self, node: fx.Node, value) -> fx.Node:
        self.results[node] = value
        return node

    def run(self, number, batch: int):
        """What an argument of the rewritten graph comes to for a batch of another size."""
        self.end.args = (number,)
        self.graph.lint()
        return fx.GraphModule(torch.nn.Module(), self.graph)(torch.zeros(batch, KEPT))


@pytest.fixture
def sizes() -> Sizes:
    return Sizes()


def test_what_numbers_come_to_in_the_pruned_program(sizes):
    batch, channels = sizes.read(0), sizes.read(1)
    product = sizes.compute(operator.mul, batch, channels)
    assert [sizes.sizes.value(n) for n in (batch, channels, product, 7)] == [BATCH, KEPT, BATCH * KEPT, 7]
    assert [sizes.sizes.is_symbolic(n) for n in (batch, channels, product, 7)] == [True, False, True, False]
    assert [sizes.sizes.is_changed(n) for n in (batch, channels, product, 7)] == [False, True, True, False]


def test_literals_become_what_is_wanted(sizes):
    assert [sizes.sizes.size(given, 9) for given in (12, -1, True)] == [9, -1, True]


def test_what_comes_right_by_itself_stays(sizes):
    channels = sizes.read(1)
    assert sizes.sizes.size(channels, KEPT) is channels


def test_a_channel_count_that_must_be_another_becomes_a_literal(sizes):
    assert sizes.sizes.size(sizes.read(1), 6) == 6


@pytest.mark.parametrize("wanted", [KEPT, 6, 12])
def test_an_expression_over_the_batch_is_rescaled(sizes, wanted):
    """b * 12 with `wanted` of twelve heads left is b * wanted, whatever the batch."""
    given = sizes.compute(operator.mul, sizes.read(0), 12)
    new = sizes.sizes.size(given, BATCH * wanted)
    assert [sizes.run(new, batch) for batch in (1, 4, 7)] == [wanted, 4 * wanted, 7 * wanted]


def test_an_expression_over_batch_and_channels_is_rescaled_from_its_original(sizes):
    """b * c // 3 where 8 = 2/3 of 12 entries are wanted: the channels count as the twelve that they were."""
    given = sizes.compute(operator.floordiv, sizes.compute(operator.mul, sizes.read(0), sizes.read(1)), 3)
    new = sizes.sizes.size(given, BATCH * 2)
    assert [sizes.run(new, batch) for batch in (1, 2, 5)] == [2, 4, 10]


def test_what_is_right_by_accident_is_not_taken_for_it(sizes):
    """c // 12 * b // 4 * 0 + ... : an expression over channels that happens to be right is written out."""
    given = sizes.compute(operator.floordiv, sizes.compute(operator.add, sizes.read(1), 6), 9)  # 2 before, 1 after
    assert sizes.sizes.size(given, 1) == 1


def test_numbers_that_are_no_sizes_keep_their_original_value(sizes):
    scale = sizes.compute(operator.pow, sizes.read(1), -0.5)
    assert sizes.sizes.original(scale) == 12**-0.5
    mixed = sizes.compute(operator.truediv, sizes.read(1), sizes.read(0))
    assert [sizes.run(sizes.sizes.original(mixed), batch) for batch in (1, 2, 4)] == [12.0, 6.0, 3.0]


def test_a_size_is_rescaled_once(sizes):
    given = sizes.compute(operator.mul, sizes.read(0), 12)
    assert sizes.sizes.size(given, BATCH * 6) is sizes.sizes.size(given, BATCH * 6)
